"""Translates a probe's schema for records.c, which turns records into JSON lines."""

from __future__ import annotations

import ctypes
import itertools
import struct
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Self

import attrs
import msgspec

from tcplat_core.event.fields import SCHEMA_VERSION, Event, FiredBy, Made, Wire, declared
from tcplat_core.event.record import Record, has_bits
from tcplat_core.event.text import micros

from .library import ABSENT, CHOICE, IDS, INSTANT, INTEGER, MICROS, SIGNED, TEXT, Op, library
from .slim import HOOK, OWN, PIECES, SLIM_NUMBERS, SlimTexts

_INTEGERS = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "s8": 1, "s16": 2, "s32": 4, "s64": 8}
_MOST_BLOCKS = 16
"""As in records.c."""
_json = msgspec.json.Encoder()


@attrs.define
class _Block:
    """A part of a record whose texts depend on its bytes alone, and are cached."""

    at: int
    size: int
    read: Callable[[bytes], Sequence[Any]]
    texts: list[list[bytes | int]] = attrs.field(factory=list)
    """Each is made of literal text and of values, given as indices of the result of read()."""
    ids: list[tuple[int, list[str | int]]] = attrs.field(factory=list)
    """Column of slim rows, and its values: constants, or indices of the result of read()."""


@attrs.define
class _Plan:
    """The parts of a line, in order."""

    record: Record
    blocks: list[_Block] = attrs.field(factory=list)
    ops: list[Op] = attrs.field(factory=list)
    columns: list[Op] = attrs.field(factory=list)
    """Of slim rows; none if they cannot have them."""

    def text(self, block: int, *parts: bytes | int) -> None:
        """Add literal text or values of a block, merged with the part before if possible."""
        last = self.ops[-1] if self.ops else None
        texts = self.blocks[block].texts
        literal = all(isinstance(part, bytes) for part in parts)
        joined = last is not None and last.kind == TEXT and not last.has
        if last is not None and joined and (literal or last.block == block):
            self.blocks[last.block].texts[last.text] += parts
            return
        texts.append(list(parts))
        self.ops.append(Op(kind=TEXT, block=block, text=len(texts) - 1))

    def number(self, kind: int, member: str, width: int, **how: int) -> None:
        """Add a number of the record."""
        self.ops.append(Op(kind=kind, width=width, at=self.record.offset(member), **how))


@attrs.define(eq=False)
class Codec:
    """The lines of one probe's records.

    Args:
        size: Bytes of a record.
        ts_at: Offset of the timestamp.
        decode: Unpacked records and the clock's offset (ns) -> rows.
        layout: Format of records for `decode`.
        handle: Pointer of records.c.
        slim: Whether slim rows can be made of records.
    """

    size: int
    ts_at: int
    decode: Callable[[Any, int], list[Event]]
    layout: struct.Struct
    handle: int
    slim: bool
    _blocks: Sequence[_Block]
    texts: SlimTexts = attrs.field(factory=SlimTexts, init=False)
    """What records.c has the numbers of."""

    @classmethod
    def of(
        cls,
        record: Record,
        probe: str,
        hooks: Sequence[FiredBy],
        ifname: Callable[[int], str | None],
    ) -> Self | None:
        """Return the codec of a probe; None without records.c, or for a field it cannot write."""
        records_c = library()
        plan = _plan(record, probe, hooks, ifname)
        if records_c is None or plan is None:
            return None
        places = [
            number for block in plan.blocks for number in (block.at, block.size, len(block.texts))
        ]
        handle = records_c.codec_new(
            record.size,
            record.offset("has"),
            len(plan.blocks),
            (ctypes.c_uint32 * len(places))(*places),
            len(plan.ops),
            len(plan.columns),
            (Op * (len(plan.ops) + len(plan.columns)))(*plan.ops, *plan.columns),
        )
        if not handle:
            raise MemoryError
        codec = cls(
            record.size,
            record.offset("ts_ns"),
            record.decoder(probe, hooks, ifname),
            record.layout,
            handle,
            bool(plan.columns),
            plan.blocks,
        )
        weakref.finalize(codec, records_c.codec_free, handle)
        return codec

    def use(self, texts: SlimTexts) -> None:
        """Have records.c forget all blocks, and learn the numbers of these texts from now on."""
        self.texts = texts
        records_c = library()
        assert records_c is not None  # noqa: S101 - it has made the handle
        records_c.codec_forget(self.handle)

    def learn(self, which: int, record: bytes) -> None:
        """Pass the texts of a block of this record, and their numbers in `texts`, to records.c."""
        block = self._blocks[which]
        value = record[block.at : block.at + block.size]
        values = block.read(value)
        texts = [
            b"".join(
                part if isinstance(part, bytes) else _json.encode(values[part]) for part in text
            )
            for text in block.texts
        ]
        ends = (ctypes.c_uint32 * len(texts))(*itertools.accumulate(map(len, texts)))
        ids = (ctypes.c_uint32 * IDS)(
            *(
                self.texts.number(
                    column, tuple(values[at] if type(at) is int else at for at in parts)
                )
                for column, parts in block.ids
            )
        )
        records_c = library()
        assert records_c is not None  # noqa: S101 - it has made the handle
        if records_c.codec_learn(self.handle, which, value, b"".join(texts), ends, ids):
            raise MemoryError

    def line(self, record: bytes, offset_ns: int) -> bytes:
        """Return the line of one record, made in Python."""
        return _json.encode_lines(self.decode(self.layout.iter_unpack(record), offset_ns))


_SOCKET, _KIND = 0, 1


def _plan(
    record: Record,
    probe: str,
    hooks: Sequence[FiredBy],
    ifname: Callable[[int], str | None],
) -> _Plan | None:
    reading = record.reading(probe, hooks, ifname)
    places = (0, record.block_size("socket"))
    plan = _Plan(record)
    names = []
    for block, at in zip(("socket", "kind"), places, strict=True):
        of_block, read = reading.blocks[block]
        names.append({name: index for index, name in enumerate(of_block)})
        plan.blocks.append(_Block(at, record.block_size(block), read))
    has = has_bits(record.event)
    for index, (field, source) in enumerate(declared(record.event)):
        plan.text(_KIND, (b"," if index else b"{") + b'"%s":' % field.encode())
        where = next((block for block in (_SOCKET, _KIND) if f"_{field}" in names[block]), None)
        if where is not None:
            plan.text(where, names[where][f"_{field}"])
        elif isinstance(source, Wire):
            _number(plan, field, source, has.get(field, 0) if source.has else 0)
        elif not (isinstance(source, Made) and _made(plan, source, probe, names[_KIND])):
            return None
    plan.text(_KIND, b"}\n")
    plan.columns = _columns(plan, probe, names, has)
    return plan if len(plan.blocks) <= _MOST_BLOCKS else None


def _columns(
    plan: _Plan, probe: str, names: Sequence[dict[str, int]], has: dict[str, int]
) -> list[Op]:
    """Return how the numbers of a slim row are made; none if they cannot be."""
    columns = []
    known = dict(declared(plan.record.event))
    for field in SLIM_NUMBERS[:HOOK]:
        source = known.get(field)
        if field == "time_ns":
            columns.append(Op(kind=INSTANT, width=8, at=plan.record.offset("ts_ns")))
        elif source is None and field in OWN:
            columns.append(Op(kind=ABSENT))
        elif isinstance(source, Wire) and source.converter is None and source.c_type in _INTEGERS:
            columns.append(
                Op(
                    kind=SIGNED if source.c_type[0] == "s" else INTEGER,
                    width=_INTEGERS[source.c_type],
                    at=plan.record.offset(source.member or field),
                    nullable=source.nullable,
                    has=has[field] if source.has else 0,
                )
            )
        else:
            return []
    for column, fields in enumerate(PIECES.values()):
        block = _SOCKET if f"_{fields[-1]}" in names[_SOCKET] else _KIND
        for number, desc in enumerate(("_full", "_empty") if "desc" in fields else ("",)):
            parts = [
                probe
                if field == "probe"
                else names[block][desc if field == "desc" else f"_{field}"]
                for field in fields
            ]
            plan.blocks[block].ids.append((column, parts))
            if not number:
                text = len(plan.blocks[block].ids) - 1
                columns.append(Op(kind=TEXT, block=block, text=text))
        if "desc" in fields:
            at = plan.record.offset("bytes")
            columns[-1] = Op(kind=CHOICE, block=block, text=text, other=text + 1, at=at)
    return columns


def _number(plan: _Plan, field: str, source: Wire, has: int) -> None:
    """Return a member that belongs to no block."""
    member = source.member or field
    width = _INTEGERS.get(source.c_type)
    if (
        width
        and source.converter in (None, micros)
        and not (source.converter and source.c_type.startswith("s"))
    ):
        kind = MICROS if source.converter else SIGNED if source.c_type[0] == "s" else INTEGER
        plan.number(kind, member, width, nullable=source.nullable, has=has)
        return
    # Any other member is cached by its bytes.
    convert = source.converter
    nullable = source.nullable and "[" not in source.c_type
    code = struct.Struct(f"={plan.record.code(member)}")

    def read(raw: bytes) -> Sequence[Any]:
        (value,) = code.unpack(raw)
        if nullable and not value:
            return (None,)
        return (convert(value) if convert else value,)

    block = _Block(plan.record.offset(member), code.size, read)
    plan.blocks.append(block)
    block.texts.append([0])
    plan.ops.append(Op(kind=TEXT, block=len(plan.blocks) - 1, text=0, has=has))


def _made(plan: _Plan, source: Made, probe: str, kind: dict[str, int]) -> bool:
    """Add a computed field; return whether records.c can write it."""
    match source.by:
        case "SCHEMA_VERSION":
            plan.text(_KIND, b"%d" % SCHEMA_VERSION)
        case "PROBE":
            plan.text(_KIND, _json.encode(probe))
        case "ts_ns + OFFSET_NS":
            plan.number(INSTANT, "ts_ns", 8)
        case "desc":
            texts = plan.blocks[_KIND].texts
            texts += [[kind["_full"]], [kind["_empty"]]]
            full, empty = len(texts) - 2, len(texts) - 1
            at = plan.record.offset("bytes")
            plan.ops.append(Op(kind=CHOICE, block=_KIND, text=full, other=empty, at=at))
        case _:
            return False
    return True
