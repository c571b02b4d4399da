"""The clock of the rows: CLOCK_MONOTONIC, as the kernel's handlers read it.

bpf_ktime_get_ns() knows no time namespaces (time_namespaces(7), Linux 5.6): in one, what
clock_gettime(2) says is ahead of it, or behind, by an offset of days for a restored container.
What is compared with the time of rows is read here. Python's own `time.monotonic()` is for how long
something takes, and for deadlines of ours.
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path

from tcplat_core.errors import CannotRunError

_INITIAL = "time:[4026531834]"
"""The first time namespace: PROC_TIME_INIT_INO in linux/proc_ns.h."""


@functools.cache  # it is for life: a process cannot enter another
def ahead_ns() -> int:
    """Return by how much this process's CLOCK_MONOTONIC is ahead of the kernel's, in ns.

    Raises:
        CannotRunError: It is not to be known: this process's children are in another time
            namespace, and it is not in the first.
    """
    try:
        own = os.readlink("/proc/self/ns/time")
        if own == _INITIAL:
            return 0
        childrens = os.readlink("/proc/self/ns/time_for_children")
        lines = Path("/proc/self/timens_offsets").read_text(encoding="ascii").splitlines()
    except OSError:  # before 5.6, or without CONFIG_TIME_NS, or without /proc: there is none
        return 0
    # The file is about the children's: unshare(2) puts them into a new one.
    if own != childrens:
        raise CannotRunError(
            "the offset of this time namespace cannot be known, because children are put into "
            "another one: start tcplat by `unshare --time --fork`, or on the host"
        )
    seconds, ns = next(line.split()[1:] for line in lines if line.split()[0] in ("monotonic", "1"))
    return int(seconds) * 1_000_000_000 + int(ns)


def kernel_ns() -> int:
    """Return the time now, as a row's `ts_ns` would have it."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) - ahead_ns()


def clock_offset_ns() -> int:
    """Return Unix time minus the rows' clock, from the most exact of five readings."""
    best = None
    for _ in range(5):
        before = kernel_ns()
        wall = time.time_ns()
        after = kernel_ns()
        if best is None or after - before < best[0]:
            best = (after - before, wall - (before + after) // 2)
    assert best is not None  # noqa: S101 - five readings were taken
    return best[1]
