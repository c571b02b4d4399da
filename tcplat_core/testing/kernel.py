"""The kernel side of a run in plain memory: ring buffers, books, and a loader that has them."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence

import attrs

from tcplat_core.kernel.layout import (
    ACK_SLOTS,
    ack_slot,
    books_hooks,
    books_slots,
    possible_cpus,
    unsampled_hooks,
    unsampled_slot,
)
from tcplat_core.loader.protocol import Answer, LoadedMap, LoadedProbe, Request
from tcplat_core.plugin.hookpoints import programs_of, reporting
from tcplat_core.plugin.specs import ProbeSpec

from .fake_rows import make_record

_PAGE = mmap.PAGESIZE
_BUSY, _DISCARD = 1 << 31, 1 << 30
_HEADER = 8


def _memory(size: int) -> tuple[int, mmap.mmap]:
    fd = os.memfd_create("tcplat-fake")
    os.ftruncate(fd, size)
    return fd, mmap.mmap(fd, size)


@attrs.define(eq=False)
class FakeRing:
    """A file that :class:`tcplat_core.deliver.ring.Ring` maps as it maps a BPF ring buffer.

    Args:
        size: Bytes of data; a power of two, one page at least.
        start: Where both positions begin, as after a long run; a multiple of 8.
    """

    size: int = 1 << 16
    start: int = 0
    fd: int = attrs.field(init=False)
    _map: mmap.mmap = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.fd, self._map = _memory(2 * _PAGE + 2 * self.size)
        struct.pack_into("=Q", self._map, 0, self.start)
        struct.pack_into("=Q", self._map, _PAGE, self.start)

    @property
    def consumed(self) -> int:
        """The reader's position."""
        return int(struct.unpack_from("=Q", self._map, 0)[0])

    @property
    def produced(self) -> int:
        """The position after the last record, complete or not."""
        return int(struct.unpack_from("=Q", self._map, _PAGE)[0])

    def reserve(self, payload: bytes) -> int | None:
        """Reserve space for a record; return its position, or None if there is no space."""
        position = self.produced
        end = position + _HEADER + len(payload) + -len(payload) % 8
        if end - self.consumed >= self.size:  # the kernel never fills it to the last byte
            return None
        self._put(position + _HEADER, payload)
        self._set_length(position, len(payload) | _BUSY)
        struct.pack_into("=Q", self._map, _PAGE, end)
        return position

    def submit(self, position: int) -> None:
        """Complete a reserved record."""
        self._set_length(position, self._length(position) & ~_BUSY)

    def discard(self, position: int) -> None:
        """Discard a reserved record: the reader has to skip it."""
        self._set_length(position, self._length(position) & ~_BUSY | _DISCARD)

    def feed(self, payloads: Iterable[bytes]) -> int:
        """Reserve and submit each; return how many fitted."""
        fitted = 0
        for payload in payloads:
            position = self.reserve(payload)
            if position is not None:
                self.submit(position)
                fitted += 1
        return fitted

    def close(self) -> None:
        """Unmap, and close the fd."""
        self._map.close()
        os.close(self.fd)

    def _length(self, position: int) -> int:
        at = 2 * _PAGE + position % self.size
        return int(struct.unpack_from("=I", self._map, at)[0])

    def _set_length(self, position: int, length: int) -> None:
        self._put(position, struct.pack("=I", length))

    def _put(self, position: int, data: bytes) -> None:
        at = position % self.size
        head, tail = data[: self.size - at], data[self.size - at :]
        for copy in (2 * _PAGE, 2 * _PAGE + self.size):
            self._map[copy + at : copy + at + len(head)] = head
            self._map[copy : copy + len(tail)] = tail


@attrs.define(eq=False)
class FakeBooks:
    """A file that :class:`tcplat_core.deliver.books.Books` maps as it maps a probe's `books`.

    Args:
        hooks: Hooks of the probe.
        cpus: Possible CPUs.
    """

    hooks: int
    cpus: int = attrs.field(factory=possible_cpus)
    fd: int = attrs.field(init=False)
    _map: mmap.mmap = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        size = books_slots(self.cpus, self.hooks) * 8
        self.fd, self._map = _memory(size + -size % _PAGE)

    def count(self, hook: int, *, produced: int = 0, dropped: int = 0, cpu: int = 0) -> None:
        """Add to the counters of a hook on one CPU."""
        slot = (cpu * books_hooks(self.hooks) + hook) * 2
        self._add(slot, produced)
        self._add(slot + 1, dropped)

    def leave_out(self, hook: int, rows: int = 1, cpu: int = 0) -> None:
        """Add to the rows of a hook that --sample left out."""
        first = unsampled_slot(self.cpus, self.hooks)
        self._add(first + cpu * unsampled_hooks(self.hooks) + hook, rows)

    def acknowledge(self, packets: int = 1, cpu: int = 0) -> None:
        """Add to the bare acknowledgements without a row."""
        self._add(ack_slot(self.cpus, self.hooks) + cpu * ACK_SLOTS, packets)

    def lose_track(self, sockets: int = 1) -> None:
        """Add to the sockets that did not fit into the table of sockets."""
        self._add(books_slots(self.cpus, self.hooks) - 1, sockets)

    def close(self) -> None:
        """Unmap, and close the fd."""
        self._map.close()
        os.close(self.fd)

    def _add(self, slot: int, number: int) -> None:
        (value,) = struct.unpack_from("=Q", self._map, slot * 8)
        struct.pack_into("=Q", self._map, slot * 8, value + number)


@attrs.define(eq=False)
class FakeArray:
    """A file that a probe's poll() maps as it maps a BPF array.

    Args:
        layout: One entry, as :mod:`struct` writes it.
        entries: How many.
    """

    layout: str
    entries: int
    fd: int = attrs.field(init=False)
    _map: mmap.mmap = attrs.field(init=False)
    _stride: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        size = struct.calcsize(self.layout)
        self._stride = size + -size % 8
        size = self._stride * self.entries
        self.fd, self._map = _memory(size + -size % _PAGE)

    def set(self, index: int, *values: int | bytes) -> None:
        """Change an entry, as a handler does."""
        struct.pack_into(self.layout, self._map, index * self._stride, *values)

    def close(self) -> None:
        """Unmap, and close the fd."""
        self._map.close()
        os.close(self.fd)


@attrs.define(eq=False)
class FakeProbe:
    """A loaded probe whose handlers a test plays.

    Args:
        spec: The probe.
        ring_bytes: Size of its ring: the `ring_bytes` of the run's request.
        mechanism: Reported as the mechanism of each point that has it; others report their first.
        missing: Points that are reported as missing, and why.
        arrays: Its maps, by name.
    """

    spec: ProbeSpec
    ring_bytes: int = 1 << 16
    mechanism: str = "tracepoint"
    missing: Mapping[str, str] = attrs.field(factory=dict)
    arrays: Mapping[str, FakeArray] = attrs.field(factory=dict)
    programs: tuple[str, ...] = attrs.field(init=False)
    """In the order of their numbers in a record."""
    ring: FakeRing = attrs.field(init=False)
    books: FakeBooks = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.programs = tuple(hook.program for _, hook in reporting(self.spec.points))
        self.ring = FakeRing(self.ring_bytes)
        self.books = FakeBooks(len(self.programs))

    def emit(self, program: str, **members: int | bytes | str) -> bool:
        """Count, reserve, fill and submit, as a handler does; return False if the ring was full."""
        hook = self.programs.index(program)
        fitted = self.ring.feed([make_record(self.spec.event, hook=hook, **members)])
        self.books.count(hook, produced=1, dropped=1 - fitted)
        return bool(fitted)

    def loaded(self) -> LoadedProbe:
        """As the loader's answer has it, with fds of the session's own."""
        taken = {
            point.point: next(
                (way for way in point.ways if way.mechanism == self.mechanism), point.ways[0]
            )
            for point in self.spec.points
            if point.point not in self.missing
        }
        return LoadedProbe(
            ring_fd=os.dup(self.ring.fd),
            books_fd=os.dup(self.books.fd),
            taken={point: way.mechanism for point, way in taken.items()},
            missing=self.missing,
            programs=programs_of(self.spec.points, taken),
            maps={
                name: LoadedMap(os.dup(array.fd), array.entries)
                for name, array in self.arrays.items()
            },
        )

    def close(self) -> None:
        """Free the memory."""
        for array in self.arrays.values():
            array.close()
        self.ring.close()
        self.books.close()


@attrs.define(eq=False)
class FakeLoader:
    """Takes the place of :class:`tcplat_core.run.loader_process.LoaderProcess`.

    Args:
        probes: The probes that it "loads".
        holding: Fds that detach when they are closed; the session becomes their owner.
    """

    probes: Sequence[FakeProbe]
    holding: tuple[int, ...] = ()
    requests: list[Request] = attrs.field(factory=list, init=False)
    """The requests that it got."""

    def ask(self, request: Request, stopping: Callable[[], bool]) -> Answer | None:
        """Return an answer as if all were attached; None if the user wants to stop."""
        self.requests.append(request)
        if stopping():
            return None
        return Answer(
            probes={probe.spec.name: probe.loaded() for probe in self.probes},
            gate_fd=_memory(_PAGE)[0],
            share_fd=_memory(_PAGE)[0] if request.max_overhead else None,
            holding=self.holding,
        )

    def output(self) -> str:
        """Return the output of compiler and verifier: none."""
        return ""

    def close(self) -> None:
        """Do nothing: no process runs."""
