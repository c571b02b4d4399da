"""Batches of JSON lines that lines.c has read: they become rows on demand (D124)."""

from __future__ import annotations

import ctypes
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_type_hints, overload

import attrs
import msgspec

from tcplat_core.event.fields import SCHEMA_VERSION, Event, fields

from .library import Form, Part, library
from .slim import FLAGS, HOOK, IFNAME, PIECES, SLIM_NUMBERS, TEXTS, SlimBatch, SlimRows, interned

_WIDTH = len(SLIM_NUMBERS) + 5
"""Numbers of a row: those of SLIM_NUMBERS, of texts of its own (two), form, begin and end."""
_OWN_TEXT, _OWN_TEXT_OR_NULL = len(SLIM_NUMBERS), len(SLIM_NUMBERS) + 1
_FORM, _BEGIN, _END = range(_WIDTH - 3, _WIDTH)
_SHORTEST = 256
"""Bytes of a line, of which the capacity for rows follows; fewer where lines are longer."""
COUNT, NULLABLE, SIGNED, MICROS, TEXT, LAST = range(6)
"""`enum kind`."""
_NOWHERE = 0xFF
_FULL = 12_288
"""Texts of a column, after which all are forgotten; a batch adds a few hundred at most."""

_COLUMNS = dict(zip(PIECES, range(HOOK, HOOK + len(TEXTS)), strict=True))
_KINDS = {
    "int": (COUNT, _NOWHERE),
    "int or null": (SIGNED, _NOWHERE),
    "float or null": (MICROS, _NOWHERE),
    "str": (TEXT, _OWN_TEXT),
    "str or null": (TEXT, _OWN_TEXT_OR_NULL),
}
"""Type of a field -> how it is read, and to which column."""
_json = msgspec.json.Encoder()


def _parts(probe: str, event: type[Event]) -> list[tuple[int, int, bytes, int]] | None:
    """Return kind, column, literal and the bytes of it to step over, for each part of a line."""
    parts: list[tuple[int, int, bytes, int]] = []
    within: set[str] = set()
    for field in fields(event):
        name, begin = field.name, b',"%s":' % field.name.encode()
        if name == "v":
            continue
        if name == "ts_ns":
            begin = b'{"v":%d%s' % (SCHEMA_VERSION, begin)
        if name in within:
            continue
        column = SLIM_NUMBERS.index(name) if name in SLIM_NUMBERS else _NOWHERE
        if name in PIECES:
            within.update(PIECES[name])
            follows = _json.encode(probe) + b',"point":' if name == "probe" else b""
            parts.append((TEXT, _COLUMNS[name], begin + follows, len(begin)))
        elif field.type in _KINDS:
            kind, to = _KINDS[field.type]
            if kind == SIGNED and not field.own:
                kind = NULLABLE
            column = to if kind in (TEXT, MICROS) else column
            parts.append((kind, column, begin, len(begin)))
        else:
            return None
    parts.append((LAST, _NOWHERE, b"}", 1))
    return parts if all(len(part[2]) < ctypes.sizeof(Part) - 4 for part in parts) else None


def _piece_class(names: Sequence[str]) -> type[msgspec.Struct]:
    hints = _hints()
    return msgspec.defstruct("Piece", [(name, hints[name]) for name in names])


@functools.cache
def _hints() -> Mapping[str, Any]:
    """Return the types of a row's fields; cached, because evaluating them takes 1 ms."""
    return get_type_hints(Event, include_extras=True)


@attrs.define(eq=False)
class _Column:
    """The texts of a column, each checked once.

    Args:
        names: The fields of a text; none for a single value.
        hint: Its type then.
        values: By the text's number; None for one that tcplat would not write so.
    """

    names: Sequence[str]
    hint: Any = None
    values: list[Any] = attrs.field(factory=list)
    odd: set[int] = attrs.field(factory=set)
    """Numbers of the texts that are not as tcplat writes them."""
    handle: int = 0
    _decode: Callable[[bytes], Any] = attrs.field(init=False)

    @_decode.default
    def _decoder(self) -> Callable[[bytes], Any]:
        return msgspec.json.Decoder(_piece_class(self.names) if self.names else self.hint).decode

    def learn(self, text: bytes) -> Any:
        """Check a text, and return its values; None if tcplat would not write it so."""
        if not text.isascii() or b"\\" in text or b"\x7f" in text:
            return None  # to be escaped, perhaps
        data = b'{"%s":%s}' % (self.names[0].encode(), text) if self.names else text
        try:
            value = self._decode(data)
        except ValueError:
            return None
        if _json.encode(value) != data:
            return None
        if not self.names:
            return (value,)
        return interned(getattr(value, name) for name in self.names)


class LineReader:
    """Reads chunks of JSON lines.

    Args:
        knows_hook: Whether rows of a hook may be read: probe, point, func, attach.
    """

    _columns: Sequence[_Column] = ()
    """Of the class for __del__, if a signal interrupts __init__."""

    def __init__(self, knows_hook: Callable[[tuple[str, ...]], bool]) -> None:
        records_c = library()
        assert records_c is not None  # noqa: S101 - see line_reader()
        self._library = records_c
        self._knows_hook = knows_hook
        self._forms: list[tuple[str, Any, Callable[[bytes], Event]]] = []
        self._decoders: list[Callable[[bytes], Event]] = []
        self._c_forms: Any = None
        pieces = [_Column(names) for names in PIECES.values()]
        self._columns = [*pieces, _Column((), str), _Column((), str | None)]
        handles = (ctypes.c_void_p * _WIDTH)()
        for at, column in enumerate(self._columns):
            column.handle = records_c.reader_new()
            if not column.handle:
                raise MemoryError
            handles[HOOK + at] = column.handle
        self._handles = handles

    def close(self) -> None:
        """Free memory. Idempotent."""
        for column in self._columns:
            if column.handle:
                self._library.reader_free(column.handle)
            column.handle = 0

    def __del__(self) -> None:
        self.close()

    def know(self, probe: str, event: type[Event], decode: Callable[[bytes], Event]) -> None:
        """Read the rows of a probe that have the fields of a class."""
        parts = _parts(probe, event)
        # As capture/rows.py: the last class of a probe.
        self._forms = [form for form in self._forms if form[0] != probe]
        if parts is not None:
            made = (Part * len(parts))(
                *(Part(kind, to, len(text), skip, text) for kind, to, text, skip in parts)
            )
            self._forms.append((probe, made, decode))
        self._decoders = [form[2] for form in self._forms]
        self._c_forms = (Form * len(self._forms))(
            *(Form(len(parts), ctypes.addressof(parts)) for _, parts, _ in self._forms)
        )

    def read(self, data: bytes) -> Lines | None:
        """Return the rows of whole lines; None if any of them is not as tcplat writes it."""
        if not self._forms or not data:
            return None
        for column in self._columns:
            if len(column.values) > _FULL:
                self._library.reader_forget(column.handle)
                column.values, column.odd = [], set()
        most = len(data) // _SHORTEST + 1
        rows = (ctypes.c_int64 * (most * _WIDTH))()
        ordered = ctypes.c_uint32()
        count = self._library.read_lines(
            *(self._handles, self._c_forms, len(self._forms), data, len(data)),
            *(rows, _WIDTH, most, ordered),
        )
        numbers = memoryview(rows).cast("B").cast("q")[: max(count, 0) * _WIDTH]
        sound = self._learn(numbers)
        if count <= 0 or not sound:
            return None
        texts = [column.values for column in self._columns]
        return Lines(data, numbers, texts, self._decoders, bool(ordered.value))

    def _learn(self, numbers: memoryview) -> bool:
        """Check the texts that are new; return whether all texts of these rows are sound."""
        for at, column in enumerate(self._columns):
            begin = len(column.values)
            for number in range(begin, self._library.reader_count(column.handle)):
                length = ctypes.c_uint32()
                text = self._library.reader_text(column.handle, number, length)
                value = column.learn(ctypes.string_at(text, length.value))
                if at == 0 and value is not None and not self._knows_hook(value):
                    value = None
                if value is None:
                    column.odd.add(number)
                if HOOK + at in (FLAGS, IFNAME):
                    value = value and value[0]
                column.values.append(value)
            if column.odd and not column.odd.isdisjoint(numbers[HOOK + at :: _WIDTH]):
                return False
        return True


def line_reader(knows_hook: Callable[[tuple[str, ...]], bool]) -> LineReader | None:
    """Return a reader in C; None without it."""
    return LineReader(knows_hook) if library() is not None else None


@attrs.define(eq=False)
class Lines(SlimBatch):
    """A batch of rows that were read from lines; the rows are made at the first access.

    Args:
        data: The lines, and perhaps others.
        numbers: Of all rows, as SlimRows has them.
        texts: Values of the texts, by column.
        decoders: Make a row of a line, by the line's form.
        ordered: The rows are in order of time.
    """

    data: bytes
    numbers: memoryview
    texts: Sequence[Sequence[Any]]
    decoders: Sequence[Callable[[bytes], Event]]
    ordered: bool
    _rows: list[Event] | None = attrs.field(default=None, init=False)

    @property
    def first_ns(self) -> int:
        """Time of the first row."""
        return int(self.numbers[0])

    @property
    def last_ns(self) -> int:
        """Time of the last row."""
        return int(self.numbers[-_WIDTH])

    def times(self) -> list[int]:
        """Return the time of each row."""
        return self.numbers[::_WIDTH].tolist()

    def hooks(self) -> Counter[tuple[str, str, str, str]]:
        """Return how many rows have which probe, point, func and attach."""
        known = self.texts[0]
        found = Counter(self.numbers[HOOK::_WIDTH].tolist())
        return Counter({known[number]: count for number, count in found.items()})

    def __len__(self) -> int:
        return len(self.numbers) // _WIDTH

    @overload
    def __getitem__(self, index: int) -> Event: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Event]: ...
    def __getitem__(self, index: int | slice) -> Event | Sequence[Event]:
        if self._rows is not None:
            return self._rows[index]
        if isinstance(index, int):
            return self._row(range(len(self))[index])
        first, last, step = index.indices(len(self))
        if step != 1 or last <= first:
            return self.rows()[index]
        numbers = self.numbers[first * _WIDTH : last * _WIDTH]
        return Lines(self.data, numbers, self.texts, self.decoders, self.ordered)

    def __iter__(self) -> Iterator[Event]:
        return iter(self.rows())

    def rows(self) -> list[Event]:
        """Return all rows."""
        if self._rows is None:
            self._rows = [self._row(index) for index in range(len(self))]
        return self._rows

    def _row(self, index: int) -> Event:
        at = index * _WIDTH
        form, begin, end = self.numbers[at + _FORM : at + _END + 1]
        return self.decoders[form](self.data[begin:end])

    def slim(self) -> SlimRows:
        """See :class:`SlimRows`."""
        texts = self.texts
        return SlimRows(
            self.numbers,
            _WIDTH,
            hooks=texts[0],
            users=texts[1],
            ends=texts[2],
            states=texts[3],
            flags=texts[4],
            ifnames=texts[5],
            row=self._row,
        )

    def json_lines(self, write: Callable[[memoryview | bytes], None]) -> None:
        """Pass the rows as JSON lines to `write`: the lines themselves."""
        begin, end = self.numbers[_BEGIN], self.numbers[-1] + 1
        write(self.data if end - begin == len(self.data) else self.data[begin:end])
