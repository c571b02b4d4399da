"""The BTF reader, on a small stored BTF, on BTF made here, and on this kernel's own."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from tcplat_core.kernel.btf import VMLINUX, Btf, BtfError, BtfKind
from tcplat_core.loader.kernel_types import generate

SMALL = (Path(__file__).parent / "data" / "small.btf").read_bytes()

Encodable = tuple[BtfKind, str, int, int, Sequence[int | str]]

needs_kernel = pytest.mark.skipif(not VMLINUX.exists(), reason="this kernel has no BTF")


def encode(types: Sequence[Encodable]) -> bytes:
    """Make BTF from (kind, name, vlen | kind_flag << 31, size or target, more words or names).

    A name that is the tail of an earlier one shares its bytes.
    """
    strings = bytearray(b"\0")

    def word(value: int | str) -> int:
        if isinstance(value, int):
            return value & 0xFFFFFFFF
        text = value.encode() + b"\0"
        if text not in strings:
            strings.extend(text)
        return strings.index(text)

    words: list[int] = []
    for kind, name, info, third, more in types:
        words += [word(name), kind << 24 | info, third, *map(word, more)]
    body = struct.pack(f"={len(words)}I", *words)
    head = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(body), len(body), len(strings))
    return head + body + bytes(strings)


INT: Encodable = (BtfKind.INT, "int", 0, 4, [1 << 24 | 32])


@pytest.fixture
def small() -> Btf:
    return Btf.from_bytes(SMALL)


def offset(btf: Btf, name: str, path: str) -> int:
    """Return a member's offset in bytes."""
    member = btf.locate(btf.record(name), path)
    assert member is not None
    assert member.bits == member.bit_offset % 8 == 0
    return member.bit_offset // 8


def test_sizes_and_offsets_match_the_compiler(small: Btf) -> None:
    assert small.size_of(small.record("outer")) == 384
    assert small.size_of(small.record("aligned")) == 128
    assert small.size_of(small.record("packed")) == 11
    assert offset(small, "outer", "aligned.on_its_own_line") == 128 + 64
    assert offset(small, "packed", "port") == 9
    assert offset(small, "outer", "flexible") == 352


def test_member_path_passes_through_anonymous_members(small: Btf) -> None:
    assert offset(small, "outer", "saddr") == 20
    assert offset(small, "outer", "list.prev") == 8
    assert small.has_member("outer", "pair")


def test_unknown_member_path_is_absent(small: Btf) -> None:
    assert not small.has_member("outer", "nothing")
    assert not small.has_member("outer", "list.next.next")  # a pointer is not walked through
    assert not small.has_member("nothing", "pair")
    assert small.locate(small.record("outer"), "saddr.x") is None
    with pytest.raises(BtfError, match="no struct or union nothing"):
        small.size_of(small.record("nothing"))


def test_bit_field_has_an_offset_and_a_width_in_bits(small: Btf) -> None:
    assert small.has_member("outer", "bits.b")
    member = small.locate(small.record("bits"), "e")
    assert member is not None
    assert (member.bit_offset, member.bits) == (24, 40)


def test_functions_have_named_and_typed_arguments(small: Btf) -> None:
    assert small.find("takes", BtfKind.FUNC)
    assert small.find("outer", BtfKind.FUNC) is None
    assert small.func_args("takes") == [("o", "struct outer *"), ("name", "const char *")]
    with pytest.raises(BtfError, match="no function gives"):
        small.func_args("gives")


def test_tracepoint_arguments_omit_the_context(small: Btf) -> None:
    assert small.tracepoint_args("hello") == [
        "const struct outer *",
        "int",
        "enum color",
        "char *const",
    ]
    assert small.tracepoint_args("goodbye") is None


@pytest.mark.parametrize(
    ("member", "text"),
    [
        ("refs", "atomic_t [2][3]"),
        ("seen", "const volatile u32"),
        ("later", "union later *"),
        ("where", "struct opaque *"),
        ("compare", "compare_t"),
        ("table", "int (*)[4]"),
        ("names", "const char *const *"),
        ("user", "int *"),
    ],
)
def test_types_are_spelled_as_in_c(small: Btf, member: str, text: str) -> None:
    found = small.locate(small.record("outer"), member)
    assert found is not None
    assert small.type_text(found.type_id) == text


def test_pointers_to_functions_have_parentheses(small: Btf) -> None:
    typedef = small.find("compare_t", BtfKind.TYPEDEF)
    assert typedef is not None
    pointer = small.type(typedef).target
    assert small.type_text(pointer) == "int (*)(const void *, const void *)"
    assert small.type_text(pointer, "f") == "int (*f)(const void *, const void *)"


def test_name_may_be_a_suffix_of_another() -> None:
    data = encode([INT, (BtfKind.STRUCT, "x_sock", 0, 8, []), (BtfKind.STRUCT, "sock", 0, 4, [])])
    assert data.count(b"sock") == 1
    btf = Btf.from_bytes(data)
    assert btf.size_of(btf.record("sock")) == 4


def test_varargs_are_three_dots() -> None:
    btf = Btf.from_bytes(
        encode(
            [INT, (BtfKind.FUNC_PROTO, "", 2, 1, ["n", 1, "", 0]), (BtfKind.FUNC, "f", 0, 2, [])]
        )
    )
    assert btf.func_args("f") == [("n", "int"), ("", "...")]
    assert btf.type_text(2) == "int (int n, ...)"


def test_enum64_and_signed_enums_keep_their_values() -> None:
    signed = 1 << 31
    btf = Btf.from_bytes(
        encode(
            [
                (BtfKind.ENUM64, "wide", 2, 8, ["BIG", 5, 1 << 31, "ONE", 1, 0]),
                (BtfKind.ENUM64, "low", signed | 1, 8, ["MIN", 0, 1 << 31]),
                (BtfKind.ENUM, "small", signed | 2, 4, ["NEG", -7, "POS", 7]),
                (BtfKind.ENUM, "flags", 1, 4, ["TOP", 1 << 31]),
            ]
        )
    )
    values = [btf.enumerators(btf.type(i)) for i in range(1, 5)]
    assert values == [
        [("BIG", 1 << 63 | 5), ("ONE", 1)],
        [("MIN", -(1 << 63))],
        [("NEG", -7), ("POS", 7)],
        [("TOP", 1 << 31)],
    ]


def test_bit_field_of_an_old_compiler_is_read_from_its_integer() -> None:
    btf = Btf.from_bytes(
        encode(
            [
                (BtfKind.INT, "int", 0, 4, [5 << 16 | 3]),  # three bits, five bits in
                (BtfKind.STRUCT, "old", 1, 4, ["x", 1, 8]),
            ]
        )
    )
    member = btf.locate(2, "x")
    assert member is not None
    assert (member.bit_offset, member.bits) == (13, 3)


def test_first_type_of_a_name_and_kind_is_found() -> None:
    sizes = ((BtfKind.UNION, 4), (BtfKind.STRUCT, 8), (BtfKind.STRUCT, 9))
    btf = Btf.from_bytes(encode([(kind, "x", 0, size, []) for kind, size in sizes]))
    assert btf.size_of(btf.record("x")) == 8
    assert btf.find("x", BtfKind.UNION) == 1


def test_data_that_is_not_btf_is_refused() -> None:
    swapped = struct.pack(">H", 0xEB9F) if struct.pack("=H", 1) == b"\1\0" else b"\x9f\xeb"
    for data in (b"", b"\x7fELF" + bytes(60), swapped + SMALL[2:], SMALL[:24]):
        with pytest.raises(BtfError):
            Btf.from_bytes(data)


def test_error_names_the_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(BtfError, match="missing"):
        Btf.from_file(tmp_path / "missing")


def test_unknown_kind_is_named() -> None:
    data = bytearray(encode([INT, (BtfKind.STRUCT, "x", 0, 4, [])]))
    data[24 + 16 + 7] = 25
    with pytest.raises(BtfError, match="type 2 is of a kind"):
        Btf.from_bytes(bytes(data))


@pytest.mark.parametrize(
    "types",
    [
        [(BtfKind.TYPEDEF, "x", 0, 1, []), (BtfKind.STRUCT, "s", 1, 4, ["m", 1, 0])],
        [(BtfKind.ARRAY, "", 0, 0, [1, 1, 1]), (BtfKind.STRUCT, "s", 1, 4, ["m", 1, 0])],
        [(BtfKind.STRUCT, "x", 1, 4, ["m", 2, 0]), (BtfKind.STRUCT, "s", 1, 4, ["m", 1, 0])],
        [(BtfKind.STRUCT, "", 1, 4, ["", 1, 0]), (BtfKind.STRUCT, "s", 1, 4, ["", 1, 0])],
        [(BtfKind.STRUCT, "s", 1, 4, ["m", 99, 0])],
        [(BtfKind.FUNC, "f", 0, 0, []), (BtfKind.STRUCT, "s", 1, 4, ["m", 1, 0])],
        [INT, (BtfKind.STRUCT, "s", 2, 4, ["m", 1, 0, "n", 1, 16])],
        [INT, (BtfKind.STRUCT, "s", 1, 2, ["m", 1, 0])],
        [INT, (BtfKind.STRUCT, "s", 1, 4, ["m; int n", 1, 0])],
    ],
    ids=["typedef", "array", "loop", "anonymous", "missing", "func", "overlap", "size", "name"],
)
def test_contradictory_types_give_a_one_line_error(
    types: Sequence[Encodable],
) -> None:
    with pytest.raises(BtfError, match=r"^[^\n]+$"):
        generate(Btf.from_bytes(encode(types)), ["s", "x?"])


def use(data: bytes) -> bool:
    """Query everything of a BTF; it may raise BtfError alone. Return whether it was read."""
    try:
        btf = Btf.from_bytes(data)
    except BtfError:
        return False
    questions: list[Callable[[], object]] = [
        lambda: generate(btf, ["outer?", "aligned?:last?", "enum:color?"]),
        lambda: btf.locate(btf.record("outer"), "bits.e"),
        lambda: btf.func_args("takes"),
        lambda: btf.tracepoint_args("hello"),
        *(partial(btf.type_text, i) for i in range(70)),
        *(partial(btf.size_of, i) for i in range(70)),
    ]
    for question in questions:
        try:
            question()
        except BtfError:
            continue
    return True


def test_btf_cut_short_anywhere_is_an_error() -> None:
    assert use(SMALL)
    for length in range(len(SMALL)):
        with pytest.raises(BtfError):
            Btf.from_bytes(SMALL[:length])


def test_a_type_section_cut_short_is_an_error() -> None:
    head = struct.unpack_from("=HBBIIIII", SMALL)
    kept = head[5]
    ends_well = 0
    for length in range(0, kept, 4):
        data = bytearray(SMALL)
        struct.pack_into("=I", data, 12, length)
        ends_well += use(bytes(data))
    # Only where a type ends; the rest ends inside one.
    assert 0 < ends_well < kept // 4 // 2


def test_damaged_btf_raises_nothing_but_btferror() -> None:
    dice = random.Random(6)  # noqa: S311 - a seeded test
    readable = 0
    for _ in range(600):
        data = bytearray(SMALL)
        for _ in range(dice.choice((1, 1, 2, 8, 40))):
            at = dice.randrange(len(data))
            data[at] = dice.choice((0, 1, 0xFF, dice.randrange(256), data[at] ^ 1))
        readable += use(bytes(data))
    assert 100 < readable < 600, "both ways must have been taken"


@needs_kernel
def test_running_kernels_btf_describes_the_network_stack() -> None:
    btf = Btf.from_file()
    assert offset(btf, "sock", "__sk_common.skc_daddr") == 0
    assert offset(btf, "sock_common", "skc_daddr") == 0
    assert ("sk", "struct sock *") in btf.func_args("tcp_sendmsg")
    args = btf.tracepoint_args("inet_sock_set_state")
    assert args is not None
    assert args[0] == "const struct sock *"
    assert len(args) == 3
