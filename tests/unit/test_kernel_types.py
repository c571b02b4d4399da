"""The kernel's types as C."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from tcplat_core.kernel.bcc import DEFINED_TAGS
from tcplat_core.kernel.btf import VMLINUX, Btf, BtfError, BtfKind
from tcplat_core.loader import kernel_tree
from tcplat_core.loader.kernel_types import generate
from tests.unit.test_btf import INT, encode

SMALL_BTF = Path(__file__).parent / "data" / "small.btf"
SMALL_WANTED = [
    "outer",
    "bits",
    "aligned",
    "packed",
    "packed_size",
    "packed_offset",
    "packed_bits",
]
NETWORK = [
    "pt_regs",
    "iphdr",
    "ipv6hdr",
    "tcphdr",
    "ethhdr",
    "sk_buff",
    "sock",
    "sock_common",
    "tcp_sock",
    "inet_sock",
    "inet_connection_sock",
    "request_sock",
    "msghdr",
    "iov_iter",
    "socket",
    "mptcp_sock?",
    "net:ns.inum",
    "task_struct:pid,tgid,group_leader,comm",
    "enum:tcp_ca_state",
]

needs_clang = pytest.mark.skipif(not shutil.which("clang"), reason="clang is not installed")
needs_kernel = pytest.mark.skipif(not VMLINUX.exists(), reason="this kernel has no BTF")


@pytest.fixture
def small() -> Btf:
    return Btf.from_file(SMALL_BTF)


def clang(text: str, *flags: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["clang", "-target", "bpf", "-x", "c", "-Wall", "-Werror", *flags, "-"],
        input=text.encode(),
        capture_output=True,
        check=False,
    )


def assert_compiles(text: str, *flags: str) -> None:
    done = clang(text, "-fsyntax-only", *flags)
    assert done.returncode == 0, done.stderr.decode()


def btf_of(header: str, names: list[str]) -> Btf:
    """Compile a header and return the BTF that the compiler makes of these structs."""
    variables = "".join(f"struct {name} v{i};\n" for i, name in enumerate(names))
    done = clang(header + variables, "-g", "-c", "-o", "-")
    assert done.returncode == 0, done.stderr.decode()
    elf = done.stdout
    (table,) = struct.unpack_from("=Q", elf, 0x28)
    size, count, names_at = struct.unpack_from("=HHH", elf, 0x3A)
    sections = [struct.unpack_from("=IIQQQQ", elf, table + i * size) for i in range(count)]
    start = sections[names_at][4]
    for name, _, _, _, offset, length in sections:
        if elf[start + name :].startswith(b".BTF\0"):
            return Btf.from_bytes(elf[offset : offset + length])
    raise AssertionError("clang made no BTF")


def layout(btf: Btf, record_id: int, base: int = 0) -> dict[str, tuple[int, int]]:
    """Return bit offset and bit-field width of each member, those of anonymous members too."""
    found = {}
    for member in btf.members(btf.resolve(record_id)):
        at = base + member.bit_offset
        if member.name:
            found[member.name] = (at, member.bits)
        else:
            found |= layout(btf, member.type_id, at)
    return found


def assert_same_layout(ours: Btf, kernels: Btf, name: str) -> None:
    """Check that the compiler places all members of a struct as the kernel does."""
    made = layout(ours, ours.record(name))
    wanted = layout(kernels, kernels.record(name))
    assert wanted == {key: at for key, at in made.items() if not key.startswith("__tcplat_pad")}
    assert ours.size_of(ours.record(name)) == kernels.size_of(kernels.record(name))


@needs_clang
def test_every_kind_of_type_compiles_with_its_size_and_offsets(small: Btf) -> None:
    header = generate(small, SMALL_WANTED)
    assert_compiles(header)
    assert "TCPLAT_SIZE(struct outer, 384);" in header
    assert "TCPLAT_AT(struct outer, saddr, 20);" in header
    assert "TCPLAT_AT(struct outer, named[0].deep, 16);" in header


@needs_clang
def test_generated_types_have_the_original_layout(small: Btf) -> None:
    ours = btf_of(generate(small, SMALL_WANTED), SMALL_WANTED)
    for name in SMALL_WANTED:
        assert_same_layout(ours, small, name)


@needs_clang
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("TCPLAT_SIZE(struct aligned, 128)", "TCPLAT_SIZE(struct aligned, 120)"),
        ("TCPLAT_AT(struct packed, when, 1)", "TCPLAT_AT(struct packed, when, 8)"),
        ("} __attribute__((packed));", "};"),
    ],
)
def test_a_wrong_layout_does_not_compile(small: Btf, right: str, wrong: str) -> None:
    header = generate(small, SMALL_WANTED)
    assert right in header
    done = clang(header.replace(right, wrong), "-fsyntax-only")
    assert done.returncode != 0
    assert b"BTF says" in done.stderr


@needs_clang
def test_members_are_accessed_as_in_the_kernel(small: Btf) -> None:
    use = """
    unsigned int f(struct outer *o, atomic_t *a)
    {
        o->list.next->prev = &o->list;
        return o->daddr + o->refs[1][2].counter + o->bits.c + o->flexible[1] + a->counter;
    }
    """
    assert_compiles(generate(small, ["outer"]) + use)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("wanted", ["outer", "outer:second,b"])
def test_anonymous_member_may_have_a_tag_or_be_a_typedef(wanted: str) -> None:
    """Kernels have them since 6.19 (-fms-extensions); in plain C such a line declares nothing."""
    two: list[int | str] = ["first", 1, 0, "second", 1, 32]
    btf = Btf.from_bytes(
        encode(
            [
                INT,
                (BtfKind.STRUCT, "inner", 2, 8, two),
                (BtfKind.STRUCT, "", 1, 4, ["third", 1, 0]),
                (BtfKind.TYPEDEF, "last_t", 0, 3, []),
                (BtfKind.STRUCT, "outer", 4, 20, ["a", 1, 0, "", 2, 32, "", 4, 96, "b", 1, 128]),
            ]
        )
    )
    header = generate(btf, [wanted])
    assert "struct inner;" not in header
    use = "int use(struct outer *o) { return o->second + o->b; }\n"
    types = kernel_tree._TYPES_H
    done = subprocess.run(
        ["cc", "-std=c11", "-Wall", "-Werror", "-fsyntax-only", "-x", "c", "-"],
        input=f"{types}{header}{use}".encode(),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()


@needs_clang
def test_trimmed_struct_keeps_its_member_offsets(small: Btf) -> None:
    header = generate(small, ["outer:saddr,bits.e,flexible"])
    assert_compiles(header)
    made = layout(ours := btf_of(header, ["outer"]), ours.record("outer"))
    kept = {key: at for key, at in made.items() if not key.startswith("__tcplat_pad")}
    assert kept == {"saddr": (160, 0), "bits": (640, 0), "flexible": (2816, 0)}
    assert ours.size_of(ours.record("outer")) == 384
    assert "struct aligned" not in header


def test_trims_of_one_struct_are_merged(small: Btf) -> None:
    both = generate(small, ["outer:saddr", "outer:seen"])
    assert "saddr, 20);" in both
    assert "seen, 56);" in both
    assert generate(small, ["outer", "outer:saddr"]) == generate(small, ["outer"])
    # Held by value counts as asked for whole.
    held = generate(small, ["aligned:last", "outer:aligned"])
    assert "TCPLAT_AT(struct aligned, on_its_own_line, 64);" in held


def test_missing_type_is_named_unless_optional(small: Btf) -> None:
    for entry, name in (
        ("nothing", "nothing"),
        ("outer:nothing", "nothing"),
        ("outer:list.nothing", "list.nothing"),
        ("enum:nothing", "nothing"),
    ):
        with pytest.raises(BtfError, match=re.escape(name)):
            generate(small, [entry])
    marked = ["nothing?", "nothing?:a", "outer:saddr,list.nothing?", "enum:nothing?"]
    assert generate(small, marked) == generate(small, ["outer:saddr"])


@needs_clang
def test_pointer_type_gives_its_btf_id(small: Btf) -> None:
    numbers = {name: small.record(name) for name in ("outer", "bits")}
    checks = "".join(
        f"_Static_assert(_Generic(({const}struct {name} *)0, TCPLAT_TYPE_IDS default: 0)"
        f' == {number}, "{name}");\n'
        for name, number in numbers.items()
        for const in ("", "const ")
    )
    other = '_Static_assert(_Generic((char *)0, TCPLAT_TYPE_IDS default: 0) == 0, "char");\n'
    assert all(numbers.values())
    assert_compiles(generate(small, ["outer", "bits"]) + checks + other)


@needs_clang
def test_enum_comes_with_its_constants(small: Btf) -> None:
    header = generate(small, ["enum:color", "outer"])
    assert_compiles(header + '_Static_assert(GREEN == 2, "");')


@needs_clang
def test_types_that_bcc_defines_do_not_clash(small: Btf) -> None:
    header = generate(small, ["bpf_insn", "xdp_md", "outer"])
    assert_compiles(header + "struct bpf_insn { int of_bcc; };")
    assert "struct bpf_insn___2 insn;" in header


def test_output_does_not_depend_on_the_order_of_types(small: Btf) -> None:
    assert generate(small, SMALL_WANTED) == generate(small, reversed(SMALL_WANTED))


def test_every_tag_defined_by_bcc_is_known() -> None:
    library = Path("/usr/lib/x86_64-linux-gnu/libbcc.so.0")
    if not library.exists():
        pytest.skip("bcc's library is not here")
    text = library.read_bytes()
    found = re.findall(
        rb"^(?:struct|union) ((?:bpf_|btf_|xdp_|sk_|__sk_)\w+) \{$", text, re.MULTILINE
    )
    assert found
    assert {name.decode() for name in found} <= DEFINED_TAGS


@needs_clang
@needs_kernel
def test_network_types_of_the_running_kernel_are_exact() -> None:
    btf = Btf.from_file()
    header = generate(btf, NETWORK)
    assert_compiles(header)
    names = [entry for entry in NETWORK if ":" not in entry and not entry.endswith("?")]
    ours = btf_of(header, names)
    for name in names:
        assert_same_layout(ours, btf, name)


def test_kinds_are_numbered_as_in_the_kernel() -> None:
    assert (BtfKind.INT, BtfKind.FUNC_PROTO, BtfKind.ENUM64) == (1, 13, 19)
