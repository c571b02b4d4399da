"""The map tcplat_gate: whether handlers wake the session, and whether they stop at the end.

A wake-up by a handler costs the traced process 5 us. So a handler wakes the session only if it
sleeps, and only once: while records come, the session polls the rings instead of sleeping.
"""

from __future__ import annotations

import mmap
import select
from collections.abc import Sequence

import attrs

OPEN, ASLEEP = 0, 2
"""Slots 0 and 1 of tcplat_gate (include/tcplat/event.bpf.h), which are 8 bytes apart."""


@attrs.define(eq=False)
class Sleeper:
    """Waits for records of a run, and closes its gate.

    Args:
        gate_fd: fd of tcplat_gate, an array of u32 with BPF_F_MMAPABLE.
        ring_fds: fds of the rings.
    """

    gate_fd: int
    ring_fds: Sequence[int]
    _map: mmap.mmap = attrs.field(init=False)
    _gate: memoryview = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._map = mmap.mmap(self.gate_fd, mmap.PAGESIZE)
        self._gate = memoryview(self._map).cast("I")

    def sleep(self, seconds: float, also: Sequence[int] = ()) -> None:
        """Sleep up to `seconds`, until a record comes or one of the fds `also` is readable."""
        poll = select.poll()
        for fd in (*self.ring_fds, *also):
            poll.register(fd, select.POLLIN)
        self._gate[ASLEEP] = 1
        # poll(2) joins the rings' wait queues before it checks them (ringbuf_map_poll_kern()), so a
        # record submitted before ASLEEP was set is not missed.
        poll.poll(max(0.0, seconds) * 1000)
        self._gate[ASLEEP] = 0

    def shut(self) -> None:
        """Stop all programs from making records and counting.

        Detaching is sequential and takes 0.1 to 0.2 s: without this, the programs detached last
        would report requests that the others had missed.
        """
        self._gate[OPEN] = 0

    def close(self) -> None:
        """Unmap. The fds stay the caller's."""
        self._gate.release()
        self._map.close()
