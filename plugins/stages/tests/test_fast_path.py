"""The fast path gives the exchanges and connections that the slow one gives, whatever comes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import attrs
import pytest
from tcplat_stages.connection import Connection
from tcplat_stages.duration_histogram import DurationHistogram
from tcplat_stages.exchange import Exchange
from tcplat_stages.join import Joiner
from tcplat_stages.row_fields import COMPILED
from tcplat_stages.samples import Tally, count

from tcplat_core import Loss
from tcplat_core.deliver.fast.slim import SlimTexts
from tests.long import LONG

from .history import CLIENT, SERVICE, History, Row
from .slim import SlimHistory

pytestmark = pytest.mark.skipif(
    not COMPILED, reason="the joiner is not compiled: it has no fast path"
)

SEEDS = 20_000 if LONG else 300
PIECE = 100
"""Histories per test."""
POINTS = ("send_short", "close", "recv", "send", "ready", "rx_tcp", "unknown", "state")
FLAGS = ("RST|ACK", "RST", "FIN|ACK", "SYN", "ACK", None, "PSH|ACK|ECE")
WITHOUT: tuple[tuple[str, ...], ...] = (
    (),
    ("tcp_client",),
    ("tcp_service",),
    ("dev_xmit", "xdp_port"),
    ("tcp_client", "dev_xmit", "xdp_port"),
    ("tcp_service/ready",),
    ("rx_ip",),
    ("nic_tx",),
    ("accept", "connect", "state"),
)
SECOND = 1_000_000_000
BRIDGE = 4_026_533_333
"""A network namespace."""

Item = Sequence[Row] | Loss | int
"""Rows; a loss; an instant before which no row comes any more."""


def on_the_slow_path(_conn: Connection, _row: Any) -> None:
    """Joiner.watch: it is called for each row, so that nothing is on the fast path."""


def told(items: Sequence[Item], *, fast: bool) -> tuple[list[Any], bool]:
    """Return all that a joiner tells, and whether a connection was on the fast path."""
    joiner, texts, used = Joiner(), SlimTexts(), False
    found: list[Any] = []
    if not fast:
        joiner.watch = on_the_slow_path
    for item in items:
        if isinstance(item, Loss):
            joiner.lost(item)
        elif isinstance(item, int):
            found += map(seen, joiner.pass_time(item))
        else:
            found += map(seen, joiner.feed(SlimHistory(item, texts)))
            used = used or any(one.fast_path for one in joiner.directory.conns.values())
    found += map(seen, joiner.finish())
    return [*found, joiner.left_out()], used


def seen(one: Exchange | Connection) -> list[Any]:
    """Return all that is known of an exchange or a connection, as plain values."""
    if isinstance(one, Exchange):
        return [
            *(one.conn.number, one.number, one.kind, one.outcome, one.over_ns, one.over_by),
            *(one.request_begin, one.request_end, one.reply_begin, one.reply_end),
            *(one.replied_ns, tuple(one.stamps), tuple(one.by), one.urgent, one.ended),
            *(one.retransmits, one.zero_windows, one.missed, one.beyond, one.lasted_ns),
        ]
    skipped = ("fast_path", "fast_from", "fast_pause", "ends", "flows", "handshake", "waiting")
    found: list[Any] = [
        repr(getattr(one, name)) for name in slots(Connection) if name not in skipped
    ]
    for flow in one.flows:
        found += [repr(getattr(flow, name)) for name in slots(type(flow)) if name not in LOGS]
        found += [(reach.position, reach.late) for reach in reaches(flow)]
    return found + [(end.sock, end.process, end.state, end.closed_ns) for end in one.ends]


LOGS = {"tx", "nic", "ip", "ready", "sends", "reads", "senders", "drop_instants"}


def slots(kind: type) -> list[str]:
    """Return the attributes of a class that was compiled."""
    return [name for name in dir(kind) if not name.startswith("_") and is_value(kind, name)]


def is_value(kind: type, name: str) -> bool:
    return type(getattr(kind, name)).__name__ in ("getset_descriptor", "member_descriptor")


def reaches(flow: Any) -> Iterator[Any]:
    return (getattr(flow, name) for name in ("tx", "nic", "ip", "ready"))


def drawn(random: Random, number: int) -> History:
    """Return a connection with some turns, most of them plain."""
    history = History(
        (random.randrange(2**32), random.randrange(2**32)),
        ends=(("10.0.0.1", 40_000 + random.choice([0, 0, number])), ("10.0.0.2", 80)),
        by_sock=(11 + 10 * number, 22 + 10 * number),
        numbered=random.random() < 0.7,
    )
    now = history.shake_hands(1_000 + number * random.choice([10, 10**6, 10**8])) + 10_000
    for _ in range(random.randint(6, 24)):
        delays = [random.choice([1, 10, 1_000, 100_000, 10**7]) for _ in range(11)]
        at = list(itertools.accumulate(delays, initial=now))
        pieces = 1 if random.random() < 0.93 else random.randint(1, 4)
        untidy = random if random.random() < 0.04 else None
        asked, answered = random.choice([1, 5, 100, 3_000]), random.choice([1, 5, 200, 9_000])
        history.message(CLIENT, asked, at[:6], pieces=pieces, random=untidy)
        if random.random() < 0.98:
            history.message(SERVICE, answered, at[6:], pieces=pieces, random=untidy)
        if random.random() < 0.02:
            history.message(CLIENT, 50, [one + 1 for one in at[2:8]])
        pauses = [1, 10**6, 3 * SECOND, 12 * SECOND] if random.random() < 0.1 else [1, 1_000]
        now = at[-1] + random.choice(pauses)
    if random.random() < 0.7:
        history.close(now + 1_000)
    if random.random() < 0.2:
        # Between the two namespaces is a bridge, whose packets are seen as well.
        packets = [row for row in history.made if row.point in ("nic_tx", "nic_rx")]
        history.made += [attrs.evolve(row, ts_ns=row.ts_ns + 1, netns=BRIDGE) for row in packets]
    return history


def changes(row: Row) -> list[dict[str, Any]]:
    """Return what a kernel or a hostile capture may have in place of a row."""
    seq, ack, length = row.seq or 0, row.ack or 0, row.bytes or 0
    return [
        {"pid": (row.pid or 0) + 1},
        {"comm": "other"},
        *({"window": window} for window in (0, None, 10, 70_000)),
        *({"seq": (seq + more) % 2**32} for more in (-1, 1, 5, -100, 100_000)),
        *({"bytes": count} for count in (0, None, 1, length + 1, max(length - 1, 0))),
        *({"netns": netns} for netns in (1, 2, None)),
        *({"flags": flags} for flags in FLAGS),
        *({"ack": one} for one in (None, (ack + 1) % 2**32, (ack + 5_000) % 2**32)),
        *({"point": point} for point in POINTS),
    ]


def mutated(rows: list[Row], random: Random) -> list[Row]:
    """Return the rows with a few changed, lost, doubled or swapped."""
    for _ in range(random.choice([1, 1, 2, 4])):
        if not rows:
            break
        at, kind = random.randrange(len(rows)), random.randrange(5)
        if kind == 0:
            del rows[at]
        elif kind == 1:
            rows.insert(at, attrs.evolve(rows[at]))
        elif kind == 2:
            other = min(len(rows) - 1, at + random.randint(1, 6))
            first, last = rows[at], rows[other]
            rows[at] = attrs.evolve(last, ts_ns=first.ts_ns)
            rows[other] = attrs.evolve(first, ts_ns=last.ts_ns)
        else:
            rows[at] = attrs.evolve(rows[at], **random.choice(changes(rows[at])))
    return sorted(rows, key=lambda row: row.ts_ns)


def capture(random: Random) -> list[Item]:
    """Return what a joiner is given of some connections."""
    histories = [drawn(random, number) for number in range(random.choice([1, 1, 1, 2, 3]))]
    without = [*random.choice(WITHOUT), "tcp_client/ready"]
    rows = [row for history in histories for row in history.rows(without)]
    rows.sort(key=lambda row: row.ts_ns)
    if random.random() < 0.3:
        rows = rows[random.randrange(len(rows) + 1) :]
    rest = mutated(rows, random) if random.random() < 0.9 else rows
    items: list[Item] = []
    while rest:
        size = random.choice([1, 3, 10, 30])
        part, rest = rest[:size], rest[size:]
        items.append(part)
        last_ns, what = part[-1].ts_ns, random.random()
        if what < 0.03:
            point = random.choice(["recv", "send", "rx_ip", "accept"])
            until_ns = last_ns + random.choice([1, 1_000, 10**6])
            items.append(Loss("tcp_service", point, 3, last_ns, until_ns))
        elif what < 0.06 and rest:
            items.append(random.randint(last_ns, rest[0].ts_ns))
    return items


@pytest.mark.parametrize("first", range(0, SEEDS, PIECE))
def test_fast_path_changes_nothing_that_is_told(first: int) -> None:
    on_it = 0
    for seed in range(first, first + PIECE):
        items = capture(Random(seed))  # noqa: S311 - a history, no secret
        found, used = told(items, fast=True)
        assert found == told(items, fast=False)[0], f"seed {seed}"
        on_it += used
    assert on_it > PIECE // 5


@pytest.mark.parametrize("without", WITHOUT)
def test_one_changed_row_of_a_plain_turn_is_taken_alike(without: tuple[str, ...]) -> None:
    rows = plain(6).rows([*without, "tcp_client/ready"])
    turn = [at for at, row in enumerate(rows) if row.bytes][-30:-15]
    for at in turn:
        row = rows[at]
        others = [[attrs.evolve(row, **change)] for change in changes(row)]
        for other in [*others, [], [row, row], [row, attrs.evolve(row, ts_ns=row.ts_ns + 10)]]:
            whole = sorted([*rows[:at], *other, *rows[at + 1 :]], key=lambda one: one.ts_ns)
            assert told([whole], fast=True)[0] == told([whole], fast=False)[0], (row, other)


@pytest.mark.parametrize("without", WITHOUT)
def test_a_loss_in_a_plain_turn_is_taken_alike(without: tuple[str, ...]) -> None:
    rows = plain(6).rows([*without, "tcp_client/ready"])
    for at in range(len(rows) // 2, len(rows) - 10):
        for lasted_ns in (0, 700, 5_000):
            since_ns = rows[at - 1].ts_ns
            loss = Loss("tcp_service", "recv", 1, since_ns, since_ns + lasted_ns)
            items: list[Item] = [rows[:at], loss, rows[at:]]
            assert told(items, fast=True)[0] == told(items, fast=False)[0], (at, lasted_ns)


def plain(turns: int) -> History:
    """Return a connection of plain turns, 1 µs for each stage."""
    history = History()
    now = history.shake_hands()
    for number in range(turns):
        at = [now + (1_000 + number) * step for step in range(1, 13)]
        history.message(CLIENT, 100, at[:6])
        history.message(SERVICE, 200, at[6:])
        now = at[-1]
    history.close(now + 1_000)
    return history


@pytest.mark.parametrize("without", WITHOUT)
def test_tally_counts_what_exchanges_would_count(without: tuple[str, ...]) -> None:
    rows = plain(50).rows([*without, "tcp_client/ready"])
    figures = []
    for fast in (True, False):
        joiner, found = Joiner(), dict[str, DurationHistogram]()
        joiner.watch = None if fast else on_the_slow_path
        joiner.count_with(Tally(lambda _, found=found: found))  # type: ignore[misc] # a default
        finished = joiner.feed(SlimHistory(rows, SlimTexts())) + joiner.finish()
        exchanges = [one for one in finished if isinstance(one, Exchange)]
        for one in exchanges:
            count(one, found, 1)
        watched = "tcp_service" not in without
        assert len(exchanges) == (50 if not (fast and watched) else len(exchanges)), without
        assert (len(exchanges) < 10) == (fast and watched)
        figures.append({name: shown(one) for name, one in found.items()})
    assert figures[0] == figures[1]
    assert figures[0]["total"][0] == 50


def shown(histogram: DurationHistogram) -> list[Any]:
    """Return all figures of a histogram."""
    names = ("count", "weight", "sum_ns", "weighted_ns", "min_ns", "max_ns")
    return [*(getattr(histogram, name) for name in names), list(histogram.buckets())]


def test_hook_whose_rows_come_as_objects_has_no_text() -> None:
    rows, texts, joiner = plain(6).rows(["tcp_client/ready"]), SlimTexts(), Joiner()
    finished = joiner.feed(SlimHistory(rows[:50], texts))
    # As LineReader has it for what it does not read itself.
    texts.columns[0][texts.number(0, ("tcp_client", "recv", "", "\u00e9"))] = None
    finished += joiner.feed(SlimHistory(rows[50:], texts)) + joiner.finish()
    assert [one.outcome for one in finished if isinstance(one, Exchange)] == ["answered"] * 6


def test_connection_that_often_leaves_the_fast_path_is_tried_less_often() -> None:
    history = plain(400)
    rows = history.rows(["tcp_client/ready", "dev_xmit", "xdp_port"])
    # Every third read of the service is of another thread's process.
    reads = [
        at for at, row in enumerate(rows) if row.probe == "tcp_service" and row.point == "recv"
    ]
    for at in reads[::3]:
        rows[at] = attrs.evolve(rows[at], comm="other")
    joiner, texts, had = Joiner(), SlimTexts(), []
    for at in range(0, len(rows), 2):
        joiner.feed(SlimHistory(rows[at : at + 2], texts))
        had += [one.fast_path is not None for one in joiner.directory.conns.values()]
    half = len(had) // 2
    assert sum(had[:half]) > 4 * sum(had[half:])
