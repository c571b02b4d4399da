"""The clock of the rows: CLOCK_MONOTONIC, as the kernel's handlers read it.

bpf_ktime_get_ns() ignores time namespaces (time_namespaces(7), Linux 5.6). Inside one,
clock_gettime(2) differs from it by the namespace's offset: days, in a restored container.
Times that are compared with rows' times are read here; `time.monotonic()` is for durations and
deadlines.
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path

from tcplat_core.errors import CannotRunError

_INITIAL = "time:[4026531834]"
"""The initial time namespace: PROC_TIME_INIT_INO in linux/proc_ns.h."""


@functools.cache  # constant: setns(2) changes the time namespace of children only
def ahead_ns() -> int:
    """Return by how much this process's CLOCK_MONOTONIC is ahead of the kernel's, in ns.

    Raises:
        CannotRunError: Unknown: this process is not in the initial time namespace, and its
            children are in another one.
    """
    try:
        own = os.readlink("/proc/self/ns/time")
        if own == _INITIAL:
            return 0
        childrens = os.readlink("/proc/self/ns/time_for_children")
        lines = Path("/proc/self/timens_offsets").read_text(encoding="ascii").splitlines()
    except OSError:  # before 5.6, or without CONFIG_TIME_NS, or without /proc: no time namespaces
        return 0
    # timens_offsets describes the children's namespace: unshare(2) puts them into a new one.
    if own != childrens:
        raise CannotRunError(
            "the offset of this time namespace cannot be known, because children are put into "
            "another one: start tcplat by `unshare --time --fork`, or on the host"
        )
    seconds, ns = next(line.split()[1:] for line in lines if line.split()[0] in ("monotonic", "1"))
    return int(seconds) * 1_000_000_000 + int(ns)


def kernel_ns() -> int:
    """Return the current time on the clock of a row's `ts_ns`, ns."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) - ahead_ns()


def clock_offset_ns() -> int:
    """Return Unix time minus the rows' clock, ns, from the most exact of five readings."""
    best = None
    for _ in range(5):
        before = kernel_ns()
        wall = time.time_ns()
        after = kernel_ns()
        if best is None or after - before < best[0]:
            best = (after - before, wall - (before + after) // 2)
    assert best is not None  # noqa: S101 - five readings were taken
    return best[1]
