"""How durations, ends and bars look."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping

from tcplat_core import duration as seconds
from tcplat_core import micros

from .chain import Split
from .connection import Connection
from .exchange import Exchange
from .row_fields import Process
from .stream import CLIENT, SERVICE

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_FEW = 4
"""So many stages in one are named by the first and the last."""


def duration(ns: int) -> str:
    """Return a duration with three digits or more and its unit."""
    if ns < 1_000_000:  # noqa: PLR2004 - a millisecond
        return f"{ns / 1000:.1f} µs"
    if ns < 1_000_000_000:  # noqa: PLR2004 - a second
        return f"{ns / 1e6:.2f} ms"
    return f"{ns / 1e9:.3f} s"


def nanos(text: str) -> int:
    """Return a time with its unit, ``1ms``, as ns.

    Raises:
        ValueError: It is none, or has no unit: 10 might be meant as ms, or as percent.
    """
    if text[-1:].isdecimal():
        raise ValueError(f"{text!r} has no unit; write 500us, 1ms or 2s")
    found: float = seconds(text)
    return round(found * 1e9)


def moment(time_ns: int) -> str:
    """Return Unix time as text, UTC, with microseconds."""
    seconds, nanos = divmod(time_ns, 1_000_000_000)
    time = dt.datetime.fromtimestamp(seconds, dt.UTC)
    return f"{time:%Y-%m-%d %H:%M:%S}.{nanos // 1000:06d}Z"


def address(end: tuple[str, int | None]) -> str:
    """Address and port."""
    host, port = end
    shown = "?" if port is None else str(port)
    return f"[{host}]:{shown}" if ":" in host else f"{host}:{shown}"


def _process(process: Process) -> str:
    """Name and number of a process, in brackets; empty where it is unknown."""
    if process.pid is None and process.comm is None:
        return ""
    return f" ({process.comm or '?'} {process.pid if process.pid is not None else '?'})"


def path(item: Connection | Exchange) -> str:
    """From whom to whom: of an exchange its own processes, of a connection the last ones."""
    if isinstance(item, Exchange):
        conn = item.conn
        client, service = _process(item.process(CLIENT)), _process(item.process(SERVICE))
    else:
        conn = item
        client, service = (_process(end.process) for end in conn.ends)
    guess = " (a guess)" if conn.guessed else ""
    return f"{address(conn.client)}{client} → {address(conn.service)}{service}{guess}"


def stage(name: str) -> str:
    """Return a stage's name; of merged stages the first and the last."""
    parts = name.split("+")
    return name if len(parts) < _FEW else f"{parts[0]}…{parts[-1]}"


def bar(before_ns: int, ns: int, whole_ns: int, width: int) -> str:
    """Return the bar of a part, at its place in the whole."""
    if not whole_ns or width <= 0:
        return ""
    first = before_ns * width * 8 // whole_ns
    last = (before_ns + ns) * width * 8 // whole_ns
    start = first // 8
    eighths = max(last - start * 8, 1)
    return " " * start + "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def stages_json(split: Split) -> Mapping[str, float]:
    """Name -> µs."""
    return {name: micros(ns) for name, ns in split.stages}
