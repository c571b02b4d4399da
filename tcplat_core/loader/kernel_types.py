"""Writes the kernel's types as C, from BTF: they are this kernel's, whatever headers it has."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import attrs

from tcplat_core.kernel.bcc import DEFINED_TAGS
from tcplat_core.kernel.btf import (
    ENUMS,
    MAX_DEPTH,
    QUALIFIERS,
    RECORDS,
    Btf,
    BtfError,
    BtfKind,
    Type,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tcplat_core.kernel.btf import Member

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KEYWORDS: dict[int, str] = {BtfKind.STRUCT: "struct", BtfKind.UNION: "union"}

_C_INTS = {
    "char": 1,
    "signed char": 1,
    "unsigned char": 1,
    "short int": 2,
    "short unsigned int": 2,
    "int": 4,
    "unsigned int": 4,
    "long int": 8,
    "long unsigned int": 8,
    "long long int": 8,
    "long long unsigned int": 8,
    "_Bool": 1,
}
_INT_BY_SIZE = {1: "char", 2: "short", 4: "int", 8: "long long"}
_SIGNED, _BOOL = 1 << 24, 1 << 26
_POINTER_SIZE = 8  # BPF's own; 32-bit kernels are not served


def generate(btf: Btf, wanted: Iterable[str]) -> str:
    """Write C declarations of kernel types, laid out exactly as BTF says.

    What a type holds by value is defined too, what it points to is declared. Assertions at the end
    make the compiler check every size and offset. The text uses no header.

    Args:
        btf: The kernel's types.
        wanted: Entries such as
            "sock", a struct or union with everything it holds by value;
            "net:ns.inum,ipv4", only these members at their offsets, and the right size
            (of a dotted path, the whole first member); asked for both ways, a type is whole;
            "enum:tcp_ca_state", an enum with its constants.
            A "?" after a type or a member leaves it out where the kernel does not have it.

    Raises:
        BtfError: The kernel lacks a type or member, or its BTF is damaged.
    """
    writer = _Writer(btf)
    whole: dict[int, Type] = {}
    trimmed: dict[int, tuple[Type, frozenset[str]]] = {}
    for entry in sorted(set(wanted)):
        name, colon, rest = entry.partition(":")
        if name == "enum":
            _want_enum(writer, rest)
            continue
        optional, name = name.endswith("?"), name.removesuffix("?")
        record_id = btf.find(name, BtfKind.STRUCT, BtfKind.UNION)
        if name in DEFINED_TAGS or (record_id is None and optional):
            continue
        record = btf.type(btf.record(name) if record_id is None else record_id)
        writer.claim(record)
        if colon:
            before = trimmed[record.id][1] if record.id in trimmed else frozenset[str]()
            trimmed[record.id] = record, before | _first_names(btf, record, rest)
        else:
            whole[record.id] = record
    for record in whole.values():
        writer.define(record)
    # First what the trimmed ones hold: if that is one of the trimmed, it is then defined whole.
    for record, keep in trimmed.values():
        writer.define_held(record, keep)
    for record, keep in trimmed.values():
        writer.define(record, keep)
    return writer.text()


@attrs.frozen
class _Body:
    """The inside of a struct or union.

    `checks` are the path and the offset, in bytes from its start, of all that has an offset.
    """

    text: str
    align: int
    packed: bool
    checks: list[tuple[str, int]]

    def braces(self, name: str) -> str:
        """Return `name { ... }`."""
        attribute = " __attribute__((packed))" if self.packed else ""
        return f"{name} {{\n{self.text}}}{attribute}"


@attrs.frozen
class _Spelling:
    """How C spells a type before and after a member's name; `checks` as in `_Body`."""

    before: str
    align: int
    after: str = ""
    checks: list[tuple[str, int]] = attrs.Factory(list)


@attrs.define(eq=False)
class _Writer:
    """Collects definitions, each one after those that it holds by value."""

    btf: Btf
    _forwards: dict[str, None] = attrs.Factory(dict)
    _definitions: list[str] = attrs.Factory(list)
    _checks: list[str] = attrs.Factory(list)
    # Type id -> how C calls it and its alignment; None while its definition is being written.
    _done: dict[int, _Spelling | None] = attrs.Factory(dict)
    # Tag -> (struct, union or enum; id of its type, 0 if only pointed to). C has one namespace for
    # the three, BTF may know several types of one name. "" is what bcc will define.
    _tags: dict[str, tuple[str, int]] = attrs.Factory(lambda: dict.fromkeys(DEFINED_TAGS, ("", -1)))
    _typedefs: dict[str, int] = attrs.Factory(dict)
    _ids: dict[str, int] = attrs.Factory(dict)
    _pads: int = 0

    def claim(self, record: Type) -> None:
        """Keep the name for this type, whatever other types have the same."""
        self._tags[record.name] = (_KEYWORDS[record.kind], record.id)

    def define(self, record: Type, keep: frozenset[str] | None = None) -> _Spelling:
        """Define a named struct or union, once; with `keep`, only the members of these names."""
        keyword = _KEYWORDS[record.kind]
        if record.id not in self._done:
            tag, number = _identifier(record.name), 1
            while self._tags.get(tag, (keyword, 0)) not in {(keyword, 0), (keyword, record.id)}:
                number += 1
                tag = f"{record.name}___{number}"
            self._tags[tag] = (keyword, record.id)
            self._ids[f"{keyword} {tag}"] = record.id
            self._define(record.id, record, f"{keyword} {tag}", keep)
        return self._finished(record.id)

    def define_held(self, record: Type, keep: frozenset[str]) -> None:
        """Define what these members of a record hold by value."""
        if record.id not in self._done:
            self._body(record, keep)

    def define_enum(self, enum: Type) -> None:
        """Define an enum with its constants."""
        if self._tags.setdefault(enum.name, ("enum", enum.id)) == ("enum", enum.id):
            values = self.btf.enumerators(enum)
            lines = [f"\t{_identifier(name)} = {_constant(value)},\n" for name, value in values]
            self._definitions.append(f"enum {_identifier(enum.name)} {{\n{''.join(lines)}}};\n")

    def text(self) -> str:
        """Return all definitions."""
        return _HEADER.format(
            forwards="".join(f"{forward};\n" for forward in self._forwards),
            definitions="\n".join(self._definitions),
            checks="".join(self._checks),
            ids="".join(
                f" \\\n\t{name} *: {number}, const {name} *: {number},"
                for name, number in self._ids.items()
            ),
        )

    def _define(
        self,
        key: int,
        record: Type,
        name: str,
        keep: frozenset[str] | None,
        *,
        typedef: bool = False,
    ) -> None:
        self._done[key] = None
        body = self._body(record, keep)
        if typedef:
            text = f"typedef {body.braces(_KEYWORDS[record.kind])} {name};\n"
        else:
            text = f"{body.braces(name)};\n"
        self._definitions.append(text)
        self._checks.append(f"TCPLAT_SIZE({name}, {record.size});\n")
        self._checks += [f"TCPLAT_AT({name}, {path}, {at});\n" for path, at in body.checks]
        self._done[key] = _Spelling(name, body.align)

    def _finished(self, key: int) -> _Spelling:
        done = self._done[key]
        if done is None:
            raise BtfError(f"BTF type {key} holds itself by value")
        return done

    def _define_typedef(self, typedef: Type, record: Type) -> _Spelling:
        if typedef.id not in self._done:
            name, number = _identifier(typedef.name), 1
            while self._typedefs.setdefault(name, typedef.id) != typedef.id:
                number += 1
                name = f"{typedef.name}___{number}"
            self._define(typedef.id, record, name, None, typedef=True)
        return self._finished(typedef.id)

    def _body(self, record: Type, keep: frozenset[str] | None, depth: int = 0) -> _Body:
        """Lay out a record's members.

        All holes are filled by hand, so C puts each member where BTF says, unless that is against
        the member's alignment: then the kernel's record was packed, and ours is too. The kernel's
        own `aligned` attributes need not be known: they show as holes and in the size.
        """
        if depth > MAX_DEPTH:
            raise BtfError(f"BTF type {record.id} is nested without end")
        union = record.kind == BtfKind.UNION
        lines: list[str] = []
        checks: list[tuple[str, int]] = []
        align, packed, at, end = 1, False, 0, 0  # at: the first free bit; end: the last used
        for member in self.btf.members(record):
            if keep is not None and not self._is_kept(member, keep):
                continue
            offset, size = member.bit_offset, self.btf.size_of(member.type_id) * 8
            spelling = self._spell(member, None if member.name else keep, depth)
            if offset < at or (union and offset) or (offset % 8 and not member.bits):
                raise BtfError(f"BTF type {record.id}: member {member.name} is misplaced")
            lines += self._padding(at, offset)
            space = "" if spelling.before.endswith("*") or not member.name else " "
            declaration = f"{spelling.before}{space}{member.name}{spelling.after}"
            if member.bits:
                packed |= offset % size + member.bits > size
                declaration += f" : {member.bits}"
            else:
                packed |= offset % (spelling.align * 8) != 0
                checks += [(path, offset // 8 + inner) for path, inner in spelling.checks]
            lines.append(f"{declaration};\n")
            align = max(align, spelling.align)
            end = max(end, offset + (member.bits or size))
            at = 0 if union else end
        total = record.size * 8
        if end > total:
            raise BtfError(f"BTF type {record.id} is smaller than its members")
        if end < total:
            lines += self._padding(at, total)
        text = "".join(f"\t{line}\n" for part in lines for line in part.splitlines())
        packed |= record.size % align != 0
        return _Body(text, 1 if packed else align, packed, checks)

    def _padding(self, at: int, to: int) -> list[str]:
        """Return members that fill the bits from `at` up to `to`."""
        lines = []
        if at % 8 and at < to:
            bits = min(8 - at % 8, to - at)
            lines.append(f"unsigned char : {bits};\n")
            at += bits
        if to - at >= 8:  # noqa: PLR2004 - bits in a byte
            self._pads += 1
            lines.append(f"char __tcplat_pad{self._pads}[{(to - at) // 8}];\n")
            at += (to - at) // 8 * 8
        if at < to:
            lines.append(f"unsigned char : {to - at};\n")
        return lines

    def _is_kept(self, member: Member, keep: frozenset[str]) -> bool:
        if member.name:
            return member.name in keep
        return any(self.btf.locate(member.type_id, name) for name in keep)

    def _spell(self, member: Member, keep: frozenset[str] | None, depth: int) -> _Spelling:
        """Spell a member's type, after defining what it holds by value."""
        name = _identifier(member.name) if member.name else ""
        type_id, dimensions, found = member.type_id, "", self.btf.type(member.type_id)
        for _ in range(MAX_DEPTH):
            found = self.btf.type(type_id)
            if found.kind == BtfKind.ARRAY:
                type_id, count = self.btf.array(found)
                dimensions += f"[{count}]"
            elif found.kind in QUALIFIERS or (
                found.kind == BtfKind.TYPEDEF and not self._is_anonymous(found)
            ):
                type_id = found.target
            else:
                break
        if not name:
            # With a tag or by a typedef as well, since 6.19 (-fms-extensions, c4781dc3d1cf): plain
            # C takes that for no member.
            found = self.btf.resolve(found.id)
        if found.kind in RECORDS and not (name and found.name):
            body = self._body(found, keep, depth + 1)
            inside = f"{name}{'[0]' * dimensions.count('[')}." if name else ""
            checks = [(inside + path, at) for path, at in body.checks]
            spelling = _Spelling(body.braces(_KEYWORDS[found.kind]), body.align, checks=checks)
        else:
            spelling = self._spell_base(found)
        own = [(name, 0)] if name else []
        return attrs.evolve(
            spelling, after=dimensions + spelling.after, checks=own + spelling.checks
        )

    def _spell_base(self, found: Type) -> _Spelling:
        if found.kind == BtfKind.TYPEDEF:
            return self._define_typedef(found, self.btf.resolve(found.id))
        if found.kind in RECORDS:
            return self.define(found)
        if found.kind == BtfKind.PTR:
            return _Spelling(self._pointer(found), _POINTER_SIZE)
        if found.kind == BtfKind.INT and found.size == 16:  # noqa: PLR2004 - __int128
            return _Spelling("unsigned long long", 8, "[2]")
        if found.kind == BtfKind.INT or found.kind in ENUMS:
            return _Spelling(self._integer(found), found.size)
        if found.kind == BtfKind.FLOAT:
            name = {4: "float", 8: "double"}.get(found.size)
            return _Spelling(name, found.size) if name else _Spelling("char", 1, f"[{found.size}]")
        raise BtfError(f"BTF type {found.id} cannot be held by value")

    def _is_anonymous(self, typedef: Type) -> bool:
        found = self.btf.resolve(typedef.id)
        return found.kind in RECORDS and not found.name

    def _integer(self, found: Type) -> str:
        """Return C's name for an integer, or for the one that is as wide as an enum."""
        if _C_INTS.get(found.name) == found.size and found.kind == BtfKind.INT:
            return found.name
        encoding = self.btf.int_encoding(found) if found.kind == BtfKind.INT else 0
        if encoding & _BOOL and found.size == 1:
            return "_Bool"
        if found.size not in _INT_BY_SIZE:
            raise BtfError(f"BTF type {found.id} is an integer of {found.size} bytes")
        signed = encoding & _SIGNED if found.kind == BtfKind.INT else found.flag
        return f"{'signed' if signed else 'unsigned'} {_INT_BY_SIZE[found.size]}"

    def _pointer(self, found: Type) -> str:
        """Return a pointer's type, `void *` where C would need a definition or a prototype."""
        stars = "*"
        for _ in range(MAX_DEPTH):
            found = self.btf.resolve(found.target)
            if found.kind != BtfKind.PTR:
                break
            stars += "*"
        if found.kind in RECORDS or found.kind == BtfKind.FWD:
            union = found.flag if found.kind == BtfKind.FWD else found.kind == BtfKind.UNION
            name = self._forward("union" if union else "struct", found.name)
        elif found.kind == BtfKind.INT and found.size in _INT_BY_SIZE:
            name = self._integer(found)
        else:
            name = "void"
        return f"{name} {stars}"

    def _forward(self, keyword: str, tag: str) -> str:
        if not tag or self._tags.setdefault(_identifier(tag), (keyword, 0))[0] not in {"", keyword}:
            return "void"
        self._forwards[f"{keyword} {tag}"] = None
        return f"{keyword} {tag}"


def _want_enum(writer: _Writer, entry: str) -> None:
    name = entry.removesuffix("?")
    enum_id = writer.btf.find(name, BtfKind.ENUM, BtfKind.ENUM64)
    if enum_id is not None:
        writer.define_enum(writer.btf.type(enum_id))
    elif name == entry:
        raise BtfError(f"this kernel has no enum {name}")


def _first_names(btf: Btf, record: Type, paths: str) -> frozenset[str]:
    """Return the first names of a comma-separated list of member paths.

    Raises:
        BtfError: A path is not in the record and has no `?`.
    """
    names = set()
    for path in filter(None, paths.split(",")):
        if btf.locate(record.id, path.removesuffix("?")):
            names.add(path.removesuffix("?").partition(".")[0])
        elif not path.endswith("?"):
            raise BtfError(f"this kernel's {record.name} has no member {path}")
    return frozenset(names)


def _identifier(name: str) -> str:
    """Return a name that is safe to write into C; Rust's, and a damaged BTF's, are not."""
    if not _IDENTIFIER.fullmatch(name):
        raise BtfError(f"the BTF name {name!r} is no C identifier")
    return name


def _constant(value: int) -> str:
    if value >= 1 << 31:
        return f"{value}ULL"
    # C has no negative literals: -2147483648 is minus a number that is too large.
    return f"-{-value - 1}LL - 1" if value < 0 else str(value)


_HEADER = """\
/* Kernel types, written from this kernel's BTF by tcplat. */
{forwards}
{definitions}
#define TCPLAT_SIZE(type, size) _Static_assert(sizeof(type) == (size), #type ": BTF says " #size)
#define TCPLAT_AT(type, path, at) \\
	_Static_assert(__builtin_offsetof(type, path) == (at), #type "." #path ": BTF says " #at)
{checks}#undef TCPLAT_SIZE
#undef TCPLAT_AT
/* For _Generic(): a pointer's type -> the BTF id of what it points to. */
#define TCPLAT_TYPE_IDS{ids}
"""
