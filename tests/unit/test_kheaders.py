"""The kernel types as C, and the tree that bcc compiles against."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tcplat_core.kernel.btf import VMLINUX, Btf, BtfError, Kind
from tcplat_core.loader import kheaders
from tcplat_core.loader.kheaders import BCC_TAGS, cached_tree, generate, write_tree
from tests.unit.test_btf import INT, encode

if TYPE_CHECKING:
    from collections.abc import Callable

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
    """The compiler, given our header, puts all members of a struct where the kernel has them."""
    made = layout(ours, ours.record(name))
    wanted = layout(kernels, kernels.record(name))
    assert wanted == {key: at for key, at in made.items() if not key.startswith("__tcplat_pad")}
    assert ours.sizeof(name) == kernels.sizeof(name)


@needs_clang
def test_every_shape_compiles_with_its_size_and_offsets(small: Btf) -> None:
    header = generate(small, SMALL_WANTED)
    assert_compiles(header)
    assert "TCPLAT_SIZE(struct outer, 384);" in header
    assert "TCPLAT_AT(struct outer, saddr, 20);" in header
    assert "TCPLAT_AT(struct outer, named[0].deep, 16);" in header


@needs_clang
def test_bit_fields_and_all_else_are_where_they_were(small: Btf) -> None:
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
def test_members_are_used_as_in_the_kernel(small: Btf) -> None:
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
def test_an_anonymous_member_may_have_a_tag_or_be_a_typedef(wanted: str) -> None:
    """Kernels have them since 6.19 (-fms-extensions); in plain C such a line declares nothing."""
    two: list[int | str] = ["first", 1, 0, "second", 1, 32]
    btf = Btf.from_bytes(
        encode(
            [
                INT,
                (Kind.STRUCT, "inner", 2, 8, two),
                (Kind.STRUCT, "", 1, 4, ["third", 1, 0]),
                (Kind.TYPEDEF, "last_t", 0, 3, []),
                (Kind.STRUCT, "outer", 4, 20, ["a", 1, 0, "", 2, 32, "", 4, 96, "b", 1, 128]),
            ]
        )
    )
    header = generate(btf, [wanted])
    assert "struct inner;" not in header
    use = "int use(struct outer *o) { return o->second + o->b; }\n"
    types = kheaders._TYPES_H
    done = subprocess.run(
        ["cc", "-std=c11", "-Wall", "-Werror", "-fsyntax-only", "-x", "c", "-"],
        input=f"{types}{header}{use}".encode(),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()


@needs_clang
def test_a_trimmed_struct_has_its_members_in_place(small: Btf) -> None:
    header = generate(small, ["outer:saddr,bits.e,flexible"])
    assert_compiles(header)
    made = layout(ours := btf_of(header, ["outer"]), ours.record("outer"))
    kept = {key: at for key, at in made.items() if not key.startswith("__tcplat_pad")}
    assert kept == {"saddr": (160, 0), "bits": (640, 0), "flexible": (2816, 0)}
    assert ours.sizeof("outer") == 384
    assert "struct aligned" not in header


def test_trimmed_twice_is_both_and_whole_wins(small: Btf) -> None:
    both = generate(small, ["outer:saddr", "outer:seen"])
    assert "saddr, 20);" in both
    assert "seen, 56);" in both
    assert generate(small, ["outer", "outer:saddr"]) == generate(small, ["outer"])
    # Held by value counts as asked for whole.
    held = generate(small, ["aligned:last", "outer:aligned"])
    assert "TCPLAT_AT(struct aligned, on_its_own_line, 64);" in held


def test_what_is_missing_is_named_unless_marked(small: Btf) -> None:
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
def test_a_pointer_tells_the_btf_id_of_its_type(small: Btf) -> None:
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
def test_an_enum_comes_with_its_constants(small: Btf) -> None:
    header = generate(small, ["enum:color", "outer"])
    assert_compiles(header + '_Static_assert(GREEN == 2, "");')


@needs_clang
def test_types_that_bcc_defines_do_not_clash(small: Btf) -> None:
    header = generate(small, ["bpf_insn", "xdp_md", "outer"])
    assert_compiles(header + "struct bpf_insn { int of_bcc; };")
    assert "struct bpf_insn___2 insn;" in header


def test_the_same_question_has_the_same_answer(small: Btf) -> None:
    assert generate(small, SMALL_WANTED) == generate(small, reversed(SMALL_WANTED))


def test_all_that_bcc_defines_is_known() -> None:
    library = Path("/usr/lib/x86_64-linux-gnu/libbcc.so.0")
    if not library.exists():
        pytest.skip("bcc's library is not here")
    text = library.read_bytes()
    found = re.findall(
        rb"^(?:struct|union) ((?:bpf_|btf_|xdp_|sk_|__sk_)\w+) \{$", text, re.MULTILINE
    )
    assert found
    assert {name.decode() for name in found} <= BCC_TAGS


@needs_clang
@needs_kernel
def test_this_kernels_network_types_are_exact() -> None:
    btf = Btf.from_file()
    header = generate(btf, NETWORK)
    assert_compiles(header)
    names = [entry for entry in NETWORK if ":" not in entry and not entry.endswith("?")]
    ours = btf_of(header, names)
    for name in names:
        assert_same_layout(ours, btf, name)


@needs_clang
def test_the_tree_compiles_without_any_include(small: Btf, tmp_path: Path) -> None:
    write_tree(tmp_path, generate(small, ["outer"]))
    include = tmp_path / "include"
    program = """
    #include <uapi/linux/bpf.h>
    #include <uapi/linux/if_packet.h>
    #include <linux/version.h>
    #include <linux/log2.h>
    #include <asm/page.h>
    #if !defined(CONFIG_BPF_SYSCALL) || LINUX_VERSION_CODE < KERNEL_VERSION(4, 8, 0)
    #error
    #endif
    u64 pages = PAGE_SIZE;
    bool yes(struct outer *o, __be32 a, size_t n) { return o->daddr == a && n ? true : false; }
    """
    flags = ["-nostdinc", f"-I{include}", "-include", f"{include}/linux/kconfig.h"]
    assert_compiles(program, *flags)


def test_a_second_start_does_not_read_btf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cached_tree(SMALL_BTF, ["outer"], tmp_path / "cache")
    monkeypatch.setattr(Btf, "from_file", None)
    second = cached_tree(SMALL_BTF, ["outer", "outer"], tmp_path / "cache")
    assert first == second
    assert not first.temporary
    assert (first.folder / "include/linux/kconfig.h").exists()


def test_a_first_start_takes_what_was_read_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Btf.from_file(SMALL_BTF)
    monkeypatch.setattr(Btf, "from_file", None)
    tree = cached_tree(SMALL_BTF, ["outer"], tmp_path, lambda: read)
    header = tree.folder / "include/generated/tcplat_kernel.h"
    assert "struct outer" in header.read_text()


def test_an_entry_in_use_counts_as_new(tmp_path: Path) -> None:
    folder = cached_tree(SMALL_BTF, ["outer"], tmp_path).folder
    os.utime(folder, (1000, 1000))
    cached_tree(SMALL_BTF, ["outer"], tmp_path)
    assert folder.stat().st_mtime > 1000


def test_other_types_and_other_kernels_have_other_entries(tmp_path: Path) -> None:
    other = tmp_path / "other.btf"
    other.write_bytes(SMALL_BTF.read_bytes() + b"\0")
    root = tmp_path / "cache"
    folders = {
        cached_tree(SMALL_BTF, ["outer"], root).folder,
        cached_tree(SMALL_BTF, ["bits"], root).folder,
        cached_tree(other, ["outer"], root).folder,
    }
    assert len(folders) == 3


def test_the_cache_is_private(tmp_path: Path) -> None:
    tree = cached_tree(SMALL_BTF, ["outer"], tmp_path / "a" / "b" / "cache")
    for folder in (tree.folder, *list(tree.folder.parents)[:3]):
        assert folder.stat().st_mode & 0o777 == 0o700, folder


def unsafe_mode(folder: Path) -> None:
    folder.chmod(0o770)


def unsafe_link(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


def unsafe_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


@pytest.mark.parametrize("spoil", [unsafe_mode, unsafe_link, unsafe_file])
@pytest.mark.parametrize("level", ["root", "entry"])
def test_a_folder_that_others_could_write_is_not_used(
    tmp_path: Path, spoil: Callable[[Path], None], level: str
) -> None:
    root = tmp_path / "cache"
    entry = cached_tree(SMALL_BTF, ["outer"], root).folder
    spoil(root if level == "root" else entry)
    with cached_tree(SMALL_BTF, ["outer"], root) as tree:
        assert tree.temporary
        assert tmp_path not in tree.folder.parents
        assert tree.folder.stat().st_mode & 0o777 == 0o700
        assert (tree.folder / "include/linux/types.h").exists()
    assert not tree.folder.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    root.mkdir(mode=0o700)
    os.chown(root, 65534, 65534)
    with cached_tree(SMALL_BTF, ["outer"], root) as tree:
        assert tree.temporary


@pytest.mark.parametrize("file", ["generated/tcplat_kernel.h", "linux/types.h"])
@pytest.mark.parametrize("content", [None, "", "int x;\n"])
def test_a_damaged_entry_is_made_anew(tmp_path: Path, file: str, content: str | None) -> None:
    first = cached_tree(SMALL_BTF, ["outer"], tmp_path)
    path = first.folder / "include" / file
    before = path.read_text()
    path.unlink() if content is None else path.write_text(content)
    assert cached_tree(SMALL_BTF, ["outer"], tmp_path) == first
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [first.folder]
    assert [path.name for path in first.folder.iterdir()] == ["include"]


def test_the_cache_stays_small_and_touches_only_its_own(tmp_path: Path) -> None:
    (tmp_path / "not-ours").mkdir()
    os.utime(tmp_path / "not-ours", (0, 0))
    for i in range(kheaders.CACHE_ENTRIES + 3):
        tree = cached_tree(SMALL_BTF, ["bits", f"missing{i}?"], tmp_path)
        os.utime(tree.folder, (1000 + i, 1000 + i))
    newest = cached_tree(SMALL_BTF, ["outer"], tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == kheaders.CACHE_ENTRIES + 1
    assert {"not-ours", newest.folder.name, tree.folder.name} <= names


def test_many_starts_at_once_share_one_entry(tmp_path: Path) -> None:
    trees: list[kheaders.Tree] = []
    barrier = threading.Barrier(8)

    def start() -> None:
        barrier.wait()
        trees.append(cached_tree(SMALL_BTF, ["outer"], tmp_path))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(trees) == 8
    assert len(set(trees)) == 1
    assert not trees[0].temporary
    assert [path.name for path in tmp_path.iterdir()] == [trees[0].folder.name]


def test_what_the_kernel_lacks_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(BtfError, match="nothing"):
        cached_tree(SMALL_BTF, ["nothing"], tmp_path)
    assert list(tmp_path.iterdir()) == []


@needs_kernel
def test_this_kernel_is_known_by_its_build_id(tmp_path: Path) -> None:
    first = cached_tree(VMLINUX, ["sock"], tmp_path)
    assert cached_tree(str(VMLINUX), ["sock"], tmp_path) == first


def test_kinds_are_numbered_as_in_the_kernel() -> None:
    assert (Kind.INT, Kind.FUNC_PROTO, Kind.ENUM64) == (1, 13, 19)
