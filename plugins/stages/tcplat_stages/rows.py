"""What a row says of the connection that it belongs to."""

from __future__ import annotations

from typing import Any


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
