"""What a row says: fields that not every probe has, its process, how it begins a connection."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple, TypeVar


def real(row: Any, name: str) -> float | None:
    """Return a field that not every probe has; None if it is missing, or no number.

    Another probe's field of that name may be anything.
    """
    value = getattr(row, name, None)
    return value if type(value) in (int, float) else None


def whole(row: Any, name: str) -> int | None:
    """Return a field that is a whole number, or None."""
    value = getattr(row, name, None)
    return value if type(value) is int else None


_Text = TypeVar("_Text", str, str | None)


def shared(text: _Text) -> _Text:
    """Return the same text, stored once: each row of a capture has one of its own."""
    return sys.intern(text) if type(text) is str else text


class Process(NamedTuple):
    """A process, as a row names it; null where nothing does."""

    pid: int | None
    comm: str | None


NO_PROCESS = Process(None, None)


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
