"""Time that passes without rows: a live run emits what a replay does."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tcplat_stages.plugin import tcplat_register_sinks

from tcplat_core import Loss, RunInfo, RunReport
from tcplat_core.plugin.options import read_options

from .history import CLIENT, SERVICE, History, Row
from .test_join import simple

SECOND = 1_000_000_000
SPECS = {spec.name: spec for spec in tcplat_register_sinks()}
SINKS = [
    ("waterfall", {}),
    ("waterfall", {"format": "json"}),
    ("summary", {"format": "json"}),
    ("stages", {"every": "1s"}),
    ("stages", {"format": "json", "every": "700ms"}),
]


def opened(path: Path, name: str, options: dict[str, str]) -> Any:
    given_options = read_options(name, SPECS[name].options, {**options, "path": str(path)})
    sink: Any = SPECS[name].factory(given_options, RunInfo(()))
    if hasattr(sink, "begin"):
        sink.begin()
    return sink


def report(until_ns: int) -> RunReport:
    return RunReport(probes={}, duration_s=1, until_ns=until_ns)


def conversations(starts: list[int], seed: int) -> list[Row]:
    """Make connections that begin at these instants; some of them end."""
    random = Random(seed)  # noqa: S311 - a history, no secret
    rows = []
    for number, start in enumerate(starts):
        history = History(
            ends=(("10.0.0.1", 40_000 + number), ("10.0.0.2", 80)),
            by_sock=(100 + number, 200 + number),
        )
        now = history.shake_hands(start)
        for _ in range(random.randint(1, 3)):
            now = simple(history, now + random.randint(1, 8 * SECOND))
        if random.random() < 0.5:
            history.close(now + random.randint(1, 15 * SECOND))
        without = random.choice([(), ("tcp_client", "tcp_service", "rx_ip"), ("tcp_client",)])
        rows += history.rows(without)
    return sorted(rows, key=lambda row: row.ts_ns)


@pytest.mark.parametrize(("name", "options"), SINKS)
@given(
    starts=st.lists(st.integers(1, 40 * SECOND), min_size=1, max_size=4),
    seed=st.integers(),
    silence=st.integers(0, 40 * SECOND),
)
@settings(max_examples=40)
def test_exchanges_ended_by_time_are_emitted_live_as_in_a_replay(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    options: dict[str, str],
    starts: list[int],
    seed: int,
    silence: int,
) -> None:
    folder = tmp_path_factory.mktemp("time")
    rows = conversations(starts, seed)
    random = Random(seed)  # noqa: S311 - as above
    until_ns = rows[-1].ts_ns + silence
    losses = {random.randrange(len(rows)): number for number in range(random.randint(0, 2))}
    live = opened(folder / "live", name, options)
    replay = opened(folder / "replay", name, options)
    before_ns = 0
    for number, row in enumerate(rows):
        ticks = sorted(random.randint(before_ns, row.ts_ns) for _ in range(random.randint(0, 6)))
        gap = random.randint(0, len(ticks)) if number in losses else -1
        for at, tick in enumerate([*ticks, None]):
            if at == gap:
                live.lost(Loss("tcp_client", "send", losses[number] + 1))
                replay.lost(Loss("tcp_client", "send", losses[number] + 1))
            if tick is not None:
                live.passed(tick)
        live.write([row])
        replay.write([row])
        before_ns = row.ts_ns
    for tick in sorted(random.randint(before_ns, until_ns) for _ in range(5)):
        live.passed(tick)
    live.close(report(until_ns))
    replay.close(report(until_ns))
    assert (folder / "live").read_bytes() == (folder / "replay").read_bytes()


@pytest.mark.parametrize("closed", [False, True])
def test_open_connection_lasts_until_the_run_ends(tmp_path: Path, *, closed: bool) -> None:
    history = History()
    now = simple(history, history.shake_hands(SECOND) + 500) + 500
    if closed:
        history.close(now)
    rows = history.rows({"tcp_client", "tcp_service"})
    sink = opened(tmp_path / "out", "summary", {"format": "json"})
    sink.write(rows)
    sink.close(report(rows[-1].ts_ns + SECOND // 2))
    (line,) = (tmp_path / "out").read_text(encoding="utf-8").splitlines()
    # The last row that counts is the service's FIN: an ACK without data does not.
    last_ns = now + 50 if closed else rows[-1].ts_ns + SECOND // 2
    assert json.loads(line)["duration_us"] == pytest.approx((last_ns - rows[0].ts_ns) / 1_000)


@pytest.mark.parametrize(("waited_s", "outcome"), [(60, "unanswered"), (0.5, "open")])
def test_unanswered_request_waits_until_the_run_ends(
    tmp_path: Path, waited_s: float, outcome: str
) -> None:
    history = History()
    now = simple(history, history.shake_hands(SECOND) + 500) + 500
    history.socket(now, CLIENT, "send", seq=history.seq(CLIENT, history.sent[CLIENT]), bytes=10)
    sink = opened(tmp_path / "out", "waterfall", {"format": "json"})
    sink.write(history.rows())
    sink.close(report(now + round(waited_s * SECOND)))
    *_, last = map(json.loads, (tmp_path / "out").read_text(encoding="utf-8").splitlines())
    assert (last["outcome"], last["waited_us"]) == (outcome, waited_s * 1_000_000)


def test_quiet_connection_is_emitted_without_new_rows(tmp_path: Path) -> None:
    sink = opened(tmp_path / "out", "waterfall", {"format": "json"})
    history = History()
    over = simple(history, history.shake_hands(5 * SECOND) + 500)
    sink.write(history.rows())
    sink.passed(over + 10 * SECOND)
    assert not (tmp_path / "out").read_bytes()
    sink.passed(over + 10 * SECOND + SECOND // 2 + 1)
    text = (tmp_path / "out").read_text(encoding="utf-8")
    assert text.count("\n") == 1
    assert '"ended":"idle"' in text


def test_interval_ends_without_new_rows(tmp_path: Path) -> None:
    sink = opened(tmp_path / "out", "stages", {"format": "json", "every": "2s"})
    history = History()
    first = simple(history, history.shake_hands(SECOND) + 500)
    simple(history, first + 500)  # it ends the first exchange
    sink.write(history.rows())
    sink.passed(2 * SECOND - 1)
    assert not (tmp_path / "out").read_bytes()
    sink.passed(2 * SECOND)
    finished = (tmp_path / "out").read_text(encoding="utf-8").splitlines()
    assert {'"until_ns":2000000000' in line for line in finished} == {True}
    # And no more of those that follow, until there is something to write.
    sink.passed(11 * SECOND)
    assert (tmp_path / "out").read_text(encoding="utf-8").splitlines() == finished


def test_distant_time_costs_no_more_than_a_near_one(tmp_path: Path) -> None:
    for name, options in SINKS:
        sink = opened(tmp_path / "out", name, {**options})
        history = History()
        simple(history, history.shake_hands(SECOND) + 500)
        history.socket(2**63 + 5, CLIENT, "send", seq=history.seq(CLIENT, 900), bytes=1)
        history.socket(2**64 - 5, SERVICE, "recv", seq=history.seq(CLIENT, 900), bytes=1)
        sink.write(history.rows())
        sink.close(report(2**90))
