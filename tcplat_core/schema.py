"""The event: each field declared once, and from it C struct, decoder, JSON names and docs.

A field of :class:`Event` is annotated with where its value comes from:
:class:`Wire` (a member of the record that the kernel fills), :class:`Hook`
(follows from which hook fired) or :class:`Made` (worked out at decode time).
msgspec makes the class, because it encodes its own structs an order of
magnitude faster than attrs objects or dicts (see ARCHITECTURE.md).
"""

from __future__ import annotations

import errno
import functools
import inspect
import itertools
import keyword
import re
import socket
import struct
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import attrs
import msgspec

from .errors import PluginError
from .texts import escaped, printable

SCHEMA_VERSION = 2
"""Of the event: the `v` of every row and every capture. Captures of older versions are read, too:
what their rows lack is null (:data:`READABLE`)."""

READABLE = (1, 2)
"""Versions that are read. 2 added `thread`; in 1, `comm` was the name of the thread `tid`."""

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

_HAS = {"seq": 1, "bytes": 2, "flags": 4}
"""Bits of the record's `has`, as in include/tcplat/event.bpf.h; a subclass has the other five."""

_C_TYPES = {
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

LARGEST_RECORD = 1024
"""Bytes: what BPF can fill with zeros in one go. The smallest ring has room for three."""

_RESERVED = frozenset(
    {
        # C11, and what the headers define besides.
        *("auto", "break", "case", "char", "const", "continue", "default", "do", "double"),
        *("else", "enum", "extern", "float", "for", "goto", "if", "inline", "int", "long"),
        *("register", "restrict", "return", "short", "signed", "sizeof", "static", "struct"),
        *("switch", "typedef", "union", "unsigned", "void", "volatile", "while", "bool"),
        *("true", "false", "asm", "typeof", "linux", "unix", "current", "size_t"),
        *("u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64"),
        *keyword.kwlist,
        "offset_ns",  # what the decoder works with
    }
)
"""No name for a member of a record."""

_UNITS = ("ns", "us", "ms", "s", "bytes")
"""How the name of a field may end; it is then the unit."""


def text(raw: bytes) -> str:
    r"""Bytes from the kernel as text that is safe to print.

    Ends at the first NUL. What is not UTF-8, and every character that does not
    print (control, bidirectional, private: `str.isprintable`), becomes an
    escape such as ``\x1b``; so does the backslash itself. A process can choose
    its name freely (prctl PR_SET_NAME), a terminal obeys it.
    """
    # surrogateescape keeps each byte that is no UTF-8 apart, as U+DC00 + byte.
    plain = raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    if plain.isprintable() and "\\" not in plain:
        return plain
    return "".join(map(escaped, plain))


_DEEPEST = 16


def cleaned(value: Any, depth: int = _DEEPEST) -> Any:
    """A line's value, or a report's, with every text such that a terminal may have it.

    Raises:
        ValueError: It holds what no line of ours does: values nested deeply, numbers beyond 64
            bits or infinite, two keys that are the same.
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
    # Neither holds of what is no number.
    if value is not None and not (isinstance(value, int | float) and LEAST <= value <= MOST):
        raise ValueError("a number in it is beyond 64 bits, or it is none")
    return value


LEAST, MOST = -(1 << 63), (1 << 64) - 1
"""Of a number with 64 bits, signed or not."""


def name(raw: bytes) -> str | None:
    """A process's name; None for none."""
    return text(raw) or None


_OUTSIDE = 1 << 31
"""TCPLAT_OUTSIDE in include/tcplat/filter.bpf.h."""


def process(raw: int) -> int | None:
    """The number of a process or thread; None for one outside our PID namespace."""
    return None if raw & _OUTSIDE else raw


def address(raw: bytes) -> str:
    """16 bytes in network order as text; ``::ffff:a.b.c.d`` becomes ``a.b.c.d``."""
    if raw.startswith(b"\0" * 10 + b"\xff\xff"):
        return socket.inet_ntop(socket.AF_INET, raw[12:])
    return socket.inet_ntop(socket.AF_INET6, raw)


def flags(raw: int) -> str:
    """TCP flags of a packet: ``SYN|ACK``."""
    return "|".join(name for bit, name in enumerate(TCP_FLAGS) if raw >> bit & 1)


def micros(ns: int) -> float:
    """Nanoseconds as microseconds."""
    return ns / 1000


class _Memo(dict[Any, Any]):
    """Remembers what a pure function gave, and starts afresh when it holds 16,384 answers."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def __missing__(self, key: Any) -> Any:
        if len(self) >= 16_384:  # noqa: PLR2004 - the bound of the docstring
            self.clear()
        value = self[key] = self.function(key)
        return value


def _checked_type(_: object, __: object, c_type: str) -> None:
    found = re.fullmatch(r"([a-z]+\d*)(\[[1-9]\d*\])?", c_type)
    if found and found[1] in ("char", "u8") and found[2]:
        return
    if found is None or found[1] not in _C_TYPES or found[2]:
        raise PluginError(
            f"a field cannot be of the C type {c_type!r}, but of "
            f"{', '.join(_C_TYPES)}, char[N] or u8[N]"
        )


def _checked_block(_: object, __: object, block: str) -> None:
    if block not in ("", "socket", "kind"):
        raise PluginError(f"there is no block {block!r}; for a field of your own leave it empty")


@attrs.frozen
class Wire:
    """A member of the kernel's record.

    Args:
        c_type: u8 to u64, s8 to s64 (signed), bool, char[N] (a text that ends at its first
            NUL, escaped so that it is safe to print), or u8[N] (bytes, which want `to`).
        doc: What the value is.
        member: Its name in C; the field's name unless given.
        to: Turns the raw value into the field's; must be pure, answers are remembered.
            :func:`micros` for ns, :func:`address` for 16 bytes in network order.
        nullable: A raw 0, or nothing but zeros, means that nobody can know: the field is None.
        has: The field is None unless the handler set TCPLAT_HAS_<NAME>; five at most.
        block: The members of a block stand side by side, and change together or seldom:
            what they mean is worked out once for each value of the whole block. Either
            ``socket`` or ``kind``; for fields of your own leave it empty.
        latency: It is a duration in µs, and ``--min-latency`` leaves out rows where it is
            shorter: in the kernel the handler has to ask ``tcplat_too_fast()``.
        unlike: A field of the same block: where both are the same, this one is None.
        since: The version of the schema that brought it. A row of an older capture lacks
            it, and it is None.
        column: Its head in the sink `table`; the name in capitals, with its unit in brackets,
            unless given: ``rto_us`` is ``RTO(us)``. Empty: it has no column.

    Raises:
        PluginError: There is no such type or block.
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
        """What turns the raw value into the field's, where `to` leaves it to the type."""
        if self.c_type.startswith("char") and self.to is None:
            return name if self.nullable else text
        if "[" in self.c_type and self.nullable and self.to is not None:
            to = self.to
            return lambda raw: to(raw) if any(raw) else None
        return self.to


@attrs.frozen
class Hook:
    """Follows from which hook fired: an attribute of :class:`FiredBy`."""

    attribute: str
    doc: str


@attrs.frozen
class Made:
    """Worked out at decode time."""

    by: str
    doc: str


@attrs.frozen
class FiredBy:
    """What the number in a record's `hook` member stands for."""

    point: str
    func: str
    attach: str
    describe: Callable[[Moment], str]
    program: str = ""


@attrs.frozen
class Moment:
    """What a row's description may depend on.

    Args:
        point: The hook point.
        state: TCP state after the event.
        old_state: TCP state before a state change.
        err: An errno, or 0.
        empty: Whether `bytes` is 0; None where the row has no `bytes`.
        flags: TCP flags of a packet, ``SYN|ACK``; None where the row has none.
    """

    point: str
    state: str | None
    old_state: str | None
    err: int
    empty: bool | None
    flags: str | None = None

    @property
    def error(self) -> str:
        """In the kernel's words: ``ECONNREFUSED``."""
        return errno.errorcode.get(self.err, f"errno {self.err}")


def state_name(number: int) -> str | None:
    """The name of a TCP state; one that this kernel has and we do not know by its number."""
    return TCP_STATES[number] if number < len(TCP_STATES) else f"state {number}"


Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
"""A number of a capture that is no less than 0, and fits wherever numbers are kept."""
Number = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
"""One that may be less."""
Positive = Annotated[float, msgspec.Meta(ge=0, le=float(1 << 63))]
"""A duration, say: no less than 0, neither infinite nor no number."""
Real = Annotated[float, msgspec.Meta(ge=-float(1 << 63), le=float(1 << 63))]
"""The same for what may be less."""


class Event(msgspec.Struct, gc=False):
    """One row, as sinks get it and as JSONL carries it. Never changed after it is made."""

    v: Annotated[int, Made("SCHEMA_VERSION", "schema version")]
    ts_ns: Annotated[Count, Wire("u64", "when, CLOCK_MONOTONIC, ns since boot")]
    time_ns: Annotated[Count, Made("ts_ns + OFFSET_NS", "Unix time of the same instant, ns")]
    probe: Annotated[str, Made("PROBE", "which probe saw it")]
    point: Annotated[str, Hook("point", "what happened: connect, state, send, recv, close ...")]
    func: Annotated[str, Hook("func", "the very hook: tcp_sendmsg, tcp:tcp_sendmsg_locked")]
    attach: Annotated[str, Hook("attach", "fentry, kprobe, tracepoint or xdp")]
    pid: Annotated[
        Count | None,
        Wire(
            "u32",
            "process that owns the socket, as /proc numbers it where tcplat runs",
            to=process,
            nullable=True,
            block="socket",
        ),
    ]
    tid: Annotated[
        Count | None,
        Wire("u32", "its thread that used it last", to=process, nullable=True, block="socket"),
    ]
    comm: Annotated[
        str | None,
        Wire(
            "char[16]",
            "the process's name, escaped: of its first thread, at that moment",
            to=name,
            block="socket",
        ),
    ]
    thread: Annotated[
        str | None,
        Wire(
            "char[16]",
            "the name of the thread `tid`, escaped; null where it is the process's",
            nullable=True,
            unlike="comm",
            since=2,
            block="socket",
        ),
    ]
    cpu: Annotated[Count, Wire("u16", "where it happened", block="kind")]
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
    desc: Annotated[str, Made("desc", "the same in plain words")]
    seq: Annotated[
        Count | None,
        Wire(
            "u32",
            "first TCP sequence number of the bytes concerned; of `state`, where the handshake "
            "ends: of the client's first byte",
            has=True,
        ),
    ]
    bytes: Annotated[Count | None, Wire("u32", "how many bytes", has=True)]
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
        int, Wire("u64", "the same for all events of one socket, 0 for packets", block="socket")
    ]


def row(event: type[Event], **values: Any) -> Event:
    """A row that no hook made.

    Args:
        event: Its class.
        values: Of its fields; what is not given is null or, where it cannot be, the zero
            of its kind.

    Raises:
        TypeError: There is no such field.
    """
    known: dict[str, Any] = dict.fromkeys(event.__struct_fields__)
    for field, source in declared(event):
        if isinstance(source, Wire) and not (source.nullable or source.has):
            raw = bytes(_array(source.c_type)[1]) if "[" in source.c_type else 0
            known[field] = source.to(raw) if source.to else raw
    return event(**{**known, "v": SCHEMA_VERSION, **values})


_HIDDEN = (
    Wire("u8", "which hook fired", member="hook", block="kind"),
    Wire("u8", "which nullable fields are filled", member="has", block="kind"),
    Wire("u16", "an errno, 0 if none", member="err", block="kind"),
    Wire("u32", "interface index of a packet", member="ifindex", block="kind"),
)
"""Members that reach the row only in translation."""


@functools.lru_cache(maxsize=1024)
def _hints(event: type[Event], *, include_extras: bool = False) -> Mapping[str, Any]:
    """The types of a class's fields; to evaluate the text of them all takes a millisecond."""
    own = inspect.get_annotations(event)
    # Classes that are made of a capture's rows may be many, and have no texts.
    if event.__bases__ == (Event,) and not any(isinstance(hint, str) for hint in own.values()):
        return {**_hints(Event, include_extras=include_extras), **own}
    return typing.get_type_hints(event, include_extras=include_extras)


def _sources(event: type[Event]) -> Iterator[tuple[str, Wire | Hook | Made | None]]:
    """Each field and where its value comes from; None where that is not said."""
    hints = _hints(event, include_extras=True)
    for field in event.__struct_fields__:
        said = getattr(hints[field], "__metadata__", ())
        found = next((one for one in said if isinstance(one, Wire | Hook | Made)), None)
        yield field, found if isinstance(found, Wire | Hook | Made) else None


@functools.cache  # it evaluates the text of every annotation, and is asked for each new socket
def declared(event: type[Event]) -> tuple[tuple[str, Wire | Hook | Made], ...]:
    """The same of a class that a probe may have: all of it is said."""
    return tuple((field, source) for field, source in _sources(event) if source)


@attrs.frozen
class Field:
    """What a sink or a reader may want to know of a field.

    Args:
        name: In Python and in JSON.
        type: In JSON: ``int``, ``float or null`` ...
        unit: ns, us, ms, s or bytes, as its name ends; empty where it has none.
        doc: What it means.
        own: It is not in every event, but this probe's.
        column: Its head in a table; empty where it is to have none.
    """

    name: str
    type: str
    unit: str
    doc: str
    own: bool
    column: str


_TYPES = {int: "int", float: "float", str: "str", bool: "bool", type(None): "null"}


@functools.lru_cache(maxsize=1024)
def fields(event: type[Event] = Event) -> tuple[Field, ...]:
    """The fields of an event's class, in the order of its JSON keys.

    Of the rows of a probe that is not installed, as a capture has them, nothing is
    known but the names of the fields.
    """
    hints = _hints(event)
    return tuple(
        Field(
            name=field,
            type=_type(_kinds(hints[field])),
            unit=_unit(field),
            doc=source.doc if source else "",
            own=field not in Event.__struct_fields__,
            column=_column(field, source),
        )
        for field, source in _sources(event)
    )


def _type(kinds: tuple[Any, ...]) -> str:
    if set(kinds) == _TYPES.keys():
        return "any"
    return " or ".join(_TYPES.get(kind, "any") for kind in kinds)


def _unit(field: str) -> str:
    unit = field.rpartition("_")[2]
    return unit if unit in _UNITS else ""


def _column(field: str, source: Wire | Hook | Made | None) -> str:
    if isinstance(source, Wire) and source.column is not None:
        return source.column
    stem = field.removesuffix(f"_{_unit(field)}")
    return field.upper() if stem == field else f"{stem.upper()}({_unit(field)})"


def wires(event: type[Event]) -> dict[str, tuple[str, Wire]]:
    """Member of the record -> the field that it fills, and how."""
    return {
        source.member or field: (field, source)
        for field, source in declared(event)
        if isinstance(source, Wire)
    }


def _kinds(hint: Any) -> tuple[Any, ...]:
    """``int | None`` as its parts."""
    return typing.get_args(hint) or (hint,)


def checked_event(_: object, __: object, event: type[Event]) -> None:
    """Validate a probe's event class: its fields become C, Python, JSON and a column.

    Raises:
        PluginError: The sentence names the field, and what is wrong with it.
    """
    if not (isinstance(event, type) and issubclass(event, Event)):
        raise PluginError(f"event={event!r} is no subclass of tcplat_core.Event")
    again = [
        field
        for cls in event.__mro__[: event.__mro__.index(Event)]
        for field in inspect.get_annotations(cls)
        if field in Event.__struct_fields__
    ]
    if again:
        raise PluginError(f"{event.__name__}.{again[0]} is a field of every event already")
    hints = typing.get_type_hints(event)
    taken = {member for member, _ in Record(Event).members}
    for field, source in _sources(event):
        if field in Event.__struct_fields__:
            continue
        what = f"{event.__name__}.{field}"
        if source is None:
            raise PluginError(
                f'{what} is not declared as {field}: Annotated[int, Wire("u32", "what it is")]'
            )
        kinds = _kinds(hints[field])
        if not set(kinds) <= _TYPES.keys():
            raise PluginError(f"{what}: a field is int, float, str or bool, or that or None")
        if isinstance(source, Wire):
            _check_wire(what, field, source, kinds, taken)
    if len(has_bits(event)) > 8:  # noqa: PLR2004 - it is a u8
        raise PluginError(f"{event.__name__} has more than five fields with has=True")
    size = Record(event).size
    if size > LARGEST_RECORD:
        raise PluginError(
            f"a record of {event.__name__} has {size} bytes; {LARGEST_RECORD} are the most"
        )


def _check_wire(
    what: str, field: str, source: Wire, kinds: tuple[Any, ...], taken: set[str]
) -> None:
    member = source.member or field
    for word in (field, member):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", word):
            raise PluginError(f"{what}: {word!r} must be lower-case letters, digits, underscores")
    if member in _RESERVED:
        raise PluginError(f"{what}: {member!r} is a reserved word; give it another member=")
    if member in taken or member == "event_pad":
        raise PluginError(f"{what}: the record has a member {member!r} already")
    taken.add(member)
    if (source.nullable or source.has) and type(None) not in kinds:
        raise PluginError(f"{what} may be unknown, and is not declared as ... | None")
    if source.latency and not field.endswith("_us"):
        raise PluginError(f"{what}: a latency is in µs, and its name ends in _us")
    if source.c_type.startswith("u8[") and source.to is None:
        raise PluginError(f"{what}: the bytes of {source.c_type} want to=, as in to=address")


def latencies(event: type[Event]) -> list[str]:
    """The fields that ``--min-latency`` looks at."""
    return [
        field for field, source in _sources(event) if isinstance(source, Wire) and source.latency
    ]


@attrs.frozen
class Reading:
    """How the fields of one probe's rows follow from its records.

    Args:
        names: What the expressions use, but for the members of a record.
        values: An expression for each field: what a block's reader gives is named _FIELD.
        blocks: What follows from a block alone: its names, and what makes their values.
    """

    names: Mapping[str, Any]
    values: tuple[str, ...]
    blocks: Mapping[str, tuple[tuple[str, ...], Callable[[bytes], tuple[Any, ...]]]]


@attrs.frozen
class Record:
    """The layout of one probe's record: members in C order, no holes, size a multiple of 8.

    First the two blocks, each padded to a multiple of 8; then what changes with every event.
    """

    event: type[Event]
    members: tuple[tuple[str, str], ...] = attrs.field(init=False)
    """Name and C type, padding included."""
    packing: struct.Struct = attrs.field(init=False)
    """Of all members: to make a record by hand."""
    layout: struct.Struct = attrs.field(init=False)
    """To read one: the two blocks, as bytes, and the other members."""

    @members.default
    def _members(self) -> tuple[tuple[str, str], ...]:
        return (*self._block("socket"), *self._block("kind"), *self._block(""))

    def _block(self, block: str) -> list[tuple[str, str]]:
        """Name and C type of a block's members, as they lie; the last pads it."""
        wires = [
            (source.member or name, source.c_type)
            for name, source in declared(self.event)
            if isinstance(source, Wire) and source.block == block
        ]
        wires += [(wire.member, wire.c_type) for wire in _HIDDEN if wire.block == block]
        wires.sort(key=lambda member: -_alignment(member[1]))
        pad = -_size(wires) % 8
        return [*wires, (f"{block or 'event'}_pad", f"u8[{pad}]")] if pad else wires

    @packing.default
    def _packing_of_all(self) -> struct.Struct:
        return struct.Struct("=" + "".join(_code(c_type) for _, c_type in self.members))

    @layout.default
    def _layout(self) -> struct.Struct:
        blocks = "".join(f"{_size(self._block(block))}s" for block in ("socket", "kind"))
        rest = "".join(
            f"{_array(c_type)[1]}x" if member == "event_pad" else _code(c_type)
            for member, c_type in self._block("")
        )
        return struct.Struct(f"={blocks}{rest}")

    @property
    def size(self) -> int:
        """Bytes of one record."""
        return self.layout.size

    def c_struct(self, name: str = "tcplat_event") -> str:
        """The C definition, and assertions that the compiler lays it out as Python reads it."""
        bits = has_bits(self.event).items() - _HAS.items()
        lines = [f"#define TCPLAT_HAS_{field.upper()} {bit}" for field, bit in sorted(bits)]
        lines.append(f"struct {name} {{")
        asserts, offset = [], 0
        for member, c_type in self.members:
            base, count = _array(c_type)
            array = f"[{count}]" if "[" in c_type else ""
            # Without it the compiler copies an address byte by byte.
            aligned = " __attribute__((aligned(8)))" if count > 1 and count % 8 == 0 else ""
            lines.append(f"\t{base} {member}{array}{aligned};")
            asserts.append(
                f"_Static_assert(__builtin_offsetof(struct {name}, {member}) == {offset}, "
                f'"{name}.{member}: schema.py has another offset");'
            )
            offset += struct.calcsize("=" + _code(c_type))
        lines.append("} __attribute__((aligned(8)));")
        asserts.append(
            f"_Static_assert(sizeof(struct {name}) == {self.size}, "
            f'"{name}: schema.py has another size");'
        )
        return "\n".join([*lines, *asserts, ""])

    def reading(
        self, probe: str, hooks: Sequence[FiredBy], ifname: Callable[[int], str | None]
    ) -> Reading:
        """How the fields of one probe's rows follow from its records."""
        has = has_bits(self.event)
        # Capitals: fields have none, so that theirs cannot clash with these.
        names: dict[str, Any] = {
            "EVENT": self.event,
            "PROBE": probe,
            "HOOKS": hooks,
            "IFNAME": ifname,
            "DESCRIBED": _described,
            "SCHEMA_VERSION": SCHEMA_VERSION,
        }
        values: list[str] = []
        of_block: dict[str, dict[str, str]] = {"socket": {}, "kind": {}}
        for field, source in declared(self.event):
            if isinstance(source, Wire):
                names[f"TO_{field}"] = source.converter and _Memo(source.converter)
                made, block = _wire_expression(field, source, has), source.block
            elif isinstance(source, Hook):
                made, block = f"HOOKS[hook].{source.attribute}", "kind"
            else:
                made, block = _MADE.get(source.by, source.by), _MADE_OF.get(source.by, "")
            if block:
                of_block[block][f"_{field}"] = made
            values.append(f"_{field}" if block else made)
        # What the kind means for this very row, the row itself has to say.
        of_block["kind"] |= {"_has": "has", "_full": f"{_WORDS}[0]", "_empty": f"{_WORDS}[1]"}
        blocks = {
            block: (tuple(made_of), self._reader(block, made_of.values(), names))
            for block, made_of in of_block.items()
        }
        return Reading(names, tuple(values), blocks)

    def decoder(
        self, probe: str, hooks: Sequence[FiredBy], ifname: Callable[[int], str | None]
    ) -> Callable[[Iterable[tuple[Any, ...]], int], list[Event]]:
        """A function from unpacked records and clock offset (ns) to rows.

        A comprehension written for this very schema: at half a million events a
        second a loop over field descriptions is what would cost most. The values
        that follow from a block are worked out once and remembered, see :class:`Wire`.
        """
        reading = self.reading(probe, hooks, ifname)
        names = dict(reading.names)
        for block, (_, read) in reading.blocks.items():
            names[f"OF_{block.upper()}"] = _Memo(read)
        of_socket, of_kind = (reading.blocks[block][0] for block in ("socket", "kind"))
        others = [member for member, _ in self._block("") if member != "event_pad"]
        source_text = (
            "def DECODE(RECORDS, OFFSET_NS):\n"
            f"    return [EVENT({', '.join(reading.values)})\n"
            f"        for {', '.join(['SOCKET', 'KIND', *others])} in RECORDS\n"
            f"        for {', '.join(of_socket)} in (OF_SOCKET[SOCKET],)\n"
            f"        for {', '.join(of_kind)} in (OF_KIND[KIND],)]\n"
        )
        exec(source_text, names)  # noqa: S102 - made above from the schema alone
        return typing.cast(
            "Callable[[Iterable[tuple[Any, ...]], int], list[Event]]", names["DECODE"]
        )

    def _reader(
        self, block: str, expressions: Iterable[str], names: Mapping[str, Any]
    ) -> Callable[[bytes], tuple[Any, ...]]:
        """The values of these expressions, from the bytes of a block."""
        members = ", ".join(member for member, _ in self._block(block))
        unpack = self._packing(block).unpack
        scope = {**names, "UNPACK": unpack}
        source_text = (
            f"def READ(RAW):\n    {members} = UNPACK(RAW)\n    return {', '.join(expressions)}\n"
        )
        exec(source_text, scope)  # noqa: S102 - made from the schema alone
        return typing.cast("Callable[[bytes], tuple[Any, ...]]", scope["READ"])

    def block_size(self, block: str) -> int:
        """Bytes of a block."""
        return _size(self._block(block))

    def offset(self, member: str) -> int:
        """Where a member begins, in bytes."""
        before = itertools.takewhile(lambda one: one[0] != member, self.members)
        return _size(before)

    def code(self, member: str) -> str:
        """Its letter, and how many, in :mod:`struct`."""
        return _code(dict(self.members)[member])

    def _packing(self, block: str) -> struct.Struct:
        return struct.Struct("=" + "".join(_code(c_type) for _, c_type in self._block(block)))


_MADE = {
    "desc": "_full if bytes else _empty",
    "ifname": "IFNAME(ifindex) if ifindex else None",
}
"""How a value is made that :class:`Made` does not say in Python itself."""
_MADE_OF = {"ifname": "kind"}
"""From which block."""
_WORDS = "DESCRIBED(HOOKS[hook], has, err, state, old_state, flags)"


def _described(
    hook: FiredBy, has: int, err: int, state: int, old_state: int, raw_flags: int
) -> tuple[str, str]:
    """A row in plain words: with bytes, and without."""
    full, empty = (
        hook.describe(
            Moment(
                hook.point,
                state_name(state),
                state_name(old_state),
                err,
                none if has & _HAS["bytes"] else None,
                flags(raw_flags) if has & _HAS["flags"] else None,
            )
        )
        for none in (False, True)
    )
    return full, empty


def has_bits(event: type[Event]) -> dict[str, int]:
    """Bits of the record's `has`: Event's own, and after them those of a subclass."""
    fields = [name for name, source in declared(event) if isinstance(source, Wire) and source.has]
    return {name: 1 << bit for bit, name in enumerate(fields)}


def _wire_expression(field: str, source: Wire, has: Mapping[str, int]) -> str:
    member = source.member or field
    value = member if source.converter is None else f"TO_{field}[{member}]"
    if source.unlike:
        return f"{value} if {value} != TO_{source.unlike}[{source.unlike}] else None"
    if source.has:
        flag = "has" if source.block == "kind" else "_has"
        return f"{value} if {flag} & {has[field]} else None"
    if source.nullable and "[" not in source.c_type:
        return f"{value} if {member} else None"
    return value


def _size(members: Iterable[tuple[str, str]]) -> int:
    return struct.calcsize("=" + "".join(_code(c_type) for _, c_type in members))


def _array(c_type: str) -> tuple[str, int]:
    base, _, count = c_type.rstrip("]").partition("[")
    return base, int(count or 1)


def _alignment(c_type: str) -> int:
    base, count = _array(c_type)
    if count > 1 and count % 8 == 0:
        return 8
    return 1 if base == "char" else _C_TYPES[base][1]


def _code(c_type: str) -> str:
    base, count = _array(c_type)
    return f"{count}s" if "[" in c_type else _C_TYPES[base][0]
