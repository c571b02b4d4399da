"""Stages add up, whichever instants are known."""

from __future__ import annotations

import itertools
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from tcplat_stages.chain import (
    CONNECT_MILESTONES,
    CONNECT_STAGES,
    MILESTONES,
    NOTHING,
    STAGES,
    split,
)

STAMPS = st.lists(
    st.one_of(st.none(), st.integers(0, 50), st.integers(0, 2**62)), min_size=12, max_size=12
)


def test_stages_lie_between_milestones() -> None:
    assert len(MILESTONES) == len(STAGES) + 1
    assert len(CONNECT_MILESTONES) == len(CONNECT_STAGES) + 1
    assert len({*STAGES, *CONNECT_STAGES}) == len(STAGES) + len(CONNECT_STAGES)


@given(STAMPS)
def test_stages_add_up_and_are_never_negative(stamps: list[int | None]) -> None:
    whole = split(stamps)
    assert sum(ns for _, ns in whole.stages) + whole.unexplained_ns == whole.total_ns
    assert all(ns >= 0 for _, ns in whole.stages)
    assert whole.unexplained_ns >= 0
    named = [stage for name, _ in whole.stages for stage in name.split("+")]
    # Each once, in order, without a gap.
    assert not named or named == list(STAGES[STAGES.index(named[0]) :][: len(named)])


@given(STAMPS)
def test_fewest_possible_instants_are_left_out(stamps: list[int | None]) -> None:
    known = [(number, at) for number, at in enumerate(stamps) if at is not None]
    whole = split(stamps)
    if len(known) < 2:
        assert whole == NOTHING
        return
    kept = [(number, at) for number, at in known if number not in whole.left_out]
    times = [at for _, at in kept]
    assert times == sorted(times)
    first, last = known[0], known[-1]
    if first[1] > last[1]:
        return
    assert (kept[0], kept[-1]) == (first, last)
    inner = [item for item in known[1:-1] if first[1] <= item[1] <= last[1]]
    most = next(
        count
        for count in range(len(inner), -1, -1)
        if any(
            all(a[1] <= b[1] for a, b in itertools.pairwise(chosen))
            for chosen in itertools.combinations(inner, count)
        )
    )
    assert len(kept) == most + 2


def test_stages_with_an_unknown_boundary_are_merged() -> None:
    stamps: list[int | None] = [0, 10, None, None, 40, 50, 60, None, None, None, None, 110]
    assert split(stamps).stages == (
        ("client_send", 10),
        ("wire+softirq+tcp", 30),
        ("queue", 10),
        ("server", 10),
        ("server_send+wire_back+softirq_back+tcp_back+queue_back", 50),
    )


def test_total_is_unexplained_where_only_its_ends_are_known() -> None:
    whole = split([5, *[None] * 10, 100])
    assert (whole.stages, whole.total_ns, whole.unexplained_ns) == ((), 95, 95)


def test_late_xdp_instant_of_loopback_is_kept() -> None:
    whole = split([0, 10, 25, 20, 30, 40, *[None] * 6])
    assert whole.left_out == (3,)
    assert whole.stages[2] == ("softirq+tcp", 5)


def test_readme_names_every_stage() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for name in (*STAGES, *CONNECT_STAGES, "unexplained"):
        assert f"`{name}`" in readme, name
