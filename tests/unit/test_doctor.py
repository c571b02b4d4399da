"""``tcplat doctor`` on bcc and tracefs."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import pytest

from tcplat_core.cli import host_checks
from tcplat_core.errors import OUT_OF_MEMORY, CannotRunError, TcplatError
from tcplat_core.kernel import bcc, bpf
from tcplat_core.kernel.bcc import find_bcc
from tcplat_core.loader.compile import import_bcc

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can own a system folder")


def package(folder: Path, **modules: str) -> Path:
    """Make a package named bcc, as a distribution would install it."""
    there = folder / "bcc"
    there.mkdir()
    for name, text in {"__init__": "", "libbcc": "", **modules}.items():
        (there / f"{name}.py").write_text(text)
    return there


@needs_root
@pytest.mark.parametrize(
    ("init", "words"),
    [
        ("from .missing import lib", "is broken (ModuleNotFoundError: No module named"),
        ("def f(:", "is broken (SyntaxError: "),
        ("raise OSError('libbcc.so.0: cannot open')", "libbcc.so.0 does not load"),
        ("import ctypes; ctypes.CDLL(None).no_such_symbol", "is broken (AttributeError: "),
    ],
)
def test_broken_bcc_is_reported_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init: str, words: str
) -> None:
    package(tmp_path, __init__=init)
    monkeypatch.setattr(bcc, "SYSTEM_FOLDERS", (str(tmp_path),))
    monkeypatch.delitem(sys.modules, "bcc", raising=False)
    with pytest.raises(CannotRunError) as error:
        import_bcc()
    assert words in str(error.value)
    assert "apt install" in str(error.value)


@needs_root
@pytest.mark.parametrize(
    ("limited", "init", "words"),
    [
        (True, "raise OSError('x.so: failed to map segment from shared object')", OUT_OF_MEMORY),
        (False, "raise OSError('x.so: failed to map segment from shared object')", "does not load"),
        (False, "raise OSError(12, 'Cannot allocate memory')", OUT_OF_MEMORY),
        (False, "raise MemoryError", OUT_OF_MEMORY),
    ],
)
def test_memory_limit_is_not_a_broken_bcc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, limited: bool, init: str, words: str
) -> None:
    package(tmp_path, __init__=init)
    monkeypatch.setattr(bcc, "SYSTEM_FOLDERS", (str(tmp_path),))
    monkeypatch.delitem(sys.modules, "bcc", raising=False)
    limit = 1 << 28 if limited else resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    with pytest.raises(TcplatError) as error:
        import_bcc()
    assert words in str(error.value)


@needs_root
def test_bcc_writable_by_others_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = package(tmp_path)
    (there / "libbcc.py").chmod(0o666)
    monkeypatch.setattr(bcc, "SYSTEM_FOLDERS", (str(tmp_path),))
    with pytest.raises(CannotRunError) as error:
        find_bcc()
    assert f"bcc in {there} can be changed by others than root" in str(error.value)
    assert f"chmod -R go-w {there}" in str(error.value)


def test_unreadable_tracefs_is_not_called_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host_checks, "tracefs", lambda: None)
    monkeypatch.setattr(
        Path, "read_text", lambda *_, **__: "tracefs /sys/kernel/tracing tracefs rw 0 0\n"
    )
    what, mend = bpf.tracefs_missing()
    assert what == f"/sys/kernel/tracing is not readable by uid {os.geteuid()}"
    assert "mount -o remount,mode=755 /sys/kernel/tracing" in mend


def test_unmounted_tracefs_is_reported_with_the_mount_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "proc /proc proc rw 0 0\n")
    assert bpf.tracefs_missing() == ("tracefs is not mounted", bpf.TRACEFS_MOUNT)


def test_unsupported_machine_is_reported_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(CannotRunError, match="runs on x86_64 and aarch64; this machine is riscv64"):
        bpf.map_create("any", bpf.ARRAY, 4, 4, 1, 0)
    checks, _ = host_checks.examine()
    assert (checks[0].name, checks[0].ok) == ("kernel", False)
