"""The reorder buffer in C, and batches of records that become rows on demand."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import attrs
import msgspec

from tcplat_core.deliver.reorder import BY_TIME, ReorderBuffer, RingSource, RowBuffer
from tcplat_core.deliver.ring import RecordSizeError, Ring
from tcplat_core.errors import TcplatError
from tcplat_core.event.fields import Event

from .codec import Codec
from .library import CANNOT, DONE, FULL, UNKNOWN, WRONG_SIZE, Popped, Progress, library
from .lines import Lines
from .slim import SLIM_NUMBERS, SlimBatch, SlimRows, SlimTexts

NO_MEMORY = "there is no memory for more records"
_MOST_TEXTS = 65_536
"""Values of slim rows in one column, after which all are forgotten."""
_SLIM_WIDTH = len(SLIM_NUMBERS) + 1
"""Numbers of a slim row: those of SLIM_NUMBERS, and the offset of its record."""
PIECE = 1 << 17
"""Bytes of text per write: few enough to stay in the CPU's cache until written."""


@attrs.define(eq=False)
class Records(SlimBatch):
    """A batch of rows in order of time; the rows are made at the first access.

    Args:
        codecs: How to read the records of each source.
        records: Their bytes, one after the other.
        sources: Index of the source of each record.
        offset_ns: Unix time minus CLOCK_MONOTONIC, ns.
        first_ns: Time of the first row.
        last_ns: Time of the last row.
        texts: Of slim rows; shared by all batches of these codecs.
    """

    codecs: Sequence[Codec]
    records: bytes
    sources: bytes
    offset_ns: int
    first_ns: int
    last_ns: int
    texts: SlimTexts
    _slim: SlimRows | None = attrs.field(default=None, init=False)
    _rows: tuple[Event, ...] | None = attrs.field(default=None, init=False)

    def __len__(self) -> int:
        return len(self.sources)

    @overload
    def __getitem__(self, index: int) -> Event: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Event]: ...
    def __getitem__(self, index: int | slice) -> Event | Sequence[Event]:
        if isinstance(index, int) and self._rows is None:
            return self._row(range(len(self))[index])
        return self._all()[index]

    def __iter__(self) -> Iterator[Event]:
        return iter(self._all())

    def rows(self) -> list[Event]:
        """Return all rows as a new list."""
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

    def slim(self) -> SlimRows | None:
        """See :class:`SlimRows`."""
        if self._slim is None:
            codecs = [self.codecs[source] for source in set(self.sources)]
            # A batch that was kept is older than the texts whose numbers records.c has now.
            if all(codec.slim and codec.texts is self.texts for codec in codecs):
                self._slim = self._made_slim()
        return self._slim

    def _made_slim(self) -> SlimRows | None:
        numbers = (ctypes.c_int64 * (len(self.sources) * _SLIM_WIDTH))()
        progress = Progress()
        while True:
            status = _library().slim_rows(
                *(self._handles(), self.records, self.sources, len(self.sources)),
                *(self.offset_ns, numbers, progress),
            )
            if status != UNKNOWN:
                break
            self._learn(progress)
        if status == CANNOT:
            return None
        view = memoryview(numbers).cast("B").cast("q")
        hooks, users, ends, states, flags, ifnames = self.texts.columns
        return SlimRows(view, _SLIM_WIDTH, hooks, users, ends, states, flags, ifnames, self._row)

    def _row(self, index: int) -> Event:
        """Return one row, without making the others where slim rows can be made."""
        slim = self.slim()
        if slim is None:
            return self._all()[index]
        begin = slim.numbers[index * _SLIM_WIDTH + _SLIM_WIDTH - 1]
        codec = self.codecs[self.sources[index]]
        record = self.records[begin : begin + codec.size]
        (row,) = codec.decode(codec.layout.iter_unpack(record), self.offset_ns)
        return row

    def json_lines(self, write: Callable[[memoryview | bytes], None]) -> None:
        """Pass the rows as JSON lines to `write`, in pieces of whole lines.

        A piece is valid only until `write` returns: its memory is reused.
        """
        lines, handles = _library().lines, self._handles()
        out, size = _text()
        progress = Progress()
        while True:
            status = lines(
                *(handles, self.records, self.sources, len(self.sources), self.offset_ns),
                *(out, size, progress),
            )
            if status == UNKNOWN:
                self._learn(progress)
                continue
            if progress.written:
                write(memoryview(out)[: progress.written].cast("B"))
            elif status == FULL:
                status = CANNOT  # a line is longer than a piece
            progress.written = 0
            if status == DONE:
                return
            if status == CANNOT:
                record = self._next(progress)
                write(self._next_codec(progress).line(record, self.offset_ns))
                progress.next += 1
                progress.at += len(record)

    def _handles(self) -> ctypes.Array[ctypes.c_void_p]:
        return (ctypes.c_void_p * len(self.codecs))(*(codec.handle for codec in self.codecs))

    def _learn(self, progress: Progress) -> None:
        self._next_codec(progress).learn(progress.block, self._next(progress))

    def _next_codec(self, progress: Progress) -> Codec:
        source: int = self.sources[progress.next]
        return self.codecs[source]

    def _next(self, progress: Progress) -> bytes:
        return self.records[progress.at : progress.at + self._next_codec(progress).size]


def _library() -> ctypes.CDLL:
    records_c = library()
    assert records_c is not None  # noqa: S101 - there would be no Records
    return records_c


@functools.cache
def _text() -> tuple[Any, int]:
    return ctypes.create_string_buffer(PIECE), PIECE


@attrs.define(eq=False)
class RecordBuffer:
    """The reorder buffer in C: a record becomes a row only when a sink reads it.

    Args:
        rings: The ring of each source. The caller closes them, after close().
        codecs: The codec of each source.
    """

    rings: Sequence[Ring]
    codecs: Sequence[Codec]
    _offset_ns: int = attrs.field(default=0, init=False)
    """The last measured Unix time minus CLOCK_MONOTONIC, ns."""
    _texts: SlimTexts = attrs.field(factory=SlimTexts, init=False)
    """What the codecs have learned the numbers of."""
    _rows: RowBuffer = attrs.field(factory=RowBuffer, init=False)
    """Holds rows that come from no ring, but from poll()."""
    _library: ctypes.CDLL = attrs.field(init=False)
    _handle: int = attrs.field(init=False)
    _rings: list[int] = attrs.field(init=False)
    _sizes: Any = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        records_c = library()
        assert records_c is not None  # noqa: S101 - it has made the codecs
        self._library = records_c
        self._forget()
        self._handle = records_c.buffer_new()
        self._rings = []
        sizes = [codec.size for codec in self.codecs]
        self._sizes = (ctypes.c_uint32 * len(sizes))(*sizes)
        for source, (ring, codec) in enumerate(zip(self.rings, self.codecs, strict=True)):
            # A separate mapping: ctypes cannot point into a mapping that is read-only in Python.
            handle = records_c.ring_map(
                *(ring.fd, ring.size, codec.size, codec.ts_at, ring.tag_at, source)
            )
            if not handle or not self._handle:
                raise MemoryError
            self._rings.append(handle)
            ring.by_c = (ctypes.c_uint64 * 256).from_address(records_c.ring_taken(handle))

    def _forget(self) -> None:
        self._texts = SlimTexts()
        for codec in self.codecs:
            codec.use(self._texts)

    def close(self) -> None:
        """Unmap the rings, and drop the records held back. Idempotent."""
        for ring, handle in zip(self.rings, self._rings, strict=False):
            ring.by_c = list(ring.by_c)
            self._library.ring_unmap(handle)
        self._rings.clear()
        if self._handle:
            self._library.buffer_free(self._handle)
        self._handle = 0

    def take(self, source: int, most: int, offset_ns: int) -> int:
        """See :meth:`ReorderBuffer.take`."""
        self._offset_ns = offset_ns
        last_ns = self._library.buffer_take(self._handle, self._rings[source], most)
        if last_ns == WRONG_SIZE:
            raise RecordSizeError(f"a record that has not {self.codecs[source].size} bytes")
        if last_ns < 0:
            raise TcplatError(NO_MEMORY)
        return int(last_ns)

    def feed(self, rows: Sequence[Event]) -> None:
        """See :meth:`ReorderBuffer.feed`."""
        self._rows.feed(rows)

    @property
    def waiting(self) -> bool:
        """See :attr:`ReorderBuffer.waiting`."""
        return bool(self._library.buffer_oldest_ns(self._handle)) or self._rows.waiting

    def pop(self, before_ns: int) -> Sequence[Event]:
        """See :meth:`ReorderBuffer.pop`."""
        rows, records = self._rows.pop(before_ns), self._records(before_ns)
        if records is None:
            return rows
        return sorted([*records, *rows], key=BY_TIME) if rows else records

    def _records(self, before_ns: int) -> Records | None:
        popped = Popped()
        if self._library.buffer_pop(self._handle, before_ns, self._sizes, popped):
            raise TcplatError(NO_MEMORY)
        if not popped.count:
            return None
        if self._texts.longest > _MOST_TEXTS:
            self._forget()
        return Records(
            self.codecs,
            ctypes.string_at(popped.records, popped.bytes),
            ctypes.string_at(popped.sources, popped.count),
            self._offset_ns,
            popped.first_ns,
            popped.last_ns,
            self._texts,
        )


def reorder_buffer(sources: Sequence[RingSource]) -> ReorderBuffer:
    """Return the buffer in C, or the one in Python if a source has no codec for C."""
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
    if isinstance(batch, Records | Lines):
        batch.json_lines(write)
    elif batch:
        write(_encoder.encode_lines(batch))
