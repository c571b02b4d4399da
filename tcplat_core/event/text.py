"""Converts a record's bytes and numbers to texts that are safe to print."""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from .terminal import escaped, printable

TCP_STATES = (
    None,
    "TCP_ESTABLISHED",
    "TCP_SYN_SENT",
    "TCP_SYN_RECV",
    "TCP_FIN_WAIT1",
    "TCP_FIN_WAIT2",
    "TCP_TIME_WAIT",
    "TCP_CLOSE",
    "TCP_CLOSE_WAIT",
    "TCP_LAST_ACK",
    "TCP_LISTEN",
    "TCP_CLOSING",
    "TCP_NEW_SYN_RECV",
)
"""Index = the number in include/net/tcp_states.h."""

TCP_FLAGS = ("FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR")
"""Index = the bit in the 14th byte of a TCP header (RFC 9293)."""


def text(raw: bytes) -> str:
    r"""Convert bytes from the kernel to text that is safe to print.

    The text ends at the first NUL. Bytes that are not UTF-8 and unprintable
    characters (control, bidirectional, private: `str.isprintable`) become an
    escape such as ``\x1b``; so does the backslash itself. A process can choose
    any name (prctl PR_SET_NAME), and a terminal would execute control sequences in it.
    """
    # surrogateescape maps each byte that is not UTF-8 to U+DC00 + byte.
    plain = raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    if plain.isprintable() and "\\" not in plain:
        return plain
    return "".join(map(escaped, plain))


_DEEPEST = 16


def cleaned(value: Any, depth: int = _DEEPEST) -> Any:
    """Return a value of a line or report with every text escaped for a terminal.

    Raises:
        ValueError: tcplat does not write such a value: nested too deeply, a number beyond 64
            bits or not finite, or two equal keys.
    """
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict | list):
        if not depth:
            raise ValueError("it is nested too deeply")
        if isinstance(value, list):
            return [cleaned(one, depth - 1) for one in value]
        clean = {
            printable(key): one if one is None else cleaned(one, depth - 1)
            for key, one in value.items()
            if isinstance(key, str)
        }
        if len(clean) < len(value):
            raise ValueError("two keys in it are the same, or a key is no text")
        return clean
    # NaN fails both comparisons.
    if value is not None and not (isinstance(value, int | float) and LEAST <= value <= MOST):
        raise ValueError("a number in it is beyond 64 bits, or it is none")
    return value


LEAST, MOST = -(1 << 63), (1 << 64) - 1
"""Bounds of a number of 64 bits, signed or unsigned."""


def name(raw: bytes) -> str | None:
    """Return a process's name; None if it is empty."""
    return text(raw) or None


_OUTSIDE = 1 << 31
"""TCPLAT_OUTSIDE in include/tcplat/filter.bpf.h."""


def process(raw: int) -> int | None:
    """Return the number of a process or thread; None for one outside our PID namespace."""
    return None if raw & _OUTSIDE else raw


def address(raw: bytes) -> str:
    """Return 16 bytes in network order as text; ``::ffff:a.b.c.d`` becomes ``a.b.c.d``."""
    if raw.startswith(b"\0" * 10 + b"\xff\xff"):
        return socket.inet_ntop(socket.AF_INET, raw[12:])
    return socket.inet_ntop(socket.AF_INET6, raw)


def flags(raw: int) -> str:
    """Return the TCP flags of a packet as text: ``SYN|ACK``."""
    return "|".join(name for bit, name in enumerate(TCP_FLAGS) if raw >> bit & 1)


def micros(ns: int) -> float:
    """Convert nanoseconds to microseconds."""
    return ns / 1000


def columns(
    rows: Sequence[Sequence[str]], *, right: Collection[int] = (), gap: int = 2
) -> Iterator[str]:
    """Yield rows of cells as lines of aligned columns, without spaces at their ends.

    Args:
        rows: All of one length; a heading is the first of them.
        right: Indexes of the columns that are aligned to the right, such as numbers.
        gap: Number of spaces between two columns.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield (" " * gap).join(cells).rstrip()


def state_name(number: int) -> str | None:
    """Return the name of a TCP state; its number if the name is unknown."""
    return TCP_STATES[number] if number < len(TCP_STATES) else f"state {number}"
