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


def unsampled_slot(cpus: int, hooks: int) -> int:
    """Return the first `books` entry of rows that --sample left out."""
    return cpus * books_hooks(hooks) * 2


def unsampled_hooks(hooks: int) -> int:
    """Return the hooks per CPU from there on: one u64 each, rounded up as in books_hooks()."""
    return hooks + -hooks % 8


ACK_SLOTS = 8
"""Entries per CPU for bare acknowledgements without a row; one is used, of a cache line."""


def ack_slot(cpus: int, hooks: int) -> int:
    """Return the first `books` entry of bare acknowledgements that have no row."""
    return unsampled_slot(cpus, hooks) + cpus * unsampled_hooks(hooks)


def books_slots(cpus: int, hooks: int) -> int:
    """Return the number of `books` entries, see event.bpf.h."""
    return ack_slot(cpus, hooks) + cpus * ACK_SLOTS + 1
