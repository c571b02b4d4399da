"""Maps a BPF ring buffer and a probe's books, and drains the ring in batches.

Layout of the mapping (kernel/bpf/ringbuf.c): a page with the consumer's position,
a page with the producer's, then the data, mapped twice in a row so that no record
is split at the end. A record is u32 length, u32 offset, then the payload,
rounded up to 8 bytes.
"""

from __future__ import annotations

import itertools
import mmap
import struct
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import attrs

from tcplat_core.errors import TcplatError

_BUSY = 1 << 31
_DISCARD = 1 << 30
_HEADER = 8
_U64 = struct.Struct("=Q")
BATCH = 1024
"""Records per batch: larger ones only cost more garbage collection."""


class RecordSizeError(TcplatError):
    """The ring holds a record that the schema does not describe."""


@attrs.define(eq=False)
class Ring:
    """One ring of records of one size.

    Reading needs neither root nor bpf(2): only the map's fd.

    Args:
        fd: fd of a BPF_MAP_TYPE_RINGBUF, or a file of the same layout.
        size: Bytes of data; a power of two.
        layout: The record, without the ring's own header.
        tag_at: Offset in the record of the byte by which `taken` counts.
        ts_at: Offset of the u64 timestamp.
    """

    fd: int
    size: int
    layout: struct.Struct
    tag_at: int = 0
    ts_at: int = 0
    by_c: Iterable[int] = attrs.field(default=(), init=False)
    """Number of records taken by deliver/fast/records.c, by the byte at `tag_at`."""
    _taken: Counter[int] = attrs.field(factory=Counter, init=False)
    _consumer: mmap.mmap = attrs.field(init=False)
    _rest: mmap.mmap = attrs.field(init=False)
    _position: memoryview = attrs.field(init=False)
    _produced: memoryview = attrs.field(init=False)
    _data: memoryview = attrs.field(init=False)
    _words: memoryview = attrs.field(init=False)
    _stride: int = attrs.field(init=False)
    _record: struct.Struct = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        page = mmap.PAGESIZE
        self._consumer = mmap.mmap(self.fd, page)
        self._rest = mmap.mmap(self.fd, page + 2 * self.size, prot=mmap.PROT_READ, offset=page)
        self._position = memoryview(self._consumer)[:8].cast("Q")
        whole = memoryview(self._rest)
        self._produced = whole[:8].cast("Q")
        self._data = whole[page:]
        self._words = self._data.cast("I")
        self._stride = _HEADER + self.layout.size + -self.layout.size % 8
        pad = self._stride - _HEADER - self.layout.size
        # The header is skipped here: drain() has checked it.
        self._record = struct.Struct(f"={_HEADER}x{self.layout.format.removeprefix('=')}{pad}x")

    def drain(self, most: int = sys.maxsize) -> Iterator[list[tuple[Any, ...]]]:
        """Yield batches of committed records, oldest first, of those in the ring at the call.

        Each batch is a copy: its space in the ring is already released.
        Stops early at a record that is reserved and not submitted yet; the next call yields it.

        Args:
            most: Number of records to stop at.

        Raises:
            RecordSizeError: A record of another size.
        """
        # One aligned 8-byte load each. x86 does not reorder loads; on other machines nothing but
        # the interpreter's work between them orders them.
        end = self._produced[0]
        here = self._position[0]
        while here < end and most:
            start = here & (self.size - 1)
            count = min((end - here) // self._stride, BATCH, most)
            words = self._words[
                start // 4 : (start + count * self._stride) // 4 : self._stride // 4
            ]
            lengths = words.tolist()
            if not count:  # less than one record of this size is there
                self._committed(self._words[start // 4 : start // 4 + 1].tolist())
            count = self._committed(lengths)
            if not count:
                return
            del lengths[count:]
            records = list(
                self._record.iter_unpack(self._data[start : start + count * self._stride])
            )
            first = start + _HEADER + self.tag_at
            tags = bytes(self._data[first : start + count * self._stride : self._stride])
            if lengths.count(self.layout.size) != count:
                kept = [not length & _DISCARD for length in lengths]
                records = list(itertools.compress(records, kept))
                tags = bytes(itertools.compress(tags, kept))
            # A column at a time: a loop over the records would cost as much as unpacking them.
            for tag in set(tags):
                self._taken[tag] += tags.count(tag)
            here += count * self._stride
            self._position[0] = here
            most -= len(records)
            yield records

    @property
    def taken(self) -> Counter[int]:
        """Number of records taken out of the ring, by the byte at `tag_at`."""
        return self._taken + Counter(dict(enumerate(self.by_c)))

    def pending(self) -> bool:
        """Return whether the ring holds records."""
        return self._produced[0] != self._position[0]

    @property
    def crowded(self) -> bool:
        """Half full or more: the ring may be full before all of it is drained."""
        return self._used() * 2 >= self.size

    def full_since_ns(self) -> int:
        """Return the time of the last record, ns, if the ring is full; 0 if not, or unknown.

        Every later event was dropped: no record fits until some are drained.
        """
        # The condition of bpf_ringbuf_reserve().
        if self._used() + self._stride < self.size:
            return 0
        return self._time_at(self._produced[0] - self._stride)

    def oldest_ns(self) -> int:
        """Return the time of the oldest record, ns; 0 if there is none, or it is not complete."""
        return self._time_at(self._position[0]) if self.pending() else 0

    def _time_at(self, position: int) -> int:
        """Return the time of the record at a position, ns; 0 if it is busy or discarded."""
        start = position & self.size - 1
        if self._words[start // 4] & (_BUSY | _DISCARD):
            return 0
        ts_ns: int = _U64.unpack_from(self._data, start + _HEADER + self.ts_at)[0]
        return ts_ns

    def _used(self) -> int:
        return self._produced[0] - self._position[0]

    def _committed(self, lengths: list[int]) -> int:
        """Return how many of the records are complete, from the first on."""
        if lengths.count(self.layout.size) == len(lengths):
            return len(lengths)
        for index, length in enumerate(lengths):
            if length & _BUSY:
                return index
            if length & ~_DISCARD != self.layout.size:
                raise RecordSizeError(
                    f"a record of {length & ~_DISCARD} bytes where {self.layout.size} were expected"
                )
        return len(lengths)

    def close(self) -> None:
        """Unmap. The caller closes the fd."""
        for view in (self._position, self._produced, self._words, self._data):
            view.release()
        self._consumer.close()
        self._rest.close()
