"""What a row says: fields that not every probe has, its process, how it begins a connection."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple, TypeVar


def real(row: Any, name: str) -> float | None:
    """A field that not every probe has; None where there is none, or where it is no number.

    Another probe's field of that name may be anything.
    """
    value = getattr(row, name, None)
    return value if type(value) in (int, float) else None


def whole(row: Any, name: str) -> int | None:
    """The same of a field that is a whole number."""
    value = getattr(row, name, None)
    return value if type(value) is int else None


_Text = TypeVar("_Text", str, str | None)


def shared(text: _Text) -> _Text:
    """The same text, once for all who keep it: each row of a capture has one of its own."""
    return sys.intern(text) if type(text) is str else text


class Process(NamedTuple):
    """A process, as a row names it; null where nothing does."""

    pid: int | None
    comm: str | None


NO_PROCESS = Process(None, None)


def opens(flags: str) -> bool:
    """A SYN, whatever it says besides (ECN), and no answer to one."""
    return "SYN" in flags and "ACK" not in flags


def device(row: Any) -> str | None:
    """What a packet leaves by; a probe that is not ours may call it otherwise."""
    device: str | None = row.ifname
    named = getattr(row, "dev", None)
    return named if isinstance(named, str) and named else device


def calls(row: Any) -> bool:
    """A row by which a socket begins to connect."""
    if row.point == "connect":
        return True
    return (row.point, row.old_state, row.state) == ("state", "TCP_CLOSE", "TCP_SYN_SENT")


def listens(row: Any) -> bool:
    """A row of a listener."""
    return "TCP_LISTEN" in (row.state, row.old_state)


def syn_of(row: Any) -> int:
    """Number of the client's SYN, as a change of state tells it; else -1."""
    if row.point != "state" or row.seq is None:
        return -1
    return int(row.seq - 1) & 0xFFFFFFFF
