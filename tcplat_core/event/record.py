"""The layout of a record: C struct, and the decoder that makes rows of it."""

from __future__ import annotations

import itertools
import struct
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs

from .fields import (
    C_TYPES,
    SCHEMA_VERSION,
    Event,
    FiredBy,
    FromHook,
    Moment,
    Wire,
    declared,
    split_array,
)
from .text import flags, state_name

_HAS = {"seq": 1, "bytes": 2, "flags": 4}
"""Bits of the record's `has`, as in include/tcplat/event.bpf.h; a subclass has the other five."""


class _Memo(dict[Any, Any]):
    """Caches the results of a pure function; cleared when it holds 16,384 of them."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def __missing__(self, key: Any) -> Any:
        if len(self) >= 16_384:  # noqa: PLR2004 - the bound of the docstring
            self.clear()
        value = self[key] = self.function(key)
        return value


_HIDDEN = (
    Wire("u8", "which hook fired", member="hook", block="kind"),
    Wire("u8", "which nullable fields are filled", member="has", block="kind"),
    Wire("u16", "an errno, 0 if none", member="err", block="kind"),
    Wire("u32", "interface index of a packet", member="ifindex", block="kind"),
)
"""Members that no field has as they are; fields are computed from them."""


@attrs.frozen
class Reading:
    """How the fields of one probe's rows follow from its records.

    Args:
        names: Globals of the expressions; the members of the record are their locals.
        values: An expression for each field; a value from a block's reader is named _FIELD.
        blocks: Block -> names of the values that depend on it alone, and the function that
            computes them.
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
    """Format of all members; packs a record."""
    layout: struct.Struct = attrs.field(init=False)
    """Format to read a record: the two blocks, as bytes, and the other members."""

    @members.default
    def _members(self) -> tuple[tuple[str, str], ...]:
        return (*self._block("socket"), *self._block("kind"), *self._block(""))

    def _block(self, block: str) -> list[tuple[str, str]]:
        """Return names and C types of a block's members, in order; the last is padding."""
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
            f"{split_array(c_type)[1]}x" if member == "event_pad" else _code(c_type)
            for member, c_type in self._block("")
        )
        return struct.Struct(f"={blocks}{rest}")

    @property
    def size(self) -> int:
        """Bytes of one record."""
        return self.layout.size

    def c_struct(self, name: str = "tcplat_event") -> str:
        """Return the C definition, with assertions that the layout is as Python reads it."""
        bits = has_bits(self.event).items() - _HAS.items()
        lines = [f"#define TCPLAT_HAS_{field.upper()} {bit}" for field, bit in sorted(bits)]
        lines.append(f"struct {name} {{")
        asserts, offset = [], 0
        for member, c_type in self.members:
            base, count = split_array(c_type)
            array = f"[{count}]" if "[" in c_type else ""
            # Without `aligned` the compiler copies an address byte by byte.
            aligned = " __attribute__((aligned(8)))" if count > 1 and count % 8 == 0 else ""
            lines.append(f"\t{base} {member}{array}{aligned};")
            asserts.append(
                f"_Static_assert(__builtin_offsetof(struct {name}, {member}) == {offset}, "
                f'"{name}.{member}: record.py has another offset");'
            )
            offset += struct.calcsize("=" + _code(c_type))
        lines.append("} __attribute__((aligned(8)));")
        asserts.append(
            f"_Static_assert(sizeof(struct {name}) == {self.size}, "
            f'"{name}: record.py has another size");'
        )
        return "\n".join([*lines, *asserts, ""])

    def reading(
        self, probe: str, hooks: Sequence[FiredBy], ifname: Callable[[int], str | None]
    ) -> Reading:
        """How the fields of one probe's rows follow from its records."""
        has = has_bits(self.event)
        # In capitals, which fields never are: no clash.
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
            elif isinstance(source, FromHook):
                made, block = f"HOOKS[hook].{source.attribute}", "kind"
            else:
                made, block = _MADE.get(source.by, source.by), _MADE_OF.get(source.by, "")
            if block:
                of_block[block][f"_{field}"] = made
            values.append(f"_{field}" if block else made)
        # Also depend on other members of the row, so that they are chosen per row.
        of_block["kind"] |= {
            "_has": "has",
            "_full": f"{_DESCRIPTIONS}[0]",
            "_empty": f"{_DESCRIPTIONS}[1]",
        }
        blocks = {
            block: (tuple(made_of), self._reader(block, made_of.values(), names))
            for block, made_of in of_block.items()
        }
        return Reading(names, tuple(values), blocks)

    def decoder(
        self, probe: str, hooks: Sequence[FiredBy], ifname: Callable[[int], str | None]
    ) -> Callable[[Iterable[tuple[Any, ...]], int], list[Event]]:
        """Return a function from unpacked records and clock offset (ns) to rows.

        The function is a comprehension generated for this schema: at half a million events a
        second, a loop over field descriptions would be the largest cost. Values that depend on a
        block alone are computed once per value of the block and cached, see :class:`Wire`.
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
        exec(source_text, names)  # noqa: S102 - generated from the schema alone
        return typing.cast(
            "Callable[[Iterable[tuple[Any, ...]], int], list[Event]]", names["DECODE"]
        )

    def _reader(
        self, block: str, expressions: Iterable[str], names: Mapping[str, Any]
    ) -> Callable[[bytes], tuple[Any, ...]]:
        """Return a function from the bytes of a block to the values of these expressions."""
        members = ", ".join(member for member, _ in self._block(block))
        unpack = self._packing(block).unpack
        scope = {**names, "UNPACK": unpack}
        source_text = (
            f"def READ(RAW):\n    {members} = UNPACK(RAW)\n    return {', '.join(expressions)}\n"
        )
        exec(source_text, scope)  # noqa: S102 - generated from the schema alone
        return typing.cast("Callable[[bytes], tuple[Any, ...]]", scope["READ"])

    def block_size(self, block: str) -> int:
        """Return the size of a block in bytes."""
        return _size(self._block(block))

    def offset(self, member: str) -> int:
        """Return the offset of a member in bytes."""
        before = itertools.takewhile(lambda one: one[0] != member, self.members)
        return _size(before)

    def code(self, member: str) -> str:
        """Return a member's format in :mod:`struct`."""
        return _code(dict(self.members)[member])

    def _packing(self, block: str) -> struct.Struct:
        return struct.Struct("=" + "".join(_code(c_type) for _, c_type in self._block(block)))


_MADE = {
    "desc": "_full if bytes else _empty",
    "ifname": "IFNAME(ifindex) if ifindex else None",
}
"""`by` of :class:`Made` -> expression, where `by` is not one itself."""
_MADE_OF = {"ifname": "kind"}
"""`by` of :class:`Made` -> the block on which it depends."""
_DESCRIPTIONS = "DESCRIBED(HOOKS[hook], has, err, state, old_state, flags)"


def _described(
    hook: FiredBy, has: int, err: int, state: int, old_state: int, raw_flags: int
) -> tuple[str, str]:
    """Return the descriptions of a row: with bytes, and without."""
    full, empty = (
        hook.describe(
            Moment(
                hook.point,
                state_name(state),
                state_name(old_state),
                err,
                none if has & _HAS["bytes"] else None,
                flags(raw_flags) if has & _HAS["flags"] else None,
                hook.func,
            )
        )
        for none in (False, True)
    )
    return full, empty


def has_bits(event: type[Event]) -> dict[str, int]:
    """Return the bits of the record's `has` by field: Event's first, then the subclass's."""
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


def _alignment(c_type: str) -> int:
    base, count = split_array(c_type)
    if count > 1 and count % 8 == 0:
        return 8
    return 1 if base == "char" else C_TYPES[base][1]


def _code(c_type: str) -> str:
    base, count = split_array(c_type)
    return f"{count}s" if "[" in c_type else C_TYPES[base][0]
