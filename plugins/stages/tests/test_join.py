"""Rows are joined to exchanges by byte ranges, whatever the segmentation."""

from __future__ import annotations

import gc
import itertools
import tracemalloc
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tcplat_stages.chain import ACCEPTED, HANDSHAKE_DONE, MILESTONES, STAGES
from tcplat_stages.connection import NO_EXCHANGES, Connection
from tcplat_stages.exchange import Exchange
from tcplat_stages.join import Joiner
from tcplat_stages.stream import NO_LOG, NO_SENDERS, NOT_SEEN

from .history import CLIENT, NETNS, SERVICE, SOCKETS, History, Row

DELAYS = st.lists(st.integers(1, 10_000_000), min_size=11, max_size=11)
TURNS = st.lists(
    st.tuples(DELAYS, st.integers(1, 100_000), st.integers(1, 100_000), st.integers(1, 6)),
    min_size=1,
    max_size=4,
)
NUMBERS = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
POINTS = ("nic_tx", "nic_rx", "rx_ip", "tcp_client", "ready", "tcp_service/recv")
PROBES = ("tcp_client", "tcp_service", "dev_xmit", "xdp_port")
SECOND = 1_000_000_000


def joined(rows: Sequence[Row], **how: Any) -> tuple[list[Exchange], list[Connection], Joiner]:
    joiner = Joiner(**how)
    finished = joiner.feed(rows) + joiner.finish()
    return (
        [one for one in finished if isinstance(one, Exchange)],
        [one for one in finished if isinstance(one, Connection)],
        joiner,
    )


def of_turns(
    turns: Any, first: tuple[int, int], seed: int, pause_ns: int = 1
) -> tuple[History, list[list[int]]]:
    """Draw a history of requests and replies in sequence, and the instants of each."""
    history, truth = History(first), []
    random = Random(seed)  # noqa: S311 - a history, no secret
    now = history.shake_hands() + 10_000
    for delays, asked, answered, pieces in turns:
        at = list(itertools.accumulate(delays, initial=now))
        history.message(CLIENT, asked, at[:6], pieces=pieces, random=random)
        history.message(SERVICE, answered, at[6:], pieces=pieces, random=random)
        truth.append(at)
        now = at[-1] + pause_ns
    history.close(now + 1_000)
    return history, truth


def shape(finished: Sequence[Exchange | Connection]) -> list[Any]:
    return [
        (one.number, one.stamps, one.retransmits, one.ended)
        if isinstance(one, Exchange)
        else (one.number, one.stamps, one.bytes_of(CLIENT), one.bytes_of(SERVICE), one.ended)
        for one in finished
    ]


@given(TURNS, NUMBERS, st.integers())
def test_stages_are_true_under_segmentation_loss_and_retransmission(
    turns: Any, first: tuple[int, int], seed: int
) -> None:
    history, truth = of_turns(turns, first, seed)
    # The client has no rx_ip, and no row says that the reply is ready.
    exchanges, connections, joiner = joined(history.rows(["tcp_client/ready"]))
    assert len(exchanges) == len(truth)
    for exchange, at, (delays, asked, answered, _) in zip(exchanges, truth, turns, strict=True):
        assert exchange.kind == "exchange"
        assert (exchange.request_bytes, exchange.reply_bytes) == (asked, answered)
        known = dict(zip(MILESTONES, exchange.stamps, strict=True))
        for name, when in zip(MILESTONES, at, strict=True):
            assert known[name] == (None if name == "reply_ready" else when), name
        parts = dict(exchange.split.stages)
        assert parts == {
            **dict(zip(STAGES[:9], delays[:9], strict=True)),
            "tcp_back+queue_back": delays[9] + delays[10],
        }
        assert exchange.total_ns == sum(delays)
    (conn,) = connections
    assert conn.bytes_of(CLIENT) == sum(turn[1] for turn in turns)
    assert conn.bytes_of(SERVICE) == sum(turn[2] for turn in turns)
    assert (conn.ended, conn.fins) == ("closed", [CLIENT, SERVICE])
    assert (joiner.cut, joiner.untimed, joiner.given_up) == (0, 0, 0)


@given(TURNS, NUMBERS, st.integers(), st.sets(st.sampled_from(POINTS)))
def test_missing_probes_merge_stages_and_never_falsify_them(
    turns: Any, first: tuple[int, int], seed: int, without: set[str]
) -> None:
    history, truth = of_turns(turns, first, seed)
    exchanges, _, _ = joined(history.rows(without))
    for exchange in exchanges:
        split = exchange.split
        assert sum(ns for _, ns in split.stages) + split.unexplained_ns == split.total_ns
        assert all(ns >= 0 for _, ns in split.stages)
    if "tcp_service/recv" in without:  # where one request ends is unknown
        return
    assert len(exchanges) == len(truth)
    for exchange, at in zip(exchanges, truth, strict=True):
        for name, when, real in zip(MILESTONES, exchange.stamps, at, strict=True):
            assert when in (None, real), name


@given(TURNS, NUMBERS, st.integers(), st.sets(st.sampled_from(PROBES), min_size=1))
def test_no_instant_comes_from_the_next_exchange(
    turns: Any, first: tuple[int, int], seed: int, kept: set[str]
) -> None:
    # A client that waits before it asks again: what belongs to the next exchange is far off.
    history, truth = of_turns(turns, first, seed, pause_ns=SECOND)
    exchanges, _, joiner = joined(history.rows(set(PROBES) - kept))
    for exchange in exchanges:
        assert any(
            all(when in (None, real) for when, real in zip(exchange.stamps, at, strict=True))
            for at in truth
        ), (exchange.stamps, truth)
        assert exchange.total_ns <= max(at[-1] - at[0] for at in truth)
    assert len(exchanges) + joiner.untimed + joiner.cut == len(truth)


def test_bytes_read_without_a_row_take_no_later_read_time() -> None:
    history = History()
    now = history.shake_hands() + 1_000
    # The second reply's body is read by splice(), say, which has no row; its head by recv().
    for body in (0, 5_000, 0):
        at = [now + 1_000 * step for step in range(12)]
        history.message(CLIENT, 100, at[:6])
        before = history.sent[SERVICE]
        history.message(SERVICE, 200 + body, at[6:])
        history.made = [
            row
            for row in history.made
            if (row.probe, row.point) != ("tcp_client", "recv") or row.ts_ns < at[6]
        ]
        history.socket(at[-1], CLIENT, "recv", seq=history.seq(SERVICE, before), bytes=200)
        now = at[-1] + SECOND
    for without in ((), ("tcp_service", "dev_xmit", "xdp_port"), ("dev_xmit", "xdp_port")):
        exchanges, _, _ = joined(history.rows(without))
        assert len(exchanges) >= 2
        assert max(one.total_ns for one in exchanges) <= 11_000
        assert [one.stamps[11] for one in exchanges if one.reply_bytes > 200] in ([None], [])


@given(TURNS, NUMBERS, st.integers(), st.lists(st.integers(1, 20)))
def test_batch_boundaries_do_not_change_the_exchanges(
    turns: Any, first: tuple[int, int], seed: int, sizes: list[int]
) -> None:
    rows = of_turns(turns, first, seed)[0].rows()
    at_once, in_parts = Joiner(), Joiner()
    finished = at_once.feed(rows) + at_once.finish()
    parts, rest = [], rows
    for size in sizes:
        parts += in_parts.feed(rest[:size])
        rest = rest[size:]
    parts += in_parts.feed(rest) + in_parts.finish()
    assert shape(parts) == shape(finished)


def simple(history: History, now: int, *, asked: int = 100, answered: int = 200) -> int:
    """Add a request and a reply, 1 µs for each stage; return when it is over."""
    at = [now + 1_000 * step for step in range(12)]
    history.message(CLIENT, asked, at[:6])
    history.message(SERVICE, answered, at[6:])
    return at[-1]


def test_handshake_is_split_into_stages() -> None:
    history = History()
    history.close(simple(history, history.shake_hands() + 500) + 500)
    (exchange,), (conn,), _ = joined(history.rows())
    assert exchange.conn is conn
    assert conn.handshake.stages == tuple(
        (name, 1_000) for name in ("connect_send", "syn", "answer", "synack", "connect_done")
    )
    assert (conn.connect_us, conn.accept_us, conn.began) == (5.0, 1.0, True)
    assert [end.pid for end in conn.ends] == [100, 101]


def test_accept_without_a_duration_is_no_handshake_instant() -> None:
    """It may be the row of the first use."""
    history = History()
    now = history.shake_hands()
    assert history.made.pop().point == "accept"
    history.socket(now + 5_000, SERVICE, "accept")
    history.close(simple(history, now + 6_000) + 500)
    _, (conn,), _ = joined(history.rows())
    assert conn.stamps[ACCEPTED] is conn.accept_us is None
    assert conn.stamps[HANDSHAKE_DONE] is not None


def test_pipelined_requests_are_separated_by_the_bytes_read() -> None:
    history = History()
    now = history.shake_hands() + 1_000
    # Three requests at once, and two replies before the client reads anything.
    for number in range(3):
        history.socket(now + number, CLIENT, "send", seq=history.seq(CLIENT, number * 10), bytes=10)
    history.socket(now + 10, SERVICE, "recv", seq=history.seq(CLIENT, 0), bytes=10)
    history.socket(now + 20, SERVICE, "send", seq=history.seq(SERVICE, 0), bytes=100)
    history.socket(now + 30, SERVICE, "recv", seq=history.seq(CLIENT, 10), bytes=20)
    history.socket(now + 40, SERVICE, "send", seq=history.seq(SERVICE, 100), bytes=50)
    history.socket(now + 41, SERVICE, "send", seq=history.seq(SERVICE, 150), bytes=50)
    history.socket(now + 50, CLIENT, "recv", seq=history.seq(SERVICE, 0), bytes=120)
    history.socket(now + 60, CLIENT, "recv", seq=history.seq(SERVICE, 120), bytes=80)
    history.sent = [30, 200]
    history.close(now + 100)
    (one, both), _, _ = joined(history.rows())
    assert (one.request_bytes, one.reply_bytes) == (10, 100)
    assert (both.request_bytes, both.reply_bytes) == (20, 100)
    assert [one.stamps[i] for i in (0, 5, 6, 11)] == [now, now + 10, now + 20, now + 50]
    # The first of the two began with its own send.
    assert [both.stamps[i] for i in (0, 5, 6, 11)] == [now + 1, now + 30, now + 40, now + 60]


def test_early_reply_gives_no_negative_time() -> None:
    history = History()
    now = history.shake_hands() + 1_000
    history.socket(now, CLIENT, "send", seq=history.seq(CLIENT, 0), bytes=100)
    history.socket(now + 10, SERVICE, "recv", seq=history.seq(CLIENT, 0), bytes=50)
    history.socket(now + 20, SERVICE, "send", seq=history.seq(SERVICE, 0), bytes=9)
    history.socket(now + 30, CLIENT, "recv", seq=history.seq(SERVICE, 0), bytes=9)
    history.socket(now + 40, SERVICE, "recv", seq=history.seq(CLIENT, 50), bytes=50)
    history.socket(now + 50, SERVICE, "send", seq=history.seq(SERVICE, 9), bytes=9)
    history.socket(now + 60, CLIENT, "recv", seq=history.seq(SERVICE, 9), bytes=9)
    history.sent = [100, 18]
    history.close(now + 100)
    exchanges, _, _ = joined(history.rows())
    assert [(one.request_bytes, one.reply_bytes) for one in exchanges] == [(50, 9), (50, 9)]
    # Both halves were handed over by one call.
    assert [one.stamps[0] for one in exchanges] == [now, now]


def test_request_without_reply_and_unsolicited_push_are_separate() -> None:
    history = History()
    now = history.shake_hands() + 1_000
    history.message(SERVICE, 30, [now + step for step in range(6)])
    history.message(CLIENT, 40, [now + 100 + step for step in range(6)])
    history.close(now + 1_000)
    (greeting, last), _, _ = joined(history.rows())
    assert (greeting.kind, greeting.reply_bytes, greeting.request_bytes) == ("push", 30, 0)
    assert [name for name, _ in greeting.split.stages][:2] == ["server_send", "wire_back"]
    assert (last.kind, last.request_bytes, last.reply_bytes) == ("request", 40, 0)
    assert [name for name, _ in last.split.stages] == list(STAGES[:5])


def test_reply_after_a_half_close_is_paired() -> None:
    history = History()
    now = history.shake_hands() + 1_000
    history.message(CLIENT, 40, [now + step for step in range(6)])
    history.socket(now + 10, CLIENT, "state", old_state="TCP_ESTABLISHED", state="TCP_FIN_WAIT1")
    history.packet(now + 11, "nic_tx", CLIENT, 40, flags="FIN|ACK")
    # The wake-up for the FIN counts it.
    history.socket(now + 12, SERVICE, "ready", seq=history.seq(CLIENT, 40), bytes=1)
    history.socket(now + 13, SERVICE, "recv", seq=history.seq(CLIENT, 40), bytes=0)
    history.message(SERVICE, 30, [now + 100 + step for step in range(6)])
    history.close(now + 1_000)
    (exchange,), (conn,), _ = joined(history.rows())
    assert (exchange.request_bytes, exchange.reply_bytes) == (40, 30)
    assert conn.fins == [CLIENT, SERVICE]


def test_refused_send_does_not_begin_a_request() -> None:
    history = History()
    now = history.shake_hands() + 1_000
    history.socket(now, CLIENT, "send", seq=history.seq(CLIENT, 0), bytes=100)
    history.socket(now + 1, CLIENT, "send_short", seq=history.seq(CLIENT, 60), bytes=40)
    history.socket(now + 2, CLIENT, "send", seq=history.seq(CLIENT, 60), bytes=40)
    history.socket(now + 3, CLIENT, "send_short", seq=history.seq(CLIENT, 60), bytes=40)
    history.socket(now + 9, SERVICE, "recv", seq=history.seq(CLIENT, 0), bytes=60)
    history.message(SERVICE, 30, [now + 100 + step for step in range(6)])
    history.sent[CLIENT] = 60
    history.close(now + 1_000)
    (exchange,), (conn,), _ = joined(history.rows())
    assert (exchange.stamps[0], exchange.request_bytes) == (now, 60)
    assert conn.bytes_of(CLIENT) == 60


def test_reused_port_is_a_new_connection() -> None:
    one, other = History(), History((7, 7), by_sock=(33, 44))
    one.close(simple(one, one.shake_hands() + 500) + 500)
    later = simple(other, other.shake_hands(100_000) + 500)
    other.close(later + 500)
    exchanges, connections, _ = joined(one.rows() + other.rows())
    assert [(exchange.conn.number, len(exchange.split.stages)) for exchange in exchanges] == [
        (connections[0].number, 11),
        (connections[1].number, 11),
    ]
    assert [conn.ended for conn in connections] == ["closed", "closed"]


@pytest.mark.parametrize("flags", ["SYN", "SYN|ECE|CWR"])
def test_syn_with_another_sequence_number_is_a_new_connection(flags: str) -> None:
    one, other = History(), History((7, 7))
    simple(one, one.shake_hands() + 500)
    simple(other, other.shake_hands(100_000) + 500)
    rows = one.rows() + other.rows()
    packets = [row for row in rows if row.probe in ("xdp_port", "dev_xmit")]
    for row in packets:
        row.flags = flags if row.flags == "SYN" else row.flags
    exchanges, connections, _ = joined(packets)
    assert [conn.ended for conn in connections] == ["port reused", "end of run"]
    assert [exchange.conn for exchange in exchanges] == connections
    assert not any(conn.guessed for conn in connections)


def test_connection_without_an_observed_end_ends_at_port_reuse() -> None:
    one, other = History(), History((7, 7), by_sock=(33, 44))
    simple(one, one.shake_hands() + 500)
    simple(other, other.shake_hands(100_000) + 500)
    exchanges, connections, _ = joined(one.rows() + other.rows())
    assert [conn.ended for conn in connections] == ["port reused", "end of run"]
    assert [len(exchange.split.stages) for exchange in exchanges] == [11, 11]


def test_equal_loopback_addresses_in_two_namespaces_are_two_connections() -> None:
    ends = [("127.0.0.1", 40_000), ("127.0.0.1", 80)]
    histories = [
        History(netns=(number, number), ends=ends, by_sock=(number, number + 50), first=(number, 9))
        for number in (1, 2)
    ]
    for offset, history in enumerate(histories):
        history.close(simple(history, history.shake_hands(1_000 + offset) + 500) + 500)
    rows = sorted(histories[0].rows() + histories[1].rows(), key=lambda row: row.ts_ns)
    exchanges, connections, _ = joined(rows)
    assert len(connections) == 2
    assert [len(exchange.split.stages) for exchange in exchanges] == [11, 11]
    assert {exchange.total_ns for exchange in exchanges} == {11_000}


def test_router_on_the_path_is_neither_end() -> None:
    history = History()
    now = history.shake_hands() + 500
    history.close(simple(history, now) + 500)
    for row in list(history.made):
        if row.point in ("nic_tx", "nic_rx") and row.bytes:
            shift = 300 if row.point == "nic_tx" else -300
            there = attrs.evolve(row, netns=77, ts_ns=row.ts_ns + shift, dev="r0", ifname="r0")
            history.made.append(there)
    (exchange,), (conn,), _ = joined(history.rows())
    assert {ns for _, ns in exchange.split.stages} == {1_000}
    assert conn.retransmits == 0


def test_bond_and_its_member_do_not_count_as_a_retransmit() -> None:
    history = History()
    history.close(simple(history, history.shake_hands() + 500) + 500)
    for row in list(history.made):
        if row.point == "nic_tx":
            history.made.append(attrs.evolve(row, ts_ns=row.ts_ns + 10, dev="eth0"))
    (exchange,), (conn,), _ = joined(history.rows())
    assert (exchange.retransmits, conn.retransmits, conn.syns) == (0, 0, 0)


def test_retransmits_are_counted_with_their_exchange() -> None:
    history = History()
    now = history.shake_hands() + 500
    over = simple(history, now)
    history.packet(now + 1_500, "nic_tx", CLIENT, 0, 100)
    history.packet(over - 3_500, "nic_tx", SERVICE, 0, 200)
    history.packet(over - 3_400, "nic_tx", SERVICE, 0, 200)
    last = simple(history, over + 1_000)
    history.close(last + 500)
    (one, other), (conn,), _ = joined(history.rows())
    assert (one.retransmits, other.retransmits) == (3, 0)
    assert [conn.retransmits_of(end) for end in (CLIENT, SERVICE)] == [1, 2]


def test_zero_window_is_counted_once_until_it_opens() -> None:
    history = History()
    now = history.shake_hands() + 500
    over = simple(history, now)
    for step, window in enumerate((0, 0, 300, 0)):
        history.packet(over - 5_000 + step, "nic_tx", CLIENT, 100, window=window)
        history.packet(over - 4_990 + step, "nic_rx", CLIENT, 100, window=window)
    history.close(over + 500)
    (exchange,), (conn,), _ = joined(history.rows())
    assert exchange.zero_windows == 2
    assert [flow.zero_windows for flow in conn.flows] == [2, 0]


def test_retransmitted_syn_is_part_of_the_handshake() -> None:
    history = History()
    history.packet(1_500, "nic_tx", CLIENT, -1, flags="SYN")
    over = history.shake_hands()
    history.close(simple(history, over + 500) + 500)
    _, (conn,), _ = joined(history.rows())
    assert conn.syns == 1
    assert dict(conn.handshake.stages)["syn"] == 1_500


@pytest.mark.parametrize(
    ("flags", "reset_by", "why"),
    [("RST|ACK", SERVICE, "no listener at that port"), (None, None, None)],
)
def test_refused_connect_is_a_reset_if_the_rst_was_seen(
    flags: str | None, reset_by: int | None, why: str | None
) -> None:
    """An ICMP error refuses a connect as well: then no end has reset it."""
    history = History()
    history.socket(1_000, CLIENT, "connect", sport=None, state="TCP_SYN_SENT")
    history.packet(1_100, "nic_tx", CLIENT, -1, flags="SYN")
    if flags:
        ack = history.seq(CLIENT, 0)
        history.packet(1_900, "nic_tx", SERVICE, 0, flags=flags, seq=0, ack=ack)
    failed = {"desc": "refused", "old_state": "TCP_SYN_SENT", "state": "TCP_CLOSE"}
    history.socket(2_000, CLIENT, "state", **failed)
    history.socket(2_100, CLIENT, "close", state="TCP_CLOSE")
    _, (conn,), _ = joined(history.rows())
    assert (conn.reset_by, conn.reset_why, conn.error) == (reset_by, why, "refused")


def test_reset_sender_follows_from_the_socket_that_got_the_error() -> None:
    history = History()
    history.socket(1_000, CLIENT, "connect", sport=None, state="TCP_SYN_SENT")
    history.packet(1_100, "nic_tx", CLIENT, -1, flags="SYN")
    history.socket(1_200, CLIENT, "state", old_state="TCP_SYN_SENT", connect_us=1.0)
    failed = {"desc": "ECONNRESET", "old_state": "TCP_ESTABLISHED", "state": "TCP_CLOSE"}
    history.socket(2_000, CLIENT, "state", **failed)
    history.socket(2_100, CLIENT, "close", state="TCP_CLOSE")
    _, (conn,), _ = joined(history.rows())
    assert (conn.reset_by, conn.reset_why, conn.error) == (SERVICE, None, "ECONNRESET")


def test_close_with_unread_data_is_the_reset_reason() -> None:
    history = History()
    now = history.shake_hands() + 500
    history.socket(now, CLIENT, "send", seq=history.seq(CLIENT, 0), bytes=100)
    history.packet(now + 1, "nic_rx", CLIENT, 0, 100)
    history.socket(now + 2, SERVICE, "ready", seq=history.seq(CLIENT, 0), bytes=100)
    history.packet(now + 3, "nic_tx", SERVICE, 0, flags="RST|ACK")
    history.socket(now + 4, SERVICE, "close", state="TCP_CLOSE")
    history.socket(
        now + 5, CLIENT, "state", old_state="TCP_ESTABLISHED", state="TCP_CLOSE", desc="ECONNRESET"
    )
    history.socket(now + 6, CLIENT, "close", state="TCP_CLOSE")
    (exchange,), (conn,), _ = joined(history.rows())
    assert (conn.reset_by, conn.reset_why) == (SERVICE, "it closed with unread data")
    # The request was never read; its known stages are emitted.
    assert (exchange.kind, exchange.request_bytes, exchange.stamps[5]) == ("request", 100, None)


def test_data_after_close_are_not_unread_data() -> None:
    history = History()
    now = simple(history, history.shake_hands())
    history.packet(now + 10, "nic_tx", SERVICE, 200, flags="FIN|ACK")
    history.socket(now + 11, SERVICE, "state", old_state="TCP_ESTABLISHED", state="TCP_FIN_WAIT1")
    history.socket(now + 12, SERVICE, "close", state="TCP_CLOSE")
    history.socket(now + 20, CLIENT, "send", seq=history.seq(CLIENT, 100), bytes=50)
    history.packet(now + 21, "nic_tx", CLIENT, 100, 50)
    history.packet(now + 22, "nic_rx", CLIENT, 100, 50)
    history.packet(now + 23, "nic_tx", SERVICE, 201, flags="RST")
    history.socket(now + 30, CLIENT, "close", state="TCP_CLOSE")
    _, (conn,), _ = joined(history.rows())
    assert (conn.reset_by, conn.reset_why) == (SERVICE, "data came after it had closed")


def test_abandoned_connect_did_not_succeed() -> None:
    history = History()
    history.socket(1_000, CLIENT, "connect", sport=None, state="TCP_SYN_SENT")
    history.packet(1_100, "nic_tx", CLIENT, -1, flags="SYN")
    history.socket(
        2_000,
        CLIENT,
        "state",
        old_state="TCP_SYN_SENT",
        state="TCP_CLOSE",
        desc="given up",
        connect_us=1.0,
    )
    history.socket(2_100, CLIENT, "close", state="TCP_CLOSE")
    _, (conn,), _ = joined(history.rows())
    assert (conn.connect_us, conn.error) == (1.0, "given up")


def test_fin_is_not_counted_as_a_byte_or_unread_data() -> None:
    history = History()
    now = history.shake_hands() + 500
    history.message(CLIENT, 40, [now + step for step in range(6)])
    history.socket(now + 10, CLIENT, "state", old_state="TCP_ESTABLISHED", state="TCP_FIN_WAIT1")
    history.socket(now + 12, SERVICE, "ready", seq=history.seq(CLIENT, 40), bytes=1)
    history.packet(now + 20, "nic_tx", SERVICE, 0, flags="RST|ACK")
    history.socket(now + 21, SERVICE, "close", state="TCP_CLOSE")
    _, (conn,), _ = joined(history.rows(["tcp_client"]))
    assert conn.bytes_of(CLIENT) == 40
    assert (conn.reset_by, conn.reset_why) == (SERVICE, "it aborted")


def test_reset_has_no_reason_without_packet_rows() -> None:
    history = History()
    now = history.shake_hands() + 500
    history.message(CLIENT, 40, [now + step for step in range(6)])
    history.socket(now + 10, SERVICE, "send", seq=history.seq(SERVICE, 0), bytes=10)
    history.packet(now + 20, "nic_tx", CLIENT, 40, flags="RST|ACK")
    history.socket(now + 21, CLIENT, "close", state="TCP_CLOSE")
    _, (conn,), _ = joined(history.rows())
    assert (conn.reset_by, conn.reset_why) == (CLIENT, None)


def test_exchange_begun_before_the_capture_is_counted_alone() -> None:
    history = History()
    now = simple(history, 10_000)
    history.close(simple(history, now + 1_000) + 500)
    for begin in (12_500, 16_500, 20_500):
        rows = [row for row in history.rows() if row.ts_ns > begin]
        exchanges, (conn,), joiner = joined(rows)
        assert [exchange.total_ns for exchange in exchanges] == [11_000]
        assert joiner.cut == 1
        assert not conn.began


def test_packets_alone_make_an_exchange_with_guessed_roles() -> None:
    history = History()
    now = simple(history, 10_000)
    simple(history, now + 1_000)
    rows = [row for row in history.rows() if row.probe in ("xdp_port", "dev_xmit")]
    exchanges, (conn,), _ = joined(rows)
    assert conn.guessed
    assert conn.client == ("10.0.0.1", 40_000)
    assert [exchange.split.stages for exchange in exchanges] == [
        (("wire", 1_000), ("softirq+tcp+queue+server+server_send", 5_000), ("wire_back", 1_000))
    ] * 2


def test_wrong_role_guess_is_corrected_by_socket_rows() -> None:
    ends = (("10.0.0.1", 80), ("10.0.0.2", 40_000))
    history = History(ends=ends)
    now = simple(history, 10_000)
    history.close(simple(history, now + 1_000) + 500)
    rows = [row for row in history.rows() if row.ts_ns > 10_500]
    exchanges, (conn,), _ = joined(rows)
    assert (conn.client, conn.guessed) == (ends[CLIENT], False)
    assert exchanges[-1].total_ns == 11_000


def test_exchange_begins_with_its_first_stage() -> None:
    exchange = Exchange(Connection(1, Row(1, "send")), "exchange")
    # As far apart as clocks of two CPUs never are: an instant before the first one.
    exchange.stamps[0], exchange.stamps[3] = 1_000_000, 400_000
    exchange.stamps[6], exchange.stamps[11] = 2_000_000, 3_000_000
    assert exchange.split.left_out == (3,)
    assert (exchange.began_ns, exchange.total_ns) == (1_000_000, 2_000_000)


def test_wrong_role_guess_is_corrected_for_close_and_reset() -> None:
    history = History(ends=(("10.0.0.1", 80), ("10.0.0.2", 40_000)))
    history.packet(1_000, "nic_rx", CLIENT, 0, 10)
    history.packet(2_000, "nic_rx", CLIENT, 10, flags="FIN|ACK")
    history.packet(2_500, "nic_rx", CLIENT, 11, flags="RST")
    joiner = Joiner()
    joiner.feed(history.rows())
    (conn,) = joiner.directory.conns.values()
    assert (conn.guessed, conn.fins, conn.reset_by) == (True, [SERVICE], SERVICE)
    history = History(ends=history.ends)
    history.socket(3_000, SERVICE, "recv", seq=history.seq(CLIENT, 0), bytes=10)
    joiner.feed(history.rows())
    assert (conn.guessed, conn.fins, conn.reset_by) == (False, [CLIENT], CLIENT)
    assert conn.fin_ns == [2_000, 0]


def test_role_guess_confirmed_by_a_socket_is_certain() -> None:
    history = History()
    simple(history, 10_000)
    _, (conn,), _ = joined(history.rows())
    assert (conn.client, conn.guessed) == (("10.0.0.1", 40_000), False)


def test_missing_row_costs_no_other_exchange() -> None:
    history, now = History(), 10_000
    for _ in range(5):
        now = simple(history, now + 1_000)
    rows = [row for row in history.rows() if row.probe in ("xdp_port", "dev_xmit")]
    whole, _, _ = joined(rows)
    assert len(whole) == 5
    # That of the first byte of all is the beginning of the capture.
    missing = [row for row in rows if row.point == "nic_rx" and row.bytes][2:]
    for gone in missing:
        exchanges, (conn,), _ = joined([row for row in rows if row is not gone])
        assert [
            (one.request_bytes, one.reply_bytes, one.stamps[1], one.stamps[7]) for one in exchanges
        ] == [(one.request_bytes, one.reply_bytes, one.stamps[1], one.stamps[7]) for one in whole]
        assert (
            sum(one.stamps != other.stamps for one, other in zip(exchanges, whole, strict=True))
            == 1
        )
        assert (conn.bytes_of(CLIENT), conn.bytes_of(SERVICE)) == (500, 1_000)


def test_acknowledged_fin_is_not_a_byte() -> None:
    history = History()
    now = simple(history, 10_000)
    history.packet(now + 100, "nic_rx", CLIENT, 100, flags="FIN|ACK")
    history.sent[CLIENT] = 101
    history.packet(now + 200, "nic_tx", SERVICE, 200, 50)
    _, (conn,), _ = joined([row for row in history.rows() if not row.sock])
    assert conn.bytes_of(CLIENT) == 100


def test_earlier_push_is_not_part_of_the_next_reply() -> None:
    history = History()
    now = history.shake_hands()
    history.packet(now + 1_000, "nic_rx", CLIENT, 0, 10)
    for number in range(3):
        history.packet(now + 2_000 + number * 1_000, "nic_tx", SERVICE, 10 * number, 10)
    history.packet(now + 100_000, "nic_rx", CLIENT, 10, 10)
    history.packet(now + 150_000, "nic_tx", SERVICE, 0, 45)
    exchanges, _, _ = joined(
        [row for row in history.rows() if row.probe in ("xdp_port", "dev_xmit")]
    )
    assert [(one.reply_bytes, one.total_ns) for one in exchanges] == [(30, 3_000), (15, 50_000)]


def test_byte_counts_survive_a_lost_send_row() -> None:
    history = History()
    now = history.shake_hands()
    history.socket(now + 1_000, CLIENT, "send", seq=history.seq(CLIENT, 0), bytes=10)
    history.socket(now + 3_000, CLIENT, "send", seq=history.seq(CLIENT, 1_010), bytes=10)
    short = history.socket(now + 4_000, CLIENT, "send_short", seq=history.seq(CLIENT, 1_500))
    short.bytes = 980
    _, (conn,), _ = joined(history.rows())
    assert conn.bytes_of(CLIENT) == 1_500


def test_next_request_before_the_reply_is_read_adds_no_think_time() -> None:
    history = History()
    now = simple(history, history.shake_hands())
    asked = history.sent[CLIENT]
    replied = history.sent[SERVICE]
    for point, at, end, sender, byte, count in (
        ("send", 1_000_000, CLIENT, CLIENT, asked, 10),
        ("recv", 2_000_000, SERVICE, CLIENT, asked, 10),
        ("send", 5_000_000, SERVICE, SERVICE, replied, 10),
        # The reply is on its way.
        ("send", 5_100_000, CLIENT, CLIENT, asked + 10, 10),
        ("recv", 5_200_000, CLIENT, SERVICE, replied, 10),
        ("recv", 6_000_000, SERVICE, CLIENT, asked + 10, 10),
        ("send", 6_100_000, SERVICE, SERVICE, replied + 10, 10),
        ("recv", 6_200_000, CLIENT, SERVICE, replied + 10, 10),
        ("send", 8_200_000, CLIENT, CLIENT, asked + 20, 10),
    ):
        history.socket(now + at, end, point, seq=history.seq(sender, byte), bytes=count)
    _, (conn,), _ = joined(history.rows())
    assert conn.think_ns == 1_000_000 + 2_000_000


def test_refused_sends_do_not_end_the_think_time() -> None:
    history = History()
    now = simple(history, history.shake_hands())
    for attempt in (1, 2, 3):
        for point in ("send", "send_short"):
            at = now + attempt * 1_000_000 + (point != "send")
            history.socket(at, CLIENT, point, seq=history.seq(CLIENT, 100), bytes=10)
    history.socket(now + 4_000_000, CLIENT, "send", seq=history.seq(CLIENT, 100), bytes=10)
    _, (conn,), _ = joined(history.rows())
    assert conn.think_ns == 4_000_000
    assert conn.bytes_of(CLIENT) == 110


def test_packet_rows_without_a_device_are_joined() -> None:
    class Plain:
        def __init__(self, row: Row) -> None:
            self.role = {"no": "text"}
            for name in (field.name for field in attrs.fields(Row)):
                if name not in ("dev", "window", "ack", "role"):
                    setattr(self, name, getattr(row, name))
            self.time_ns = row.time_ns

    history = History()
    simple(history, 10_000)
    unrelated = history.socket(9_000, CLIENT, "send", seq=1, bytes=1)
    unrelated.probe = "another"
    rows = [row for row in history.rows() if not row.sock or row is unrelated]
    exchanges, _, _ = joined([Plain(row) for row in rows])  # type: ignore[misc]
    assert [exchange.total_ns for exchange in exchanges] == [8_000]


def test_idle_connection_ends_its_reply() -> None:
    history, other = History(), History(ends=(("10.9.9.9", 1), ("10.9.9.8", 2)), by_sock=(5, 6))
    over = simple(history, history.shake_hands() + 500)
    other.shake_hands(over + 11 * SECOND)
    joiner = Joiner()
    assert joiner.feed(history.rows()) == []
    (exchange,) = joiner.feed(other.rows())
    assert isinstance(exchange, Exchange)
    assert (exchange.ended, exchange.total_ns) == ("idle", 11_000)
    # And the connection goes on.
    later = History()
    later.sent = [100, 200]
    simple(later, over + 12 * SECOND)
    finished = joiner.feed(later.rows()) + joiner.finish()
    assert [one.total_ns for one in finished if isinstance(one, Exchange)] == [11_000]


def test_memory_is_bounded_and_evictions_are_counted() -> None:
    rows: list[Row] = []
    for number in range(100):
        history = History(
            ends=(("10.0.0.1", 1_000 + number), ("10.0.0.2", 80)),
            by_sock=(number + 1, number + 1_000),
        )
        simple(history, history.shake_hands(1_000 + 20_000 * number) + 100)
        rows += history.rows()
    exchanges, connections, joiner = joined(rows, most=10)
    assert len(connections) == len(exchanges) == 100
    assert [conn.ended for conn in connections].count("given up") == joiner.given_up >= 90


def test_long_transfer_keeps_a_bounded_log() -> None:
    history = History()
    now = history.shake_hands() + 1_000
    history.message(CLIENT, 10, [now + step for step in range(6)])
    for number in range(20_000):
        at = now + 100 + number * 10
        seq = history.seq(SERVICE, number * 1_000)
        history.socket(at, SERVICE, "send", seq=seq, bytes=1_000)
        history.packet(at + 1, "nic_tx", SERVICE, number * 1_000, 1_000)
        history.packet(at + 2, "nic_rx", SERVICE, number * 1_000, 1_000)
        history.socket(at + 3, CLIENT, "recv", seq=seq, bytes=1_000)
    history.sent[SERVICE] = 20_000_000
    joiner, longest = Joiner(), 0
    for row in history.rows():
        joiner.feed([row])
        for conn in joiner.directory.conns.values():
            longest = max(longest, *(len(log) for log in conn.flows[SERVICE].logs()))
    assert longest < 300
    (exchange,) = [one for one in joiner.finish() if isinstance(one, Exchange)]
    assert exchange.reply_bytes == 20_000_000
    assert exchange.stamps[7:9] == [at + 1, at + 2]


def test_endless_push_keeps_a_bounded_log() -> None:
    history = History()
    now = history.shake_hands()
    joiner = Joiner()
    joiner.feed(history.rows(without=["tcp_client"]))
    for number in range(20_000):
        history = History()
        seq = history.seq(SERVICE, number * 10)
        history.socket(now + number, SERVICE, "send", seq=seq, bytes=10)
        joiner.feed(history.rows())
    (conn,) = joiner.directory.conns.values()
    assert all(len(log) < 300 for log in conn.flows[SERVICE].logs())


def test_durations_of_40000_waiting_requests_are_exact() -> None:
    history, sends, gap = History(), 40_000, 10_000
    now = history.shake_hands()
    for number in range(sends):
        history.socket(now + number * gap, CLIENT, "send", seq=history.seq(CLIENT, number), bytes=1)
    truth = []
    for number in range(5):
        at = now + sends * gap + number * 1_000_000
        history.socket(at, SERVICE, "recv", seq=history.seq(CLIENT, number), bytes=1)
        history.socket(at + 10, SERVICE, "send", seq=history.seq(SERVICE, number), bytes=1)
        history.socket(at + 20, CLIENT, "recv", seq=history.seq(SERVICE, number), bytes=1)
        truth.append(at + 20 - (now + number * gap))
    exchanges, _, _ = joined(history.rows())
    # Of eight sends one is still kept: three times 16,384 came.
    for exchange, total_ns in zip(exchanges, truth, strict=False):
        assert total_ns - 8 * gap <= exchange.total_ns <= total_ns


def test_unread_replies_are_emitted_eventually() -> None:
    history, joiner = History(), Joiner()
    now = history.shake_hands()
    for number in range(17_000):
        at = now + number * 1_000
        for end, point, sender in (
            (CLIENT, "send", CLIENT),
            (SERVICE, "recv", CLIENT),
            (SERVICE, "send", SERVICE),
        ):
            at += 100
            history.socket(at, end, point, seq=history.seq(sender, number), bytes=1)
    finished = joiner.feed(history.rows())
    (conn,) = joiner.directory.conns.values()
    assert len(finished) + len(conn.waiting) == 16_999
    assert 500 < len(finished) < 700
    assert {one.total_ns for one in finished if isinstance(one, Exchange)} == {200}


def scan(count: int, *, answered: bool = False) -> list[Row]:
    """SYNs from as many ports, a microsecond apart; each one may be refused at once."""
    rows = []
    for number in range(count):
        one = History(ends=(("10.0.0.9", 1 + number), ("10.0.0.2", 80)))
        at = SECOND + number * 1_000
        one.packet(at, "nic_rx", CLIENT, -1, flags="SYN")
        if answered:
            one.packet(at + 10, "nic_tx", SERVICE, -1, seq=0, flags="ACK|RST")
        rows += one.rows()
    return rows


def test_port_scan_evicts_no_connection() -> None:
    history = History()
    now = history.shake_hands()
    history.message(CLIENT, 10, [now + step for step in range(6)])
    history.message(SERVICE, 20, [2 * SECOND + step for step in range(6)])
    rows = history.rows()
    before = [row for row in rows if row.ts_ns < SECOND]
    joiner = Joiner(most=64)
    finished = joiner.feed([*before, *scan(1_000), *rows[len(before) :]])
    assert len(joiner.directory.conns) <= 1 + 64 // 4
    assert joiner.given_up == 1_000 - 64 // 4
    finished += joiner.finish()
    (exchange,) = [one for one in finished if isinstance(one, Exchange)]
    assert exchange.outcome == "answered"
    assert len([one for one in finished if isinstance(one, Connection)]) == 1_001


def test_refused_port_scan_is_closed_and_not_evicted() -> None:
    _, connections, joiner = joined(scan(1_000, answered=True), most=64)
    assert len(connections) == 1_000
    assert joiner.given_up == 0
    assert [conn.ended for conn in connections].count("closed") == 1_000 - 64 // 4


def test_established_connection_is_not_evicted_by_syns() -> None:
    history = History()
    now = history.shake_hands()
    history.message(CLIENT, 10, [now + step for step in range(6)])
    joiner = Joiner(most=64)
    joiner.feed([*history.rows(without=SOCKETS), *scan(1_000)])
    assert 1 in joiner.directory.conns


def test_port_scan_entry_takes_little_memory() -> None:
    rows, joiner = scan(4_000), Joiner()
    tracemalloc.start()
    try:
        joiner.feed(rows)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(joiner.directory.conns) == len(rows)
    assert used / len(rows) < 2_600


def test_shared_empty_objects_stay_empty() -> None:
    history, _ = of_turns([([10] * 11, 100_000, 100_000, 6)] * 4, (1_000, 5_000), 1)
    joined(history.rows())
    joined(scan(100, answered=True), most=8)
    assert not NO_LOG
    assert not NO_SENDERS
    assert not NO_EXCHANGES
    assert (NOT_SEEN.position, NOT_SEEN.log, NOT_SEEN.late) == (-1, [], None)


def test_unfilled_sequence_hole_uses_bounded_memory() -> None:
    history = History()
    for number in range(10_000):
        if number != 5:
            history.packet(number, "nic_rx", CLIENT, number * 10, 10)
    joiner = Joiner()
    joiner.feed(history.rows())
    (conn,) = joiner.directory.conns.values()
    assert len(conn.flows[CLIENT].nic.late or ()) < 5_000
    assert conn.bytes_of(CLIENT) == 100_000


def test_ended_connections_leave_no_entries() -> None:
    joiner = Joiner()
    for number in range(50):
        history = History(
            ends=(("10.0.0.1", 1_000 + number), ("10.0.0.2", 80)),
            by_sock=(number + 1, number + 1_000),
        )
        history.close(simple(history, history.shake_hands(number * SECOND) + 100) + 100)
        joiner.feed(history.rows())
        assert len(joiner.directory.by_addresses) + len(joiner.directory.by_packet) < 20
    assert not joiner.directory.conns
    assert not joiner.directory.by_sock


def test_ended_connections_are_freed_without_the_garbage_collector() -> None:
    def alive() -> int:
        return sum(isinstance(one, Connection) for one in gc.get_objects())

    joiner, kept = Joiner(), []
    gc.collect()
    gc.freeze()  # what there was before is then not looked at: there is much of it
    gc.disable()
    try:
        for number in range(50):
            history = History(
                ends=(("10.0.0.1", 1_000 + number), ("10.0.0.2", 80)),
                by_sock=(number + 1, number + 1_000),
            )
            history.close(simple(history, history.shake_hands(number * SECOND) + 100) + 100)
            joiner.feed(history.rows())
            kept.append(alive())
    finally:
        gc.enable()
        gc.unfreeze()
    assert 0 < max(kept) < 10


def test_replaced_connections_are_removed_safely() -> None:
    rows: list[Row] = []
    for number in range(4):
        history = History(first=(1_000 * number, 5_000), by_sock=(number + 1, number + 99))
        simple(history, history.shake_hands(number * 5 * SECOND) + 100)
        rows += history.rows()
    exchanges, connections, _ = joined(rows)
    assert [conn.ended for conn in connections] == ["port reused"] * 3 + ["end of run"]
    assert len(exchanges) == 4


def test_both_ends_may_share_a_namespace() -> None:
    history = History(netns=(NETNS[0], NETNS[0]))
    history.close(simple(history, history.shake_hands() + 500) + 500)
    (exchange,), _, _ = joined(history.rows())
    assert len(exchange.split.stages) == 11


@pytest.mark.parametrize("watched", [PROBES, ("tcp_client",), ("tcp_service",)])
def test_urgent_bytes_are_not_counted_in_the_stream(watched: tuple[str, ...]) -> None:
    history = History()
    now = history.shake_hands() + 1_000
    for urgent in (1, 1, 3, 0):
        now = simple(history, now) + 1_000
        for _ in range(urgent):  # send(MSG_OOB): a packet, and no row of a call at either end
            history.packet(now, "nic_tx", CLIENT, history.sent[CLIENT], 1, flags="PSH|ACK|URG")
            history.packet(now + 10, "rx_ip", CLIENT, history.sent[CLIENT], 1, flags="PSH|ACK|URG")
            history.sent[CLIENT] += 1
            now += 100
    history.close(now + SECOND)
    exchanges, (conn,), _ = joined(history.rows(set(PROBES) - set(watched)))
    first = exchanges[0].request_bytes
    assert [one.request_bytes for one in exchanges] == [first] * 4
    assert conn.bytes_of(CLIENT) == 4 * first


def test_trailing_urgent_byte_is_no_request() -> None:
    history = History()
    now = simple(history, history.shake_hands() + 1_000) + 1_000
    history.packet(now, "nic_tx", CLIENT, history.sent[CLIENT], 1, flags="PSH|ACK|URG")
    stream = history.sent[CLIENT]
    history.sent[CLIENT] += 1
    history.close(now + SECOND)
    exchanges, (conn,), _ = joined(history.rows())
    assert [one.outcome for one in exchanges] == ["answered"]
    assert conn.bytes_of(CLIENT) == stream


def test_missing_rows_are_not_taken_for_urgent_bytes() -> None:
    history = History()
    now = simple(history, history.shake_hands() + 1_000) + 1_000
    now = simple(history, now) + 1_000
    last = simple(history, now)
    history.close(last + SECOND)
    sends = [row for row in history.rows() if (row.probe, row.point) == ("tcp_client", "send")]
    missed = [row for row in sends if row.seq is not None and now > row.ts_ns > sends[0].ts_ns]
    _, (conn,), _ = joined([row for row in history.rows() if row not in missed[-1:]])
    assert conn.bytes_of(CLIENT) == history.sent[CLIENT]


def connection_of(number: int) -> Iterator[Any]:
    """As in a capture: texts are not shared between rows."""
    history = History(
        ends=(("10.0.0.1", 1000 + number), ("10.0.0.2", 80)),
        by_sock=(2 * number + 1, 2 * number + 2),
    )
    now = history.shake_hands(number * 1_000)
    at = [now + 1_000 * step for step in range(13)]
    history.message(CLIENT, 100, at[:6])
    history.message(SERVICE, 200, at[6:12])
    for row in history.rows():
        for name in ("saddr", "daddr", "state", "comm", "ifname", "dev"):
            text = getattr(row, name)
            if text:
                setattr(row, name, f" {text}"[1:])
        yield row


def test_open_connection_takes_little_memory() -> None:
    count = 300
    joiner = Joiner()
    joiner.feed(list(connection_of(0)))
    tracemalloc.start()
    try:
        for number in range(1, count + 1):
            joiner.feed(list(connection_of(number)))
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used / count < 7_000
