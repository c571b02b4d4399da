"""A trace that ui.perfetto.dev opens: processes, connections, stages, and what flows between them.

The format is Chrome's Trace Event Format (JSON object form), with complete events (``X``),
flow events (``s``, ``f``) and metadata (``M``). Times are µs since the first host's boot, exact
to the nanosecond. Written as it comes: memory does not grow with the capture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, BinaryIO

import attrs
import msgspec
from tcplat_stages.chain import CONNECT_STAGES, CONNECTED, REPLY_TX, REQUEST_RX, STAGES
from tcplat_stages.connection import Connection, Finished
from tcplat_stages.exchange import Exchange
from tcplat_stages.formatting import address
from tcplat_stages.hosts import Hosts
from tcplat_stages.row_fields import Process
from tcplat_stages.stream import CLIENT, SERVICE
from tcplat_stages.waterfall import WAITING

from tcplat_core import HOST_BITS, Merge, micros

_MADE_UP = 1 << 22
"""Kernel process numbers are smaller."""
_MOST_PROCESSES = 65_536
_CATEGORY = "tcp"

Chain = list[tuple[int, int]]
"""Number of an instant, and when it was."""


@attrs.define(eq=False)
class _Track:
    """Slices of one connection at one end. Where exchanges overlap, there are several lanes."""

    pid: int
    name: str
    tids: list[int] = attrs.field(factory=list)
    ends_ns: list[int] = attrs.field(factory=list)


@attrs.define(eq=False)
class Trace:
    """Writes one trace."""

    file: BinaryIO
    _hosts: Hosts = attrs.field(factory=Hosts, init=False)
    _names: dict[int, str] = attrs.field(factory=dict, init=False)
    _pids: dict[Any, int] = attrs.field(factory=dict, init=False)
    _taken: set[int] = attrs.field(factory=set, init=False)
    _tracks: dict[tuple[int, int], dict[Process, _Track]] = attrs.field(factory=dict, init=False)
    _next_pid: int = attrs.field(default=_MADE_UP, init=False)
    _tid: int = attrs.field(default=0, init=False)
    _flow: int = attrs.field(default=0, init=False)
    _begun: bool = attrs.field(default=False, init=False)
    _encode: Any = attrs.field(factory=lambda: msgspec.json.Encoder().encode, init=False)
    _lines: list[bytes] = attrs.field(factory=list, init=False)

    def merged(self, merge: Merge) -> None:
        """Add a host of the capture."""
        self._hosts.learn(merge)
        self._names[merge.host] = merge.name

    def add(self, finished: Iterable[Finished]) -> None:
        """Exchanges and connections, as they are complete."""
        for one in finished:
            if isinstance(one, Exchange):
                self._exchange(one)
            else:
                self._connection(one)
        self._flush()

    def close(self) -> None:
        """End of the trace."""
        self._flush()
        if not self._begun:
            self.file.write(b'{"displayTimeUnit":"ns","traceEvents":[')
        self.file.write(b"\n]}\n")

    def _flush(self) -> None:
        if not self._lines:
            return
        self.file.write(b",\n" if self._begun else b'{"displayTimeUnit":"ns","traceEvents":[\n')
        self.file.write(b",\n".join(self._lines))
        self._begun = True
        self._lines.clear()

    def _emit(self, **event: Any) -> None:
        self._lines.append(self._encode(event))

    # --- what there is to show

    def _connection(self, conn: Connection) -> None:
        if not conn.reported:
            self._handshake(conn)
        for end in (CLIENT, SERVICE):
            self._tracks.pop((conn.number, end), None)

    def _handshake(self, conn: Connection) -> None:
        stamps = conn.stamps
        if stamps[CONNECTED] is not None:
            stamps = stamps[: CONNECTED + 1]
        chain = _chain(stamps, conn.handshake.left_out)
        if len(chain) > 1:
            end = CLIENT if conn.ends[CLIENT].sock else SERVICE
            about = {"syns_again": conn.syns}
            self._slice(conn, end, conn.ends[end].process, "connect", chain, CONNECT_STAGES, about)

    def _exchange(self, exchange: Exchange) -> None:
        conn = exchange.conn
        if exchange.number == 1:
            self._handshake(conn)
        chain = _chain(exchange.stamps, exchange.split.left_out)
        if not chain:
            return
        served = [item for item in chain if REQUEST_RX <= item[0] <= REPLY_TX]
        bound_ns = self._hosts.wire_bound_ns(conn)
        about = {
            "request_bytes": exchange.request_bytes,
            "reply_bytes": exchange.reply_bytes,
            "retransmits": exchange.retransmits,
            "zero_windows": exchange.zero_windows,
            "ended": exchange.ended,
            "outcome": exchange.outcome,
            **({"over_by": exchange.over_by} if exchange.over_by else {}),
            **({} if bound_ns is None else {"wire_bound_us": micros(bound_ns)}),
        }
        name = f"{exchange.kind} {exchange.number}"
        asked = replied = None
        if len(served) < len(chain) or exchange.over_ns is not None:
            # A request that waited in vain is its client's, whichever end it is reported for.
            name += f" ({exchange.outcome})" if exchange.over_ns is not None else ""
            track, tid = self._slice(
                *(conn, CLIENT, exchange.process(CLIENT), name),
                *(chain, STAGES, about, exchange.over_ns or 0),
            )
            asked = replied = (track, tid)
        if len(served) < 2:  # noqa: PLR2004 - one instant is no slice
            return
        name, service = f"serve {exchange.number}", exchange.process(SERVICE)
        at = self._slice(conn, SERVICE, service, name, served, STAGES, about)
        if asked is None or replied is None:
            return
        if chain[0][0] < REQUEST_RX:
            self._flows("request", asked, chain[0][1], at, served[0][1])
        if chain[-1][0] > REPLY_TX:
            self._flows("reply", at, served[-1][1], replied, chain[-1][1])

    # --- how it looks

    def _slice(
        self,
        conn: Connection,
        end: int,
        process: Process,
        name: str,
        chain: Chain,
        stages: Sequence[str],
        about: dict[str, Any],
        over_ns: int = 0,
    ) -> tuple[int, int]:
        """Write a slice, and one for each stage and wait in it; return where it is."""
        begin_ns, end_ns = chain[0][1], max(chain[-1][1], over_ns)
        pid, tid = self._lane(conn, end, process, begin_ns, end_ns)

        def show(what: str, ts_ns: int, until_ns: int, **more: Any) -> None:
            self._emit(
                ph="X",
                cat=_CATEGORY,
                name=what,
                pid=pid,
                tid=tid,
                ts=micros(ts_ns),
                dur=micros(until_ns - ts_ns),
                **more,
            )

        show(name, begin_ns, end_ns, args=about)
        for (first, since_ns), (last, until_ns) in pairwise(chain):
            show("+".join(stages[first:last]), since_ns, until_ns)
        if over_ns > chain[-1][1]:
            show(WAITING, chain[-1][1], over_ns)
        return pid, tid

    def _flows(
        self, name: str, here: tuple[int, int], ts_ns: int, there: tuple[int, int], until_ns: int
    ) -> None:
        self._flow += 1
        common = {"cat": _CATEGORY, "name": name, "id": self._flow}
        self._emit(ph="s", pid=here[0], tid=here[1], ts=micros(ts_ns), **common)
        self._emit(ph="f", bp="e", pid=there[0], tid=there[1], ts=micros(until_ns), **common)

    def _lane(
        self, conn: Connection, end: int, process: Process, begin_ns: int, end_ns: int
    ) -> tuple[int, int]:
        """Where nothing else is at that time."""
        tracks = self._tracks.setdefault((conn.number, end), {})
        track = tracks.get(process)
        if track is None:
            name = f"{address(conn.client)} → {address(conn.service)}"
            track = tracks[process] = _Track(self._process(conn, end, process), name)
        for lane, until_ns in enumerate(track.ends_ns):
            if until_ns <= begin_ns:
                track.ends_ns[lane] = end_ns
                return track.pid, track.tids[lane]
        self._tid += 1
        track.tids.append(self._tid)
        track.ends_ns.append(end_ns)
        self._meta("thread_name", track.pid, self._tid, name=track.name)
        return track.pid, self._tid

    def _process(self, conn: Connection, index: int, process: Process) -> int:
        end = conn.ends[index]
        host = (end.netns or 0) >> HOST_BITS
        where = (conn.client, conn.service)[index][0]
        key = (host, process) if process.pid is not None else where
        pid = self._pids.get(key)
        if pid is not None:
            return pid
        if len(self._pids) >= _MOST_PROCESSES:
            self._pids.clear()  # the same process then stands there twice
        pid = process.pid
        if pid is None or pid in self._taken or len(self._taken) >= _MOST_PROCESSES:
            self._next_pid += 1
            pid = self._next_pid
        else:
            self._taken.add(pid)
        self._pids[key] = pid
        name = (
            f"{where} (not watched)"
            if process.pid is None
            else f"{process.comm or '?'} {process.pid}"
        )
        if process.pid is not None and len(self._names) > 1:
            name += f" on {self._names.get(host, host)}"
        self._meta("process_name", pid, 0, name=name)
        return pid

    def _meta(self, what: str, pid: int, tid: int, **args: Any) -> None:
        self._emit(ph="M", name=what, pid=pid, tid=tid, ts=0, args=args)


def _chain(stamps: Sequence[int | None], left_out: Sequence[int]) -> Chain:
    """Return the instants that are known and in order."""
    return [
        (number, at)
        for number, at in enumerate(stamps)
        if at is not None and number not in left_out
    ]
