"""The event: each field declared once, and from it C struct, decoder, JSON names and docs.

A field of :class:`Event` is annotated with where its value comes from:
:class:`Wire` (a member of the record that the kernel fills), :class:`FromHook`
(depends on the hook alone) or :class:`Made` (computed at decode time).
msgspec makes the class, because it encodes its own structs an order of
magnitude faster than attrs objects or dicts (D11, docs/design/event.md).
"""

from __future__ import annotations

import errno
import functools
import inspect
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import attrs
import msgspec

from tcplat_core.errors import PluginError

from .text import address, flags, micros, name, process, state_name, text

SCHEMA_VERSION = 2
"""Version of the event: the `v` of every row and capture. Captures of older versions
(:data:`READABLE`) can be read; fields that they lack are null."""

READABLE = (1, 2)
"""Versions that are read. 2 added `thread`; in 1, `comm` was the name of the thread `tid`."""

C_TYPES = {
    "u64": ("Q", 8),
    "u32": ("I", 4),
    "u16": ("H", 2),
    "u8": ("B", 1),
    "s64": ("q", 8),
    "s32": ("i", 4),
    "s16": ("h", 2),
    "s8": ("b", 1),
    "bool": ("?", 1),
}
"""C type -> its letter in :mod:`struct`, and its size. Arrays are of u8 or char."""

_UNITS = ("ns", "us", "ms", "s", "bytes")
"""Endings of field names that are the unit."""


def _checked_type(_: object, __: object, c_type: str) -> None:
    found = re.fullmatch(r"([a-z]+\d*)(\[[1-9]\d*\])?", c_type)
    if found and found[1] in ("char", "u8") and found[2]:
        return
    if found is None or found[1] not in C_TYPES or found[2]:
        raise PluginError(
            f"a field cannot be of the C type {c_type!r}, but of "
            f"{', '.join(C_TYPES)}, char[N] or u8[N]"
        )


def _checked_block(_: object, __: object, block: str) -> None:
    if block not in ("", "socket", "kind"):
        raise PluginError(f"there is no block {block!r}; for a field of your own leave it empty")


@attrs.frozen
class Wire:
    """A member of the kernel's record.

    Args:
        c_type: u8 to u64, s8 to s64 (signed), bool, char[N] (text up to its first NUL, escaped
            so that it is safe to print), or u8[N] (bytes; needs `to`).
        doc: Meaning of the value.
        member: Name in C; default: the name of the field.
        to: Converts the raw value. Must be pure: results are cached. :func:`micros` for ns,
            :func:`address` for 16 bytes in network order.
        nullable: A raw 0, or all bytes 0, means "unknown": the field is None.
        has: The field is None unless the handler set TCPLAT_HAS_<NAME>; at most five fields.
        block: ``socket`` or ``kind``; leave it empty for your own fields. Members of a block are
            adjacent and change together or seldom; the whole block is decoded once per value.
        latency: The field is a duration in µs to which ``--min-latency`` applies. The handler
            must call ``tcplat_too_fast()``.
        unlike: A field of the same block. If both values are equal, this field is None.
        since: Schema version that introduced the field. It is None in rows of older captures.
        column: Heading in the sink `table`. Default: the name in capitals, with the unit in
            brackets (``rto_us`` is ``RTO(us)``). Empty: no column.

    Raises:
        PluginError: No such type or block.
    """

    c_type: str = attrs.field(validator=_checked_type)
    doc: str
    member: str = ""
    to: Callable[[Any], Any] | None = None
    nullable: bool = False
    has: bool = False
    block: str = attrs.field(default="", validator=_checked_block)
    latency: bool = False
    unlike: str = ""
    since: int = 1
    column: str | None = None

    @property
    def converter(self) -> Callable[[Any], Any] | None:
        """The function from the raw value to the field's: `to`, or the default of the C type."""
        if self.c_type.startswith("char") and self.to is None:
            return name if self.nullable else text
        if "[" in self.c_type and self.nullable and self.to is not None:
            to = self.to
            return lambda raw: to(raw) if any(raw) else None
        return self.to


@attrs.frozen
class FromHook:
    """A value that depends on the hook alone: an attribute of :class:`FiredBy`."""

    attribute: str
    doc: str


@attrs.frozen
class Made:
    """A value that is computed at decode time."""

    by: str
    doc: str


@attrs.frozen
class FiredBy:
    """The hook that a record's `hook` member identifies."""

    point: str
    func: str
    attach: str
    describe: Callable[[Moment], str]
    program: str = ""


_FAILURES = {errno.ECONNREFUSED: "refused", errno.ETIMEDOUT: "timed out"}


@attrs.frozen
class Moment:
    """What the description of a row may depend on.

    Args:
        point: The hook point.
        state: TCP state after the event.
        old_state: TCP state before a state change.
        err: An errno, or 0.
        empty: Whether `bytes` is 0; None if the row has no `bytes`.
        flags: TCP flags of a packet, ``SYN|ACK``; None if the row has none.
        func: The hook, as in the row.
    """

    point: str
    state: str | None
    old_state: str | None
    err: int
    empty: bool | None
    flags: str | None = None
    func: str = ""

    @property
    def error(self) -> str:
        """The symbolic name of `err`: ``ECONNREFUSED``."""
        return errno.errorcode.get(self.err, f"errno {self.err}")

    @property
    def failure(self) -> str:
        """`err` in the words that all probes have for it: ``refused``, ``timed out``, ``EPIPE``."""
        return _FAILURES.get(self.err, self.error)


Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
"""A whole number of a capture, not negative, within a signed 64-bit integer."""
Number = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
"""A whole number of a capture, within a signed 64-bit integer."""
Positive = Annotated[float, msgspec.Meta(ge=0, le=float(1 << 63))]
"""A finite float that is not negative, such as a duration."""
Real = Annotated[float, msgspec.Meta(ge=-float(1 << 63), le=float(1 << 63))]
"""A finite float."""


class Event(msgspec.Struct, gc=False):
    """One row, as sinks receive it and as JSONL contains it. Immutable by convention."""

    v: Annotated[int, Made("SCHEMA_VERSION", "schema version")]
    ts_ns: Annotated[Count, Wire("u64", "when, CLOCK_MONOTONIC, ns since boot")]
    time_ns: Annotated[Count, Made("ts_ns + OFFSET_NS", "Unix time of the same instant, ns")]
    probe: Annotated[str, Made("PROBE", "probe that made the row")]
    point: Annotated[str, FromHook("point", "what happened: connect, state, send, recv, close ...")]
    func: Annotated[str, FromHook("func", "hook: tcp_sendmsg, tcp:tcp_sendmsg_locked")]
    attach: Annotated[str, FromHook("attach", "fentry, kprobe, tracepoint or xdp")]
    pid: Annotated[
        Count | None,
        Wire(
            "u32",
            "process that owns the socket, as in the /proc where tcplat runs",
            to=process,
            nullable=True,
            block="socket",
        ),
    ]
    tid: Annotated[
        Count | None,
        Wire(
            "u32", "its thread that used the socket last", to=process, nullable=True, block="socket"
        ),
    ]
    comm: Annotated[
        str | None,
        Wire(
            "char[16]",
            "name of the process (of its first thread) at that time, escaped",
            to=name,
            block="socket",
        ),
    ]
    thread: Annotated[
        str | None,
        Wire(
            "char[16]",
            "name of the thread `tid`, escaped; null if equal to `comm`",
            nullable=True,
            unlike="comm",
            since=2,
            block="socket",
        ),
    ]
    cpu: Annotated[Count, Wire("u16", "CPU of the event", block="kind")]
    netns: Annotated[
        Count | None, Wire("u32", "network namespace, inode number", nullable=True, block="socket")
    ]
    ip: Annotated[
        Count | None,
        Wire("u8", "4 or 6; a mapped IPv4 address is 4", nullable=True, block="socket"),
    ]
    saddr: Annotated[
        str, Wire("u8[16]", "local address; in packets the source", to=address, block="socket")
    ]
    sport: Annotated[
        Count | None,
        Wire("u16", "local port; null before it is chosen", nullable=True, block="socket"),
    ]
    daddr: Annotated[
        str,
        Wire("u8[16]", "remote address; in packets the destination", to=address, block="socket"),
    ]
    dport: Annotated[Count | None, Wire("u16", "remote port", nullable=True, block="socket")]
    state: Annotated[
        str | None, Wire("u8", "TCP state after the event", to=state_name, block="kind")
    ]
    old_state: Annotated[
        str | None, Wire("u8", "TCP state before a state change", to=state_name, block="kind")
    ]
    desc: Annotated[str, Made("desc", "description of the event")]
    seq: Annotated[
        Count | None,
        Wire(
            "u32",
            "TCP sequence number of the first byte; in the `state` row that completes the "
            "handshake: of the client's first byte",
            has=True,
        ),
    ]
    bytes: Annotated[Count | None, Wire("u32", "number of bytes", has=True)]
    flags: Annotated[
        str | None, Wire("u8", "TCP flags of a packet", to=flags, has=True, block="kind")
    ]
    connect_us: Annotated[
        Positive | None,
        Wire(
            "u64",
            "from connect() to its completion or failure, µs",
            member="connect_ns",
            to=micros,
            nullable=True,
            latency=True,
        ),
    ]
    ifname: Annotated[str | None, Made("ifname", "interface of a packet")]
    sock: Annotated[
        int,
        Wire(
            "u64", "number of the socket, the same in all its rows; 0 for packets", block="socket"
        ),
    ]


def row(event: type[Event], **values: Any) -> Event:
    """Return a row that no hook made.

    Args:
        event: Its class.
        values: Values of its fields. Other fields are null or, where that is not allowed, zero.

    Raises:
        TypeError: There is no such field.
    """
    known: dict[str, Any] = dict.fromkeys(event.__struct_fields__)
    for field, source in declared(event):
        if isinstance(source, Wire) and not (source.nullable or source.has):
            raw = bytes(split_array(source.c_type)[1]) if "[" in source.c_type else 0
            known[field] = source.to(raw) if source.to else raw
    return event(**{**known, "v": SCHEMA_VERSION, **values})


@functools.lru_cache(maxsize=1024)
def _hints(event: type[Event], *, include_extras: bool = False) -> Mapping[str, Any]:
    """Return the types of a class's fields; cached, because evaluating them takes 1 ms."""
    own = inspect.get_annotations(event)
    # A capture can define many classes; their annotations are no strings and need no evaluation.
    if event.__bases__ == (Event,) and not any(isinstance(hint, str) for hint in own.values()):
        return {**_hints(Event, include_extras=include_extras), **own}
    return typing.get_type_hints(event, include_extras=include_extras)


def sources(event: type[Event]) -> Iterator[tuple[str, Wire | FromHook | Made | None]]:
    """Yield each field and its source; None for a field without a declared source."""
    hints = _hints(event, include_extras=True)
    for field in event.__struct_fields__:
        metadata = getattr(hints[field], "__metadata__", ())
        found = next((one for one in metadata if isinstance(one, Wire | FromHook | Made)), None)
        yield field, found if isinstance(found, Wire | FromHook | Made) else None


@functools.cache  # evaluates every annotation, and is called for each new socket
def declared(event: type[Event]) -> tuple[tuple[str, Wire | FromHook | Made], ...]:
    """Return each field that has a source, and the source."""
    return tuple((field, source) for field, source in sources(event) if source)


@attrs.frozen
class Field:
    """Description of one field of a row.

    Args:
        name: Name in Python and in JSON.
        type: Type in JSON: ``int``, ``float or null`` ...
        unit: ns, us, ms, s or bytes, from the end of the name; empty if it has none.
        doc: Meaning of the value.
        own: The field belongs to this probe; other events do not have it.
        column: Heading in a table; empty for no column.
    """

    name: str
    type: str
    unit: str
    doc: str
    own: bool
    column: str


JSON_TYPES = {int: "int", float: "float", str: "str", bool: "bool", type(None): "null"}


@functools.lru_cache(maxsize=1024)
def fields(event: type[Event] = Event) -> tuple[Field, ...]:
    """Return the fields of an event's class, in the order of its JSON keys.

    For rows of a probe that is not installed (from a capture), only the names are known.
    """
    hints = _hints(event)
    return tuple(
        Field(
            name=field,
            type=_type(parts_of(hints[field])),
            unit=_unit(field),
            doc=source.doc if source else "",
            own=field not in Event.__struct_fields__,
            column=_column(field, source),
        )
        for field, source in sources(event)
    )


def _type(kinds: tuple[Any, ...]) -> str:
    if set(kinds) == JSON_TYPES.keys():
        return "any"
    return " or ".join(JSON_TYPES.get(kind, "any") for kind in kinds)


def _unit(field: str) -> str:
    unit = field.rpartition("_")[2]
    return unit if unit in _UNITS else ""


def _column(field: str, source: Wire | FromHook | Made | None) -> str:
    if isinstance(source, Wire) and source.column is not None:
        return source.column
    stem = field.removesuffix(f"_{_unit(field)}")
    return field.upper() if stem == field else f"{stem.upper()}({_unit(field)})"


def wires(event: type[Event]) -> dict[str, tuple[str, Wire]]:
    """Return member of the record -> the field that it fills, and its source."""
    return {
        source.member or field: (field, source)
        for field, source in declared(event)
        if isinstance(source, Wire)
    }


def parts_of(hint: Any) -> tuple[Any, ...]:
    """Return the parts of a union such as ``int | None``."""
    return typing.get_args(hint) or (hint,)


def latencies(event: type[Event]) -> list[str]:
    """Return the fields to which ``--min-latency`` applies."""
    return [
        field for field, source in sources(event) if isinstance(source, Wire) and source.latency
    ]


def split_array(c_type: str) -> tuple[str, int]:
    """Return the element type and count of a C type: ``u8[16]`` is ``u8`` and 16."""
    base, _, count = c_type.rstrip("]").partition("[")
    return base, int(count or 1)
