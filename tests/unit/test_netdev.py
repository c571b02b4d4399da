"""Interfaces and network namespaces, as far as they can be looked at without root."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tcplat_core.errors import UsageError
from tcplat_core.kernel import fdinfo, netdev, netns


def test_interfaces_match_those_of_the_kernel() -> None:
    found = {interface.name: interface for interface in netdev.interfaces()}
    assert {(one.index, name) for name, one in found.items()} == set(socket.if_nameindex())
    for name, one in found.items():
        flags = int(Path(f"/sys/class/net/{name}/flags").read_text(), 16)
        kind = int(Path(f"/sys/class/net/{name}/type").read_text())
        assert (one.is_up, one.is_ethernet) == (bool(flags & 1), kind in (1, 772))


def test_unknown_namespace_error_lists_the_known_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(netns, "NAMED", tmp_path / "none")
    with pytest.raises(UsageError, match=r"no network namespace 'blue' .*ip netns lists none"):
        netns.inside("blue").__enter__()
    monkeypatch.setattr(netns, "NAMED", tmp_path)
    (tmp_path / "red").touch()
    (tmp_path / "green").touch()
    with pytest.raises(UsageError, match=r"'blue' \(No such file.*ip netns lists green, red$"):
        netns.inside("blue").__enter__()
    for what in ("4194305", "/nowhere"):
        with pytest.raises(UsageError, match=f"'{what}' .No such file"):
            netns.inside(what).__enter__()


def test_own_namespace_needs_no_root() -> None:
    before = os.stat("/proc/self/ns/net").st_ino
    with netns.inside(""):
        assert os.stat("/proc/self/ns/net").st_ino == before


def test_fdinfo_tells_numbers_of_any_process() -> None:
    fd = os.pidfd_open(os.getpid())
    try:
        assert fdinfo.number(fd, "Pid") == os.getpid()
        assert fdinfo.number(fd, "Pid", str(os.getpid())) == os.getpid()
        assert fdinfo.number(fd, "link_id") is None
    finally:
        os.close(fd)
    assert fdinfo.number(fd, "Pid") is None


def test_xdp_link_without_interface_alone_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "file").open("wb") as file:
        assert not fdinfo.is_cut(file.fileno())
    assert not fdinfo.is_cut(1 << 20)
    for text, cut in (
        ("link_type:\txdp\nprog_id:\t7\nifindex:\t3\n", False),
        ("link_type:\txdp\nprog_id:\t7\nifindex:\t0\n", True),
    ):
        monkeypatch.setattr(Path, "read_text", lambda *_, text=text, **__: text)
        assert fdinfo.is_cut(9) is cut
