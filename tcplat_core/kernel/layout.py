"""Sizes on which the programs in the kernel and Python agree."""

from __future__ import annotations

from pathlib import Path


def possible_cpus() -> int:
    """CPUs that there may ever be: bpf_get_smp_processor_id() stays below it."""
    text = Path("/sys/devices/system/cpu/possible").read_text(encoding="ascii").strip()
    return int(text.rpartition("-")[2].rpartition(",")[2]) + 1


def books_hooks(hooks: int) -> int:
    """For how many hooks a CPU has room in `books`: its two u64 each fill whole cache lines."""
    return hooks + -hooks % 4


def books_slots(cpus: int, hooks: int) -> int:
    """Entries of `books` (include/tcplat/event.bpf.h): two per CPU and hook, and one more."""
    return cpus * books_hooks(hooks) * 2 + 1
