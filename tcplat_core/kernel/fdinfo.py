"""What /proc/PID/fdinfo says of programs and links: of our own it needs no rights."""

from __future__ import annotations

import re
from pathlib import Path


def is_cut(link_fd: int) -> bool:
    """Return whether the interface of an XDP link has gone. Needs no rights, nor its namespace."""
    return number(link_fd, "ifindex") == 0


def misses(program_fd: int) -> int:
    """Return how often the kernel did not run a program (bpf_prog_show_fdinfo()); 0 if unknown."""
    return number(program_fd, "recursion_misses") or 0


def number(fd: int | str, key: str, process: str = "self") -> int | None:
    """Return a number that fdinfo tells; None where it does not, or cannot be read.

    Args:
        fd: Number of the file descriptor.
        key: As the line begins, without the colon.
        process: Its id.
    """
    try:
        info = Path(f"/proc/{process}/fdinfo/{fd}").read_text(encoding="ascii")
    except OSError:  # before 5.14 not for a process that has given up root
        return None
    found = re.search(rf"^{key}:\s+(\d+)$", info, re.MULTILINE)
    return int(found[1]) if found else None
