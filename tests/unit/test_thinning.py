"""--max-overhead: fewer connections where a run costs too much, and more again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import cast

import click
import pytest

from tcplat_core import Event, Sampled
from tcplat_core.cli.shared_options import Percent
from tcplat_core.deliver.fast.records import reorder_buffer
from tcplat_core.deliver.router import Router
from tcplat_core.deliver.sequencer import Sequencer
from tcplat_core.event.clock import kernel_ns
from tcplat_core.loader.protocol import Request
from tcplat_core.plugin.hookpoints import HookPoint, tracepoint
from tcplat_core.plugin.sampling import MOST, Shares
from tcplat_core.plugin.specs import Chosen, ProbeSpec
from tcplat_core.run.loader_process import LoaderProcess
from tcplat_core.run.session import Session
from tcplat_core.run.thinning import Budget, Thinner
from tcplat_core.testing import FakeLoader, FakeProbe, RecordingSink, make_event

LIMIT = 0.02


def costs(
    budget: Budget, load: Callable[[int], float], floor: float, count: int
) -> Iterator[float]:
    """Yield the costs of so many intervals: a floor, and a part that the share scales."""
    for second in range(count):
        cost = floor + load(second) * 2.0**-budget.halvings
        budget.decide(cost)
        yield cost


def test_cheap_run_is_never_thinned() -> None:
    budget = Budget(LIMIT, 20)
    assert all(cost < LIMIT for cost in costs(budget, lambda _: 0.015, 0.001, 100))
    assert budget.halvings == 0


@pytest.mark.parametrize("load", [0.03, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("floor", [0.0, 0.005, 0.012])
def test_expensive_run_is_below_the_limit_after_a_few_seconds(load: float, floor: float) -> None:
    budget = Budget(LIMIT, 20)
    spent = list(costs(budget, lambda _: load, floor, 120))
    assert all(cost <= LIMIT for cost in spent[10:20])
    # It does not give up more than it must ...
    assert floor + load * 2.0 ** -(budget.halvings - 1) > LIMIT * 0.85
    # ... and seldom tries for more.
    assert sum(cost > LIMIT for cost in spent[10:]) <= 8


def test_connections_come_back_when_the_load_falls() -> None:
    budget = Budget(LIMIT, 20)
    list(costs(budget, lambda second: 0.3 if second < 30 else 0.004, 0.002, 120))
    assert budget.halvings == 0


def test_steady_load_near_the_limit_does_not_flap() -> None:
    budget = Budget(LIMIT, 20)
    seen = []
    for cost in costs(budget, lambda second: 0.03 + 0.002 * (second % 3), 0.0, 300):
        del cost
        seen.append(budget.halvings)
    changes = sum(a != b for a, b in pairwise(seen))
    assert changes <= 20


def test_thinning_that_saves_nothing_ends_and_is_noted() -> None:
    budget = Budget(LIMIT, 20)
    list(costs(budget, lambda _: 0.04, 0.03, 60))
    assert budget.futile
    assert 3 <= budget.halvings <= 9
    # What it cost is forgotten once it is affordable.
    list(costs(budget, lambda _: 0.001, 0.001, 300))
    assert budget.halvings == 0
    assert not budget.futile


def test_backlog_that_is_read_meanwhile_does_not_end_thinning() -> None:
    budget, backlog = Budget(LIMIT, 20), [0.0, 0.0, 0.18, 0.18, 0.1]
    for second in range(40):
        left = backlog[second] if second < len(backlog) else 0.0
        budget.decide(0.001 + left + 0.2 * 2.0**-budget.halvings)
    assert not budget.futile
    assert 0.001 + 0.2 * 2.0**-budget.halvings <= LIMIT


def test_useless_halvings_are_tried_again_after_a_while() -> None:
    budget = Budget(LIMIT, 20)
    list(costs(budget, lambda _: 0.04, 0.03, 60))
    before = budget.halvings
    # The floor was another program's: it is gone, and a smaller share saves again.
    list(costs(budget, lambda _: 40.0, 0.001, 60))
    assert budget.halvings > before
    assert not budget.futile


def test_share_is_never_smaller_than_can_be_asked_for() -> None:
    budget = Budget(LIMIT, 3)
    list(costs(budget, lambda _: 100.0, 0.0, 60))
    assert budget.halvings == 3
    assert budget.futile


# --- the word that the programs read


@pytest.fixture
def share_fd() -> Iterator[int]:
    fd = os.memfd_create("tcplat-fake")
    os.ftruncate(fd, 4096)
    yield fd
    os.close(fd)


def one_in(share_fd: int, base: int, ts_ns: int) -> int:
    """Return what tcplat_one_in() of sample.bpf.h does."""
    word = int.from_bytes(os.pread(share_fd, 8, 0), sys.byteorder)
    return base << ((word >> 5 if ts_ns < word >> 10 << 10 else word) & 31)


def test_programs_and_stream_change_at_the_same_instant(share_fd: int) -> None:
    spent = iter([0.1, 0.1, 0.001, 0.001, 0.001, 0.001, 0.001, 0.001])
    thinner = Thinner(share_fd, 4, LIMIT, lambda: next(spent), lambda _: None)
    assert one_in(share_fd, 4, kernel_ns()) == 4
    before, known = kernel_ns(), 4
    changes = 0
    for _ in range(8):
        share = thinner.check()
        if share is None:
            continue
        changes += 1
        assert share.since_ns > before
        assert one_in(share_fd, 4, share.since_ns - 1) == known
        assert one_in(share_fd, 4, share.since_ns) == share.one_in
        before, known = share.since_ns, share.one_in
    assert changes >= 2
    thinner.close()


_READ = """
import mmap, sys
word = memoryview(mmap.mmap(int(sys.argv[1]), 4096))[:8].cast("Q")
print(flush=True)
seen = set()
while (one := word[0]) != 1:
    seen.add(one)
for one in seen:
    print(one >> 10 << 10)
"""


def test_program_that_reads_during_a_change_has_one_share_or_the_other(share_fd: int) -> None:
    written = {1024}
    os.pwrite(share_fd, (1024).to_bytes(8, sys.byteorder), 0)
    command = [sys.executable, "-c", _READ, str(share_fd)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, pass_fds=[share_fd]
    ) as reader:
        assert reader.stdout is not None
        reader.stdout.readline()
        while len(written) < 20_000:
            thinner = Thinner(share_fd, 4, LIMIT, lambda: 0.1, lambda _: None)
            for _ in range(10):
                share = thinner.check()
                written |= {share.since_ns} if share else set()
            thinner.close()
        os.pwrite(share_fd, (1).to_bytes(8, sys.byteorder), 0)
        seen = {int(line) for line in reader.stdout}
    # Where both share a CPU, one or two in each of the reader's turns.
    assert len(seen) > 10
    assert seen <= written


def test_user_is_told_once_that_thinning_does_not_help(share_fd: int) -> None:
    said: list[str] = []
    thinner = Thinner(share_fd, MOST // 2, LIMIT, lambda: 0.5, said.append)
    for _ in range(20):
        thinner.check()
    assert len(said) == 1
    assert "more than --max-overhead 2.0%" in said[0]
    thinner.close()


@pytest.mark.parametrize(("text", "part"), [("2%", 0.02), ("0.5%", 0.005), ("100%", 1.0)])
def test_limit_is_written_in_percent(text: str, part: float) -> None:
    assert Percent().convert(text, None, None) == pytest.approx(part)


@pytest.mark.parametrize("text", ["2", "0%", "101%", "-1%", "%", "2 %", "x%"])
def test_other_limits_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a percentage"):
        Percent().convert(text, None, None)


# --- a run


def test_run_that_costs_too_much_has_fewer_connections_from_an_instant_on() -> None:
    """The session's own CPU time is a cost: next to no limit is kept by no session."""
    points = (HookPoint("send", (tracepoint("tcp:tcp_sendmsg_locked", "tp_send"),)),)
    probe = FakeProbe(ProbeSpec(name="one", summary="s", source="", points=points))
    sink = RecordingSink()
    session = Session(
        loader=cast("LoaderProcess", FakeLoader([probe])),
        probes=[Chosen(probe.spec, {})],
        sinks={"it": sink},
        request=Request(probes=(), ring_bytes=probe.ring_bytes, sample=4, max_overhead=1e-9),
        duration_s=2.5,
        say=lambda _: None,
    )
    before = kernel_ns()
    report = session.run()
    probe.close()
    first, *later = [one for one in sink.stream if isinstance(one, Sampled)]
    assert first == Sampled(4)
    assert later
    assert all(share.one_in > 4 and share.since_ns > before for share in later)
    assert report.one_in == (4, later[-1].one_in)


# --- the stream


def test_share_has_its_place_among_the_rows() -> None:
    sink = RecordingSink()
    router = Router({"it": sink})
    buffer = reorder_buffer([])
    sequencer = Sequencer(router, buffer)
    rows = [make_event(ts_ns=ts_ns) for ts_ns in (10, 19, 20, 30)]
    buffer.feed(list(rows))
    shares = [Sampled(2, since_ns=20), Sampled(4, since_ns=25)]
    for share in shares:
        sequencer.share(share)
    assert sequencer.waiting
    sequencer.flush(20)
    assert [row.ts_ns for row in sink.rows] == [10, 19]
    sequencer.flush()
    stream = [one.ts_ns if isinstance(one, Event) else one for one in sink.stream]
    assert stream == [10, 19, shares[0], 20, shares[1], 30]
    buffer.close()


@pytest.mark.parametrize(
    ("began_ns", "ended_ns", "weight"),
    [(5, 9, 1), (5, 10, 4), (12, 15, 4), (12, 25, 4), (25, 30, 2), (35, 40, 1), (5, 40, 4)],
)
def test_request_stands_for_as_many_as_the_smallest_share_it_was_in(
    began_ns: int, ended_ns: int, weight: int
) -> None:
    shares = Shares()
    for since_ns, share in ((10, 4), (20, 2), (31, 1)):
        shares.add(Sampled(share, since_ns))
    assert shares.weight(began_ns, ended_ns) == weight
    assert shares.one_in == (1, 4)
