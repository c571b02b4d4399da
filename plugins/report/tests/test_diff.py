"""tcplat diff: changes are found, and noise is not reported."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tcplat_report.changes import Change, changes
from tcplat_report.commands import diff
from tcplat_report.condition import Condition
from tcplat_report.sample import Quantiles, Sample
from tcplat_report.shares import _share

from tcplat_core.errors import UsageError

from .captures import STAGES_US, Traffic, joint, write

pytestmark = pytest.mark.slow

STAGE = ((), "queue")
LONG = os.environ.get("TCPLAT_LONG") == "1"


def sample(values: Sequence[float]) -> Sample:
    made = Sample()
    for value in values:
        made.add(round(value))
    return made


def lognormal(seed: int, count: int = 2000, factor: float = 1.0) -> list[float]:
    chance = Random(seed)  # noqa: S311 - made-up traffic
    return [factor * 30_000 * chance.lognormvariate(0, 0.5) for _ in range(count)]


def in_bursts(seed: int, count: int = 2000) -> list[float]:
    """Half of the requests are slow; slow and fast bursts last 50 requests, on average."""
    chance = Random(seed)  # noqa: S311 - made-up traffic
    values, slow = [], False
    for _ in range(count):
        slow ^= chance.random() < 1 / 50
        values.append((60_000 if slow else 20_000) * chance.lognormvariate(0, 0.1))
    return values


def compared(base: Sample, new: Sample, seed: int = 1) -> dict[str, Change]:
    return {one.percentile: one for one in changes({STAGE: base}, {STAGE: new}, seed)}


def test_at_most_5_of_100_identical_pairs_differ() -> None:
    wrong, pairs = 0, 100 if LONG else 40
    for seed in range(pairs):
        found = compared(sample(lognormal(2 * seed)), sample(lognormal(2 * seed + 1)), seed)
        wrong += any(one.certain for one in found.values())
    assert wrong <= pairs * 5 / 100


def test_bursts_are_not_reported_as_a_change() -> None:
    wrong = 0
    for seed in range(60):
        found = compared(sample(in_bursts(2 * seed)), sample(in_bursts(2 * seed + 1)), seed)
        wrong += any(one.certain for one in found.values())
    assert wrong <= 3


def test_confidence_interval_covers_the_truth_and_is_narrow() -> None:
    truth = 0.3
    hits, widths, pairs = 0, [], 60 if LONG else 24
    for seed in range(pairs):
        base, new = sample(lognormal(2 * seed)), sample(lognormal(2 * seed + 1, factor=1 + truth))
        interval = compared(base, new, seed)["p50"].interval
        assert interval
        hits += interval[0] <= truth <= interval[1]
        widths.append(interval[1] - interval[0])
    assert hits >= pairs * 57 / 60
    # Two medians of 2,000 each: 1.253 * 0.5 / sqrt(2000) * sqrt(2) * 1.3 = 2.6 %; 99 % are ± 2.58.
    assert sum(widths) / len(widths) < 2 * 2.58 * 0.026 * 1.25


def test_percentile_agrees_with_the_histogram() -> None:
    made = sample(lognormal(1))
    quantiles = Quantiles(made)
    for share in (0.5, 0.9, 0.99):
        assert quantiles.value(share) == made.whole().percentile(share * 100)
    assert made.whole().count == 2000
    assert 1 < len(made.blocks) <= 64


def test_growth_from_zero_exceeds_any_relative_limit() -> None:
    base, new = Sample(), Sample()
    for ns in range(2000):
        base.add(0)
        new.add(5_000_000 + ns)
    found = changes({((), "queue"): base}, {((), "queue"): new}, 1)
    (median,) = [change for change in found if change.percentile == "p50"]
    assert Condition.parse("queue.p50:+900%").met_by(median)
    assert Condition.parse("queue.p50:+4ms").met_by(median)
    assert not Condition.parse("queue.p50:+6ms").met_by(median)


def test_same_seed_gives_the_same_figures() -> None:
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


def test_planted_slowdown_is_found_in_its_stage_alone(captures: dict[str, Path]) -> None:
    limits = [word for stage in STAGES_US for word in ("--fail-on", f"{stage}.p50:+10%")]
    result = ran(captures, "base", "slow", "--format", "json", *limits)
    assert result.exit_code == 1
    found = lines(result)
    assert [one["failed"] for one in found if one["failed"]] == [["queue.p50:+10%"]]
    queue = next(one for one in found if (one["stage"], one["percentile"]) == ("queue", "p50"))
    assert queue["base_count"] == queue["new_count"] == 1000
    assert queue["interval"][0] <= 0.3 <= queue["interval"][1]
    assert queue["certain"]
    assert {one["stage"] for one in found} == {"connect", *STAGES_US, "total", "unanswered"}


def test_identical_captures_fail_no_condition(captures: dict[str, Path]) -> None:
    limits = [word for stage in STAGES_US for word in ("--fail-on", f"{stage}.p99:+10%")]
    result = ran(captures, "base", "same", *limits)
    assert result.exit_code == 0
    assert result.stderr.count("not met") == len(STAGES_US)


def test_negative_limit_fails_on_an_improvement(captures: dict[str, Path]) -> None:
    assert ran(captures, "slow", "base", "--fail-on", "queue.p50:-10%").exit_code == 1
    assert ran(captures, "base", "slow", "--fail-on", "queue.p50:-10%").exit_code == 0


def test_limit_may_be_a_duration(captures: dict[str, Path]) -> None:
    assert ran(captures, "base", "slow", "--fail-on", "queue.p50:+5us").exit_code == 1
    assert ran(captures, "base", "slow", "--fail-on", "queue.p50:+1ms").exit_code == 0


def test_too_little_data_is_reported_and_does_not_fail(captures: dict[str, Path]) -> None:
    result = ran(captures, "base", "few", "--fail-on", "queue.p99:+10%")
    assert result.exit_code == 0
    assert "not judged, so it passes: too little data: 50 in NEW; it takes 100" in result.stderr
    assert ran(captures, "base", "few", "--fail-on", "queue.p50:+10%").exit_code == 1


def test_merged_stage_is_not_judged(captures: dict[str, Path]) -> None:
    result = ran(captures, "merged", "merged", "--fail-on", "queue.p50:+10%")
    assert result.exit_code == 0
    assert "no queue by itself; it is part of tcp+queue" in result.stderr


def test_groups_are_compared_separately(captures: dict[str, Path]) -> None:
    result = ran(captures, "base", "slow", "--group-by", "process+port", "--format", "json")
    assert {(one["process"], one["port"], one["remote"]) for one in lines(result)} == {
        ("curl", 80, None)
    }


def test_table_has_a_line_for_each_stage_and_percentile(captures: dict[str, Path]) -> None:
    text = ran(captures, "base", "slow").stdout.splitlines()
    assert text[0].split()[:2] == ["STAGE", "COUNT"]
    assert len(text) == 1 + 3 * (2 + len(STAGES_US)) + 1
    assert text[-1].split()[:4] == ["unanswered", "0/0", "0.00%", "0.00%"]


@pytest.fixture(scope="module")
def hung(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hung")
    made = {
        "none": Traffic(connections=40, seed=1),
        "none, longer": Traffic(connections=120, seed=2),
        "two": Traffic(connections=40, seed=3, hung={5: 2_000_000, 9: 2_000_000}),
        "six, longer": Traffic(
            connections=120, seed=4, hung=dict.fromkeys(range(0, 120, 20), 2_000_000)
        ),
        "many": Traffic(connections=40, seed=5, hung=dict.fromkeys(range(40), 2_000_000)),
        "three, shorter": Traffic(
            connections=30, seed=6, hung=dict.fromkeys((3, 13, 23), 2_000_000)
        ),
        "all of them": Traffic(
            connections=30, seed=6, exchanges=0, hung=dict.fromkeys(range(30), 2_000_000)
        ),
        "more of them": Traffic(
            connections=60, seed=7, exchanges=0, hung=dict.fromkeys(range(60), 2_000_000)
        ),
        "just now": Traffic(connections=1, seed=8, exchanges=30, hung={0: 3_000}, closes=False),
    }
    return {name: write(folder / name, joint(traffic)) for name, traffic in made.items()}


@pytest.mark.parametrize(
    ("base", "new", "limit", "fails"),
    [
        ("none", "none", "+0", False),
        ("none", "two", "+0", True),
        ("none", "two", "+1", True),
        ("none", "two", "+2", False),
        ("two", "none", "+0", False),
        ("two", "two", "+0", False),
        # As many of a hundred, in a capture three times as long.
        ("two", "six, longer", "+0", False),
        ("six, longer", "three, shorter", "+0", False),
        ("two", "three, shorter", "+0", True),
        ("none, longer", "two", "+0", True),
        ("none", "many", "+2%", True),
        ("none", "many", "+50%", False),
        ("none", "two", "+1%", False),
        # No request of the new one was answered; the base shows that the service sends replies.
        ("none", "all of them", "+0", True),
        # A service that never sends a byte, as syslog: not a fault, however many.
        ("all of them", "more of them", "+0", False),
        ("none", "just now", "+0", False),
    ],
)
def test_more_requests_without_a_reply_fail(
    hung: dict[str, Path],
    base: str,
    new: str,
    limit: str,
    fails: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    result = ran(hung, base, new, "--fail-on", f"unanswered:{limit}")
    assert result.exit_code == int(fails), result.stderr


def test_counts_of_different_shares_are_not_compared(hung: dict[str, Path], tmp_path: Path) -> None:
    traffic = Traffic(connections=40, seed=5, hung=dict.fromkeys(range(40), 2_000_000))
    captures = {**hung, "sampled": write(tmp_path / "sampled", joint(traffic), one_in=8)}
    limits = ("--fail-on", "unanswered:+0")
    result = ran(captures, "none", "sampled", *limits)
    assert result.exit_code == 0
    assert "BASE has 1/1 of the connections, NEW 1/8" in result.stderr
    assert "unanswered:+0: not judged, so it passes" in result.stderr
    # Shares of the requests can be compared, and so can counts of equal samples.
    assert ran(captures, "none", "sampled", "--fail-on", "unanswered:+2%").exit_code == 1
    captures["none"] = write(tmp_path / "none", joint(Traffic(connections=40, seed=1)), one_in=8)
    result = ran(captures, "none", "sampled", *limits)
    assert result.exit_code == 1
    assert "counts are those of this sample" in result.stderr


def test_unanswered_requests_have_a_line_and_no_sample_in_total(hung: dict[str, Path]) -> None:
    result = ran(hung, "none", "many", "--format", "json", "--fail-on", "unanswered:+0")
    found = {(one["stage"], one["percentile"]): one for one in lines(result)}
    line = found["unanswered", "share"]
    assert (line["base_count"], line["new_count"]) == (0, 40)
    assert (line["base_requests"], line["new_requests"]) == (400, 440)
    assert (line["base_share"], line["new_share"]) == (0, pytest.approx(40 / 440))
    assert 0 < line["interval"][0] < 40 / 440 < line["interval"][1] < 0.5
    assert (line["certain"], line["failed"]) == (True, ["unanswered:+0"])
    # They make those that were answered neither slower nor faster.
    assert not any(one["certain"] for (stage, _), one in found.items() if stage == "total")
    assert found["total", "p50"]["new_count"] == found["server", "p50"]["new_count"] == 400
    assert found["queue", "p50"]["new_count"] == 440  # it was read, if not answered
    assert ("cut", "share") not in found


def test_young_request_at_the_end_of_the_run_is_open(hung: dict[str, Path]) -> None:
    found = lines(ran(hung, "none", "just now", "--format", "json"))
    counts = {one["stage"]: one["new_count"] for one in found if one["percentile"] == "share"}
    assert counts == {"unanswered": 0, "open": 1}


def test_services_without_any_reply_are_reported(hung: dict[str, Path]) -> None:
    result = ran(hung, "all of them", "more of them")
    assert (
        "30 requests in BASE and 60 in NEW went to services that sent no byte in either"
        in result.stderr
    )
    assert "unanswered" in result.stdout or result.stdout.count("\n") > 1


def test_shares_of_at_most_8_of_100_identical_pairs_differ() -> None:
    chance = Random(1)  # noqa: S311 - made-up traffic
    wrong = 0
    for _ in range(200):
        pair = [sample([chance.random() < 0.02 for _ in range(1000)]) for _ in range(2)]
        wrong += _share((), "unanswered", pair).certain
    assert wrong <= 8


@pytest.mark.parametrize(
    "text",
    [
        "unanswered",
        "unanswered:0",
        "unanswered:-1",
        "unanswered:+2ms",
        "unanswered.p99:+1%",
        "open:+0",
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
def test_malformed_conditions_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--fail-on"):
        Condition.parse(text)


def test_unknown_group_is_refused(captures: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="none of process, remote, port, none"):
        ran(captures, "base", "same", "--group-by", "colour")
