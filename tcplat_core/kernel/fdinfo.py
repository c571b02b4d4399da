"""What /proc/self/fdinfo says of programs and links: needs no rights."""

from __future__ import annotations

from pathlib import Path


def is_cut(link_fd: int) -> bool:
    """Whether the interface of an XDP link has gone. Needs neither root nor its namespace."""
    return any(line.split() == ["ifindex:", "0"] for line in _info(link_fd).splitlines())


def misses(program_fd: int) -> int:
    """How often the kernel did not run a program (bpf_prog_show_fdinfo()); 0 if it does not say."""
    info = _info(program_fd)
    return int(info.partition("recursion_misses:")[2].split()[0]) if "recursion_" in info else 0


def _info(fd: int) -> str:
    try:
        return Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii")
    except OSError:  # before 5.14 not for a process that has given up root
        return ""
