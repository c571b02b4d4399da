"""tcplat diff: what changed is found, and what did not change is not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tcplat_report.commands import diff
from tcplat_report.diff import Change, Condition, Quantiles, Sample, changes

from tcplat_core.errors import UsageError

from .captures import STAGES_US, Traffic, joint, write

STAGE = ((), "queue")


def sample(values: Sequence[float]) -> Sample:
    made = Sample()
    for value in values:
        made.add(round(value))
    return made


def lognormal(seed: int, count: int = 2000, factor: float = 1.0) -> list[float]:
    chance = Random(seed)  # noqa: S311 - made-up traffic
    return [factor * 30_000 * chance.lognormvariate(0, 0.5) for _ in range(count)]


def in_bursts(seed: int, count: int = 2000) -> list[float]:
    """Half of the time all is slow; slow and fast times last 50 requests, on average."""
    chance = Random(seed)  # noqa: S311 - made-up traffic
    values, slow = [], False
    for _ in range(count):
        slow ^= chance.random() < 1 / 50
        values.append((60_000 if slow else 20_000) * chance.lognormvariate(0, 0.1))
    return values


def compared(base: Sample, new: Sample, seed: int = 1) -> dict[str, Change]:
    return {one.percentile: one for one in changes({STAGE: base}, {STAGE: new}, seed)}


def test_of_a_hundred_pairs_alike_few_differ() -> None:
    wrong = 0
    for seed in range(100):
        found = compared(sample(lognormal(2 * seed)), sample(lognormal(2 * seed + 1)), seed)
        wrong += any(one.certain for one in found.values())
    assert wrong <= 5


def test_bursts_do_not_pass_for_a_change() -> None:
    wrong = 0
    for seed in range(60):
        found = compared(sample(in_bursts(2 * seed)), sample(in_bursts(2 * seed + 1)), seed)
        wrong += any(one.certain for one in found.values())
    assert wrong <= 3


def test_the_interval_has_the_truth_in_it_and_is_no_wider_than_it_must() -> None:
    truth = 0.3
    hits, widths = 0, []
    for seed in range(60):
        base, new = sample(lognormal(2 * seed)), sample(lognormal(2 * seed + 1, factor=1 + truth))
        interval = compared(base, new, seed)["p50"].interval
        assert interval
        hits += interval[0] <= truth <= interval[1]
        widths.append(interval[1] - interval[0])
    assert hits >= 57
    # Two medians of 2,000 each: 1.253 * 0.5 / sqrt(2000) * sqrt(2) * 1.3 = 2.6 %; 99 % are ± 2.58.
    assert sum(widths) / len(widths) < 2 * 2.58 * 0.026 * 1.25


def test_a_percentile_is_the_histograms() -> None:
    made = sample(lognormal(1))
    quantiles = Quantiles(made)
    for share in (0.5, 0.9, 0.99):
        assert quantiles.value(share) == made.whole().percentile(share * 100)
    assert made.whole().count == 2000
    assert 1 < len(made.blocks) <= 64


def test_from_nothing_to_something_is_more_than_any_limit() -> None:
    base, new = Sample(), Sample()
    for ns in range(2000):
        base.add(0)
        new.add(5_000_000 + ns)
    found = changes({((), "queue"): base}, {((), "queue"): new}, 1)
    (median,) = [change for change in found if change.percentile == "p50"]
    assert Condition.parse("queue.p50:+900%").met_by(median)
    assert Condition.parse("queue.p50:+4ms").met_by(median)
    assert not Condition.parse("queue.p50:+6ms").met_by(median)


def test_the_same_seed_gives_the_same_figures() -> None:
    base, new = sample(lognormal(1)), sample(lognormal(2))
    assert compared(base, new) == compared(base, new)
    assert compared(base, new) != compared(base, new, seed=2)


@pytest.fixture(scope="module")
def captures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("captures")
    made = {
        "base": Traffic(connections=100, seed=1),
        "same": Traffic(connections=100, seed=2),
        "slow": Traffic(connections=100, seed=3, factors={"queue": 1.3}),
        "few": Traffic(connections=5, seed=4, factors={"queue": 3}),
        "merged": Traffic(connections=100, seed=5, without=frozenset({"1/ready"})),
    }
    return {name: write(folder / name, joint(traffic)) for name, traffic in made.items()}


def ran(captures: dict[str, Path], base: str, new: str, *arguments: str) -> Result:
    paths = (str(captures[base]), str(captures[new]))
    return CliRunner().invoke(diff, [*paths, *arguments], catch_exceptions=False)


def lines(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_what_was_planted_is_found_and_only_there(captures: dict[str, Path]) -> None:
    limits = [word for stage in STAGES_US for word in ("--fail-on", f"{stage}.p50:+10%")]
    result = ran(captures, "base", "slow", "--format", "json", *limits)
    assert result.exit_code == 1
    found = lines(result)
    assert [one["failed"] for one in found if one["failed"]] == [["queue.p50:+10%"]]
    queue = next(one for one in found if (one["stage"], one["percentile"]) == ("queue", "p50"))
    assert queue["base_count"] == queue["new_count"] == 1000
    assert queue["interval"][0] <= 0.3 <= queue["interval"][1]
    assert queue["certain"]
    assert {one["stage"] for one in found} == {"connect", *STAGES_US, "total"}


def test_nothing_fails_where_nothing_changed(captures: dict[str, Path]) -> None:
    limits = [word for stage in STAGES_US for word in ("--fail-on", f"{stage}.p99:+10%")]
    result = ran(captures, "base", "same", *limits)
    assert result.exit_code == 0
    assert result.stderr.count("not met") == len(STAGES_US)


def test_an_improvement_can_be_asked_for_too(captures: dict[str, Path]) -> None:
    assert ran(captures, "slow", "base", "--fail-on", "queue.p50:-10%").exit_code == 1
    assert ran(captures, "base", "slow", "--fail-on", "queue.p50:-10%").exit_code == 0


def test_a_limit_can_be_a_time(captures: dict[str, Path]) -> None:
    assert ran(captures, "base", "slow", "--fail-on", "queue.p50:+5us").exit_code == 1
    assert ran(captures, "base", "slow", "--fail-on", "queue.p50:+1ms").exit_code == 0


def test_too_little_data_is_said_and_does_not_fail(captures: dict[str, Path]) -> None:
    result = ran(captures, "base", "few", "--fail-on", "queue.p99:+10%")
    assert result.exit_code == 0
    assert "too little data to judge: 50 in NEW; it takes 100" in result.stderr
    assert ran(captures, "base", "few", "--fail-on", "queue.p50:+10%").exit_code == 1


def test_a_stage_that_is_one_with_another_is_not_judged(captures: dict[str, Path]) -> None:
    result = ran(captures, "merged", "merged", "--fail-on", "queue.p50:+10%")
    assert result.exit_code == 0
    assert "no queue by itself; it is part of tcp+queue" in result.stderr


def test_groups_are_compared_each_by_itself(captures: dict[str, Path]) -> None:
    result = ran(captures, "base", "slow", "--group-by", "process+port", "--format", "json")
    assert {(one["process"], one["port"], one["remote"]) for one in lines(result)} == {
        ("curl", 80, None)
    }


def test_the_table_has_a_line_for_each(captures: dict[str, Path]) -> None:
    text = ran(captures, "base", "slow").stdout.splitlines()
    assert text[0].split()[:2] == ["STAGE", "COUNT"]
    assert len(text) == 1 + 3 * (2 + len(STAGES_US))


@pytest.mark.parametrize(
    "text",
    [
        "queue.p99",
        "queue:+10%",
        "queue.p98:+10%",
        "cue.p99:+10%",
        "queue.p99:10%",
        "queue.p99:+ten%",
        "queue.p99:+10",
        "queue.p99:+10%x",
    ],
)
def test_bad_conditions_are_said(text: str) -> None:
    with pytest.raises(UsageError, match="--fail-on"):
        Condition.parse(text)


def test_an_unknown_group_is_said(captures: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="none of process, remote, port, none"):
        ran(captures, "base", "same", "--group-by", "colour")
