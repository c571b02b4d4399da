"""What is accepted as a network namespace, and what is refused."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import pytest

from tcplat_core.errors import UsageError
from tcplat_core.kernel import netns
from tcplat_core.kernel.netns import inode, netns_recorded

OURS = os.stat("/proc/self/ns/net").st_ino


def test_namespace_is_given_by_process_or_path() -> None:
    assert inode(str(os.getpid())) == OURS
    assert inode("/proc/self/ns/net") == OURS
    assert inode(f"/proc/self/task/{threading.get_native_id()}/ns/net") == OURS


@pytest.mark.parametrize("text", ["no-such-namespace", "4194304", "/no/where"])
def test_unknown_namespace_is_named(text: str) -> None:
    with pytest.raises(UsageError, match=f"there is no network namespace '{text}'"):
        inode(text)


@pytest.fixture(
    params=["/etc/passwd", "/dev/null", "/dev/tty", "/usr", "..", "/proc/self/ns/pid", "FIFO"]
)
def other(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return an existing file that is not a network namespace."""
    if request.param == "FIFO":
        os.mkfifo(tmp_path / "fifo")
        return str(tmp_path / "fifo")
    text = str(request.param)
    if text == ".." and not Path("/run/netns").is_dir():
        pytest.skip("no network namespace was ever named here")
    return text


def test_file_that_is_not_a_network_namespace_is_refused(other: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for take in (inode, netns_recorded, lambda text: netns.inside(text).__enter__()):
        with pytest.raises(UsageError, match=f"'{other}' is not a network namespace, though"):
            take(other)
    assert len(os.listdir("/proc/self/fd")) == before


def test_looking_up_a_namespace_leaves_no_fd_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    assert inode("/proc/self/ns/net") == OURS
    with contextlib.suppress(UsageError), netns.inside("/proc/self/ns/net"):  # without root
        pass
    assert len(os.listdir("/proc/self/fd")) == before
