"""How far two hosts' clocks are apart, as the packets between them bound it.

A packet that leaves host A at `a` by its clock, and arrives at B at `b` by B's, was under way
for no less than nothing: B's clock is ahead by ``b - a`` at most. One that goes the other way
says the same of the least. NTP is not asked.

Clocks drift, but by 200 ppm at most against each other (crystals are within 100 ppm, and
NTP holds them closer). So a bound that holds at one time holds at another, widened by 200 ppm of
the time between: of all packets, the tightest bound at each time is taken. The rate itself
is not fitted: temperature and NTP change it.

CLOCK_MONOTONIC (`ts_ns`) is what is compared. Unix time may be set, and step; this one never does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import attrs
from tcplat_stages.row_fields import whole

from tcplat_core import TcplatError

DRIFT_PPM = 200
_MILLION = 1_000_000
_FIRST_WINDOW_NS = 1 << 20
_MOST_WINDOWS = 1 << 17
_MOST_WAITING = 500_000
"""Packets that were seen on one host, and not yet on the other."""
_UNSURE_NS = 1_000_000_000
_HALF = 1 << 31
_WHOLE = 1 << 32
_PACKETS = frozenset({"nic_tx", "nic_rx", "rx_ip"})
_BEGINNINGS = frozenset({"syn", "syn acked"})
"""Kinds of numbers that begin a connection."""
_ACKS = frozenset({"acked", "syn acked"})

Key = tuple[Any, ...]


def drift(ns: int) -> int:
    """Return how much an offset may change (ns) in so long."""
    return -(-abs(ns) * DRIFT_PPM // _MILLION)


class UnboundedError(TcplatError):
    """The packets do not bound the offset of the clocks; the message gives the reason."""


@attrs.frozen
class Offset:
    """B's clock minus A's, as a function of B's time, and how far it may be wrong.

    Args:
        times: By B's clock, ascending.
        lows: Bounds at these.
        highs: Bounds at these.
        bound_ns: Of the worst of them: the offset is right within so much.
        packets: So many gave the bounds.
    """

    times: tuple[int, ...]
    lows: tuple[int, ...]
    highs: tuple[int, ...]
    bound_ns: int
    packets: int

    def at(self, ts_ns: int) -> int:
        """Return the middle of the bounds: it drifts by less than DRIFT_PPM, so order stays."""
        place = bisect_right(self.times, ts_ns)
        if place == 0 or place == len(self.times):
            place = min(place, len(self.times) - 1)
            return (self.lows[place] + self.highs[place]) // 2
        left, right = self.times[place - 1], self.times[place]
        before = self.lows[place - 1] + self.highs[place - 1]
        after = self.lows[place] + self.highs[place]
        return (before + (after - before) * (ts_ns - left) // (right - left)) // 2

    @property
    def first_ns(self) -> int:
        """The offset at the first packet."""
        return self.at(self.times[0])

    @property
    def drift_ppm(self) -> float:
        """How much faster B's clock runs, from the first packet to the last."""
        return (self.at(self.times[-1]) - self.first_ns) / self._span_ns * _MILLION

    @property
    def drift_bound_ppm(self) -> float:
        """So far that may be wrong."""
        return min(2 * self.bound_ns / self._span_ns * _MILLION, 2.0 * DRIFT_PPM)

    @property
    def _span_ns(self) -> int:
        return max(self.times[-1] - self.times[0], 1)


class Corridor:
    """Bounds of the offset, by windows of B's time: each stands at its window's middle."""

    def __init__(self) -> None:
        self.window_ns = _FIRST_WINDOW_NS
        self.highs: dict[int, int] = {}
        self.lows: dict[int, int] = {}
        self.counts = [0, 0]
        """Bounds from packets of each way; one packet may give two."""
        self.packets = 0

    def at_most(self, ts_ns: int, offset: int) -> None:
        """Take the upper bound by a packet to B, that arrived at `ts_ns`."""
        self.counts[0] += 1
        window, off = self._place(ts_ns)
        offset += off
        known = self.highs.get(window)
        if known is None or offset < known:
            self.highs[window] = offset
            if len(self.highs) > _MOST_WINDOWS:
                self._widen()

    def at_least(self, ts_ns: int, offset: int) -> None:
        """Take the lower bound by a packet from B, that left at `ts_ns`."""
        self.counts[1] += 1
        window, off = self._place(ts_ns)
        offset -= off
        known = self.lows.get(window)
        if known is None or offset > known:
            self.lows[window] = offset
            if len(self.lows) > _MOST_WINDOWS:
                self._widen()

    def _place(self, ts_ns: int) -> tuple[int, int]:
        window = ts_ns // self.window_ns
        return window, drift(ts_ns - self._middle(window))

    def _middle(self, window: int) -> int:
        return window * self.window_ns + self.window_ns // 2

    def _widen(self) -> None:
        """Make windows twice as long."""
        far = drift(self.window_ns // 2)
        self.window_ns *= 2
        highs, lows = self.highs, self.lows
        self.highs, self.lows = {}, {}
        for window, offset in highs.items():
            new = window // 2
            self.highs[new] = min(offset + far, self.highs.get(new, offset + far))
        for window, offset in lows.items():
            new = window // 2
            self.lows[new] = max(offset - far, self.lows.get(new, offset - far))

    def offset(self) -> Offset:
        """Return the tightest bounds that all packets together give.

        Raises:
            UnboundedError: One direction is missing, or the packets contradict each other.
        """
        for count, way in zip(self.counts, ("A to B", "B to A"), strict=True):
            if not count:
                raise UnboundedError(
                    f"how far the clocks are apart cannot be determined: no packet from {way} was "
                    "seen leaving on the one host and arriving on the other; "
                    "run dev_xmit and xdp_port on both, at the same time"
                )
        windows = sorted(self.highs.keys() | self.lows.keys())
        times = [self._middle(window) for window in windows]
        highs = _spread([self.highs.get(window) for window in windows], times)
        lows = _spread(
            [-n if (n := self.lows.get(w)) is not None else None for w in windows], times
        )
        lows = [-low for low in lows]
        worst = min(high - low for low, high in zip(lows, highs, strict=True))
        if worst < 0:
            raise UnboundedError(
                f"the packets contradict each other by {-worst / 1000:.1f} µs: their clocks "
                f"drift by more than {DRIFT_PPM} ppm, events were lost, or these are not "
                "captures of the same packets"
            )
        widest = max(high - low for low, high in zip(lows, highs, strict=True))
        bound = -(-widest // 2) + drift(self.window_ns // 2)
        return Offset(tuple(times), tuple(lows), tuple(highs), bound, self.packets)


def _spread(bounds: list[int | None], times: list[int]) -> list[int]:
    """Upper bounds at each time, by their neighbours' as well; one at least is known."""
    spread: list[int] = []
    for turn in (1, -1):
        bounds, times = bounds[::turn], times[::turn]
        spread = []
        last: int | None = None
        before = 0
        for bound, time in zip(bounds, times, strict=True):
            if last is not None:
                last += drift(time - before)
            if bound is not None and (last is None or bound < last):
                last = bound
            before = time
            spread.append(last)  # type: ignore[arg-type] # what is None comes out of the way back
        bounds, times = spread[::turn], times[::turn]  # type: ignore[assignment] # the same
    return spread[::-1]


class _Progress:
    """How far one direction of a connection has come at one host, unwrapped; -1 for unknown."""

    __slots__ = ("acked", "position", "since")

    def __init__(self, since: int) -> None:
        self.position = self.acked = -1
        self.since = since

    def reached(self, kind: str) -> int:
        """Return how far its bytes, or what it acknowledges, have come."""
        return self.acked if kind in _ACKS else self.position


class _Sight(NamedTuple):
    """Where and when a number was new, and how far that was, unwrapped."""

    ts_ns: int
    netns: Any
    progress: _Progress
    at: int


class PacketMatcher:
    """Packets, as the two hosts see them, matched by TCP's numbers -> a corridor.

    What counts is when a byte, or an acknowledgement of one, is seen for the first time: that
    it left before it arrived is true whatever is segmented, merged, or sent again in between.
    So of each packet its last byte and its acknowledgement count, if they are new there.

    Several connections may have the same addresses and ports, each in network namespaces of its
    own, and the kernel gives them numbers that are near each other. The first packet that both
    hosts have seen shows which namespace of one host talks to which of the other; each SYN shows
    it again, because its number is unique. A number that two more seem to share is of two packets.
    """

    def __init__(self) -> None:
        self.corridor = Corridor()
        self._progress: dict[Key, _Progress] = {}
        self._left: dict[Key, _Sight] = {}
        self._arrived: dict[Key, _Sight] = {}
        self._peers: dict[Key, Any] = {}
        """Host, its namespace and a connection's ends there -> the other host's namespace."""
        self.dropped = 0

    def feed(self, host: int, rows: Iterable[Any]) -> None:
        """Take rows of one host, in order of time."""
        for row in rows:
            point = row.point
            if point not in _PACKETS or row.sock or row.seq is None or row.bytes is None:
                continue
            leaves = point == "nic_tx"
            flags = row.flags or ""
            ts_ns, netns = row.ts_ns, row.netns
            ends = (row.saddr, row.sport, row.daddr, row.dport)
            begins = "SYN" in flags
            progress = self._progress_of((leaves, host, netns, *ends), row, begins=begins)
            matched = False
            # The number that begins a connection is no other's, but may be that of another's data.
            byte, acked = ("syn", "syn acked") if begins else ("byte", "acked")
            end = row.seq + row.bytes + begins + ("FIN" in flags)
            if end != row.seq and (at := _advanced(end % _WHOLE, progress.position)) >= 0:
                progress.position = at
                if ts_ns >= progress.since:
                    sight = _Sight(ts_ns, netns, progress, at)
                    matched = self._match(host, sight, (leaves, *ends, byte, at % _WHOLE))
            ack = whole(row, "ack")
            if ack is not None and "ACK" in flags and (at := _advanced(ack, progress.acked)) >= 0:
                progress.acked = at
                if ts_ns >= progress.since:
                    sight = _Sight(ts_ns, netns, progress, at)
                    matched |= self._match(host, sight, (leaves, *ends, acked, at % _WHOLE))
            self.corridor.packets += matched

    def _progress_of(self, key: Key, row: Any, *, begins: bool) -> _Progress:
        """Return the progress of a packet's direction there; a new one where a SYN begins it."""
        known = self._progress.get(key)
        if known is not None and (
            not begins or (known.position >= 0 and (row.seq + 1 - known.position) % _WHOLE == 0)
        ):
            return known
        # Where the beginning was missed, what seems new may have been sent before.
        found = self._progress[key] = _Progress(row.ts_ns + (0 if begins else _UNSURE_NS))
        if len(self._progress) > _MOST_WAITING:
            del self._progress[next(iter(self._progress))]
        return found

    def _match(self, host: int, sight: _Sight, key: Key) -> bool:
        """Take a number that is new at a host.

        Args:
            host: Which one.
            sight: When, and in which network namespace there.
            key: Whether the packet leaves there, or arrives; its ends, the kind of number, and it.

        Returns:
            Whether the other host has seen it before.
        """
        leaves, kind = key[0], key[5]
        sender = host if leaves else 1 - host
        key = (sender, *key[1:])
        here, there = (self._left, self._arrived) if leaves else (self._arrived, self._left)
        for sights in (here, there):
            old = sights.get(key)
            if old is not None and old.progress.reached(kind) - old.at >= _HALF:
                del sights[key]  # numbers wrap: this one was passed 2 GiB ago
        other = there.get(key)
        if other is None or not self._are_peers(host, sight.netns, other.netns, key):
            if key not in here:
                here[key] = sight
                if len(here) > _MOST_WAITING:
                    del here[next(iter(here))]
                    self.dropped += 1
            return False
        del there[key]
        left, arrived = (sight, other) if leaves else (other, sight)
        if sender == 0:
            self.corridor.at_most(arrived.ts_ns, arrived.ts_ns - left.ts_ns)
        else:
            self.corridor.at_least(left.ts_ns, left.ts_ns - arrived.ts_ns)
        return True

    def _are_peers(self, host: int, netns: Any, other: Any, key: Key) -> bool:
        """Whether a connection goes from a namespace here to that one there, as far as is known."""
        ends = frozenset((key[1:3], key[3:5]))
        mine, theirs = (host, netns, ends), (1 - host, other, ends)
        peers = self._peers
        if key[5] not in _BEGINNINGS:
            known = peers.get(mine, other), peers.get(theirs, netns)
            if known != (other, netns):
                return False
        if peers.get(mine) != other or peers.get(theirs) != netns:
            peers[mine], peers[theirs] = other, netns
            while len(peers) > _MOST_WAITING:
                del peers[next(iter(peers))]
        return True


def _advanced(number: int, known: int) -> int:
    """Return a number unwrapped, if it is beyond the known position (modulo 2^32); else -1."""
    if known < 0:
        return number
    ahead = (number - known) % _WHOLE
    return known + ahead if 0 < ahead < _HALF else -1


def together(
    first: Iterator[Sequence[Any]], second: Iterator[Sequence[Any]]
) -> Iterator[tuple[int, Sequence[Any]]]:
    """Batches of both, by the Unix time of each host: good enough for an order of reading."""
    streams = (first, second)
    heads: list[Sequence[Any] | None] = [next(stream, None) for stream in streams]
    while True:
        left = [(rows[0].time_ns, host) for host, rows in enumerate(heads) if rows]
        if not left:
            return
        _, host = min(left)
        rows = heads[host]
        if rows:
            yield host, rows
        heads[host] = next(streams[host], None)
