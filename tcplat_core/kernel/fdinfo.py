"""Reads /proc/PID/fdinfo of programs and links; for own descriptors that needs no rights."""

from __future__ import annotations

import re
from pathlib import Path


def is_cut(link_fd: int) -> bool:
    """Return whether the interface of an XDP link is gone, from any network namespace."""
    return number(link_fd, "ifindex") == 0


def misses(program_fd: int) -> int:
    """Return how often the kernel did not run a program (bpf_prog_show_fdinfo()); 0 if unknown."""
    return number(program_fd, "recursion_misses") or 0


def number(fd: int | str, key: str, process: str = "self") -> int | None:
    """Return a number of fdinfo; None if the key is absent or the file cannot be read.

    Args:
        fd: Number of the file descriptor.
        key: The key, without the colon.
        process: Its pid, or ``self``.
    """
    try:
        info = Path(f"/proc/{process}/fdinfo/{fd}").read_text(encoding="ascii")
    except OSError:  # before 5.14, unreadable to a process that has dropped root
        return None
    found = re.search(rf"^{key}:\s+(\d+)$", info, re.MULTILINE)
    return int(found[1]) if found else None
