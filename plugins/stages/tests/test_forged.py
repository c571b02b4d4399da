"""Packets that the kernel ignores: they must not change what is said of the connection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tcplat_stages.connection import Connection
from tcplat_stages.exchange import Exchange
from tcplat_stages.join import Joiner

from .history import CLIENT, SERVICE, History, Row

SECOND = 1_000_000_000
CALLS = ("state", "accept", "send", "recv", "ready", "close")
SOCKETS = ("tcp_client", *(f"tcp_service/{point}" for point in CALLS))
PROBES = ("tcp_client", "tcp_service", "dev_xmit", "xdp_port")
RESET = {"old_state": "TCP_ESTABLISHED", "state": "TCP_CLOSE", "desc": "ECONNRESET"}
ends = st.sampled_from([CLIENT, SERVICE])
some_probes = st.sets(st.sampled_from(PROBES), max_size=len(PROBES) - 1)


def joined(rows: Sequence[Row]) -> tuple[list[Exchange], list[Connection]]:
    joiner = Joiner()
    shown = joiner.feed(rows) + joiner.finish()
    return (
        [one for one in shown if isinstance(one, Exchange)],
        [one for one in shown if isinstance(one, Connection)],
    )


def talk(history: History, now: int, *, asked: int = 300, answered: int = 500) -> int:
    """Add a request and a reply, 1 µs for each stage; return when it is over."""
    at = [now + 1_000 * step for step in range(12)]
    history.message(CLIENT, asked, at[:6])
    history.message(SERVICE, answered, at[6:])
    return at[-1] + 1_000


def inject(history: History, now: int, end: int, byte: int, count: int = 0, **more: Any) -> None:
    """Add a packet that claims to be of an end; on `lo` it is seen at each point."""
    for step, point in enumerate(("nic_tx", "nic_rx", "rx_ip")):
        history.packet(now + step, point, end, byte, count, **more)


def story(connections: Sequence[Connection]) -> list[Any]:
    """Return what is reported of each connection, without its duration."""
    return [
        (
            *(conn.reset_by, conn.reset_why, conn.error, conn.ended, tuple(conn.fins)),
            *(conn.bytes_of(index) for index in (CLIENT, SERVICE)),
            *(conn.flows[index].retransmits for index in (CLIENT, SERVICE)),
            tuple(sorted(conn.outcomes.items())),
        )
        for conn in connections
    ]


# --- RST


@given(ends, st.integers(-(2**31), 2**31 - 1), some_probes)
def test_reset_with_a_wrong_sequence_number_is_ignored(
    end: int, off: int, without: set[str]
) -> None:
    plain, attacked = History(), History()
    for history in (plain, attacked):
        now = talk(history, talk(history, history.shake_hands() + 1_000))
        if history is attacked and off:
            inject(history, now, end, history.sent[end] + off, flags="RST")
        history.close(talk(history, now + 10_000) + 1_000)
    assert story(joined(attacked.rows(without))[1]) == story(joined(plain.rows(without))[1])


@given(ends, some_probes)
def test_reset_with_the_next_sequence_number_counts(end: int, without: set[str]) -> None:
    history = History()
    now = talk(history, history.shake_hands() + 1_000)
    closed = {"state": "TCP_CLOSE", "desc": "closed"}
    history.socket(now, end, "state", old_state="TCP_ESTABLISHED", **closed)
    inject(history, now + 1, end, history.sent[end], flags="RST|ACK")
    history.socket(now + 10, 1 - end, "state", **RESET)
    history.socket(now + 11, 1 - end, "close", state="TCP_CLOSE")
    history.socket(now + 12, end, "close", state="TCP_CLOSE")
    rows = history.rows(without)
    shown = any(row.flags == "RST|ACK" or row.desc == "ECONNRESET" for row in rows)
    _, (conn,) = joined(rows)
    assert conn.reset_by == (end if shown else None)


@pytest.mark.parametrize("without", [(), ("tcp_client",), SOCKETS])
@pytest.mark.parametrize("end", [CLIENT, SERVICE])
def test_reset_followed_by_traffic_was_ignored(end: int, without: tuple[str, ...]) -> None:
    history = History()
    now = talk(history, history.shake_hands() + 1_000)
    # Its number is right, and its checksum is not: nothing in the row shows it.
    inject(history, now, end, history.sent[end], flags="RST")
    history.close(talk(history, now + 10_000) + 1_000)
    exchanges, (conn,) = joined(history.rows(without))
    assert (conn.reset_by, conn.reset_why) == (None, None)
    assert conn.fins == [CLIENT, SERVICE]
    assert [one.outcome for one in exchanges] == ["answered", "answered"]


def test_socket_open_at_the_end_was_not_reset() -> None:
    history = History()
    now = talk(history, history.shake_hands() + 1_000)
    inject(history, now, CLIENT, history.sent[CLIENT], flags="RST")
    _, (conn,) = joined(history.rows())
    assert (conn.reset_by, conn.ended) == (None, "end of run")
    # Where no socket is watched, no row shows that it was ignored.
    _, (conn,) = joined(history.rows(SOCKETS))
    assert conn.reset_by == CLIENT


def test_socket_error_confirms_a_reset_with_a_wrong_number() -> None:
    history = History()
    now = talk(history, history.shake_hands() + 1_000)
    inject(history, now, CLIENT, history.sent[CLIENT] + 77, flags="RST")
    history.socket(now + 10, SERVICE, "state", **RESET)
    history.socket(now + 11, SERVICE, "close", state="TCP_CLOSE")
    _, (conn,) = joined(history.rows())
    assert conn.reset_by == CLIENT


@pytest.mark.parametrize("after", ["tx", "rx"])
def test_reset_before_the_last_bytes_counts(after: str) -> None:
    history = History()
    now = talk(history, history.shake_hands() + 1_000)
    history.packet(now, "nic_tx", CLIENT, history.sent[CLIENT], 50)
    history.packet(now + 1, "nic_tx", CLIENT, history.sent[CLIENT] + 50, flags="RST|ACK")
    if after == "rx":
        # Bytes before them are lost: their end is acknowledged by SACK.
        history.packet(now + 2, "nic_rx", CLIENT, history.sent[CLIENT] + 20, 30)
        history.packet(now + 3, "nic_rx", CLIENT, history.sent[CLIENT] + 50, flags="RST|ACK")
    without = ("tcp_client", "tcp_service", *(("dev_xmit",) if after == "rx" else ()))
    _, (conn,) = joined(history.rows(without))
    assert conn.reset_by == CLIENT


def test_reset_in_a_capture_begun_after_all_data_counts() -> None:
    history = History()
    history.sent = [1_000, 2_000]
    history.packet(1_000, "nic_tx", SERVICE, 2_000, 10)
    history.packet(2_000, "nic_tx", CLIENT, 1_500, flags="RST|ACK")
    _, (conn,) = joined(history.rows())
    assert conn.reset_by == CLIENT


# --- bytes


@given(
    ends,
    st.sampled_from([2**24, 2**30, 2**31 - 2**20]),
    st.sampled_from(["PSH|ACK", "FIN|ACK"]),
    some_probes,
)
def test_bytes_beyond_the_window_are_none_of_the_stream(
    end: int, off: int, flags: str, without: set[str]
) -> None:
    if without >= {"dev_xmit", "xdp_port"}:
        off = max(off, 2**30)  # rows of IP have no window: it may be the largest
    plain, attacked = History(), History()
    for history in (plain, attacked):
        now = talk(history, talk(history, history.shake_hands() + 1_000))
        if history is attacked:
            inject(history, now, end, history.sent[end] + off, 100, flags=flags)
        history.close(talk(history, now + 10_000) + 1_000)
    assert story(joined(attacked.rows(without))[1]) == story(joined(plain.rows(without))[1])


@pytest.mark.parametrize("end", [CLIENT, SERVICE])
def test_bytes_that_were_seen_before_their_send_are_not_its_bytes(end: int) -> None:
    plain, attacked = History(), History()
    for history in (plain, attacked):
        now = talk(history, talk(history, history.shake_hands() + 1_000))
        if history is attacked:
            inject(history, now, end, history.sent[end], 900)
        history.close(talk(history, now + 10_000) + 1_000)
    (shown, expected) = (joined(one.rows()) for one in (attacked, plain))
    assert story(shown[1]) == story(expected[1])
    assert [one.stamps for one in shown[0]] == [one.stamps for one in expected[0]]


def test_a_stream_that_goes_on_far_away_is_followed() -> None:
    history = History()
    now = talk(history, history.shake_hands() + 1_000)
    history.sent[CLIENT] += 2**30
    for number in range(100):
        history.packet(now + number, "nic_tx", CLIENT, history.sent[CLIENT], 100)
        history.sent[CLIENT] += 100
    _, (conn,) = joined(history.rows(SOCKETS))
    assert conn.bytes_of(CLIENT) == 300 + 2**30 + 10_000


# --- SYN


@pytest.mark.parametrize("without", [(), ("tcp_service",), ("dev_xmit",), ("xdp_port", "rx_ip")])
def test_a_syn_while_the_client_is_connected_begins_no_connection(
    without: tuple[str, ...],
) -> None:
    netns = (7, 7)  # on lo: the SYN is seen where the client's socket is
    plain, attacked = History(netns=netns), History(netns=netns)
    for history in (plain, attacked):
        now = talk(history, history.shake_hands() + 1_000)
        if history is attacked:
            inject(history, now, CLIENT, 2**30, flags="SYN", ack=None)
        history.close(talk(history, now + 10_000) + 1_000)
    shown, expected = (joined(one.rows(without))[1] for one in (attacked, plain))
    assert story(shown) == story(expected)
    assert [conn.syns for conn in shown] == [0]
