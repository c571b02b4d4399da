"""Records that wait for their turn, and batches of them that become rows only when asked."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import attrs
import msgspec

from tcplat_core.deliver.reorder import BY_TIME, ReorderBuffer, RingSource, RowBuffer
from tcplat_core.deliver.ring import ForeignRecordError, Ring
from tcplat_core.errors import TcplatError
from tcplat_core.event.fields import Event

from .codec import Codec
from .library import CANNOT, DONE, FOREIGN, FULL, UNKNOWN, Left, Progress, library

NO_MEMORY = "there is no memory for more records"
PIECE = 1 << 17
"""Bytes of text that are made at a time: what stays in the cache until it is written."""


@attrs.define(eq=False)
class Records(Sequence[Event]):
    """A batch of rows, in order of time; each is made when somebody looks at it.

    Args:
        codecs: How to read the records of each source.
        records: Their bytes, one after the other.
        sources: Of which source each is.
        offset_ns: Unix time minus CLOCK_MONOTONIC.
        first_ns: When the first was.
        last_ns: When the last was.
    """

    codecs: Sequence[Codec]
    records: bytes
    sources: bytes
    offset_ns: int
    first_ns: int
    last_ns: int
    _rows: tuple[Event, ...] | None = attrs.field(default=None, init=False)

    def __len__(self) -> int:
        return len(self.sources)

    @overload
    def __getitem__(self, index: int) -> Event: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Event]: ...
    def __getitem__(self, index: int | slice) -> Event | Sequence[Event]:
        return self._all()[index]

    def __iter__(self) -> Iterator[Event]:
        return iter(self._all())

    def rows(self) -> list[Event]:
        """All of them, made; the list is the caller's, the batch stays as it is."""
        return list(self._all())

    def _all(self) -> tuple[Event, ...]:
        if self._rows is None:
            self._rows = tuple(self._made())
        return self._rows

    def _made(self) -> Iterator[Event]:
        several = set(self.sources)
        if len(several) == 1:
            codec = self.codecs[self.sources[0]]
            yield from codec.decode(codec.layout.iter_unpack(self.records), self.offset_ns)
            return
        parts: dict[int, list[bytes]] = {source: [] for source in several}
        at = 0
        for source in self.sources:
            end = at + self.codecs[source].size
            parts[source].append(self.records[at:end])
            at = end
        made = {}
        for source, part in parts.items():
            codec = self.codecs[source]
            unpacked = codec.layout.iter_unpack(b"".join(part))
            made[source] = iter(codec.decode(unpacked, self.offset_ns))
        for source in self.sources:
            yield next(made[source])

    def json_lines(self, write: Callable[[memoryview | bytes], None]) -> None:
        """Hand the rows as JSON lines to `write`, in pieces of whole lines.

        A piece is to be used at once: its memory is that of the next.
        """
        lines = _lines()
        handles = (ctypes.c_void_p * len(self.codecs))(*(codec.handle for codec in self.codecs))
        out, size = _text()
        progress = Progress()
        while True:
            status = lines(
                *(handles, self.records, self.sources, len(self.sources), self.offset_ns),
                *(out, size, progress),
            )
            if status == UNKNOWN:
                self._next_codec(progress).learn(progress.block, self._next(progress))
                continue
            if progress.written:
                write(memoryview(out)[: progress.written].cast("B"))
            elif status == FULL:
                status = CANNOT  # one line is longer than a piece
            progress.written = 0
            if status == DONE:
                return
            if status == CANNOT:
                record = self._next(progress)
                write(self._next_codec(progress).line(record, self.offset_ns))
                progress.next += 1
                progress.at += len(record)

    def _next_codec(self, progress: Progress) -> Codec:
        source: int = self.sources[progress.next]
        return self.codecs[source]

    def _next(self, progress: Progress) -> bytes:
        return self.records[progress.at : progress.at + self._next_codec(progress).size]


def _lines() -> Any:
    records_c = library()
    assert records_c is not None  # noqa: S101 - there would be no Records
    return records_c.lines


@functools.cache
def _text() -> tuple[Any, int]:
    return ctypes.create_string_buffer(PIECE), PIECE


@attrs.define(eq=False)
class RecordBuffer:
    """The reorder buffer in C: a record becomes a row only when a sink looks at it.

    Args:
        rings: By source. They stay the caller's, and have to be there until close().
        codecs: By source.
    """

    rings: Sequence[Ring]
    codecs: Sequence[Codec]
    _offset_ns: int = attrs.field(default=0, init=False)
    """Unix time minus CLOCK_MONOTONIC, when it was measured last."""
    _rows: RowBuffer = attrs.field(factory=RowBuffer, init=False)
    """Rows that come from no ring."""
    _library: ctypes.CDLL = attrs.field(init=False)
    _handle: int = attrs.field(init=False)
    _rings: list[int] = attrs.field(init=False)
    _sizes: Any = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        records_c = library()
        assert records_c is not None  # noqa: S101 - it has made the codecs
        self._library = records_c
        self._handle = records_c.room_new()
        self._rings = []
        sizes = [codec.size for codec in self.codecs]
        self._sizes = (ctypes.c_uint32 * len(sizes))(*sizes)
        for source, (ring, codec) in enumerate(zip(self.rings, self.codecs, strict=True)):
            # A mapping of its own: ctypes cannot point into one that is read-only in Python.
            handle = records_c.ring_map(
                *(ring.fd, ring.size, codec.size, codec.ts_at, ring.tag_at, source)
            )
            if not handle or not self._handle:
                raise MemoryError
            self._rings.append(handle)
            ring.by_c = (ctypes.c_uint64 * 256).from_address(records_c.ring_taken(handle))

    def close(self) -> None:
        """Unmap the rings, and let go of what waits. Again it does nothing."""
        for ring, handle in zip(self.rings, self._rings, strict=False):
            ring.by_c = list(ring.by_c)
            self._library.ring_unmap(handle)
        self._rings.clear()
        if self._handle:
            self._library.room_free(self._handle)
        self._handle = 0

    def take(self, source: int, most: int, offset_ns: int) -> int:
        """See :meth:`ReorderBuffer.take`."""
        self._offset_ns = offset_ns
        last_ns = self._library.room_take(self._handle, self._rings[source], most)
        if last_ns == FOREIGN:
            raise ForeignRecordError(f"a record that has not {self.codecs[source].size} bytes")
        if last_ns < 0:
            raise TcplatError(NO_MEMORY)
        return int(last_ns)

    def feed(self, rows: Sequence[Event]) -> None:
        """See :meth:`ReorderBuffer.feed`."""
        self._rows.feed(rows)

    @property
    def waiting(self) -> bool:
        """See :attr:`ReorderBuffer.waiting`."""
        return bool(self._library.room_oldest_ns(self._handle)) or self._rows.waiting

    def leave(self, before_ns: int) -> Sequence[Event]:
        """See :meth:`ReorderBuffer.leave`."""
        rows, records = self._rows.leave(before_ns), self._records(before_ns)
        if records is None:
            return rows
        return sorted([*records, *rows], key=BY_TIME) if rows else records

    def _records(self, before_ns: int) -> Records | None:
        left = Left()
        if self._library.room_leave(self._handle, before_ns, self._sizes, left):
            raise TcplatError(NO_MEMORY)
        if not left.count:
            return None
        return Records(
            self.codecs,
            ctypes.string_at(left.records, left.bytes),
            ctypes.string_at(left.sources, left.count),
            self._offset_ns,
            left.first_ns,
            left.last_ns,
        )


def reorder_buffer(sources: Sequence[RingSource]) -> ReorderBuffer:
    """Return the buffer in C; the one in Python where a source has no codec for C."""
    codecs = [one.codec for one in sources if one.codec]
    if len(codecs) < len(sources):
        return RowBuffer(sources)
    return RecordBuffer([one.ring for one in sources], codecs)


_encoder = msgspec.json.Encoder()


def json_lines(batch: Sequence[Event], write: Callable[[memoryview | bytes], None]) -> None:
    """Pass the rows of a batch to `write`, as JSON lines.

    `write` is called several times, with whole lines; a memoryview is valid until it returns.
    Rows that no sink has read become text without being created.
    """
    if isinstance(batch, Records):
        batch.json_lines(write)
    elif batch:
        write(_encoder.encode_lines(batch))
