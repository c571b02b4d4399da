"""Joined rows of a sample: what ends where its connection leaves the sample, and weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import attrs
import pytest
from tcplat_stages.connection import Connection, Finished
from tcplat_stages.duration_histogram import DurationHistogram
from tcplat_stages.exchange import ANSWERED, OPEN, Exchange
from tcplat_stages.join import Joiner
from tcplat_stages.plugin import tcplat_register_sinks
from tcplat_stages.turns import UNSAMPLED

from tcplat_core import RunInfo, RunReport, Sampled, connection_hash, is_in_share
from tcplat_core.plugin.options import read_options

from .history import CLIENT, SERVICE, History, Row

MS = 1_000_000
_CONNECTIONS, _REQUESTS = 60, 30
SPECS = {spec.name: spec for spec in tcplat_register_sinks()}


def traffic(seed: int = 1) -> list[Row]:
    """Return rows of connections of 30 requests each, all at the same time."""
    chance = Random(seed)  # noqa: S311 - made-up traffic
    rows: list[Row] = []
    for number in range(_CONNECTIONS):
        history = History(
            ends=(("10.0.0.1", 40_000 + number), ("10.0.0.2", 80)),
            by_sock=(1_000 + number, 2_000 + number),
        )
        now = history.shake_hands(1_000 + chance.randrange(20 * MS)) + 1_000
        for _ in range(_REQUESTS):
            step = chance.randint(50_000, 150_000)
            history.message(CLIENT, 100, [now + step * at for at in range(6)])
            history.message(SERVICE, 200, [now + step * (10 + at) for at in range(6)])
            now += step * 16 + chance.randrange(MS)
        history.close(now + 1_000)
        rows += history.rows()
    return sorted(rows, key=lambda row: row.ts_ns)


def one_in(shares: Sequence[Sampled], ts_ns: int) -> int:
    held = [share.one_in for share in shares if share.since_ns <= ts_ns]
    return held[-1] if held else 1


def is_made(row: Row, shares: Sequence[Sampled]) -> bool:
    """Return whether the kernel makes a row; rows without a port wait for it, and are whole."""
    sport = row.sport or 40_000 + row.sock - 1_000
    assert row.dport
    return is_in_share(
        connection_hash(row.saddr, sport, row.daddr, row.dport), one_in(shares, row.ts_ns)
    )


def joined(
    rows: Sequence[Row], shares: Sequence[Sampled] = (), until_ns: int = 0
) -> Iterator[Finished]:
    joiner = Joiner()
    waiting = list(shares)
    for row in rows:
        while waiting and waiting[0].since_ns <= row.ts_ns:
            yield from joiner.pass_time(waiting[0].since_ns)
            yield from joiner.sampled(waiting.pop(0))
        if is_made(row, shares):
            yield from joiner.feed([row])
    yield from joiner.finish(until_ns)


def key(exchange: Exchange) -> tuple[int, int, str]:
    return exchange.conn.client[1] or 0, exchange.began_ns, exchange.outcome


CHANGES = {
    "smaller": ((20 * MS, 2), (35 * MS, 8)),
    "larger": ((0, 8), (30 * MS, 2), (45 * MS, 1)),
    "back and forth": ((15 * MS, 4), (25 * MS, 1), (35 * MS, 8), (50 * MS, 2)),
}


@pytest.mark.parametrize("name", list(CHANGES))
@pytest.mark.parametrize("seed", range(3))
def test_exchanges_of_a_changing_sample_are_true_ones(name: str, seed: int) -> None:
    rows = traffic(seed)
    shares = [Sampled(share, since_ns) for since_ns, share in CHANGES[name]]
    truth = {key(one): one.total_ns for one in joined(rows) if isinstance(one, Exchange)}
    assert {outcome for _, _, outcome in truth} == {ANSWERED}
    found = [one for one in joined(rows, shares) if isinstance(one, Exchange)]
    # Nothing ended or was not answered because rows ended or began; what came back in its middle
    # may be followed by one end alone, as it is where a capture begins, and is open at the end.
    assert {one.outcome for one in found} <= {ANSWERED, OPEN}
    whole = [one for one in found if one.conn.began]
    for one in whole:
        assert truth[key(one)] == one.total_ns
    assert len({key(one) for one in whole}) == len(whole)
    # Of a connection that is in every share nothing is missing; of one that left, its last reply,
    # and a request that was under way.
    for port in {port for port, _, _ in truth}:
        number = connection_hash("10.0.0.1", port, "10.0.0.2", 80)
        left = [share.since_ns for share in shares if not is_in_share(number, share.one_in)]
        mine = {
            began for which, began, _ in truth if which == port and (not left or began < left[0])
        }
        lacking = mine - {one.began_ns for one in whole if one.conn.client[1] == port}
        assert len(lacking) <= (2 if left else 0)


def test_connections_that_leave_the_sample_say_so() -> None:
    rows = traffic()
    shares = [Sampled(4, 30 * MS)]
    ended = {
        one.client[1] or 0: one.ended for one in joined(rows, shares) if isinstance(one, Connection)
    }
    for port, why in ended.items():
        inside = is_in_share(connection_hash("10.0.0.1", port, "10.0.0.2", 80), 4)
        assert (why == UNSAMPLED) != inside
    assert len(ended) == _CONNECTIONS


def test_what_is_under_way_when_a_connection_leaves_is_counted() -> None:
    joiner = Joiner()
    rows = [row for row in traffic() if row.ts_ns < 30 * MS]
    joiner.feed(rows)
    left = joiner.sampled(Sampled(1 << 20, 30 * MS))
    assert not [one for one in left if isinstance(one, Exchange)]
    conns = [one for one in left if isinstance(one, Connection)]
    assert joiner.unsampled == sum(conn.left_out for conn in conns) > 0
    assert any("left the sample" in words for words in joiner.left_out())
    assert joiner.finish() == []


def test_connection_without_an_address_stays_in_a_sample() -> None:
    joiner = Joiner()
    odd = [attrs.evolve(row, saddr="nowhere", daddr="elsewhere") for row in traffic()]
    joiner.feed([row for row in odd if row.ts_ns < 30 * MS])
    assert joiner.sampled(Sampled(1 << 20, 30 * MS)) == []


def test_weights_move_percentiles_and_the_mean_but_no_count() -> None:
    plain, weighted = DurationHistogram(), DurationHistogram()
    for _ in range(10):
        weighted.add(100, 9)
        weighted.add(200)
        for _ in range(9):
            plain.add(100)
        plain.add(200)
    assert weighted.count == 20
    assert weighted.percentile(50) == plain.percentile(50) == 100
    assert weighted.percentile(89) == 100
    assert weighted.percentile(91) == 200
    assert weighted.weighted_ns / weighted.weight == plain.sum_ns / plain.count == 110
    both = DurationHistogram()
    both.merge(weighted)
    both.merge(plain)
    assert (both.count, both.weight) == (120, 200)


def stages(folder: Path, rows: Sequence[Row], shares: Sequence[Sampled]) -> list[dict[str, Any]]:
    path = folder / "out"
    given = {"path": str(path), "format": "json", "group_by": "none"}
    sink: Any = SPECS["stages"].factory(
        read_options("stages", SPECS["stages"].options, given), RunInfo(("tcp_client",))
    )
    waiting = list(shares)
    for row in rows:
        while waiting and waiting[0].since_ns <= row.ts_ns:
            sink.sampled(waiting.pop(0))
        sink.write([row])
    sink.close(RunReport(probes={}, duration_s=1.0))
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_percentiles_of_a_changing_sample_are_those_of_all_traffic(tmp_path: Path) -> None:
    """Slow requests first, all of them; then fast ones, of which an eighth is sampled."""
    rows: list[Row] = []
    change = 100 * MS
    shares = [Sampled(8, change)]
    fast = slow = 0
    for number in range(2_000):
        early = number % 4 == 0
        history = History(
            ends=(("10.0.0.1", 20_000 + number), ("10.0.0.2", 80)),
            by_sock=(100_000 + number, 200_000 + number),
        )
        begin = (1 if early else 110) * MS + number * 1_000
        now = history.shake_hands(begin) + 1_000
        step = 100_000 if early else 10_000
        history.message(CLIENT, 100, [now + step * at for at in range(6)])
        history.message(SERVICE, 200, [now + step * (10 + at) for at in range(6)])
        history.close(now + step * 16)
        made = [attrs.evolve(row, sport=row.sport or 20_000 + number) for row in history.rows()]
        kept = [row for row in made if is_made(row, shares)]
        assert len(kept) in (0, len(made))
        rows += kept
        slow += early
        fast += bool(kept) and not early
    lines = stages(tmp_path, sorted(rows, key=lambda row: row.ts_ns), shares)
    assert lines[0]["sampled"]["one_in"] == 8
    (total,) = [line for line in lines if line.get("stage") == "total"]
    assert total["count"] == slow + fast
    # Three quarters of the traffic are fast, and far fewer of the sample.
    assert fast < slow
    assert total["p50_us"] == pytest.approx(150, rel=0.02)
    assert total["p90_us"] == pytest.approx(1500, rel=0.02)
    share = 8 * fast / (8 * fast + slow)
    assert total["mean_us"] == pytest.approx(150 * share + 1500 * (1 - share), rel=0.02)
