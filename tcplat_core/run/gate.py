"""The gate of the programs: wakes the session when something comes, and is shut at the end.

A handler that wakes somebody costs the traced process some 5 us. So it does that only for a
sleeper, once: while records come, nobody sleeps, and the session looks at the rings by itself.
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
    """The one who waits for a run's records.

    Args:
        gate_fd: Of tcplat_gate, an array of u32 with BPF_F_MMAPABLE.
        ring_fds: Of the rings.
    """

    gate_fd: int
    ring_fds: Sequence[int]
    _map: mmap.mmap = attrs.field(init=False)
    _gate: memoryview = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._map = mmap.mmap(self.gate_fd, mmap.PAGESIZE)
        self._gate = memoryview(self._map).cast("I")

    def sleep(self, seconds: float, also: Sequence[int] = ()) -> None:
        """Until a record comes, at most so long; or until one of the fds `also` is readable."""
        poll = select.poll()
        for fd in (*self.ring_fds, *also):
            poll.register(fd, select.POLLIN)
        self._gate[ASLEEP] = 1
        # It looks at the rings once it is on their wait queues (ringbuf_map_poll_kern()): what
        # came before anybody could know that we sleep is not overlooked.
        poll.poll(max(0.0, seconds) * 1000)
        self._gate[ASLEEP] = 0

    def shut(self) -> None:
        """No program makes a record or counts from here on.

        They are detached one after the other, which takes a tenth of a second or two: rows of those
        that go last would be of requests that the others had not seen.
        """
        self._gate[OPEN] = 0

    def close(self) -> None:
        """Unmap. The fds stay the caller's."""
        self._gate.release()
        self._map.close()
