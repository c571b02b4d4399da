"""The kernel tree that bcc compiles against, and its types in the cache."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tcplat_core.kernel.btf import Btf, BtfError
from tcplat_core.loader import kernel_tree as module
from tcplat_core.loader.cache import Cache
from tcplat_core.loader.kernel_tree import kernel_tree, types_as_c, write_tree
from tcplat_core.loader.kernel_types import generate
from tests.unit.test_kernel_types import SMALL_BTF, assert_compiles, needs_clang


def small() -> Btf:
    return Btf.from_file(SMALL_BTF)


def unread() -> Btf:
    raise AssertionError("BTF is read again")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache.open(tmp_path / "cache")


def files(cache: Cache) -> list[Path]:
    assert cache.root is not None
    return list(cache.root.iterdir())


@needs_clang
def test_tree_compiles_without_any_include(tmp_path: Path) -> None:
    write_tree(tmp_path, generate(small(), ["outer"]))
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


def test_tree_is_removed_at_the_end_of_the_block(cache: Cache) -> None:
    with kernel_tree(["outer"], cache, small) as tree:
        assert tree.stat().st_mode & 0o777 == 0o700
        assert (tree / "include/linux/kconfig.h").exists()
        header = (tree / "include/generated/tcplat_kernel.h").read_text()
        assert header == generate(small(), ["outer"])
    assert not tree.exists()


def test_second_start_does_not_read_btf(cache: Cache) -> None:
    first = types_as_c(["outer"], cache, small)
    assert types_as_c(["outer", "outer"], cache, unread) == first
    assert [path.suffix for path in files(cache)] == [".types"]


def test_each_list_of_types_has_its_own_entry(cache: Cache) -> None:
    assert types_as_c(["outer"], cache, small) != types_as_c(["bits"], cache, small)
    assert len(files(cache)) == 2


def test_each_kernel_has_its_own_entries(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    types_as_c(["outer"], cache, small)
    monkeypatch.setattr(module, "identity", lambda: "another")
    with pytest.raises(AssertionError, match="read again"):
        types_as_c(["outer"], cache, unread)


def test_btf_is_read_each_time_without_a_cache() -> None:
    for _ in range(2):
        with kernel_tree(["outer"], Cache(None), small) as tree:
            assert (tree / "include/linux/types.h").exists()
    with pytest.raises(AssertionError, match="read again"):
        types_as_c(["outer"], Cache(None), unread)


@pytest.mark.parametrize("content", [b"", b"int x;\n"])
def test_damaged_entry_is_rebuilt(cache: Cache, content: bytes) -> None:
    first = types_as_c(["outer"], cache, small)
    (path,) = files(cache)
    path.write_bytes(content)
    assert types_as_c(["outer"], cache, small) == first
    assert types_as_c(["outer"], cache, unread) == first


def test_concurrent_starts_share_one_entry(cache: Cache) -> None:
    texts: list[str] = []
    barrier = threading.Barrier(8)

    def start() -> None:
        barrier.wait()
        texts.append(types_as_c(["outer"], cache, small))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 8
    assert len(set(texts)) == 1
    assert len(files(cache)) == 1


def test_missing_type_leaves_no_entry(cache: Cache) -> None:
    with pytest.raises(BtfError, match="nothing"), kernel_tree(["nothing"], cache, small):
        pytest.fail("there is no such type")
    assert files(cache) == []
