"""Reads BTF, the kernel's description of its own types.

The format is documented in the kernel's Documentation/bpf/btf.rst. One pass records where each type
starts; everything else is read on demand, because a kernel has 130,000 types and a program needs
thirty.
"""

from __future__ import annotations

import struct
from array import array
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing import Self

VMLINUX = Path("/sys/kernel/btf/vmlinux")

_MAGIC = 0xEB9F
_HEADER = struct.Struct("=HBBIIIII")
# No real chain of typedefs or nested anonymous structs comes near this; a damaged one may loop.
MAX_DEPTH = 64


class BtfError(Exception):
    """The BTF is damaged, or lacks the requested type; the message is one sentence."""


class BtfKind(IntEnum):
    """What a type is; the numbers are BTF's own."""

    VOID = 0
    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


QUALIFIERS = frozenset({BtfKind.CONST, BtfKind.VOLATILE, BtfKind.RESTRICT, BtfKind.TYPE_TAG})
RECORDS = frozenset({BtfKind.STRUCT, BtfKind.UNION})
ENUMS = frozenset({BtfKind.ENUM, BtfKind.ENUM64})
_SIZED = RECORDS | ENUMS | {BtfKind.INT, BtfKind.FLOAT, BtfKind.DATASEC}

# 4-byte words of a type by kind: of its head, and of each of its entries.
_UNKNOWN = 1 << 40
_HEAD = [3] * len(BtfKind) + [_UNKNOWN] * (32 - len(BtfKind))
_HEAD[BtfKind.VOID] = _UNKNOWN
_HEAD[BtfKind.INT] = _HEAD[BtfKind.VAR] = _HEAD[BtfKind.DECL_TAG] = 4
_HEAD[BtfKind.ARRAY] = 6
_ENTRY = [0] * 32
_ENTRY[BtfKind.ENUM] = _ENTRY[BtfKind.FUNC_PROTO] = 2
for _kind in (BtfKind.STRUCT, BtfKind.UNION, BtfKind.DATASEC, BtfKind.ENUM64):
    _ENTRY[_kind] = 3


class Type(NamedTuple):
    """One type.

    `size` is in bytes and 0 for the kinds that have none; `target` is the type that a pointer,
    typedef, qualifier, function or variable refers to, else 0; `flag` is BTF's kind_flag and
    `entries` the number of members, arguments or constants.

    A NamedTuple, because it is the cheapest to create, and thousands are created.
    """

    id: int
    kind: int
    name: str
    flag: bool
    entries: int
    size: int
    target: int


class Member(NamedTuple):
    """One member of a struct or union; `bits` is its width when it is a bit-field, else 0."""

    name: str
    type_id: int
    bit_offset: int
    bits: int


class Btf:
    """The types of one kernel. Made by `from_file` or `from_bytes`."""

    def __init__(
        self, words: array[int], starts: list[int], index: dict[int, int], strings: bytes
    ) -> None:
        self._words = words
        self._starts = starts
        self._index = index
        self._strings = strings

    @classmethod
    def from_file(cls, path: Path | str = VMLINUX) -> Self:
        """Read a BTF file.

        Raises:
            BtfError: It cannot be read or is damaged.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise BtfError(f"cannot read the kernel's types: {error}") from error
        return cls.from_bytes(data)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read BTF from memory.

        Raises:
            BtfError: It is not BTF of this machine's byte order, or damaged.
        """
        if len(data) < _HEADER.size:
            raise BtfError(f"{len(data)} bytes are too few for BTF")
        magic, version, _, head, type_at, type_len, text_at, text_len = _HEADER.unpack_from(data)
        if magic != _MAGIC or version != 1:
            raise BtfError("this is not BTF version 1 in the byte order of this machine")
        type_at, text_at = type_at + head, text_at + head
        if (
            head < _HEADER.size
            or type_len % 4
            or max(type_at + type_len, text_at + text_len) > len(data)
        ):
            raise BtfError("the BTF header does not fit the data")
        strings = data[text_at : text_at + text_len]
        if not strings or strings[0] or strings[-1]:
            raise BtfError("the BTF strings do not start and end with a zero")
        words = array("I")
        words.frombytes(data[type_at : type_at + type_len])
        return cls(words, *_scan(words), strings)

    def find(self, name: str, *kinds: BtfKind) -> int | None:
        """Return the id of the first type of one of these kinds with this name, or None."""
        # Strings may share a tail, so a name can start inside a longer one.
        key = name.encode() + b"\0"
        for kind in kinds:
            at = self._strings.find(key)
            while name and at >= 0:
                if found := self._index.get(kind << 32 | at):
                    return found
                at = self._strings.find(key, at + 1)
        return None

    def record(self, name: str) -> int:
        """Return the id of the struct or union of this name.

        Raises:
            BtfError: There is none.
        """
        found = self.find(name, BtfKind.STRUCT, BtfKind.UNION)
        if found is None:
            raise BtfError(f"this kernel has no struct or union {name}")
        return found

    def type(self, type_id: int) -> Type:
        """Return a type by its id; 0 is void.

        Raises:
            BtfError: There is no such type.
        """
        if type_id == 0:
            return Type(0, BtfKind.VOID, "", False, 0, 0, 0)
        at = self._at(type_id)
        info, third = self._words[at + 1], self._words[at + 2]
        kind = info >> 24 & 31
        size, target = (third, 0) if kind in _SIZED else (0, third)
        name = self._string(self._words[at])
        return Type(type_id, kind, name, bool(info >> 31), info & 0xFFFF, size, target)

    def members(self, record: Type) -> list[Member]:
        """Return the members of a struct or union, in the order of the source."""
        words, at = self._words, self._at(record.id) + 3
        found = []
        for i in range(at, at + 3 * record.entries, 3):
            type_id, offset, bits = words[i + 1], words[i + 2], 0
            if record.flag:
                offset, bits = offset & 0xFFFFFF, offset >> 24
            elif (base := self.resolve(type_id)).kind == BtfKind.INT:
                # Without kind_flag the integer type itself encodes the width of a bit-field.
                encoding = self.int_encoding(base)
                if encoding & 0xFF != base.size * 8 or encoding >> 16 & 0xFF:
                    offset, bits = offset + (encoding >> 16 & 0xFF), encoding & 0xFF
            found.append(Member(self._string(words[i]), type_id, offset, bits))
        return found

    def int_encoding(self, integer: Type) -> int:
        """Return an INT's encoding word.

        Bits 0-7 are its width in bits, 16-23 its offset, 24 signed, 25 char, 26 bool.
        """
        return self._words[self._at(integer.id) + 3]

    def array(self, array_type: Type) -> tuple[int, int]:
        """Return an ARRAY's element type id and number of elements."""
        at = self._at(array_type.id)
        return self._words[at + 3], self._words[at + 5]

    def enumerators(self, enum: Type) -> list[tuple[str, int]]:
        """Return the names and values of an ENUM or ENUM64; without a flag they are unsigned."""
        words, at = self._words, self._at(enum.id) + 3
        step = _ENTRY[enum.kind]
        bits = 64 if enum.kind == BtfKind.ENUM64 else 32
        found = []
        for i in range(at, at + step * enum.entries, step):
            value = words[i + 1] | (words[i + 2] << 32 if step > 2 else 0)  # noqa: PLR2004
            if enum.flag and value >> bits - 1:
                value -= 1 << bits
            found.append((self._string(words[i]), value))
        return found

    def params(self, proto: Type) -> list[tuple[str, int]]:
        """Return the names and type ids of a FUNC_PROTO's arguments; ("", 0) is `...`."""
        words, at = self._words, self._at(proto.id) + 3
        return [
            (self._string(words[i]), words[i + 1]) for i in range(at, at + 2 * proto.entries, 2)
        ]

    def resolve(self, type_id: int) -> Type:
        """Follow typedefs and qualifiers to the type itself.

        Raises:
            BtfError: The chain does not end.
        """
        for _ in range(MAX_DEPTH):
            found = self.type(type_id)
            if found.kind != BtfKind.TYPEDEF and found.kind not in QUALIFIERS:
                return found
            type_id = found.target
        raise BtfError(f"BTF type {type_id}: a chain of typedefs that does not end")

    def size_of(self, type_id: int) -> int:
        """Return a type's size in bytes; pointers are taken to have 8, as they have in BPF.

        Raises:
            BtfError: The type has no size, such as a function or a struct only declared.
        """
        factor = 1
        for _ in range(MAX_DEPTH):
            found = self.resolve(type_id)
            if found.kind == BtfKind.PTR:
                return factor * 8
            if found.kind in _SIZED:
                return factor * found.size
            if found.kind != BtfKind.ARRAY:
                break
            type_id, count = self.array(found)
            factor *= count
        raise BtfError(f"BTF type {type_id} has no size")

    def locate(self, record_id: int, path: str) -> Member | None:
        """Find a member by its dotted path, looking through anonymous structs and unions.

        Returns:
            The member with its offset from the start of the outermost struct, or None.
        """
        offset = 0
        member = None
        for name in path.split("."):
            member = self._member(record_id, name, {record_id})
            if member is None:
                return None
            offset += member.bit_offset
            record_id = member.type_id
        return member._replace(bit_offset=offset) if member else None

    def has_member(self, name: str, path: str) -> bool:
        """Return whether the kernel has this member of this struct or union."""
        record_id = self.find(name, BtfKind.STRUCT, BtfKind.UNION)
        return record_id is not None and self.locate(record_id, path) is not None

    def func_args(self, name: str) -> list[tuple[str, str]]:
        """Return the name and the C type of each argument of a kernel function.

        Raises:
            BtfError: There is no such function.
        """
        func = self.find(name, BtfKind.FUNC)
        if func is None:
            raise BtfError(f"this kernel has no function {name}")
        proto = self.type(self.type(func).target)
        if proto.kind != BtfKind.FUNC_PROTO:
            raise BtfError(f"BTF function {name} has no prototype")
        return [(arg, self._param_text(type_id)) for arg, type_id in self.params(proto)]

    def tracepoint_args(self, name: str) -> list[str] | None:
        """Return the C types of a raw tracepoint's arguments; None if there is no such one.

        The kernel leaves a typedef `btf_trace_<name>` for each tracepoint; its first argument is
        the tracer's own context, which a raw tracepoint program does not see.
        """
        typedef = self.find(f"btf_trace_{name}", BtfKind.TYPEDEF)
        if typedef is None:
            return None
        proto = self.type(self.type(self.type(typedef).target).target)
        if proto.kind != BtfKind.FUNC_PROTO:
            raise BtfError(f"BTF typedef btf_trace_{name} is not a pointer to a function")
        return [self._param_text(type_id) for _, type_id in self.params(proto)[1:]]

    def type_text(self, type_id: int, declarator: str = "", depth: int = 0) -> str:
        """Return a type as C text, such as "const struct sock *", or with a name to declare.

        Raises:
            BtfError: The type is nested without end.
        """
        if depth > MAX_DEPTH:
            raise BtfError(f"BTF type {type_id} is nested without end")
        found = self.type(type_id)
        target = found.target
        if found.kind == BtfKind.PTR:
            inner = self.type(target).kind in {BtfKind.ARRAY, BtfKind.FUNC_PROTO}
            declarator = f"(*{declarator})" if inner else f"*{declarator}"
        elif found.kind == BtfKind.ARRAY:
            target, count = self.array(found)
            declarator = f"{declarator}[{count}]"
        elif found.kind == BtfKind.FUNC_PROTO:
            args = [self.type_text(t, a, depth + 1) if t else "..." for a, t in self.params(found)]
            declarator = f"{declarator}({', '.join(args) or 'void'})"
        elif found.kind in QUALIFIERS:
            if found.kind != BtfKind.TYPE_TAG:
                word = BtfKind(found.kind).name.lower()
                if self.type(target).kind != BtfKind.PTR:
                    return f"{word} {self.type_text(target, declarator, depth + 1)}"
                declarator = f"{word} {declarator}".rstrip()
        else:
            return f"{_base_text(found)} {declarator}".rstrip()
        return self.type_text(target, declarator, depth + 1)

    def _param_text(self, type_id: int) -> str:
        return self.type_text(type_id) if type_id else "..."

    def _member(self, record_id: int, name: str, visited: set[int]) -> Member | None:
        record = self.resolve(record_id)
        if record.kind not in RECORDS:
            return None
        for member in self.members(record):
            if member.name == name:
                return member
            if not member.name and member.type_id not in visited:
                visited.add(member.type_id)
                if inner := self._member(member.type_id, name, visited):
                    return inner._replace(bit_offset=inner.bit_offset + member.bit_offset)
        return None

    def _at(self, type_id: int) -> int:
        if not 0 < type_id < len(self._starts):
            raise BtfError(f"BTF has no type {type_id}")
        return self._starts[type_id]

    def _string(self, offset: int) -> str:
        if offset >= len(self._strings):
            raise BtfError(f"BTF has no string at {offset}")
        end = self._strings.index(0, offset)
        return self._strings[offset:end].decode(errors="backslashreplace")


def _base_text(found: Type) -> str:
    name = found.name or "{...}"
    if found.kind == BtfKind.VOID:
        return "void"
    if found.kind == BtfKind.FWD:
        return f"{'union' if found.flag else 'struct'} {name}"
    if found.kind in RECORDS or found.kind in ENUMS:
        return f"{BtfKind(found.kind).name.lower().removesuffix('64')} {name}"
    return name


def _scan(words: array[int]) -> tuple[list[int], dict[int, int]]:
    """Walk once over all types.

    Returns:
        Where each type id starts (type 0, void, is not stored), and an index from
        `kind << 32 | offset of the name` to the first such type.

    Raises:
        BtfError: The last type is cut short, or a kind is unknown.
    """
    starts = [0]
    index: dict[int, int] = {}
    # Local names are faster: this loop runs 130,000 times and dominates the start.
    append, remember, head, entry = starts.append, index.setdefault, _HEAD, _ENTRY
    at, end, type_id = 0, len(words), 1
    try:
        while at < end:
            info = words[at + 1]
            kind = info >> 24 & 31
            remember(kind << 32 | words[at], type_id)
            append(at)
            type_id += 1
            at += head[kind] + entry[kind] * (info & 0xFFFF)
    except IndexError:
        at = end + 1
    if at >= _UNKNOWN:
        raise BtfError(f"BTF type {type_id - 1} is of a kind this reader does not know")
    if at != end:
        raise BtfError("the BTF ends inside a type")
    return starts, index
