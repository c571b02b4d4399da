"""A block per connection, when it is over."""

from __future__ import annotations

from typing import Any

import attrs

from tcplat_core import micros, printable

from .chain import CONNECT_CALLED, CONNECTED, HANDSHAKE_DONE, SYN_RX
from .closing import in_words
from .connection import STATS, Connection, Finished
from .exchange import ANSWERED, OUTCOMES
from .formatting import duration, moment, path, stages_json
from .hosts import Hosts
from .joined import Joined
from .stream import CLIENT, SERVICE

_ENDS = ("client", "service")


@attrs.define(eq=False)
class Summary(Joined):
    """Connections as they end."""

    def finish(self, finished: list[Finished]) -> None:
        """Tell of those that were still open."""
        self.write_finished(finished)

    def write_finished(self, finished: list[Finished]) -> None:
        """Tell of those that are over."""
        found = [one for one in finished if isinstance(one, Connection)]
        for some in self.pieces(found):
            if self.as_json:
                self.output.write(
                    self.encoder.encode_lines([as_json(conn, self.hosts) for conn in some])
                )
            else:
                self.output.write("".join([block(conn, self.hosts) for conn in some]).encode())


def _between(conn: Connection, first: int, last: int) -> int | None:
    """How many ns between two instants of the handshake, if they are known and in order."""
    began, ended = conn.stamps[first], conn.stamps[last]
    return ended - began if began is not None and ended is not None and ended >= began else None


def _connect(conn: Connection) -> tuple[int | None, int | None, int | None, int | None]:
    """All of it until the client may send; its parts: SYN, SYN-ACK; the ACK after it; ns."""
    return (
        _between(conn, CONNECT_CALLED, CONNECTED),
        _between(conn, CONNECT_CALLED, SYN_RX),
        _between(conn, SYN_RX, CONNECTED),
        _between(conn, CONNECTED, HANDSHAKE_DONE),
    )


def _us(ns: int | None) -> float | None:
    return None if ns is None else micros(ns)


def _main_end(conn: Connection) -> int:
    """Return the end that stands for the connection: the client's, if the kernel reported it."""
    return CLIENT if conn.ends[CLIENT].stats or not conn.ends[SERVICE].stats else SERVICE


def _figures(conn: Connection, index: int) -> dict[str, Any]:
    """Return what the kernel counted for an end; null if it reported nothing."""
    stats = conn.ends[index].stats or {}
    return {name: stats.get(name) for name in STATS}


def as_json(conn: Connection, hosts: Hosts) -> dict[str, Any]:  # its fields, one by one
    """Return a connection as one object; times in µs.

    ``wire_bound_us`` is there where two hosts' clocks stamped SYN, SYN-ACK and ACK.
    """
    bound_ns = hosts.wire_bound_ns(conn)
    figures = _figures(conn, _main_end(conn))
    connect, syn, synack, ack = _connect(conn)
    ends = {
        name: {
            "pid": conn.ends[index].pid,
            "comm": conn.ends[index].comm,
            "netns": conn.ends[index].netns,
            "bytes_sent": conn.bytes_of(index),
            "retransmits_seen": conn.flows[index].retransmits,
            "zero_windows": conn.flows[index].zero_windows,
            **_figures(conn, index),
        }
        for index, name in enumerate(_ENDS)
    }
    end = conn.ends[CLIENT if conn.ends[CLIENT].pid is not None else SERVICE]
    return {
        "v": 1,
        "ts_ns": conn.first_ns,
        "time_ns": conn.first_ns + conn.offset_ns,
        "conn": conn.number,
        "pid": end.pid,
        "comm": end.comm,
        "ip": conn.ip,
        "saddr": conn.client[0],
        "sport": conn.client[1],
        "daddr": conn.service[0],
        "dport": conn.service[1],
        "guessed": conn.guessed,
        "doubtful": conn.doubtful,
        "began": conn.began,
        "duration_us": micros(conn.duration_ns),
        "connect_us": conn.connect_us if connect is None else micros(connect),
        "syn_us": _us(syn),
        "synack_us": _us(synack),
        "ack_us": _us(ack),
        **({} if bound_ns is None else {"wire_bound_us": micros(bound_ns)}),
        "accept_us": conn.accept_us,
        "connect_stages": stages_json(conn.handshake),
        "syn_retransmits": conn.syns,
        "exchanges": conn.exchanges,
        **{name: conn.outcomes.get(name, 0) for name in OUTCOMES if name != ANSWERED},
        "untold": conn.left_out,
        "spans_loss": conn.spans_loss,
        "think_us": micros(conn.think_ns),
        "bytes_to_service": conn.bytes_of(CLIENT),
        "bytes_to_client": conn.bytes_of(SERVICE),
        "srtt_us": figures["srtt_us"],
        "min_rtt_us": figures["min_rtt_us"],
        "rto_us": figures["rto_us"],
        "retransmits": conn.retransmits,
        "zero_windows": sum(flow.zero_windows for flow in conn.flows),
        "closed_first": _ENDS[conn.fins[0]] if conn.fins else None,
        "reset_by": None if conn.reset_by is None else _ENDS[conn.reset_by],
        "reset_why": conn.reset_why,
        "error": conn.error,
        "ended": conn.ended,
        **ends,
    }


def block(conn: Connection, hosts: Hosts) -> str:
    """Return a connection in a few lines."""
    bound_ns = hosts.wire_bound_ns(conn)
    bound = "" if bound_ns is None else f" ± {duration(bound_ns)}"
    began = moment(conn.first_ns + conn.offset_ns)
    lines = [f"{began}  {path(conn)}  {duration(conn.duration_ns)}  {_end(conn)}"]
    connect, syn, synack, ack = _connect(conn)
    parts = [("SYN", syn), ("SYN-ACK", synack), ("ACK", ack)]
    known = [f"{name} {duration(ns)}{bound}" for name, ns in parts if ns is not None]
    accept = (
        []
        if conn.accept_us is None
        else [f"accepted after {duration(round(conn.accept_us * 1000))}"]
    )
    again = [f"SYN sent again {conn.syns} times"] if conn.syns else []
    if connect is not None or known or accept:
        whole = [] if connect is None else [f"{duration(connect)}"]
        lines.append(_line("connect", [*whole, *known, *accept, *again]))
    there, back = conn.bytes_of(CLIENT), conn.bytes_of(SERVICE)
    lines.append(
        _line(
            "bytes",
            [
                f"{'?' if there is None else there} to the service",
                f"{'?' if back is None else back} to the client",
                _many(conn.exchanges, "exchange"),
                *_outcomes(conn),
                *([f"client thought {duration(conn.think_ns)}"] if conn.think_ns else []),
            ],
        )
    )
    for index, name in enumerate(_ENDS):
        stats = conn.ends[index].stats
        if stats and stats["srtt_us"]:
            figures = (("srtt", "srtt_us"), ("min RTT", "min_rtt_us"), ("RTO", "rto_us"))
            shown = [(what, stats[key]) for what, key in figures]
            lines.append(_line(name, [f"{what} {duration(us * 1000)}" for what, us in shown if us]))
    trouble = _trouble(conn)
    if trouble:
        lines.append(_line("trouble", trouble))
    return "\n".join([*map(printable, lines), "", ""])


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _outcomes(conn: Connection) -> list[str]:
    """Return what there was besides exchanges."""
    words = {
        "unanswered": "unanswered",
        "cut": "cut off",
        "open": "open at the end",
        "one_way": "without a reply awaited",
        "unknown": "of unknown outcome",
    }
    counts = conn.outcomes
    found = [f"{counts[name]} {what}" for name, what in words.items() if counts.get(name)]
    pushes = counts.get("push")
    lost = [f"{conn.spans_loss} left out: events were lost"] if conn.spans_loss else []
    return [*found, *([f"{pushes} push" + "es" * (pushes > 1)] if pushes else []), *lost]


def _line(head: str, parts: list[str]) -> str:
    return f"  {head:<8} {' · '.join(parts)}"


def _end(conn: Connection) -> str:
    if conn.reset_by is not None:
        why = f": {conn.reset_why}" if conn.reset_why else ""
        return f"reset by the {_ENDS[conn.reset_by]}{why}"
    if conn.error:
        return in_words(conn.error)
    if conn.fins:
        return f"closed by the {_ENDS[conn.fins[0]]}"
    return conn.ended


def _trouble(conn: Connection) -> list[str]:
    found = []
    if conn.doubtful:
        found.append("two connections have these addresses: not joined")
    for index, name in enumerate(_ENDS):
        count = conn.retransmits_of(index)
        if count:
            found.append(f"{name} retransmitted {count}")
        windows = conn.flows[index].zero_windows
        if windows:
            found.append(f"{name} closed its window {windows} times")
    return found
