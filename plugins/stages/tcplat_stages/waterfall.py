"""A block per exchange: where its time went, stage after stage."""

from __future__ import annotations

import heapq
from typing import Any

import attrs

from tcplat_core import micros, printable

from .chain import MILESTONES, STAGES, UNEXPLAINED, Split
from .connection import Finished
from .exchange import CUT, FAILED, OPEN, UNANSWERED, UNKNOWN, Exchange
from .formatting import bar, duration, moment, nanos, path, stage, stages_json
from .hosts import Hosts, crosses
from .joined import Joined
from .stream import SERVICE

TOTAL = "total"
WAITING = "waiting"
_LEAST_BAR = 10


Rank = tuple[bool, int]


def rank(exchange: Exchange) -> Rank:
    """Return how slow it is: failed ones first, then by the time it took, or waited."""
    return exchange.outcome in FAILED, exchange.lasted_ns


@attrs.frozen
class AtLeast:
    """Only exchanges of which one stage took so long: name -> ns, any of them."""

    limits: tuple[tuple[str, int], ...]

    def passes(self, exchange: Exchange) -> bool:
        """Return whether a stage took that long; merged stages count as a whole.

        So may each stage in which a request was that waited in vain, and its total is no less.
        """
        split = exchange.split
        parts = [(name.split("+"), ns) for name, ns in split.stages]
        parts += [([TOTAL], exchange.lasted_ns), ([UNEXPLAINED], split.unexplained_ns)]
        if exchange.waited_ns is not None:
            rest_ns = exchange.waited_ns - split.total_ns
            parts += [(list(exchange.under_way), rest_ns), ([exchange.outcome], exchange.waited_ns)]
        return any(
            name in names and ns >= limit for name, limit in self.limits for names, ns in parts
        )


@attrs.define(eq=False)
class Waterfall(Joined):
    """Exchanges as they are complete.

    Args:
        output: Where to.
        width: Columns to fit into.
        as_json: One JSON object per exchange, instead of a picture.
        slow: Only so many of the slowest, at the end; 0 for all, as they come. What was not
            answered is slower than what was.
        at_least: Which ones; None for all.
    """

    width: int = 100
    slow: int = attrs.field(default=0, kw_only=True)
    at_least: AtLeast | None = attrs.field(default=None, kw_only=True)
    _slowest: list[tuple[Rank, int, Exchange]] = attrs.field(factory=list, init=False)
    _count: int = attrs.field(default=0, init=False)

    def finish(self, finished: list[Finished]) -> None:
        """Write what was still open, and the slowest."""
        self.write_finished(finished)
        slowest = sorted(self._slowest, key=lambda one: one[:2], reverse=True)
        self._write([exchange for _, _, exchange in slowest])
        if self.as_json:
            self.output.write(self.spans_loss())
        else:
            left_out = [f"-- {words} --\n" for words in self.joiner.left_out()]
            self.output.write("".join(left_out).encode())

    def write_finished(self, finished: list[Finished]) -> None:
        """Show the exchanges that are complete."""
        found = [
            one
            for one in finished
            if isinstance(one, Exchange) and (self.at_least is None or self.at_least.passes(one))
        ]
        if not self.slow:
            self._write(found)
            return
        for exchange in found:
            self._count += 1
            # Of two that took equally long, the earlier one stays.
            item = (rank(exchange), -self._count, exchange)
            if len(self._slowest) < self.slow:
                heapq.heappush(self._slowest, item)
            else:
                heapq.heappushpop(self._slowest, item)

    def _write(self, exchanges: list[Exchange]) -> None:
        for some in self.pieces(exchanges):
            if self.as_json:
                self.output.write(
                    self.encoder.encode_lines([as_json(one, self.hosts) for one in some])
                )
            else:
                blocks = [block(one, self.width, self.hosts) for one in some]
                self.output.write("".join(blocks).encode())


def as_json(exchange: Exchange, hosts: Hosts | None = None) -> dict[str, Any]:
    """Return an exchange as one object; times in µs, exact to the nanosecond.

    ``wire_bound_us`` is there where two hosts' clocks stamped the two ends of the wire.
    """
    conn = exchange.conn
    split = exchange.split
    end = exchange.end
    process, service = exchange.process(end.index), exchange.process(SERVICE)
    began_ns = exchange.began_ns
    handshake = _handshake(exchange)
    bound_ns = hosts.wire_bound_ns(conn) if hosts else None
    return {
        "v": 1,
        "kind": exchange.kind,
        "outcome": exchange.outcome,
        "ts_ns": began_ns,
        "time_ns": began_ns + conn.offset_ns,
        "conn": conn.number,
        "number": exchange.number,
        "pid": process.pid,
        "comm": process.comm,
        "service_pid": service.pid,
        "service_comm": service.comm,
        "netns": end.netns,
        "ip": conn.ip,
        "saddr": conn.client[0],
        "sport": conn.client[1],
        "daddr": conn.service[0],
        "dport": conn.service[1],
        "guessed": conn.guessed,
        "total_us": micros(split.total_ns) if exchange.measured else None,
        "waited_us": None if exchange.waited_ns is None else micros(exchange.waited_ns),
        "over_by": exchange.over_by or None,
        "stages": stages_json(split),
        "unexplained_us": micros(split.unexplained_ns),
        **({} if bound_ns is None else {"wire_bound_us": micros(bound_ns)}),
        "left_out": [MILESTONES[number] for number in split.left_out],
        "request_bytes": exchange.request_bytes,
        "reply_bytes": exchange.reply_bytes,
        "retransmits": exchange.retransmits,
        "zero_windows": exchange.zero_windows,
        "ended": exchange.ended,
        "accept_us": conn.accept_us if exchange.number == 1 else None,
        "connect": handshake
        and {
            "total_us": micros(handshake.total_ns),
            "stages": stages_json(handshake),
            "unexplained_us": micros(handshake.unexplained_ns),
        },
    }


def _handshake(exchange: Exchange) -> Split | None:
    """With a connection's first exchange, what came before."""
    split = exchange.conn.handshake
    return split if exchange.number == 1 and split.total_ns else None


def block(exchange: Exchange, width: int, hosts: Hosts | None = None) -> str:
    """Return an exchange as a picture."""
    conn = exchange.conn
    bound_ns = hosts.wire_bound_ns(conn) if hosts else None
    split = exchange.split
    head = (
        f"{moment(exchange.began_ns + conn.offset_ns)}  {path(exchange)}  "
        f"{_what(exchange)}  {_how_long(exchange)}{_marks(exchange)}"
    )
    lines = [head]
    handshake = _handshake(exchange)
    if handshake is not None:
        again = f", SYN sent again {conn.syns} times" if conn.syns else ""
        accept_us = conn.accept_us
        accept = (
            "" if accept_us is None else f", accepted after {duration(round(accept_us * 1000))}"
        )
        lines.append(f"  connect {duration(handshake.total_ns)}{again}{accept}")
        lines += _bars(handshake, width, bound_ns)
        lines.append(f"  {exchange.kind} {duration(exchange.lasted_ns)}")
    lines += _bars(split, width, bound_ns, exchange.waited_ns or 0)
    return "\n".join([*map(printable, lines), "", ""])


def _what(exchange: Exchange) -> str:
    if exchange.kind == "push":
        return f"{exchange.reply_bytes} B, unasked"
    asked = f"{exchange.request_bytes} B"
    if exchange.kind == "exchange":
        words = {UNANSWERED: "late, unread ", CUT: "cut off after ", OPEN: "so far "}
        return f"{asked}, reply {words.get(exchange.outcome, '')}{exchange.reply_bytes} B"
    words = {UNANSWERED: "unanswered", OPEN: "no reply yet", UNKNOWN: "no row shows a reply"}
    return f"{asked}, {words.get(exchange.outcome, 'no reply awaited')}"


def _how_long(exchange: Exchange) -> str:
    if exchange.waited_ns is None:
        return duration(exchange.split.total_ns)
    return f"waited {duration(exchange.waited_ns)}, {exchange.over_by}"


def _marks(exchange: Exchange) -> str:
    marks = ""
    if exchange.retransmits:
        marks += f"  ! {exchange.retransmits} retransmitted"
    if exchange.zero_windows:
        marks += f"  ! window closed {exchange.zero_windows} times"
    if exchange.ended not in ("turn", "closed", exchange.over_by):
        marks += f"  ({exchange.ended})"
    return marks


def _bars(split: Split, width: int, bound_ns: int | None, waited_ns: int = 0) -> list[str]:
    bound = "" if bound_ns is None else f" ± {duration(bound_ns)}"
    parts = [
        (stage(name), ns, duration(ns) + (bound if crosses(name) else ""))
        for name, ns in split.stages
    ]
    if split.unexplained_ns:
        parts.append((UNEXPLAINED, split.unexplained_ns, duration(split.unexplained_ns)))
    whole_ns = max(split.total_ns, waited_ns)
    rest_ns = whole_ns - split.total_ns
    if rest_ns:
        parts.append((WAITING, rest_ns, duration(rest_ns)))
    names = max((len(name) for name, _, _ in parts), default=0)
    times = max((len(time) for _, _, time in parts), default=0)
    columns = max(width - names - times - 6, _LEAST_BAR)
    lines, before_ns = [], 0
    for name, ns, time in parts:
        shown = bar(before_ns, ns, whole_ns, columns)
        lines.append(f"    {name:<{names}} {time:>{times}} {shown}".rstrip())
        before_ns += ns
    return lines


def parse_at_least(text: str) -> AtLeast:
    """``queue:1ms`` or ``queue=1ms``; several are joined by +, any of them will do.

    ``unanswered:1s``, ``cut`` and ``open`` are those that waited so long in vain.

    Raises:
        ValueError: There is no such stage, or it is no duration.
    """
    limits = []
    for word in text.split("+"):
        name, _, least = word.replace("=", ":").partition(":")
        if name not in (*STAGES, TOTAL, UNEXPLAINED, UNANSWERED, CUT, OPEN):
            raise ValueError(
                f"there is no stage {name!r}; it must be one of {', '.join(STAGES)}, "
                f"{TOTAL}, {UNANSWERED}, {CUT}, {OPEN}"
            )
        if not least:
            raise ValueError(f"{name} has no time; write {name}:1ms")
        limits.append((name, nanos(least)))
    return AtLeast(tuple(limits))
