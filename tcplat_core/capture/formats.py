"""Splits the bytes of a capture into frames: JSON lines or msgpack maps.

A capture may be hostile. So each byte is examined a bounded number of times, however small the
pieces in which it comes, and no more than the largest frame is kept.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, cast

import attrs
import msgpack
import msgspec

from tcplat_core.event.fields import SCHEMA_VERSION, Event

Rows = TypeVar("Rows")

LONGEST = 1 << 20
"""Most bytes of a line or map; tcplat writes no longer one."""


@attrs.frozen
class Damage:
    """Bytes that are not a frame, and the reason."""

    reason: str = "it is damaged, or not part of a capture"


class Format(Protocol):
    """Turns bytes into frames: lines or maps.

    The frames of take_all() can be given back and taken one by one. If one of them is not part of a
    capture, reject() makes frames that begin inside it available.
    """

    noun: str
    head: re.Pattern[bytes]
    """The beginning of a row as tcplat writes it, up to the probe."""

    @property
    def torn(self) -> bool:
        """Whether the frame from take() is the last, and is cut short."""

    def feed(self, chunk: bytes) -> None:
        """Add bytes; all frames before them must have been taken."""

    def end(self) -> None:
        """Note the end of the bytes."""

    def take_all(self) -> tuple[list[bytes], bytes] | None:
        """Return all whole frames, and their bytes; None if other bytes are between them."""

    def give_back(self) -> None:
        """Undo take_all(), to take its frames one by one."""

    def take(self) -> bytes | Damage | None:
        """Return the next frame, or Damage; None if more bytes are needed."""

    def reject(self) -> None:
        """Note that the frame from take() is not part of a capture."""

    def decoder(self, event: type[Event]) -> Callable[[bytes], Event]:
        """From bytes to a row."""

    def value(self, data: bytes) -> Any:
        """From bytes to whatever they are."""

    def encode(self, rows: Sequence[Event]) -> bytes:
        """As a sink of ours would write these rows."""


class Jsonl:
    """A frame is a line."""

    noun = "line"
    head = re.compile(rb'\{"v":%d,"ts_ns":\d+,"time_ns":\d+,"probe":"([^"\\]+)"' % SCHEMA_VERSION)

    def __init__(self) -> None:
        self.value = msgspec.json.Decoder().decode
        self.encode = msgspec.json.Encoder().encode_lines
        self._rest = bytearray()
        """The beginning of a line."""
        self._data = b""
        self._lines: deque[bytes | Damage] = deque()
        self._skipping = self._damaged = self._ended = self._cut = False
        self._divided = True

    @property
    def torn(self) -> bool:
        """It is at the end, where a newline should be."""
        return self._cut and not self._lines

    def feed(self, chunk: bytes) -> None:
        """Take more bytes."""
        if self._skipping:
            _, newline, chunk = chunk.partition(b"\n")
            if not newline:
                return
            self._skipping = False
        cut = chunk.rfind(b"\n") + 1
        self._data, self._damaged = b"", False
        if cut:
            self._data = bytes(self._rest) + chunk[:cut]
            self._rest.clear()
            self._divided = False
        self._rest += memoryview(chunk)[cut:]
        if len(self._rest) > LONGEST:
            self._rest.clear()
            self._skipping = self._damaged = True
            self._divide()
            self._lines.append(Damage("it is too long"))

    def _divide(self) -> None:
        """Divide the bytes into lines, unless that was done: seldom, as take_data() is first."""
        if not self._divided:
            self._divided = True
            self._lines.extend(self._data.split(b"\n"))
            self._lines.pop()

    def take_data(self, read: Callable[[bytes], Rows]) -> Rows | None:
        """Return what `read` makes of all lines; None if it cannot, or if one is not whole."""
        if self._divided or self._damaged:
            return None
        rows = read(self._data)
        self._divided = rows is not None
        return rows

    def end(self) -> None:
        """Take the rest as a line."""
        self._ended = True
        if self._rest:
            self._cut = True
            self._lines.append(bytes(self._rest))

    def take_all(self) -> tuple[list[bytes], bytes] | None:
        """All lines, unless one is too long or has no end."""
        self._taken: list[bytes] = []
        if self._ended or self._damaged:
            return None
        self._divide()
        self._taken = cast("list[bytes]", list(self._lines))
        self._lines.clear()
        return self._taken, self._data

    def give_back(self) -> None:
        """Put the lines back, so that they are taken again."""
        self._lines.extend(self._taken)

    def take(self) -> bytes | Damage | None:
        """Return the next line."""
        self._divide()
        return self._lines.popleft() if self._lines else None

    def reject(self) -> None:
        """Do nothing: no line begins within another."""

    def decoder(self, event: type[Event]) -> Callable[[bytes], Event]:
        """From a line to a row."""
        return msgspec.json.Decoder(event).decode


START = re.compile(rb"(?:[\x80-\x8f]|\xde..|\xdf....)\xa1v", re.DOTALL)
"""The beginning of each map that tcplat writes: its version."""
_SPLIT = 6
"""Most bytes of START that may be at the end of a chunk."""
_FIRST_STEP, _STEP = 1 << 8, 1 << 14
"""Bytes per feed of the unpacker, first and later; small, because it copies them."""
_CREDIT = 8 << 20
_PER_BYTE = 8
"""Limit of bytes that are examined again inside rejected frames: a base, and a number per byte of
the capture. Beyond it, frames inside a rejected frame are lost."""


class Msgpack:
    """A frame is a map that begins with its version."""

    noun = "map"
    head = re.compile(
        rb"(?:[\x80-\x8f]|\xde..)\xa1v"
        + bytes([SCHEMA_VERSION])
        + rb"\xa5ts_ns(?:[\x00-\x7f]|\xcc.|\xcd..|\xce.{4}|\xcf.{8})"
        rb"\xa7time_ns(?:[\x00-\x7f]|\xcc.|\xcd..|\xce.{4}|\xcf.{8})"
        rb"\xa5probe(?:[\xa0-\xbf]|\xd9.)([\w.-]+)\xa5point",
        re.DOTALL,
    )

    def __init__(self) -> None:
        self._encode_one = msgspec.msgpack.Encoder().encode
        self.value = msgspec.msgpack.Decoder().decode
        self._data = bytearray()
        self._begin = 0
        """Begin of the last frame or frames taken."""
        self._at = 0
        """End of the last frame taken."""
        self._credit = _CREDIT
        self._damaged = self._damaged_before = False
        """The bytes before `_at` are damaged, and that was reported; the same before take_all()."""
        self._ended = self._failed = False
        self._origin = self._fed = self._scanned = 0
        """Offsets where the unpacker began, how far it was fed, and how far it has read."""
        self._step = _FIRST_STEP
        self._restart()

    @property
    def torn(self) -> bool:
        """Whether the last frame ends with the data."""
        return self._ended and self._at >= len(self._data)

    def feed(self, chunk: bytes) -> None:
        """Take more bytes."""
        if self._at:
            del self._data[: self._at]
            self._origin -= self._at
            self._fed -= self._at
            self._begin = self._at = 0
        self._data += chunk
        self._credit = min(_CREDIT * 4, self._credit + _PER_BYTE * len(chunk))

    def end(self) -> None:
        """Note that no more bytes come."""
        self._ended = True

    def take_all(self) -> tuple[list[bytes], bytes] | None:
        """Return all whole maps; None if other bytes are between them."""
        begin, self._damaged_before = self._at, self._damaged
        frames = []
        while (frame := self.take()) is not None:
            if isinstance(frame, Damage):
                self._begin = begin
                return None
            frames.append(frame)
        self._begin = begin
        return frames, bytes(memoryview(self._data)[begin : self._at])

    def give_back(self) -> None:
        """Put the maps back, so that they are taken again."""
        self._at, self._damaged = self._begin, self._damaged_before
        self._restart()

    def take(self) -> bytes | Damage | None:
        """Return the next map, or the damaged bytes before it."""
        while self._at < len(self._data):
            self._begin, reported = self._at, self._damaged
            if not START.match(self._data, self._at):
                if not self._skip_damage():
                    return None
            elif self._whole():
                self._at = self._origin + self._unpacker.tell()
                self._damaged = False
                return bytes(self._data[self._begin : self._at])
            elif not self._failed:
                return None
            else:
                self._continue_within(self._scanned)
            self._damaged = True
            if not reported:
                return Damage()
        return None

    def reject(self) -> None:
        """Continue within the map that take() returned."""
        end = self._at
        self._continue_within(end)
        self._damaged = self._at < end

    def _skip_damage(self) -> bool:
        """Skip to the next START; return False if more bytes are needed."""
        found = START.search(self._data, self._at)
        # START may be split between chunks.
        stop = found.start() if found else len(self._data) - (0 if self._ended else _SPLIT)
        if stop <= self._at:
            return False
        self._at = stop
        self._restart()
        return True

    def _whole(self) -> bool:
        """Return whether a map is complete; `_failed` is set if it never will be."""
        self._failed = True
        try:
            while True:
                self._scanned = self._fed
                try:
                    self._unpacker.skip()
                except msgpack.OutOfData:
                    too_long = self._fed - self._at >= LONGEST
                    if too_long or self._fed >= len(self._data):
                        self._failed = too_long or self._ended
                        return False
                    stop = self._fed + self._step
                    self._unpacker.feed(bytes(memoryview(self._data)[self._fed : stop]))
                    self._fed = min(stop, len(self._data))
                    self._step = _STEP
                else:
                    return True
        except (ValueError, msgpack.UnpackException):
            self._scanned = self._origin + self._unpacker.tell()
            return False

    def _continue_within(self, stop: int) -> None:
        """Skip damaged bytes before `stop`; continue at a START inside them, or at `stop`."""
        found = START.search(self._data, self._begin + 1, stop + _SPLIT)
        at = stop
        if found and found.start() < stop:
            again = stop - found.start()
            if again <= self._credit:
                self._credit -= again
                at = found.start()
        elif self._failed and not (found or self._ended):  # START may be split
            at = min(stop, max(self._begin + 1, len(self._data) - _SPLIT))
        self._at = at
        self._restart()

    def _restart(self) -> None:
        """Create an unpacker for the data at `_at`."""
        self._origin = self._fed = self._at
        self._step = _FIRST_STEP
        self._unpacker: Any = msgpack.Unpacker(max_buffer_size=LONGEST * 4, strict_map_key=False)
        self._failed = False

    def decoder(self, event: type[Event]) -> Callable[[bytes], Event]:
        """From a map to a row."""
        return msgspec.msgpack.Decoder(event).decode

    def encode(self, rows: Sequence[Event]) -> bytes:
        """Return the rows as maps, as the sink msgpack writes them."""
        return b"".join(map(self._encode_one, rows))


def format_of(data: bytes) -> Format:
    """Return the format: by the beginning or, if that is damaged, by the more common row start."""
    if data.startswith(b'{"v":'):
        return Jsonl()
    if START.match(data) or len(START.findall(data)) > data.count(b'{"v":'):
        return Msgpack()
    return Jsonl()
