"""The outcome of a request: answered, unanswered, open, cut; and how each is counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tcplat_stages.connection import Connection
from tcplat_stages.exchange import Exchange

from .history import CLIENT, SERVICE, History, Row
from .test_join import NUMBERS, PROBES, SECOND, TURNS, joined, of_turns, simple
from .test_stage_sinks import objects, written

__all__ = ["written"]  # a fixture
WAIT = 2 * SECOND


def ask(history: History, now: int, count: int = 50) -> int:
    """Add a request that the service reads and does not answer; return when it was read."""
    at = [now + 1_000 * step for step in range(6)]
    history.message(CLIENT, count, at)
    return at[-1]


def one_answered(history: History) -> int:
    """Add a connection with one exchange of 11 µs; return when it is over."""
    return simple(history, history.shake_hands() + 1_000)


def hung(answered: int = 1) -> History:
    """Return a history of so many exchanges and a request that gets no reply within 2 s."""
    history = History()
    now = history.shake_hands() + 1_000
    for _ in range(answered):
        now = simple(history, now) + 1_000
    ask(history, now)
    history.close(now + WAIT)
    return history


def outcomes(rows: Sequence[Row]) -> list[tuple[str, int | None, str]]:
    exchanges, _, _ = joined(rows)
    return [(one.outcome, one.waited_ns, one.over_by) for one in exchanges]


@pytest.mark.parametrize(
    ("watched", "first"),
    [
        (PROBES, 0),
        (("tcp_client",), 0),
        (("tcp_client", "dev_xmit"), 0),
        (("tcp_service",), 3_000),
        (("dev_xmit", "xdp_port"), 1_000),
        (("xdp_port",), 2_000),
    ],
)
def test_unanswered_request_waits_until_the_client_gives_up(
    watched: tuple[str, ...], first: int
) -> None:
    rows = hung().rows(set(PROBES) - set(watched))
    answered, waited = outcomes(rows)
    assert answered == ("answered", None, "")
    assert (waited[0], waited[2]) == ("unanswered", "closed by the client")
    # From its first known instant to the FIN, as it is first seen.
    assert waited[1] is not None
    assert 0 <= waited[1] - (WAIT - first) <= 1_000


def test_unanswered_request_has_its_stages_and_a_waiting_time() -> None:
    exchanges, (conn,), _ = joined(hung().rows())
    waited = exchanges[-1]
    assert [name for name, _ in waited.split.stages] == [
        *("client_send", "wire", "softirq", "tcp", "queue")
    ]
    assert waited.under_way == ("server",)
    assert conn.outcomes == {"answered": 1, "unanswered": 1}
    assert conn.exchanges == 1


@pytest.mark.parametrize("watched", [PROBES, ("tcp_client",), ("tcp_service",), ("xdp_port",)])
def test_unread_request_is_unanswered(
    watched: tuple[str, ...],
) -> None:
    history = hung()
    (read,) = [
        row
        for row in history.made
        if (row.probe, row.point, row.seq) == ("tcp_service", "recv", history.seq(CLIENT, 100))
        and row.bytes
    ]
    history.made.remove(read)
    assert [one[0] for one in outcomes(history.rows(set(PROBES) - set(watched)))] == [
        "answered",
        "unanswered",
    ]


@pytest.mark.parametrize("seen_at", ["nic_rx", "rx_ip", "ready"])
def test_unread_request_is_unanswered_if_the_client_is_not_watched(seen_at: str) -> None:
    history = hung()
    # No recv at all: one that is left, were it the end of the stream's, shows that all was read.
    unread = [
        row
        for row in history.made
        if (row.probe, row.point) == ("tcp_service", "recv")
        and (row.seq or 0) >= history.seq(CLIENT, 100)
    ]
    assert sum(row.bytes or 0 for row in unread) == 50
    history.made = [row for row in history.made if row not in unread]
    without = {"tcp_client", "dev_xmit", "nic_rx", "rx_ip", "ready"} - {seen_at}
    assert [(outcome, over_by) for outcome, _, over_by in outcomes(history.rows(without))] == [
        ("answered", ""),
        ("unanswered", "closed by the client"),
    ]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"desc": "ECONNRESET"}, "reset by the service"),
        ({"desc": "timed out"}, "timed out"),
        ({"desc": "EHOSTUNREACH"}, "no route to host (EHOSTUNREACH)"),
        ({"desc": "errno 9999"}, "errno 9999"),
    ],
)
def test_unanswered_request_names_what_ended_it(how: dict[str, Any], words: str) -> None:
    history = History()
    now = one_answered(history) + 1_000
    ask(history, now)
    history.socket(
        now + WAIT, CLIENT, "state", old_state="TCP_ESTABLISHED", state="TCP_CLOSE", **how
    )
    history.socket(now + WAIT, CLIENT, "close", state="TCP_CLOSE")
    for without in ((), ("dev_xmit", "xdp_port", "tcp_service")):
        assert outcomes(history.rows(without))[1] == ("unanswered", WAIT, words)


def test_close_by_the_service_leaves_the_request_unanswered() -> None:
    history = History()
    now = one_answered(history) + 1_000
    ask(history, now)
    # As the client sees it, the service unwatched.
    then = now + WAIT
    history.socket(then, CLIENT, "state", old_state="TCP_ESTABLISHED", state="TCP_CLOSE_WAIT")
    history.socket(then + 5, CLIENT, "recv", seq=history.seq(SERVICE, 200), bytes=0)
    history.socket(then + 9, CLIENT, "state", old_state="TCP_CLOSE_WAIT", state="TCP_LAST_ACK")
    history.socket(then + 20, CLIENT, "close", state="TCP_CLOSE")
    rows = [row for row in history.rows() if row.probe == "tcp_client"]
    assert outcomes(rows)[1] == ("unanswered", WAIT, "closed by the service")
    _, (conn,), _ = joined(rows)
    assert conn.fins == [SERVICE, CLIENT]


def test_half_closed_client_keeps_waiting() -> None:
    history = History()
    now = one_answered(history) + 1_000
    ask(history, now)
    history.socket(now + 10, CLIENT, "state", old_state="TCP_ESTABLISHED", state="TCP_FIN_WAIT1")
    history.socket(now + WAIT, SERVICE, "state", old_state="TCP_CLOSE_WAIT", state="TCP_LAST_ACK")
    history.socket(now + WAIT + 50, CLIENT, "recv", seq=history.seq(SERVICE, 200), bytes=0)
    history.socket(now + WAIT + 60, CLIENT, "close", state="TCP_CLOSE")
    history.socket(now + WAIT + 60, SERVICE, "close", state="TCP_CLOSE")
    assert outcomes(history.rows())[1] == ("unanswered", WAIT, "closed by the service")


def test_request_before_an_immediate_close_is_one_way() -> None:
    history = History()
    now = one_answered(history) + 1_000
    # TLS's close_notify, QUIT ...
    ask(history, now)
    history.close(now + 50_000)
    (_, goodbye), (conn,), _ = joined(history.rows())
    assert (goodbye.kind, goodbye.outcome, goodbye.waited_ns) == ("request", "one_way", None)
    assert conn.outcomes == {"answered": 1, "one_way": 1}
    # Over a wire of 80 ms, 50 ms is at once as well.
    (goodbye,) = [one for one in _far(50_000_000) if one.kind == "request"]
    assert goodbye.outcome == "one_way"
    (given_up,) = [one for one in _far(100_000_000) if one.kind == "request"]
    assert given_up.outcome == "unanswered"


def _far(leaves_ns: int) -> list[Exchange]:
    history = History()
    history.shake_hands()
    for row in history.made:
        row.ts_ns += 80_000_000 * (row.ts_ns >= 4_000)
    now = simple(history, 100_000_000) + 1_000
    history.close(ask(history, now) + leaves_ns)
    return joined(history.rows())[0]


def _parting(
    client_ns: int, service_ns: int, *, eof_ns: int = 0, answered: int = 1, read: bool = True
) -> History:
    """Add a last message and, after these times, each end's FIN; the client reads the end first."""
    history = History()
    now = history.shake_hands() + 1_000
    for _ in range(answered):
        now = simple(history, now) + 1_000
    ask(history, now)
    if not read:
        del history.made[-1]
    count, established = history.sent[CLIENT], "TCP_ESTABLISHED"
    first = min(client_ns, service_ns)
    for end, at in ((CLIENT, client_ns), (SERVICE, service_ns)):
        old, new = (
            (established, "TCP_FIN_WAIT1") if at == first else ("TCP_CLOSE_WAIT", "TCP_LAST_ACK")
        )
        peer_ns = now + client_ns + service_ns - at
        if at != first:
            history.socket(peer_ns + 1, end, "state", old_state=established, state="TCP_CLOSE_WAIT")
        history.socket(now + at, end, "state", old_state=old, state=new)
        history.packet(now + at + 1, "nic_tx", end, history.sent[end], flags="FIN|ACK")
    if eof_ns:
        eof = history.seq(SERVICE, history.sent[SERVICE])
        history.socket(now + eof_ns, CLIENT, "recv", seq=eof, bytes=0)
    over = now + max(client_ns, service_ns) + 50
    for end in (CLIENT, SERVICE):
        history.socket(over, end, "close", state="TCP_CLOSE")
    assert history.sent[CLIENT] == count
    return history


US, MS = 1_000, 1_000_000


@pytest.mark.parametrize(
    ("how", "outcome"),
    [
        # TLS's close_notify: the service has read it, and closes 2 us before the client does.
        ({"client_ns": 58 * US, "service_ns": 56 * US}, "one_way"),
        # The client did not run for a while; it did not wait: it never read the end.
        ({"client_ns": 6_600 * US, "service_ns": 2_790 * US}, "one_way"),
        # PostgreSQL's Terminate: the client comes late to its close(), the backend to its end.
        ({"client_ns": 2_300 * US, "service_ns": 9_400 * US}, "one_way"),
        ({"client_ns": 2_250 * US, "service_ns": 2_150 * US}, "one_way"),
        # A handler that crashes: the client waits, and reads the end.
        ({"client_ns": 90 * US, "service_ns": 56 * US, "eof_ns": 80 * US}, "unanswered"),
        ({"client_ns": 2_250 * US, "service_ns": 2_150 * US, "eof_ns": 2_200 * US}, "unanswered"),
        # The client gives up, and the service goes on for long.
        ({"client_ns": 2_300 * US, "service_ns": 90 * MS}, "unanswered"),
        ({"client_ns": 20 * MS, "service_ns": 21 * MS}, "unanswered"),
        # The only message of a connection, and one that the service did not read.
        ({"client_ns": 2_300 * US, "service_ns": 3 * MS, "answered": 0}, "unanswered"),
        ({"client_ns": 2_300 * US, "service_ns": 3 * MS, "read": False}, "unanswered"),
    ],
)
def test_farewell_before_a_late_close_is_one_way(how: dict[str, Any], outcome: str) -> None:
    assert outcomes(_parting(**how).rows())[-1][0] == outcome


@pytest.mark.parametrize(("client_ns", "outcome"), [(58 * US, "one_way"), (90 * US, "unanswered")])
def test_round_trip_decides_where_client_reads_are_unknown(client_ns: int, outcome: str) -> None:
    # A round trip takes 4 us: what closes sooner behind the service's FIN has not seen that.
    rows = _parting(client_ns, 56 * US).rows({"tcp_client"})
    assert outcomes(rows)[-1][0] == outcome


def test_earlier_answer_time_bounds_the_wait_for_a_reply() -> None:
    for answered_ns, outcome in ((30 * MS, "one_way"), (10 * MS, "unanswered")):
        history = _parting(20 * MS, 25 * MS, answered=2)
        late = [row for row in history.made if row.ts_ns >= 24_000]
        for row in late:
            row.ts_ns += answered_ns
        assert outcomes(history.rows())[-1][0] == outcome


def test_message_after_the_services_fin_is_one_way() -> None:
    history = History()
    now = one_answered(history) + 1_000
    history.socket(now, CLIENT, "state", old_state="TCP_ESTABLISHED", state="TCP_CLOSE_WAIT")
    history.socket(now + SECOND, CLIENT, "send", seq=history.seq(CLIENT, 100), bytes=30)
    history.socket(
        now + SECOND + 9,
        CLIENT,
        "state",
        old_state="TCP_CLOSE_WAIT",
        state="TCP_CLOSE",
        desc="ECONNRESET",
    )
    history.socket(now + SECOND + 9, CLIENT, "close", state="TCP_CLOSE")
    assert [one[0] for one in outcomes(history.rows(["tcp_service"]))] == ["answered", "one_way"]


def test_unanswered_pipelined_requests_are_one() -> None:
    history = History()
    now = history.shake_hands() + 1_000
    for number in range(3):
        history.socket(now + number, CLIENT, "send", seq=history.seq(CLIENT, number * 10), bytes=10)
    history.socket(now + 10, SERVICE, "recv", seq=history.seq(CLIENT, 0), bytes=10)
    history.socket(now + 20, SERVICE, "send", seq=history.seq(SERVICE, 0), bytes=100)
    history.socket(now + 30, SERVICE, "recv", seq=history.seq(CLIENT, 10), bytes=20)
    history.socket(now + 50, CLIENT, "recv", seq=history.seq(SERVICE, 0), bytes=100)
    history.sent = [30, 100]
    history.close(now + WAIT)
    exchanges, _, _ = joined(history.rows())
    assert [(one.outcome, one.request_bytes) for one in exchanges] == [
        ("answered", 10),
        ("unanswered", 20),
    ]
    assert exchanges[1].waited_ns == WAIT - 1


def test_reply_cut_off_by_a_reset_is_no_answer() -> None:
    history = History()
    now = one_answered(history) + 1_000
    read = ask(history, now)
    history.socket(read + 1_000, SERVICE, "send", seq=history.seq(SERVICE, 200), bytes=9_000)
    history.packet(read + 2_000, "nic_tx", SERVICE, 200, 3_000)
    history.packet(read + 3_000, "nic_rx", SERVICE, 200, 3_000)
    history.socket(read + 4_000, CLIENT, "recv", seq=history.seq(SERVICE, 200), bytes=3_000)
    history.packet(now + WAIT, "nic_tx", SERVICE, 3_200, flags="RST|ACK")
    history.socket(now + WAIT, SERVICE, "close", state="TCP_CLOSE")
    history.socket(
        *(now + WAIT + 500, CLIENT, "state"),
        old_state="TCP_ESTABLISHED",
        state="TCP_CLOSE",
        desc="ECONNRESET",
    )
    history.socket(now + WAIT + 500, CLIENT, "close", state="TCP_CLOSE")
    (_, cut), (conn,), _ = joined(history.rows())
    assert (cut.outcome, cut.waited_ns, cut.over_by) == ("cut", WAIT, "reset by the service")
    # The server's part is over, how long the rest would have taken is not known.
    assert [name for name, _ in cut.split.stages] == [
        *("client_send", "wire", "softirq", "tcp", "queue", "server")
    ]
    assert conn.outcomes == {"answered": 1, "cut": 1}


def test_reset_after_a_read_reply_cuts_nothing() -> None:
    history = History()
    now = one_answered(history) + 1_000
    history.packet(now, "nic_tx", SERVICE, 200, flags="RST|ACK")
    history.socket(now, SERVICE, "close", state="TCP_CLOSE")
    history.socket(now + 9, CLIENT, "close", state="TCP_CLOSE")
    for without in ((), ("tcp_client",), ("tcp_service",), ("tcp_client", "tcp_service")):
        assert [one[0] for one in outcomes(history.rows(without))] == ["answered"]


def test_reply_after_the_client_gave_up_does_not_count() -> None:
    history = History()
    now = one_answered(history) + 1_000
    read = ask(history, now)
    history.socket(now + WAIT, CLIENT, "state", old_state="TCP_ESTABLISHED", state="TCP_FIN_WAIT1")
    late = read + WAIT + SECOND
    history.socket(late, SERVICE, "send", seq=history.seq(SERVICE, 200), bytes=10)
    history.packet(late + 5, "nic_tx", SERVICE, 200, 10)
    history.packet(late + 9, "nic_tx", CLIENT, 151, flags="RST")
    history.socket(late + 10, CLIENT, "close", state="TCP_CLOSE")
    history.socket(late + 20, SERVICE, "close", state="TCP_CLOSE")
    (_, late_one), _, _ = joined(history.rows())
    assert (late_one.outcome, late_one.waited_ns) == ("unanswered", WAIT)
    assert dict(late_one.split.stages)["server"] == WAIT + SECOND


@pytest.mark.parametrize(
    ("waited_ns", "answered_ns", "outcome"),
    [
        (3_000_000, 11_000, "open"),
        (999_000_000, 11_000, "open"),
        (WAIT, 11_000, "unanswered"),
        # A service whose answers take long: it may yet answer.
        (WAIT, 3 * SECOND, "open"),
        (4 * SECOND, 3 * SECOND, "unanswered"),
    ],
)
def test_pending_request_is_open_unless_it_waits_longest(
    waited_ns: int, answered_ns: int, outcome: str
) -> None:
    history, other = History(), History(ends=(("10.9.9.9", 1), ("10.9.9.8", 2)), by_sock=(5, 6))
    now = history.shake_hands() + 1_000
    history.message(CLIENT, 10, [now + step for step in range(6)])
    history.message(SERVICE, 10, [now + answered_ns - 5 + step for step in range(6)])
    now += answered_ns + 1_000
    ask(history, now)
    other.shake_hands(now + waited_ns - 7_000)
    rows = sorted(history.rows() + other.rows(), key=lambda row: row.ts_ns)
    exchanges, connections, _ = joined(rows)
    assert [(one.outcome, one.waited_ns) for one in exchanges] == [
        ("answered", None),
        (outcome, waited_ns),
    ]
    assert connections[0].outcomes == {"answered": 1, "open": outcome == "open"} | (
        {"unanswered": 1} if outcome != "open" else {}
    )


def test_reply_under_way_at_the_end_is_open() -> None:
    history = History()
    now = one_answered(history) + 1_000
    read = ask(history, now)
    history.socket(read + 1_000, SERVICE, "send", seq=history.seq(SERVICE, 200), bytes=9_000)
    assert [one[0] for one in outcomes(history.rows())] == ["answered", "open"]


# --- a service that reads by splice(): it has no recv row, by tracepoint


@given(TURNS, NUMBERS, st.integers(), st.sets(st.sampled_from(["nic_tx", "nic_rx", "tcp_client"])))
def test_request_read_without_a_row_is_paired(
    turns: Any, first: tuple[int, int], seed: int, without: set[str]
) -> None:
    history, truth = of_turns(turns, first, seed, pause_ns=SECOND)
    _with_copied(history)
    exchanges, (conn,), joiner = joined(history.rows({"tcp_service/recv", *without}))
    assert [(one.kind, one.request_bytes, one.reply_bytes) for one in exchanges] == [
        ("exchange", asked, answered) for _, asked, answered, _ in turns
    ]
    for exchange, at in zip(exchanges, truth, strict=True):
        assert exchange.stamps[5] is None
        assert exchange.stamps[6] == at[6]
        for when, real in zip(exchange.stamps, at, strict=True):
            assert when in (None, real)
    assert joiner.untimed == 0
    assert conn.outcomes == {"answered": len(turns)}


def _with_copied(history: History) -> None:
    """Wake-ups give the first unread byte."""
    read = [history.seq(end, 0) for end in (CLIENT, SERVICE)]
    for row in history.rows():
        peer = SERVICE if row.probe == "tcp_client" else CLIENT
        if row.point == "recv" and row.bytes:
            read[peer] = (row.seq or 0) + row.bytes
        elif row.point == "ready" and row.bytes:
            last = (row.seq or 0) + row.bytes
            row.seq, row.bytes = read[peer] % 2**32, (last - read[peer]) % 2**32


def test_request_partly_read_without_a_row_is_paired() -> None:
    history = History()
    now = history.shake_hands() + 1_000
    for number in range(3):
        at = [now + 1_000 * step for step in range(12)]
        history.message(CLIENT, 5_000, at[:6])
        history.message(SERVICE, 200, at[6:])
        history.made = [
            row
            for row in history.made
            if (row.probe, row.point) != ("tcp_service", "recv") or row.ts_ns < now
        ]
        seq = history.seq(CLIENT, number * 5_000)
        history.socket(at[5], SERVICE, "recv", seq=seq, bytes=100)
        now = at[-1] + SECOND
    history.close(now)
    exchanges, (conn,), _ = joined(history.rows())
    assert [(one.request_bytes, one.total_ns) for one in exchanges] == [(5_000, 11_000)] * 3
    assert conn.outcomes == {"answered": 3}


def test_reply_answers_no_request_still_unread() -> None:
    history = History()
    now = history.shake_hands() + 1_000
    at = [now + 1_000 * step for step in range(6)]
    history.message(CLIENT, 10, at)
    history.socket(now + 10_000, SERVICE, "send", seq=history.seq(SERVICE, 0), bytes=10)
    # The next one comes, and the rest of the first reply goes, before the service reads it.
    at = [now + 11_000 + 1_000 * step for step in range(5)] + [now + 30_000]
    history.message(CLIENT, 10, at)
    history.socket(now + 20_000, SERVICE, "send", seq=history.seq(SERVICE, 10), bytes=10)
    history.socket(now + 40_000, SERVICE, "send", seq=history.seq(SERVICE, 20), bytes=10)
    history.socket(now + 50_000, CLIENT, "recv", seq=history.seq(SERVICE, 0), bytes=30)
    history.sent[SERVICE] = 30
    history.close(now + 60_000)
    exchanges, _, _ = joined(history.rows())
    assert [(one.kind, one.reply_bytes) for one in exchanges] == [
        ("exchange", 20),
        ("exchange", 10),
    ]


def test_banner_before_the_request_is_read_is_a_push() -> None:
    history = History()
    now = history.shake_hands() + 1_000
    history.message(CLIENT, 10, [now, now + 1, now + 2, now + 3, now + 4, now + 900])
    history.socket(now + 100, SERVICE, "send", seq=history.seq(SERVICE, 0), bytes=7)
    history.socket(now + 200, CLIENT, "recv", seq=history.seq(SERVICE, 0), bytes=7)
    history.socket(now + 1_000, SERVICE, "send", seq=history.seq(SERVICE, 7), bytes=9)
    history.socket(now + 1_100, CLIENT, "recv", seq=history.seq(SERVICE, 7), bytes=9)
    history.sent[SERVICE] = 16
    history.close(now + 10_000)
    exchanges, (conn,), _ = joined(history.rows())
    assert [(one.kind, one.reply_bytes) for one in exchanges] == [("push", 7), ("exchange", 9)]
    assert (conn.exchanges, conn.outcomes) == (1, {"push": 1, "answered": 1})


# --- connections without a byte


def test_complete_connection_without_bytes_had_no_exchange() -> None:
    history = History()
    history.close(history.shake_hands() + SECOND)
    for watched in (PROBES, ("tcp_client",), ("tcp_service",), ("dev_xmit",), ("xdp_port",)):
        _, (conn,), _ = joined(history.rows(set(PROBES) - set(watched)))
        assert (conn.bytes_of(CLIENT), conn.bytes_of(SERVICE)) == (0, 0), watched


def test_exchanges_of_an_older_connection_are_unknown() -> None:
    history = History()
    history.close(history.shake_hands() + SECOND)
    rows = [row for row in history.rows() if row.ts_ns > SECOND and row.sock]
    _, connections, _ = joined(rows)
    assert {(one.bytes_of(CLIENT), one.bytes_of(SERVICE)) for one in connections} == {(None, None)}


# --- what the sinks make of it


def test_unanswered_requests_rank_as_slowest(written: Any) -> None:
    rows = hung(3).rows()
    slowest = objects(written("waterfall", rows, format="json", slow="2"))
    assert [one["outcome"] for one in slowest] == ["unanswered", "answered"]
    assert slowest[0]["waited_us"] == pytest.approx(2_000_000)
    assert (slowest[0]["total_us"], slowest[0]["over_by"]) == (None, "closed by the client")
    assert (slowest[1]["total_us"], slowest[1]["waited_us"]) == (11, None)
    text = written("waterfall", rows, slow="1")
    assert "50 B, unanswered  waited 2.000 s, closed by the client" in text
    assert text.splitlines()[-2].split()[:3] == ["waiting", "2.000", "s"]


@pytest.mark.parametrize(
    ("limit", "found"),
    [
        ("total:1s", ["unanswered"]),
        ("server:1s", ["unanswered"]),
        ("unanswered:0s", ["unanswered"]),
        ("unanswered:3s", []),
        ("queue:1s", []),
        ("queue:1us", ["answered", "answered", "unanswered"]),
        ("queue_back:1us", ["answered", "answered"]),
    ],
)
def test_latency_limit_includes_the_time_waited(written: Any, limit: str, found: list[str]) -> None:
    finished = objects(written("waterfall", hung(2).rows(), format="json", min_stage=limit))
    assert [one["outcome"] for one in finished] == found


def test_stages_sink_counts_unanswered_requests_separately(written: Any) -> None:
    rows = hung(3).rows()
    found = {one["stage"]: one for one in objects(written("stages", rows, format="json"))}
    assert list(found)[-2:] == ["total", "unanswered"]
    assert (found["total"]["count"], found["total"]["max_us"]) == (3, 11)
    assert (found["unanswered"]["count"], found["unanswered"]["max_us"]) == (1, 2_000_000)
    assert (found["queue"]["count"], found["server"]["count"]) == (4, 3)
    assert written("stages", rows, group_by="none").splitlines()[-1].split()[:2] == [
        *("unanswered", "1")
    ]


def test_push_is_not_a_sample_of_request_time(written: Any) -> None:
    history = History()
    now = history.shake_hands() + 1_000
    history.message(SERVICE, 30, [now + step * 1_000 for step in range(6)])
    history.close(simple(history, now + 10_000) + 1_000)
    found = {one["stage"]: one for one in objects(written("stages", history.rows(), format="json"))}
    assert (found["total"]["count"], found["push"]["count"], found["server_send"]["count"]) == (
        *(1, 1, 2),
    )
    (conn,) = objects(written("summary", history.rows(), format="json"))
    assert (conn["exchanges"], conn["push"]) == (1, 1)
    assert "1 exchange · 1 push" in written("summary", history.rows())


def test_summary_counts_outcomes_separately(written: Any) -> None:
    (conn,) = objects(written("summary", hung(2).rows(), format="json"))
    counted = ("exchanges", "unanswered", "cut", "open", "one_way", "push")
    assert [conn[name] for name in counted] == [2, 1, 0, 0, 0, 0]
    assert "2 exchanges · 1 unanswered" in written("summary", hung(2).rows())


def test_intervals_are_labelled_with_wall_clock_time(written: Any) -> None:
    history = History()
    # The second request ends the first exchange; of an interval without any there is no head.
    first = simple(history, history.shake_hands(SECOND - 100_000))
    history.close(simple(history, first + 500) + 5 * SECOND)
    text = written("stages", history.rows(), every="2s")
    # Unix time of the rows is 2023-11-14 22:13:20 and the time since boot.
    heads = [line for line in text.splitlines() if line.startswith("-- until")]
    assert heads[0] == "-- until 2023-11-14 22:13:22.000000Z"
    (first, *_) = [
        json.loads(line)
        for line in written("stages", history.rows(), every="2s", format="json").splitlines()
    ]
    if "until_ns" in first:
        assert first["until_time_ns"] - first["until_ns"] == 1_700_000_000_000_000_000


def test_outcomes_agree_with_the_counts() -> None:
    exchanges, connections, _ = joined(hung(2).rows())
    counted: dict[str, int] = {}
    for one in connections:
        assert isinstance(one, Connection)
        for name, count in one.outcomes.items():
            counted[name] = counted.get(name, 0) + count
    assert sum(counted.values()) == len(exchanges)


@pytest.mark.parametrize("shows", ["packets", "acked", "received", "an orderly end"])
def test_connection_without_call_rows_has_no_missing_reply(
    shows: str, written: Callable[..., str]
) -> None:
    """As with MPTCP: states and packets of a subflow have rows, its calls have none."""
    history = History()
    now = one_answered(history)
    history.socket(now + SECOND - 2, SERVICE, "stats", bytes_acked=202 if shows == "acked" else 2)
    received = 201 if shows == "received" else 1
    history.socket(now + SECOND - 1, CLIENT, "stats", bytes_received=received)
    history.close(now + SECOND)
    calls = {"send", "recv", *(["accept"] if shows == "an orderly end" else [])}
    packets = set() if shows == "packets" else {"dev_xmit", "xdp_port"}
    rows = history.rows(calls | packets)
    (one,), (conn,), _ = joined(rows)
    assert (one.outcome, one.waited_ns) == ("unknown", None)
    assert conn.outcomes == {"unknown": 1}
    assert "no row shows a reply" in written("waterfall", rows)
    assert "1 of unknown outcome" in written("summary", rows)
    assert objects(written("summary", rows, format="json"))[0]["unanswered"] == 0


# --- a farewell behind a request that hangs


def _hung_then(
    pause_ns: int = SECOND,
    *,
    farewell: int = 31,
    stays_ns: int = 60 * US,
    sends: int = 1,
) -> History:
    """Add an exchange, a request, after a pause so many more bytes, and the client's close()."""
    history = History()
    now = one_answered(history) + 1_000
    ask(history, now, 80)
    now += pause_ns
    for _ in range(sends):
        ask(history, now, farewell // sends)
        now += 10_000
    history.close(now - 10_000 + stays_ns)
    return history


@pytest.mark.parametrize(
    "watched",
    [
        PROBES,
        ("tcp_client",),
        ("tcp_service",),
        ("tcp_client", "dev_xmit"),
        ("dev_xmit",),
        ("xdp_port",),
        ("dev_xmit", "xdp_port"),
    ],
)
@pytest.mark.parametrize("sends", [1, 2])
def test_farewell_does_not_hide_an_earlier_hanging_request(
    watched: tuple[str, ...], sends: int
) -> None:
    rows = _hung_then(farewell=32, sends=sends).rows(set(PROBES) - set(watched))
    exchanges, (conn,), _ = joined(rows)
    assert [(one.outcome, one.request_bytes) for one in exchanges] == [
        ("answered", 100),
        ("unanswered", 80),
        ("one_way", 32),
    ]
    hung_one = exchanges[1]
    assert hung_one.over_by == "closed by the client"
    assert hung_one.waited_ns == pytest.approx(SECOND, abs=MS)
    # Its stages end with its own bytes: the pause is in none of them.
    assert hung_one.split.total_ns < MS
    assert conn.outcomes == {"answered": 1, "unanswered": 1, "one_way": 1}


@pytest.mark.parametrize(
    ("how", "found"),
    [
        # TLS records of one flight, and a farewell right behind the last request.
        ({"pause_ns": 10 * US}, ["one_way"]),
        ({"pause_ns": 900 * US}, ["one_way"]),
        # A body that follows its head after a pause is too long for a farewell.
        ({"farewell": 5_000}, ["one_way"]),
        ({"farewell": 5_000, "stays_ns": WAIT}, ["unanswered"]),
        # The client comes late to its close().
        ({"stays_ns": 20 * MS}, ["unanswered", "one_way"]),
        # It waits for an answer to the last part, too.
        ({"stays_ns": 500 * MS}, ["unanswered"]),
        ({"stays_ns": WAIT}, ["unanswered"]),
    ],
)
def test_farewell_is_short_and_between_a_pause_and_the_end(
    how: dict[str, Any], found: list[str]
) -> None:
    assert [one[0] for one in outcomes(_hung_then(**how).rows())] == ["answered", *found]


def test_pause_is_not_a_stage_of_a_waiting_request() -> None:
    # A client that sends QUIT, and waits for an answer to that, too.
    (_, waited), _, _ = joined(_hung_then(farewell=6, stays_ns=500 * MS).rows())
    assert (waited.outcome, waited.request_bytes) == ("unanswered", 86)
    assert waited.waited_ns == SECOND + 500 * MS
    assert waited.split.total_ns == 5_000


def test_farewell_after_the_services_fin_is_not_part_of_the_request() -> None:
    history = History()
    now = one_answered(history) + 1_000
    ask(history, now)
    gone = now + SECOND
    history.socket(gone, SERVICE, "state", old_state="TCP_ESTABLISHED", state="TCP_FIN_WAIT1")
    history.socket(gone + 9, CLIENT, "state", old_state="TCP_ESTABLISHED", state="TCP_CLOSE_WAIT")
    history.socket(gone + 20, CLIENT, "recv", seq=history.seq(SERVICE, 200), bytes=0)
    history.socket(gone + 30, CLIENT, "send", seq=history.seq(CLIENT, 150), bytes=31)
    history.socket(gone + 40, CLIENT, "state", old_state="TCP_CLOSE_WAIT", state="TCP_LAST_ACK")
    history.socket(gone + 50, CLIENT, "close", state="TCP_CLOSE")
    history.socket(gone + 50, SERVICE, "close", state="TCP_CLOSE")
    (_, crashed, farewell), _, _ = joined(history.rows())
    assert (crashed.outcome, crashed.waited_ns, crashed.over_by) == (
        *("unanswered", SECOND, "closed by the service"),
    )
    assert (farewell.outcome, farewell.request_bytes) == ("one_way", 31)


def test_late_reply_answers_neither_request_nor_farewell() -> None:
    history = History()
    now = one_answered(history) + 1_000
    ask(history, now)
    ask(history, now + SECOND, 31)
    left = now + SECOND + 60_000
    history.socket(left, CLIENT, "state", old_state="TCP_ESTABLISHED", state="TCP_FIN_WAIT1")
    late = left + SECOND
    history.socket(late, SERVICE, "send", seq=history.seq(SERVICE, 200), bytes=10)
    history.packet(late + 5, "nic_tx", SERVICE, 200, 10)
    history.packet(late + 9, "nic_tx", CLIENT, 182, flags="RST")
    history.socket(late + 10, CLIENT, "close", state="TCP_CLOSE")
    history.socket(late + 20, SERVICE, "close", state="TCP_CLOSE")
    (_, late_one, farewell), _, _ = joined(history.rows())
    assert (late_one.outcome, late_one.request_bytes) == ("unanswered", 50)
    assert late_one.waited_ns == SECOND + 60_000
    assert dict(late_one.split.stages)["client_send"] == 1_000
    assert (farewell.outcome, farewell.request_bytes) == ("one_way", 31)


# --- a reply after the client's FIN, where its reads have no rows


@pytest.mark.parametrize("watched", [("dev_xmit",), ("dev_xmit", "tcp_service"), ("tcp_service",)])
@pytest.mark.parametrize("refused", [True, False])
def test_reset_in_answer_to_a_late_reply_means_it_was_not_read(
    watched: tuple[str, ...], *, refused: bool
) -> None:
    """Without it the client has only closed its side, and reads the reply."""
    history = History()
    now = one_answered(history) + 1_000
    ask(history, now)
    left, late = now + SECOND, now + 2 * SECOND
    history.packet(left, "nic_tx", CLIENT, 150, flags="FIN|ACK")
    history.socket(left, SERVICE, "state", old_state="TCP_ESTABLISHED", state="TCP_CLOSE_WAIT")
    history.socket(late, SERVICE, "send", seq=history.seq(SERVICE, 200), bytes=10)
    history.packet(late, "nic_tx", SERVICE, 200, 10)
    if refused:
        history.packet(late + 50_000, "nic_tx", CLIENT, 151, flags="RST")
        history.socket(
            *(late + 50_000, SERVICE, "state"),
            old_state="TCP_CLOSE_WAIT",
            state="TCP_CLOSE",
            desc="ECONNRESET",
        )
    else:
        history.packet(late + MS, "nic_tx", SERVICE, 210, flags="FIN|ACK")
    history.socket(late + 2 * MS, SERVICE, "close", state="TCP_CLOSE")
    rows = history.rows({"tcp_client", *set(PROBES) - set(watched)})
    exchanges, _, _ = joined(rows)
    last = exchanges[-1]
    if refused:
        assert (last.outcome, last.over_by) == ("unanswered", "closed by the client")
        assert last.waited_ns == pytest.approx(SECOND, abs=MS)
    else:
        assert (last.outcome, last.reply_bytes) == ("answered", 10)
