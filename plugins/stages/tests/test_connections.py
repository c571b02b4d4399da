"""Which connection a row belongs to: reconnected sockets, and reused addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tcplat_stages.connection import Connection
from tcplat_stages.exchange import Exchange
from tcplat_stages.join import Joiner

from .history import ADDRESSES, CLIENT, NETNS, SERVICE, History, Row

SECOND = 1_000_000_000
UNNAMED = {"sport": None, "state": "TCP_SYN_SENT"}


def joined(rows: Sequence[Row]) -> tuple[list[Exchange], list[Connection]]:
    joiner = Joiner()
    finished = joiner.feed(rows) + joiner.finish()
    return (
        [one for one in finished if isinstance(one, Exchange)],
        [one for one in finished if isinstance(one, Connection)],
    )


def in_order(*histories: History) -> list[Row]:
    return sorted((row for one in histories for row in one.rows()), key=lambda row: row.ts_ns)


def talk(history: History, now: int, *, asked: int = 100, answered: int = 200) -> int:
    """Add a request and a reply, 1 µs for each stage; return when it is over."""
    at = [now + 1_000 * step for step in range(12)]
    history.message(CLIENT, asked, at[:6])
    history.message(SERVICE, answered, at[6:])
    return at[-1]


# --- one socket, several connections


def refuse(history: History, t: int) -> int:
    """Add a connect that the other host refuses; return when it is over."""
    history.socket(t, CLIENT, "connect", **UNNAMED)
    history.socket(t + 1, CLIENT, "state", old_state="TCP_CLOSE", **UNNAMED)
    history.packet(t + 10, "nic_tx", CLIENT, -1, flags="SYN")
    history.packet(t + 20, "nic_tx", SERVICE, 0, flags="RST|ACK", seq=0, ack=history.seq(CLIENT, 0))
    failed = {"old_state": "TCP_SYN_SENT", "state": "TCP_CLOSE", "desc": "refused"}
    history.socket(t + 30, CLIENT, "state", **failed, connect_us=0.03)
    return t + 30


@pytest.mark.parametrize("without", [(), ("dev_xmit", "xdp_port", "rx_ip")])
def test_each_connect_of_one_socket_is_a_separate_connection(without: tuple[str, ...]) -> None:
    tries = [
        History((1_000 * number, 0), ends=(("10.0.0.1", 40_000 + number), ADDRESSES[1]))
        for number in range(1, 3)
    ]
    ends = [refuse(one, number * SECOND) for number, one in enumerate(tries, 1)]
    last = History((9_000, 5_000), ends=(("10.0.0.1", 40_009), ADDRESSES[1]))
    last.close(talk(last, last.shake_hands(3 * SECOND) + 500) + 500)
    rows = [row for one in (*tries, last) for row in one.rows(without)]
    exchanges, connections = joined(rows)
    assert [conn.error for conn in connections] == ["refused", "refused", None]
    assert [conn.client[1] for conn in connections] == [40_001, 40_002, 40_009]
    assert [conn.connect_us for conn in connections] == [0.03, 0.03, 5.0]
    assert [conn.first_ns for conn in connections] == [SECOND, 2 * SECOND, 3 * SECOND]
    assert [conn.handshake.total_ns for conn in connections][2] == 5_000
    if not without:
        assert [conn.duration_ns for conn in connections][:2] == [30, 30]
        assert [conn.reset_why for conn in connections][:2] == ["no listener at that port"] * 2
    (exchange,) = exchanges
    assert exchange.conn is connections[2]
    assert (exchange.request_bytes, exchange.reply_bytes) == (100, 200)
    assert ends == [SECOND + 30, 2 * SECOND + 30]


def disconnect(history: History, t: int) -> None:
    """connect(AF_UNSPEC): the socket is closed by a RST, and may be used again."""
    history.socket(
        t, CLIENT, "state", old_state="TCP_ESTABLISHED", state="TCP_CLOSE", desc="closed"
    )
    history.packet(t + 1, "nic_tx", CLIENT, history.sent[CLIENT], flags="RST|ACK")
    reset = {"old_state": "TCP_ESTABLISHED", "state": "TCP_CLOSE", "desc": "ECONNRESET"}
    history.socket(t + 2, SERVICE, "state", **reset)
    history.socket(t + 3, SERVICE, "close", state="TCP_CLOSE")


def test_disconnected_socket_may_connect_elsewhere() -> None:
    one = History()
    other = History((7, 9), ends=(("10.0.0.1", 40_001), ("10.0.0.3", 81)), by_sock=(11, 44))
    disconnect(one, talk(one, one.shake_hands() + 500) + 500)
    other.close(talk(other, other.shake_hands(100_000) + 500, asked=7, answered=9) + 500)
    exchanges, connections = joined(in_order(one, other))
    assert [(one.request_bytes, one.reply_bytes) for one in exchanges] == [(100, 200), (7, 9)]
    assert [conn.service for conn in connections] == [("10.0.0.2", 80), ("10.0.0.3", 81)]
    assert [conn.bytes_of(CLIENT) for conn in connections] == [100, 7]
    assert [(conn.reset_by, conn.reset_why) for conn in connections] == [
        (CLIENT, "it aborted"),
        (None, None),
    ]
    assert [conn.ended for conn in connections] == ["closed", "closed"]


def test_disconnected_socket_that_listens_is_no_longer_an_end() -> None:
    history = History()
    later = talk(history, history.shake_hands() + 500)
    disconnect(history, later + 500)
    listens = {"daddr": "0.0.0.0", "dport": 0, "probe": "tcp_service", "sport": 90}
    history.socket(
        later + SECOND, CLIENT, "state", old_state="TCP_CLOSE", **{**listens, "state": "TCP_LISTEN"}
    )
    history.socket(
        later + 2 * SECOND,
        CLIENT,
        "state",
        old_state="TCP_LISTEN",
        **{**listens, "state": "TCP_CLOSE"},
    )
    (exchange,), (conn,) = joined(history.rows())
    assert exchange.conn is conn
    assert (conn.ended, conn.last_ns) == ("closed", later + 503)


# --- addresses that are used again


@pytest.mark.parametrize("without", [(), ("dev_xmit", "xdp_port", "rx_ip"), ("tcp_client",)])
def test_open_socket_keeps_its_connection_when_addresses_are_reused(
    without: tuple[str, ...],
) -> None:
    old, new = History((1_000, 5_000)), History((90_000, 95_000), by_sock=(33, 44))
    over = talk(old, old.shake_hands() + 500)
    # The client aborts; the service has not read all, and learns of it much later.
    old.message(CLIENT, 30, [over + 100 + step for step in range(5)] + [over + 510_000])
    old.packet(over + 200, "nic_tx", CLIENT, 130, flags="RST|ACK")
    closed = {"state": "TCP_CLOSE", "desc": "closed"}
    old.socket(over + 199, CLIENT, "state", old_state="TCP_ESTABLISHED", **closed)
    old.socket(over + 201, CLIENT, "close", state="TCP_CLOSE")
    new_over = talk(new, new.shake_hands(over + 500_000) + 500, asked=11, answered=12)
    old.socket(new_over + 1, SERVICE, "send", seq=old.seq(SERVICE, 200), bytes=5)
    old.socket(new_over + 2, SERVICE, "send_short", seq=old.seq(SERVICE, 200), bytes=5)
    old.socket(new_over + 3, SERVICE, "stats", probe="tcp_stats", srtt_us=1, retransmits=77)
    old.socket(new_over + 4, SERVICE, "close", state="TCP_CLOSE")
    talk(new, new_over + 1_000, asked=13, answered=14)
    new.close(new_over + 50_000)
    rows = sorted([*old.rows(without), *new.rows(without)], key=lambda row: row.ts_ns)
    exchanges, connections = joined(rows)
    assert [(conn.ends[SERVICE].sock, conn.ended) for conn in connections] == [
        (22, "closed"),
        (44, "closed"),
    ]
    assert [conn.ends[SERVICE].stats is not None for conn in connections] == [True, False]
    asked = [
        [
            (one.request_bytes, one.reply_bytes)
            for one in exchanges
            if one.conn is conn and one.kind == "exchange"
        ]
        for conn in connections
    ]
    assert asked[0][0] == (100, 200)
    assert asked[1] == [(11, 12), (13, 14)]
    assert connections[1].reset_by is None


def test_late_packets_do_not_end_the_next_connection() -> None:
    old, new = History((1_000, 5_000)), History((90_000, 95_000), by_sock=(33, 44))
    over = talk(old, old.shake_hands() + 500)
    old.socket(
        over + 10, CLIENT, "state", old_state="TCP_ESTABLISHED", state="TCP_CLOSE", desc="closed"
    )
    old.packet(over + 11, "nic_tx", CLIENT, 100, flags="RST|ACK")
    old.socket(over + 12, CLIENT, "close", state="TCP_CLOSE")
    # Bound to the port: its name is known from the call on.
    now = over + 100
    new.socket(now, CLIENT, "connect", state="TCP_SYN_SENT")
    new.socket(now + 1, CLIENT, "state", old_state="TCP_CLOSE", state="TCP_SYN_SENT")
    # A long way behind: the reset of the old one, before and after the new one's SYN.
    old.packet(now + 2, "nic_rx", CLIENT, 100, flags="RST|ACK")
    reset = {"old_state": "TCP_ESTABLISHED", "state": "TCP_CLOSE", "desc": "ECONNRESET"}
    old.socket(now + 3, SERVICE, "state", **reset)
    done = new.shake_hands(now + 1_000)
    new.made = [row for row in new.made if row.sport or row.point not in ("connect", "state")]
    old.packet(done + 1, "nic_rx", CLIENT, 100, flags="RST|ACK")
    old.packet(done + 2, "nic_rx", SERVICE, 200, 50, flags="FIN|PSH|ACK")
    later = talk(new, done + 1_000, asked=11, answered=12)
    new.close(later + 1_000)
    old.socket(later + 500_000, SERVICE, "close", state="TCP_CLOSE")
    exchanges, connections = joined(in_order(old, new))
    assert [(one.request_bytes, one.reply_bytes) for one in exchanges] == [(11, 12), (100, 200)]
    by_number = {conn.ends[CLIENT].sock: conn for conn in connections}
    assert sorted(by_number) == [11, 33]
    assert (by_number[11].reset_by, by_number[33].reset_by) == (CLIENT, None)
    assert by_number[33].fins == [CLIENT, SERVICE]
    assert by_number[33].retransmits == 0


def test_replaced_connection_is_emitted_once_silent() -> None:
    old, new = History(), History((90_000, 95_000), by_sock=(33, 44))
    old.shake_hands()
    old.socket(20_000, CLIENT, "close", state="TCP_CLOSE")
    new.close(talk(new, new.shake_hands(100_000) + 500) + 500)
    late = History(ends=(("10.0.0.9", 1), ADDRESSES[1]), by_sock=(55, 66))
    late.shake_hands(30 * SECOND)
    joiner = Joiner()
    finished = [one for one in joiner.feed(in_order(old, new, late)) if isinstance(one, Connection)]
    assert [(conn.ends[SERVICE].sock, conn.ended) for conn in finished] == [
        (44, "closed"),
        (22, "port reused"),
    ]
    # Later rows of its socket make no new connection.
    old.socket(40 * SECOND, SERVICE, "recv", seq=old.seq(CLIENT, 0), bytes=0)
    old.socket(41 * SECOND, SERVICE, "close", state="TCP_CLOSE")
    assert joiner.feed(old.made[-2:]) == []
    assert [conn.client for conn in joiner.finish() if isinstance(conn, Connection)] == [
        ("10.0.0.9", 1)
    ]


@pytest.mark.parametrize("without", [(), ("tcp_client",)])
def test_reused_sequence_number_is_a_new_connection_after_the_end(
    without: tuple[str, ...],
) -> None:
    rows: list[Row] = []
    for number in range(3):
        history = History(by_sock=(11 + number * 100, 22 + number * 100), numbered=True)
        start = number * 4 * SECOND // 3 + 1_000
        history.close(talk(history, history.shake_hands(start) + 500) + 500)
        rows += history.rows(without)
    exchanges, connections = joined(rows)
    assert [(one.request_bytes, one.reply_bytes) for one in exchanges] == [(100, 200)] * 3
    assert len(connections) == 3


# --- the same addresses in two pairs of namespaces

OTHERS = (NETNS[0] + 50, NETNS[1] + 50)
PROBES = ("tcp_client", "tcp_service", "dev_xmit", "xdp_port", "rx_ip")


def pair(
    number: int, begins: int, *, steps: Sequence[int], numbered: bool, first: tuple[int, int]
) -> History:
    """One of two pairs; the length of a message shows which pair sent it."""
    history = History(
        first,
        netns=(NETNS, OTHERS)[number],
        by_sock=((11, 22), (33, 44))[number],
        numbered=numbered,
    )
    now = history.shake_hands(begins)
    for step in steps:
        now = talk(history, now + step, asked=100 + number, answered=200 + number)
    history.close(now + 1_000)
    return history


@given(
    st.integers(-100_000, 100_000),
    st.tuples(*[st.lists(st.integers(1, 50_000), min_size=1, max_size=4)] * 2),
    st.sets(st.sampled_from(PROBES), max_size=4),
    st.booleans(),
    st.integers(1, 10_000),
)
def test_namespace_pairs_with_equal_addresses_are_not_mixed(
    shift: int,
    steps: tuple[list[int], list[int]],
    without: set[str],
    numbered: bool,  # noqa: FBT001 - drawn
    apart: int,
) -> None:
    # By RFC 6528 the same addresses have nearly the same numbers at the same time.
    first = ((1_000, 5_000), (1_000 + apart, 5_000 + apart))
    pairs = [
        pair(number, begins, steps=steps[number], numbered=numbered, first=first[number])
        for number, begins in enumerate((200_000, 200_000 + shift))
    ]
    rows = sorted(
        (row for one in pairs for row in one.rows(without)),
        key=lambda row: row.ts_ns,
    )
    exchanges, connections = joined(rows)
    whole = {(11, 22), (33, 44)}
    for conn in connections:
        by_sock = tuple(end.sock for end in conn.ends)
        assert 0 in by_sock or by_sock in whole or conn.doubtful, (by_sock, conn)
    for one in exchanges:
        if one.conn.doubtful:
            continue
        sizes = {size % 100 for size in (one.request_bytes, one.reply_bytes) if size > 0}
        assert len(sizes) == 1, (one.request_bytes, one.reply_bytes)
    # Where the client's host reports arriving packets alone, without their acknowledgements, no
    # number in them identifies their connection.
    arriving = not numbered or without == {"tcp_client", "dev_xmit", "xdp_port"}
    if not arriving or not without & {"dev_xmit", "xdp_port"}:
        assert not any(conn.doubtful for conn in connections)
    if numbered and not without & {"tcp_client", "tcp_service"}:
        assert {tuple(end.sock for end in conn.ends) for conn in connections} == whole
        assert len(exchanges) == sum(map(len, steps))


# --- what failed first is why

TIMED_OUT = {"old_state": "TCP_ESTABLISHED", "state": "TCP_CLOSE", "desc": "timed out"}
RESET = {"old_state": "TCP_ESTABLISHED", "state": "TCP_CLOSE", "desc": "ECONNRESET"}


@pytest.mark.parametrize("end", [CLIENT, SERVICE])
@pytest.mark.parametrize("without", [(), ("dev_xmit", "xdp_port", "rx_ip"), ("xdp_port", "rx_ip")])
def test_reset_after_a_timeout_is_not_an_abort(end: int, without: tuple[str, ...]) -> None:
    history = History()
    now = talk(history, history.shake_hands() + 500) + 500
    # tcp_keepalive_timer(): the RST leaves, and then the socket gets the error.
    history.packet(now, "nic_tx", end, history.sent[end], flags="RST|ACK")
    history.socket(now + 1, end, "state", **TIMED_OUT)
    history.packet(now + 2, "nic_rx", end, history.sent[end], flags="RST|ACK")
    history.socket(now + 3, 1 - end, "state", **RESET)
    history.socket(now + 4, 1 - end, "close", state="TCP_CLOSE")
    history.socket(now + 5, end, "close", state="TCP_CLOSE")
    _, (conn,) = joined(history.rows(without))
    assert (conn.error, conn.reset_by, conn.reset_why) == ("timed out", None, None)


@pytest.mark.parametrize("end", [CLIENT, SERVICE])
@pytest.mark.parametrize("failed_with", ["ECONNRESET", "EPIPE"])
def test_timeout_is_the_error_although_its_reset_was_seen_first(end: int, failed_with: str) -> None:
    history = History()
    now = talk(history, history.shake_hands() + 500) + 500
    history.packet(now, "nic_tx", end, history.sent[end], flags="RST|ACK")
    # On another CPU, the other end is faster than the timer that sent the RST.
    history.socket(now + 1, 1 - end, "state", **{**RESET, "desc": failed_with})
    history.socket(now + 2, end, "state", **TIMED_OUT)
    history.socket(now + 3, 1 - end, "close", state="TCP_CLOSE")
    history.socket(now + 4, end, "close", state="TCP_CLOSE")
    for without in ((), ("dev_xmit", "xdp_port", "rx_ip")):
        _, (conn,) = joined(history.rows(without))
        assert (conn.error, conn.reset_by, conn.reset_why) == ("timed out", None, None)


def test_reset_in_reply_to_a_timed_out_connection_is_not_the_reason() -> None:
    history = History()
    now = talk(history, history.shake_hands() + 500) + 500
    history.socket(now, CLIENT, "send", seq=history.seq(CLIENT, 100), bytes=10)
    history.socket(now + 1, CLIENT, "state", **TIMED_OUT)
    # The service keeps sending although the client's socket is gone.
    history.packet(now + 2, "nic_tx", SERVICE, 200, 5)
    history.packet(now + 3, "nic_tx", CLIENT, 110, flags="RST")
    history.socket(now + 4, SERVICE, "state", **RESET)
    history.socket(now + 5, SERVICE, "close", state="TCP_CLOSE")
    history.socket(now + 6, CLIENT, "close", state="TCP_CLOSE")
    _, (conn,) = joined(history.rows())
    assert (conn.error, conn.reset_by) == ("timed out", None)


def test_timed_out_connect_is_not_reset_by_a_late_answer() -> None:
    history = History()
    history.socket(0, CLIENT, "connect", **UNNAMED)
    history.packet(10, "nic_tx", CLIENT, -1, flags="SYN")
    late = {"old_state": "TCP_SYN_SENT", "state": "TCP_CLOSE", "desc": "timed out"}
    history.socket(SECOND, CLIENT, "state", **late, connect_us=1e6)
    history.packet(SECOND + 1, "nic_rx", SERVICE, -1, flags="SYN|ACK")
    history.packet(SECOND + 2, "nic_tx", CLIENT, 0, flags="RST")
    history.socket(SECOND + 3, CLIENT, "close", state="TCP_CLOSE")
    _, (conn,) = joined(history.rows())
    assert (conn.error, conn.reset_by, conn.connect_us) == ("timed out", None, 1e6)


def test_reset_before_the_timeout_is_the_reason() -> None:
    history = History()
    now = talk(history, history.shake_hands() + 500) + 500
    closed = {"state": "TCP_CLOSE", "desc": "closed"}
    history.socket(now, SERVICE, "state", old_state="TCP_ESTABLISHED", **closed)
    history.packet(now + 1, "nic_tx", SERVICE, 200, flags="RST|ACK")
    history.socket(now + 2, SERVICE, "close", state="TCP_CLOSE")
    history.socket(now + SECOND, CLIENT, "state", **TIMED_OUT)
    history.socket(now + SECOND + 1, CLIENT, "close", state="TCP_CLOSE")
    _, (conn,) = joined(history.rows())
    assert (conn.reset_by, conn.reset_why, conn.error) == (SERVICE, "it aborted", "timed out")


# --- one socket, several processes


def renamed(rows: Sequence[Row], since_ns: int, end: int, pid: int, comm: str) -> None:
    """From an instant on, another process uses the socket of an end."""
    for row in rows:
        if row.ts_ns >= since_ns and row.sock == (11, 22)[end]:
            row.pid, row.comm = pid, comm


def names(one: Exchange) -> list[tuple[int | None, str | None]]:
    return [(process.pid, process.comm) for process in (one.process(CLIENT), one.process(SERVICE))]


@pytest.mark.parametrize(
    ("end", "pid", "comm", "processes"),
    [
        (CLIENT, 100, "python3", [(100, "python3"), (101, "nginx")]),  # exec(), or prctl()
        (CLIENT, 300, "worker", [(300, "worker"), (101, "nginx")]),  # by SCM_RIGHTS, or fork()
        (SERVICE, 101, "cat", [(100, "curl"), (101, "cat")]),
        (SERVICE, 300, "worker", [(100, "curl"), (300, "worker")]),
    ],
)
def test_exchange_names_the_process_of_its_own_rows(
    end: int, pid: int, comm: str, processes: list[tuple[int, str]]
) -> None:
    history = History()
    first_over = talk(history, history.shake_hands() + 1_000)
    second_over = talk(history, first_over + 1_000)
    history.close(second_over + 1_000)
    rows = history.rows()
    renamed(rows, first_over + 1_000, end, pid, comm)
    (first, second), (conn,) = joined(rows)
    # Though the connection is emitted at the end, when another process has it.
    assert names(first) == [(100, "curl"), (101, "nginx")]
    assert names(second) == processes
    assert [(one.pid, one.comm) for one in conn.ends] == processes


def test_pipelined_requests_keep_their_sending_process() -> None:
    history = History()
    now = history.shake_hands() + 1_000
    processes = [(300 + number, f"kid{number}") for number in range(3)]
    for number, (pid, comm) in enumerate(processes):
        seq = history.seq(CLIENT, 10 * number)
        history.socket(now + number, CLIENT, "send", seq=seq, bytes=10, pid=pid, comm=comm)
        history.socket(now + 1_000 * (number + 1), SERVICE, "recv", seq=seq, bytes=10)
        seq = history.seq(SERVICE, 20 * number)
        history.socket(now + 1_000 * (number + 1) + 100, SERVICE, "send", seq=seq, bytes=20)
        history.socket(now + 1_000 * (number + 1) + 200, CLIENT, "recv", seq=seq, bytes=20)
    history.sent = [30, 60]
    history.close(now + 100_000)
    exchanges, _ = joined(history.rows())
    assert [names(one)[CLIENT] for one in exchanges] == processes


def test_alternating_processes_use_bounded_memory() -> None:
    history = History()
    now = history.shake_hands() + 1_000
    for number in range(5_000):
        seq = history.seq(CLIENT, number)
        history.socket(now + number, CLIENT, "send", seq=seq, bytes=1, pid=300 + number % 2)
    joiner = Joiner()
    joiner.feed(history.rows())
    (conn,) = joiner.directory.conns.values()
    assert len(conn.flows[CLIENT].senders) < 1_000


# --- many connections of one pair of addresses


def busy(step: Callable[[int], list[Row]], count: int) -> Joiner:
    """Join so many steps of rows; return the joiner, with what it has kept."""
    joiner = Joiner()
    for number in range(count):
        joiner.feed(step(number))
    return joiner


def connects(number: int) -> list[Row]:
    """One more socket calls connect() with the same two addresses; none of them is closed."""
    one = History(by_sock=(1_000 + number, 0))
    one.socket(1_000 * number, CLIENT, "connect", state="TCP_SYN_SENT")
    return one.made


def test_most_recent_64_connections_of_a_four_tuple_are_kept() -> None:
    joiner = busy(connects, 1_000)
    (known,) = joiner.directory.by_addresses.values()
    assert [conn.ends[CLIENT].sock for conn in known] == list(range(1_936, 2_000))
    assert joiner.given_up == 1_000 - 64
    assert len(joiner.directory.conns) == 64


def test_each_evicted_connection_is_emitted_once() -> None:
    joiner = Joiner()
    finished = [one for number in range(1_000) for one in joiner.feed(connects(number))]
    finished += joiner.finish()
    assert sorted(one.ends[CLIENT].sock for one in finished if isinstance(one, Connection)) == list(
        range(1_000, 2_000)
    )
    assert [one.ended for one in finished if isinstance(one, Connection)] == (
        ["given up"] * 936 + ["port reused"] * 63 + ["end of run"]
    )
