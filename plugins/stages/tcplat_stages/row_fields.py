"""What a row says: fields that not every probe has, its process, how it begins a connection."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple, TypeVar

from tcplat_core import SLIM_NUMBERS, SlimRows

COMPILED = not __file__.endswith((".py", ".pyc"))
"""These modules are C by now, with the types of the .pxd files beside them."""
BEYOND_NS = 1 << 62
"""No clock gets so far: below it, sums of instants stay within 64 bits."""
UNKNOWN = -(1 << 63)
MISSING = UNKNOWN + 1
"""Numbers of slim rows."""
TS_NS, TIME_NS, SEQ, BYTES, SOCK, ACK, WINDOW, HOOK, USER, ENDS, STATES, FLAGS, IFNAME = map(
    SLIM_NUMBERS.index,
    (
        *("ts_ns", "time_ns", "seq", "bytes", "sock", "ack", "window"),
        *("hook", "user", "ends", "states", "flags", "ifname"),
    ),
)
"""Places in a slim row."""


def real(row: Any, name: str) -> float | None:
    """Return a field that not every probe has; None if it is missing, or no number.

    Another probe's field of that name may be anything.
    """
    value = getattr(row, name, None)
    return value if type(value) in (int, float) else None


def whole(row: Any, name: str) -> int | None:
    """Return a field that is a whole number of 64 bits, signed, or None."""
    if COMPILED and type(row) is Slim:
        return row.own(name)
    return _whole(getattr(row, name, None))


def _whole(value: Any) -> int | None:
    # An unknown probe's field may have any value that JSON and msgpack have.
    return value if type(value) is int and value.bit_length() < 64 else None  # noqa: PLR2004


_Text = TypeVar("_Text", str, str | None)


def shared(text: _Text) -> _Text:
    """Return the same text, stored once: each row of a capture has one of its own."""
    return sys.intern(text) if type(text) is str else text


class Process(NamedTuple):
    """A process, as a row names it; null where nothing does."""

    pid: int | None
    comm: str | None


NO_PROCESS = Process(None, None)


class Look:
    """The numbers of a slim row. One object stands for one row after the other."""

    def __init__(self) -> None:
        self.numbers: Any = None
        self.width = 0
        self.ts_ns = self.seq = self.bytes = self.sock = self.ack = self.window = 0
        self.hook = self.user = self.ends = self.flags = 0

    def turn_to(self, index: int) -> None:
        """Stand for the row of this index."""
        at = index * self.width
        # Not by a local name: where it is compiled, each takes a reference of the buffer.
        self.ts_ns = self.numbers[at + TS_NS]
        self.seq, self.bytes = self.numbers[at + SEQ], self.numbers[at + BYTES]
        self.sock = self.numbers[at + SOCK]
        self.ack, self.window = self.numbers[at + ACK], self.numbers[at + WINDOW]
        self.hook, self.user = self.numbers[at + HOOK], self.numbers[at + USER]
        self.ends, self.flags = self.numbers[at + ENDS], self.numbers[at + FLAGS]

    def shows_window(self) -> bool:
        """Return whether its window is not closed, as far as it is known."""
        return self.window not in (0, UNKNOWN)


class Slim:
    """What the joiner reads of a row, as a compiled joiner has it: with no look-up by name.

    One object stands for one row after the other, so it must not be kept. Interpreted, the joiner
    reads the rows themselves, which have the same names.
    """

    def __init__(self) -> None:
        self.event: Any = None
        self.numbers: Any = None
        self.batch: SlimRows | None = None
        self.look = Look()
        self._at = self._index = 0

    def load(self, event: Any) -> None:
        """Stand for a row of a batch that has rows."""
        self.event = event
        self.ts_ns = min(event.ts_ns, BEYOND_NS)
        self.point = event.point
        self.sock = event.sock
        self.seq = event.seq
        self.bytes = event.bytes
        self.netns = event.netns
        self.saddr = event.saddr
        self.sport = event.sport
        self.daddr = event.daddr
        self.dport = event.dport
        if self.sock:
            self.pid = event.pid
            self.comm = event.comm
            self.state = event.state
        else:
            self.flags = event.flags

    def begin(self, batch: SlimRows | None) -> None:
        """Stand for rows of a batch that has none, one after the other; None to let go of it."""
        self.batch = batch
        self.event = None
        if batch is None:
            self.numbers = self.look.numbers = None
            return
        self.numbers = self.look.numbers = batch.numbers
        self.look.width = batch.width
        self._width = batch.width
        self._hooks = batch.hooks
        self._users = batch.users
        self._ends = batch.ends
        self._states = batch.states
        self._flags = batch.flags

    def turn_to(self, index: int) -> None:
        """Stand for the row of this index."""
        at = index * self._width
        self.event = None
        self._index, self._at = index, at
        # Not by a local name: where it is compiled, each takes a reference of the buffer.
        self.ts_ns = min(self.numbers[at + TS_NS], BEYOND_NS)
        seq, count = self.numbers[at + SEQ], self.numbers[at + BYTES]
        self.seq = None if seq < 0 else seq
        self.bytes = None if count < 0 else count
        sock = self.numbers[at + SOCK]
        self.sock = sock
        hook = self._hooks[self.numbers[at + HOOK]]
        self.point = hook[1]
        ends = self._ends[self.numbers[at + ENDS]]
        self.netns, _, self.saddr, self.sport, self.daddr, self.dport = ends
        if sock:
            user = self._users[self.numbers[at + USER]]
            self.pid, self.comm = user[0], user[2]
            states = self._states[self.numbers[at + STATES]]
            self.state = states[0]
        else:
            self.flags = self._flags[self.numbers[at + FLAGS]]

    def own(self, name: str) -> int | None:
        """Return a whole number that not every probe's rows have; None without it."""
        if self.batch is not None and name in ("ack", "window"):
            value = self.numbers[self._at + (ACK if name == "ack" else WINDOW)]
            return None if value in (UNKNOWN, MISSING) else value
        return _whole(getattr(self, name, None))

    def shows_window(self) -> bool:
        """Return whether its window is not closed, as far as it is known."""
        if self.batch is not None:
            window = self.numbers[self._at + WINDOW]
            return bool(window) and window != UNKNOWN
        return bool(getattr(self, "window", 1))

    def __getattr__(self, name: str) -> Any:
        """Return a field that is not needed for most rows, or that not every probe has."""
        if self.event is None and self.batch is not None:
            self.event = self.batch.row(self._index)
        return getattr(self.event, name)


def shows_window(row: Any) -> bool:
    """Return whether a packet's window is not closed, as far as its row tells."""
    return row.shows_window() if COMPILED else bool(getattr(row, "window", 1))


def opens(flags: str) -> bool:
    """Return whether flags are those of a SYN (with ECN or not), and no SYN-ACK."""
    return "SYN" in flags and "ACK" not in flags


def device(row: Any) -> str | None:
    """Return the device that a packet leaves by; another probe may have another field."""
    device: str | None = row.ifname
    named = getattr(row, "dev", None)
    return named if isinstance(named, str) and named else device


def calls(row: Any) -> bool:
    """Return whether a socket begins to connect by a row."""
    if row.point == "connect":
        return True
    return (row.point, row.old_state, row.state) == ("state", "TCP_CLOSE", "TCP_SYN_SENT")


def listens(row: Any) -> bool:
    """Return whether a row is of a listener."""
    return "TCP_LISTEN" in (row.state, row.old_state)


def syn_of(row: Any) -> int:
    """Return the number of the client's SYN, if a change of state has it; else -1."""
    if row.point != "state" or row.seq is None:
        return -1
    return int(row.seq - 1) & 0xFFFFFFFF
