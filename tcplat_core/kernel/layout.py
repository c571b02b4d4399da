"""Sizes on which the programs in the kernel and Python agree."""

from __future__ import annotations

from pathlib import Path


def possible_cpus() -> int:
    """Return the number of possible CPUs; bpf_get_smp_processor_id() is always below it."""
    text = Path("/sys/devices/system/cpu/possible").read_text(encoding="ascii").strip()
    return int(text.rpartition("-")[2].rpartition(",")[2]) + 1


def books_hooks(hooks: int) -> int:
    """Return the hooks per CPU in `books`, rounded up so that a CPU's part fills cache lines.

    A hook has two u64; four hooks are one cache line of 64 bytes.
    """
    return hooks + -hooks % 4


def books_slots(cpus: int, hooks: int) -> int:
    """Return the number of `books` entries (event.bpf.h): two per CPU and hook, plus one."""
    return cpus * books_hooks(hooks) * 2 + 1
