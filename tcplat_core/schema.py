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
import socket
import struct
import time
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import attrs
import msgspec

SCHEMA_VERSION = 1

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

_C_TYPES = {"u64": ("Q", 8), "u32": ("I", 4), "u16": ("H", 2), "u8": ("B", 1)}


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
    return "".join(map(_escaped, plain))


def printable(plain: str) -> str:
    """Text from elsewhere, escaped as by text(), but for backslashes: it may have been before."""
    return "".join(char if char == "\\" else _escaped(char) for char in plain)


def _escaped(char: str) -> str:
    if char.isprintable() and char != "\\":
        return char
    if "\udc80" <= char <= "\udcff":
        return f"\\x{ord(char) - 0xDC00:02x}"
    if "\x80" <= char <= "\xff":  # \x80 is the byte, \u0080 the character
        return f"\\u{ord(char):04x}"
    return char.encode("unicode_escape").decode("ascii")


def name(raw: bytes) -> str | None:
    """A process's name; None for none."""
    return text(raw) or None


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


@attrs.frozen
class Wire:
    """A member of the kernel's record.

    Args:
        c_type: u8, u16, u32, u64, or an array of u8 or char: ``u8[16]``.
        doc: What the value is, with its unit.
        member: Its name in C; the field's name unless given.
        to: Turns the raw value into the field's; must be pure, answers are remembered.
        nullable: A raw 0 means that nobody can know: the field is None.
        has: The field is None unless the handler set TCPLAT_HAS_<NAME>.
        block: The members of a block stand side by side, and change together or seldom:
            what they mean is worked out once for each value of the whole block. Either
            ``socket`` or ``kind``; for fields of your own leave it empty.
        latency: It is a duration in µs, and ``--min-latency`` leaves out rows where it is
            shorter: in the kernel the handler has to ask ``tcplat_too_fast()``.
    """

    c_type: str
    doc: str
    member: str = ""
    to: Callable[[Any], Any] | None = None
    nullable: bool = False
    has: bool = False
    block: str = ""
    latency: bool = False


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


class Event(msgspec.Struct, gc=False):
    """One row, as sinks get it and as JSONL carries it. Never changed after it is made."""

    v: Annotated[int, Made("1", "schema version")]
    ts_ns: Annotated[int, Wire("u64", "when, CLOCK_MONOTONIC, ns since boot")]
    time_ns: Annotated[int, Made("ts_ns + offset_ns", "Unix time of the same instant, ns")]
    probe: Annotated[str, Made("probe", "which probe saw it")]
    point: Annotated[str, Hook("point", "what happened: connect, state, send, recv, close ...")]
    func: Annotated[str, Hook("func", "the very hook: tcp_sendmsg, tcp:tcp_sendmsg_locked")]
    attach: Annotated[str, Hook("attach", "fentry, kprobe, tracepoint or xdp")]
    pid: Annotated[
        int | None, Wire("u32", "process that owns the socket", nullable=True, block="socket")
    ]
    tid: Annotated[
        int | None, Wire("u32", "its thread that used it last", nullable=True, block="socket")
    ]
    comm: Annotated[
        str | None, Wire("char[16]", "the owner's name, escaped", to=name, block="socket")
    ]
    cpu: Annotated[int, Wire("u16", "where it happened", block="kind")]
    netns: Annotated[
        int | None, Wire("u32", "network namespace, inode number", nullable=True, block="socket")
    ]
    ip: Annotated[
        int | None, Wire("u8", "4 or 6; a mapped IPv4 address is 4", nullable=True, block="socket")
    ]
    saddr: Annotated[
        str, Wire("u8[16]", "local address; in packets the source", to=address, block="socket")
    ]
    sport: Annotated[
        int | None,
        Wire("u16", "local port; null before it is chosen", nullable=True, block="socket"),
    ]
    daddr: Annotated[
        str,
        Wire("u8[16]", "remote address; in packets the destination", to=address, block="socket"),
    ]
    dport: Annotated[int | None, Wire("u16", "remote port", nullable=True, block="socket")]
    state: Annotated[
        str | None, Wire("u8", "TCP state after the event", to=state_name, block="kind")
    ]
    old_state: Annotated[
        str | None, Wire("u8", "TCP state before a state change", to=state_name, block="kind")
    ]
    desc: Annotated[str, Made("desc", "the same in plain words")]
    seq: Annotated[
        int | None, Wire("u32", "first TCP sequence number of the bytes concerned", has=True)
    ]
    bytes: Annotated[int | None, Wire("u32", "how many bytes", has=True)]
    flags: Annotated[
        str | None, Wire("u8", "TCP flags of a packet", to=flags, has=True, block="kind")
    ]
    connect_us: Annotated[
        float | None,
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


_HIDDEN = (
    Wire("u8", "which hook fired", member="hook", block="kind"),
    Wire("u8", "which nullable fields are filled", member="has", block="kind"),
    Wire("u16", "an errno, 0 if none", member="err", block="kind"),
    Wire("u32", "interface index of a packet", member="ifindex", block="kind"),
)
"""Members that reach the row only in translation."""


@functools.cache  # a new socket needs it, and it takes a millisecond
def _annotations(event: type[Event]) -> list[tuple[str, Wire | Hook | Made]]:
    hints = typing.get_type_hints(event, include_extras=True)
    return [(name, hints[name].__metadata__[0]) for name in event.__struct_fields__]


def json_types(event: type[Event] = Event) -> dict[str, str]:
    """JSON type of each field, in order: ``int or null``; ``any`` where nothing is declared."""
    names: dict[Any, str] = {int: "int", float: "float", str: "str", type(None): "null"}
    hints = typing.get_type_hints(event)
    return {
        name: " or ".join(
            names.get(kind, "any") for kind in typing.get_args(hints[name]) or (hints[name],)
        )
        for name in event.__struct_fields__
    }


def documentation(event: type[Event] = Event) -> list[tuple[str, str, str]]:
    """Name, JSON type and meaning of each field, in order."""
    types = json_types(event)
    return [(name, types[name], source.doc) for name, source in _annotations(event)]


def latencies(event: type[Event]) -> list[str]:
    """The fields that ``--min-latency`` looks at."""
    hints = typing.get_type_hints(event, include_extras=True)
    return [
        name
        for name in event.__struct_fields__
        for source in getattr(hints[name], "__metadata__", ())
        if isinstance(source, Wire) and source.latency
    ]


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
            for name, source in _annotations(self.event)
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
        bits = _has_bits(self.event).items() - _HAS.items()
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

    def decoder(
        self, probe: str, hooks: Sequence[FiredBy], ifname: Callable[[int], str | None]
    ) -> Callable[[Iterable[tuple[Any, ...]], int], list[Event]]:
        """A function from unpacked records and clock offset (ns) to rows.

        A comprehension written for this very schema: at half a million events a
        second a loop over field descriptions is what would cost most. The values
        that follow from a block are worked out once and remembered, see :class:`Wire`.
        """
        has = _has_bits(self.event)
        names: dict[str, Any] = {
            "Event": self.event,
            "probe": probe,
            "hooks": hooks,
            "ifname": ifname,
            "described": _described,
        }
        values: list[str] = []
        of_block: dict[str, dict[str, str]] = {"socket": {}, "kind": {}}
        """What follows from a block alone: its name in the comprehension -> how it is made."""
        for field, source in _annotations(self.event):
            if isinstance(source, Wire):
                names[f"to_{field}"] = source.to and _Memo(source.to)
                made, block = _wire_expression(field, source, has), source.block
            elif isinstance(source, Hook):
                made, block = f"hooks[hook].{source.attribute}", "kind"
            else:
                made, block = _MADE.get(source.by, source.by), _MADE_OF.get(source.by, "")
            if block:
                of_block[block][f"_{field}"] = made
            values.append(f"_{field}" if block else made)
        # What the kind means for this very row, the row itself has to say.
        of_block["kind"] |= {"_has": "has", "_full": f"{_WORDS}[0]", "_empty": f"{_WORDS}[1]"}
        for block, made_of in of_block.items():
            names[block] = self._remembering(block, made_of.values(), names)
        others = [member for member, _ in self._block("") if member != "event_pad"]
        source_text = (
            "def decode(records, offset_ns):\n"
            f"    return [Event({', '.join(values)})\n"
            f"        for {', '.join(['of_socket', 'of_kind', *others])} in records\n"
            f"        for {', '.join(of_block['socket'])} in (socket[of_socket],)\n"
            f"        for {', '.join(of_block['kind'])} in (kind[of_kind],)]\n"
        )
        exec(source_text, names)  # noqa: S102 - made above from the schema alone
        return typing.cast(
            "Callable[[Iterable[tuple[Any, ...]], int], list[Event]]", names["decode"]
        )

    def _remembering(
        self, block: str, expressions: Iterable[str], names: Mapping[str, Any]
    ) -> _Memo:
        """The values of these expressions, from the bytes of a block."""
        members = ", ".join(member for member, _ in self._block(block))
        unpack = self._packing(block).unpack
        scope = {**names, "unpack": unpack}
        source_text = (
            f"def read(raw):\n    {members} = unpack(raw)\n    return {', '.join(expressions)}\n"
        )
        exec(source_text, scope)  # noqa: S102 - made from the schema alone
        return _Memo(scope["read"])

    def hook(self, kind: bytes) -> int:
        """The number of the hook, from the block `kind`."""
        members = [member for member, _ in self._block("kind")]
        return int(self._packing("kind").unpack(kind)[members.index("hook")])

    def _packing(self, block: str) -> struct.Struct:
        return struct.Struct("=" + "".join(_code(c_type) for _, c_type in self._block(block)))


_MADE = {
    "desc": "_full if bytes else _empty",
    "ifname": "ifname(ifindex) if ifindex else None",
}
"""How a value is made that :class:`Made` does not say in Python itself."""
_MADE_OF = {"ifname": "kind"}
"""From which block."""
_WORDS = "described(hooks[hook], has, err, state, old_state, flags)"


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


def _has_bits(event: type[Event]) -> dict[str, int]:
    """Bits of the record's `has`: Event's own, and after them those of a subclass."""
    fields = [
        name for name, source in _annotations(event) if isinstance(source, Wire) and source.has
    ]
    return {name: 1 << bit for bit, name in enumerate(fields)}


def _wire_expression(field: str, source: Wire, has: Mapping[str, int]) -> str:
    member = source.member or field
    value = member if source.to is None else f"to_{field}[{member}]"
    if source.has:
        flag = "has" if source.block == "kind" else "_has"
        return f"{value} if {flag} & {has[field]} else None"
    if source.nullable:
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


def clock_offset_ns() -> int:
    """Unix time minus CLOCK_MONOTONIC, from the tightest of five readings."""
    best = None
    for _ in range(5):
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        wall = time.time_ns()
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        if best is None or after - before < best[0]:
            best = (after - before, wall - (before + after) // 2)
    assert best is not None  # noqa: S101 - five readings were taken
    return best[1]
