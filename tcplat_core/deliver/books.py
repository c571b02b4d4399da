"""Maps a probe's books: the event counts of its BPF programs."""

from __future__ import annotations

import mmap

import attrs

from tcplat_core.kernel.layout import (
    ACK_SLOTS,
    ack_slot,
    books_hooks,
    books_slots,
    unsampled_hooks,
    unsampled_slot,
)


@attrs.define(eq=False)
class Books:
    """Event counts per CPU and hook: produced, and how many of these were dropped.

    Args:
        fd: fd of the probe's `books`, an array of u64 with BPF_F_MMAPABLE.
        cpus: Possible CPUs.
        hooks: Hooks of the probe.
    """

    fd: int
    cpus: int
    hooks: int
    _map: mmap.mmap = attrs.field(init=False)
    _all: memoryview = attrs.field(init=False)
    _slots: memoryview = attrs.field(init=False)
    """Of what was produced and dropped."""
    _unsampled: memoryview = attrs.field(init=False)
    _acks: memoryview = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        slots = books_slots(self.cpus, self.hooks)
        size = slots * 8
        self._map = mmap.mmap(self.fd, size + -size % mmap.PAGESIZE, prot=mmap.PROT_READ)
        self._all = memoryview(self._map).cast("Q")
        first = unsampled_slot(self.cpus, self.hooks)
        self._slots = self._all[:first]
        acks = ack_slot(self.cpus, self.hooks)
        self._unsampled = self._all[first:acks]
        self._acks = self._all[acks : slots - 1]

    def read(self) -> list[tuple[int, int]]:
        """Return (produced, dropped) of each hook, over all CPUs."""
        row = books_hooks(self.hooks) * 2
        return [
            (sum(self._slots[2 * hook :: row]), sum(self._slots[2 * hook + 1 :: row]))
            for hook in range(self.hooks)
        ]

    def dropped(self) -> int:
        """Return the dropped events of all hooks."""
        return sum(self._slots[1::2])

    def unsampled(self) -> list[int]:
        """Return the rows of each hook that were not made, because --sample left them out."""
        row = unsampled_hooks(self.hooks)
        return [sum(self._unsampled[hook::row]) for hook in range(self.hooks)]

    def bare_acks(self) -> int:
        """Return the packets that only acknowledge, and have no row because no sink uses it."""
        return sum(self._acks[::ACK_SLOTS])

    def untracked(self) -> int:
        """Return how often a socket was not tracked, because the socket table was full."""
        return int(self._all[books_slots(self.cpus, self.hooks) - 1])

    def close(self) -> None:
        """Unmap. The caller closes the fd."""
        self._slots.release()
        self._unsampled.release()
        self._acks.release()
        self._all.release()
        self._map.close()
