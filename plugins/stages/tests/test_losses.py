"""Exchanges under way while events were lost are omitted: neither slow nor unanswered."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tcplat_stages.connection import Connection
from tcplat_stages.exchange import Exchange
from tcplat_stages.join import Joiner
from tcplat_stages.plugin import tcplat_register_sinks

from tcplat_core import Loss, RunInfo, RunReport
from tcplat_core.plugin.options import read_options

from .history import History, Row
from .test_join import PROBES, SECOND, simple

GAP_NS = SECOND // 2
TOTAL_NS = 11_000
RING = ("tcp_client", "tcp_service", "dev_xmit", "xdp_port")
"""Probes, each with a ring of its own."""


def lossy(
    rows: Sequence[Row],
    first_ns: int,
    last_ns: int,
    probes: Iterable[str] = RING,
    told_ns: int | None = None,
) -> tuple[list[Exchange], list[Connection], Joiner]:
    """Join rows without those of the lossy probes in an interval; the loss comes then, or later."""
    gone = set(probes)
    kept = [row for row in rows if row.probe not in gone or not first_ns <= row.ts_ns < last_ns]
    told_ns = last_ns if told_ns is None else told_ns
    joiner = Joiner()
    finished = joiner.feed([row for row in kept if row.ts_ns < told_ns])
    for probe in gone:
        joiner.lost(Loss(probe, "nic_tx" if probe == "dev_xmit" else "send", 1))
    finished += joiner.feed([row for row in kept if row.ts_ns >= told_ns])
    finished += joiner.finish()
    return (
        [one for one in finished if isinstance(one, Exchange)],
        [one for one in finished if isinstance(one, Connection)],
        joiner,
    )


def requests(count: int, pause_ns: int = 1_000) -> tuple[History, list[int]]:
    """Add a connection with this many exchanges of 11 µs; return when each begins."""
    history = History()
    now, begins = history.shake_hands() + 1_000, []
    for _ in range(count):
        begins.append(now)
        now = simple(history, now) + pause_ns
    history.close(now + 1_000)
    return history, begins


@pytest.mark.parametrize("without", [(), ("tcp_client",), ("tcp_service",), ("xdp_port",)])
@pytest.mark.parametrize("offset_ns", [1, 1_500, 5_500, 6_500, 10_500])
@pytest.mark.parametrize("missing", [0, 1, 3])
def test_exchange_across_a_loss_is_neither_slow_nor_unanswered(
    without: tuple[str, ...], offset_ns: int, missing: int
) -> None:
    # From the middle of the fourth of ten requests to the middle of another.
    history, begins = requests(10, pause_ns=GAP_NS)
    rows = history.rows(without)
    finished, (conn,), joiner = lossy(rows, begins[3] + offset_ns, begins[3 + missing] + 6_000)
    assert {one.outcome for one in finished} == {"answered"}
    assert max(one.total_ns for one in finished) <= TOTAL_NS
    assert joiner.missed >= 1
    assert conn.spans_loss == joiner.missed
    assert sum(conn.outcomes.values()) == len(finished) == conn.reported
    # All that was wholly seen, but for a neighbour of the loss.
    assert len(finished) >= 10 - missing - 3


@pytest.mark.parametrize("ring", ["tcp_client", "tcp_service"])
@pytest.mark.parametrize("late_ns", [0, 100_000, SECOND])
def test_full_ring_loses_rows_from_its_last_one_on(ring: str, late_ns: int) -> None:
    # The other rings have room, and go on; the loss comes behind their rows, or never before
    # the end.
    history, begins = requests(40)
    first, last = begins[10] + 5_500, begins[30] + 5_500
    finished, (conn,), joiner = lossy(history.rows(), first, last + late_ns, [ring])
    assert {one.outcome for one in finished} == {"answered"}
    assert max(one.total_ns for one in finished) <= TOTAL_NS
    assert joiner.missed >= 1
    assert "unanswered" not in conn.outcomes


@pytest.mark.parametrize("rings", [RING, ("tcp_client", "tcp_service"), ("tcp_client",)])
@pytest.mark.parametrize("offset_ns", [1, 1_500, 5_500, 6_500, 10_500])
def test_rows_during_a_loss_end_no_exchange(rings: Sequence[str], offset_ns: int) -> None:
    # A ring that is drained has room for some: these come amid the gap, and then it is full again.
    history, begins = requests(40)
    gaps = [(begins[at] + offset_ns, begins[at + 9] + 6_000) for at in (3, 14, 25)]
    joiner = Joiner()
    finished = []
    for row in history.rows():
        while gaps and row.ts_ns > gaps[0][0]:
            since_ns, until_ns = gaps.pop(0)
            joiner.lost(Loss("tcp_client", "send", 1, since_ns, until_ns))
            joiner.lost(Loss("tcp_client", "recv", 1, since_ns, until_ns))
            middle_ns = (since_ns + until_ns) // 2
            told_until_ns = until_ns
        lost = row.ts_ns > begins[3] + offset_ns and row.probe in rings
        if lost and row.ts_ns <= told_until_ns and abs(row.ts_ns - middle_ns) > TOTAL_NS:
            continue
        finished += joiner.feed([row])
    finished += joiner.finish()
    found = [one for one in finished if isinstance(one, Exchange)]
    assert {one.outcome for one in found} == {"answered"}
    assert {one.total_ns for one in found} == {TOTAL_NS}
    assert 1 <= joiner.missed <= 36
    assert len(found) >= 40 - 3 * 12


def test_loss_applies_to_its_interval_and_not_its_position() -> None:
    # As in a capture of two hosts: rows of the other one may stand before it.
    history, begins = requests(10, pause_ns=SECOND)
    first, last = begins[3] + 5_500, begins[3] + 8_500
    joiner = Joiner()
    finished = joiner.feed([row for row in history.rows() if row.ts_ns <= last])
    joiner.lost(Loss("tcp_client", "send", 1, first, last))
    finished += joiner.feed([row for row in history.rows() if row.ts_ns > last])
    finished += joiner.finish()
    assert sum(isinstance(one, Exchange) for one in finished) == 9
    assert joiner.missed == 1


def test_complete_exchanges_before_a_loss_are_kept() -> None:
    history, begins = requests(6, pause_ns=SECOND)
    # Nothing is lost of this connection: the loss falls into a pause.
    then = begins[3] - SECOND // 2
    finished, (conn,), joiner = lossy(history.rows(), then, then)
    assert [one.total_ns for one in finished] == [TOTAL_NS] * 6
    assert (joiner.missed, conn.spans_loss, conn.outcomes) == (0, 0, {"answered": 6})


def test_request_with_a_lost_end_is_not_open() -> None:
    history, begins = requests(3)
    finished, (conn,), joiner = lossy(history.rows(), begins[2] + 5_500, 10 * SECOND)
    assert [one.outcome for one in finished] == ["answered"] * 2
    assert (joiner.missed, conn.outcomes) == (1, {"answered": 2})
    assert joiner.left_out() == ["without 1 exchanges that were under way where events were lost"]


def test_losses_at_points_without_turns_have_no_effect() -> None:
    history, begins = requests(3)
    joiner = Joiner()
    rows = history.rows()
    finished = joiner.feed([row for row in rows if row.ts_ns < begins[1] + 5_500])
    for point in ("stats", "retransmit", "accept", "rx_tcp"):
        joiner.lost(Loss("tcp_client", point, 1))
    finished += joiner.feed([row for row in rows if row.ts_ns >= begins[1] + 5_500])
    finished += joiner.finish()
    assert sum(isinstance(one, Exchange) for one in finished) == 3
    assert joiner.missed == 0


def _sink(name: str, path: Path, form: str) -> Any:
    spec = next(spec for spec in tcplat_register_sinks() if spec.name == name)
    options = {"path": str(path), "format": form}
    return spec.factory(read_options(name, spec.options, options), RunInfo(PROBES))


@pytest.mark.parametrize(
    ("name", "words", "field"),
    [
        ("stages", "without 1 exchanges that were under way where events were lost", 1),
        ("waterfall", "without 1 exchanges that were under way where events were lost", 1),
        ("summary", "1 left out: events were lost", 1),
    ],
)
def test_every_sink_reports_omitted_exchanges_in_text_and_json(
    name: str, words: str, field: int, tmp_path: Path
) -> None:
    history, begins = requests(5, pause_ns=SECOND)
    rows = history.rows()
    cut = begins[2] + 5_500
    for form in ("text", "json"):
        sink = _sink(name, tmp_path / form, form)
        sink.write([row for row in rows if row.ts_ns < cut])
        sink.lost(Loss("tcp_service", "send", 3))
        sink.write([row for row in rows if row.ts_ns >= cut])
        sink.close(RunReport(probes={}, duration_s=1.0))
    assert words in (tmp_path / "text").read_text()
    finished = [json.loads(line) for line in (tmp_path / "json").read_text().splitlines()]
    assert [one["spans_loss"] for one in finished if "spans_loss" in one] == [field]
