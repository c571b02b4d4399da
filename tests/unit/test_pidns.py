"""Which PID namespace /proc shows."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from tcplat_core.errors import CannotRunError
from tcplat_core.kernel import pidns

Set = Callable[..., None]
OURS = SimpleNamespace(st_ino=4026532300, st_dev=os.makedev(0, 4))
INITIAL = SimpleNamespace(st_ino=4026531836, st_dev=os.makedev(0, 4))


@pytest.fixture
def proc(monkeypatch: pytest.MonkeyPatch) -> Set:
    """Says what /proc has: an error to raise, or what there is."""

    def set_all(first: object, own: object = OURS, number: int | None = None) -> None:
        def stat(path: str) -> object:
            found = first if path == "/proc/1/ns/pid" else own
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(os, "stat", stat)
        monkeypatch.setattr(os, "readlink", lambda _: str(number or os.getpid()))

    return set_all


def test_pid_namespace_is_that_of_process_1(proc: Set) -> None:
    proc(INITIAL)
    assert pidns.shown() is None
    proc(OURS, INITIAL)
    assert pidns.shown() == (4026532300, 4)
    proc(FileNotFoundError())
    assert pidns.shown() is None


def test_own_pid_namespace_is_used_where_process_1_is_unreadable(proc: Set) -> None:
    proc(PermissionError(), OURS)
    assert pidns.shown() == (4026532300, 4)
    proc(PermissionError(), INITIAL)
    assert pidns.shown() is None
    proc(PermissionError(), OURS, number=os.getpid() + 1)
    with pytest.raises(CannotRunError, match="another PID namespace"):
        pidns.shown()


def test_pids_of_another_namespace_are_refused(proc: Set) -> None:
    proc(OURS)
    pidns.require_ours()
    proc(OURS, number=os.getpid() + 1)
    with pytest.raises(CannotRunError, match="mount -t proc proc /proc"):
        pidns.require_ours()
