"""Compiled programs are cached, and read only where no other user can have written them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tcplat_core.loader.cache import (
    ENTRIES,
    Cache,
    check_own,
    default_root,
    digest,
    identity,
    own_folder,
)

VALUE = {"functions": {"tp_send": b"\x00\xff"}, "maps": [1, 2], "facts": None}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache.open(tmp_path / "cache")


def test_written_value_is_read_back(cache: Cache) -> None:
    cache.write("a.program", VALUE)
    assert cache.read("a.program") == VALUE
    cache.write("a.program", [3])
    assert cache.read("a.program") == [3]
    assert cache.read("b.program") is None


def test_cache_folder_is_private_to_its_owner(cache: Cache) -> None:
    cache.write("a.program", VALUE)
    assert cache.root is not None
    assert cache.root.stat().st_mode & 0o777 == 0o700
    assert (cache.root / "a.program").stat().st_mode & 0o077 == 0


def test_missing_folders_are_made(tmp_path: Path) -> None:
    cache = Cache.open(tmp_path / "a" / "b" / "c")
    cache.write("a.facts", 1)
    assert cache.read("a.facts") == 1
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_folder_writable_by_others_is_not_used(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "cache"
    Cache.open(folder).write("a.program", VALUE)
    folder.chmod(mode)
    cache = Cache.open(folder)
    assert cache.root is None
    assert cache.read("a.program") is None
    cache.write("b.program", VALUE)
    assert [path.name for path in folder.iterdir()] == ["a.program"]


def test_symlink_to_a_folder_is_not_used(tmp_path: Path) -> None:
    Cache.open(tmp_path / "cache").write("a.program", VALUE)
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    assert Cache.open(tmp_path / "link").root is None


def test_file_in_place_of_the_folder_disables_the_cache(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    assert Cache.open(tmp_path / "cache").root is None
    assert Cache.open(tmp_path / "cache" / "below").root is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_folder_of_another_user_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    Cache.open(folder).write("a.program", VALUE)
    os.chown(folder, 65534, 65534)
    assert Cache.open(folder).root is None
    with pytest.raises(PermissionError, match="not a folder that only we can write to"):
        check_own(folder)


@pytest.mark.parametrize("kept", [0, 1, 31, 32, 33, -33, -32, -1])
def test_truncated_file_is_ignored(cache: Cache, kept: int) -> None:
    cache.write("a.program", VALUE)
    assert cache.root is not None
    path = cache.root / "a.program"
    path.write_bytes(path.read_bytes()[:kept])
    assert cache.read("a.program") is None


def test_file_with_any_bit_flipped_is_ignored(cache: Cache) -> None:
    cache.write("a.program", VALUE)
    assert cache.root is not None
    path = cache.root / "a.program"
    whole = path.read_bytes()
    for bit in range(len(whole) * 8):
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        assert cache.read("a.program") is None
    path.write_bytes(whole)
    assert cache.read("a.program") == VALUE


def test_full_disk_is_not_an_error(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp", full)
    cache.write("a.program", VALUE)
    assert cache.read("a.program") is None


def test_write_leaves_no_temporary_file(cache: Cache) -> None:
    for number in range(3):
        cache.write("a.program", number)
    assert cache.root is not None
    assert [path.name for path in cache.root.iterdir()] == ["a.program"]


def test_least_recently_used_entries_are_evicted(cache: Cache) -> None:
    assert cache.root is not None
    for number in range(ENTRIES):
        cache.write(f"{number}.program", number)
        os.utime(cache.root / f"{number}.program", (number, number))
    assert cache.read("0.program") == 0  # used: the youngest now
    cache.write("new.program", -1)
    assert cache.read("0.program") == 0
    assert cache.read("1.program") is None
    assert cache.read("2.program") == 2
    assert cache.read("new.program") == -1
    assert len(list(cache.root.iterdir())) == ENTRIES


def test_eviction_spares_files_that_are_not_entries(cache: Cache) -> None:
    assert cache.root is not None
    (cache.root / "notes.txt").touch()
    os.utime(cache.root / "notes.txt", (0, 0))
    for number in range(ENTRIES + 3):
        cache.write(f"{number}.types", "")
    assert (cache.root / "notes.txt").exists()
    assert len(list(cache.root.iterdir())) == ENTRIES + 1


def test_identity_differs_for_another_kernel_build(monkeypatch: pytest.MonkeyPatch) -> None:
    here = identity.__wrapped__()
    read = Path.read_bytes
    assert identity() == here
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: b"x" if str(path).startswith("/sys/") else read(path)
    )
    assert identity.__wrapped__() != here


def test_identity_differs_for_another_tcplat_version(monkeypatch: pytest.MonkeyPatch) -> None:
    here = identity.__wrapped__()
    read = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: b"x" if path.name == "btf.py" else read(path)
    )
    assert identity.__wrapped__() != here


def test_cache_without_a_folder_stores_nothing() -> None:
    cache = Cache(None)
    cache.write("a.program", VALUE)
    assert cache.read("a.program") is None


def test_cache_without_a_home_is_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("tcplat_core.loader.cache.default_root", homeless)
    assert Cache.open().root is None


def test_root_caches_in_var_and_users_in_their_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setenv("XDG_CACHE_HOME", "/planted")
    assert default_root() == Path("/var/cache/tcplat")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("tcplat_core.loader.cache.held", lambda: False)
    assert default_root() == Path("/planted/tcplat")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_root() == Path("/home/me/.cache/tcplat")


def test_capabilities_without_root_disable_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the user's folder, processes without capabilities could plant programs."""
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("tcplat_core.loader.cache.held", lambda: True)
    with pytest.raises(PermissionError, match="there is no cache"):
        default_root()
    assert Cache.open().root is None


def test_folder_replaceable_by_others_is_not_used(tmp_path: Path) -> None:
    above = tmp_path / "above"
    Cache.open(above / "cache").write("a.program", VALUE)
    above.chmod(0o777)
    assert Cache.open(above / "cache").root is None
    above.chmod(0o1777)  # as /tmp: only the owner of a folder can rename it
    assert Cache.open(above / "cache").read("a.program") == VALUE


def test_symlink_or_file_writable_by_others_is_not_read(cache: Cache) -> None:
    cache.write("a.program", VALUE)
    assert cache.root is not None
    (cache.root / "b.program").symlink_to(cache.root / "a.program")
    assert cache.read("b.program") is None
    (cache.root / "a.program").chmod(0o666)
    assert cache.read("a.program") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_file_of_another_user_is_not_read(cache: Cache) -> None:
    cache.write("a.program", VALUE)
    assert cache.root is not None
    os.chown(cache.root / "a.program", 65534, 65534)
    assert cache.read("a.program") is None


def test_failed_write_leaves_no_file(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.rename", full)
    cache.write("a.program", VALUE)
    assert cache.root is not None
    assert list(cache.root.iterdir()) == []


def test_own_folder_is_created_private(tmp_path: Path) -> None:
    own_folder(tmp_path / "mine")
    check_own(tmp_path / "mine")
    with pytest.raises(FileNotFoundError):
        check_own(tmp_path / "missing")


def test_digest_depends_on_the_boundaries_of_its_parts() -> None:
    hashes = {digest(), digest(b""), digest(b"", b""), digest(b"ab"), digest(b"a", b"b")}
    hashes |= {digest(b"b", b"a"), digest(b"ab", b"")}
    assert len(hashes) == 7
    assert digest(b"a", b"b") == digest(b"a", b"b")
