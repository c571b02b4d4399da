"""What JSON lines and msgpack maps do not have in common: how a capture's bytes become frames.

Whoever wrote a capture may mean harm. So each byte is looked at a bounded number of times, in
however small pieces it comes, and no more is kept than one frame may have.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import attrs
import msgpack
import msgspec

from tcplat_core.event.fields import SCHEMA_VERSION, Event

LONGEST = 1 << 20
"""Bytes: a longer line, or map, is none of ours."""


@attrs.frozen
class Damage:
    """What is no frame, and why not."""

    reason: str = "it is damaged, or not part of a capture"


class Format(Protocol):
    """Bytes go in; frames, each a line or a map, come out.

    What take_all() gave may be given back, to be looked at frame by frame: where one proves to be
    none of ours, reject() lets what begins within it come to light.
    """

    noun: str
    head: re.Pattern[bytes]
    """Of a row as we write it, up to its probe."""

    @property
    def torn(self) -> bool:
        """What take() gave is the last thing, and it has no end."""

    def feed(self, chunk: bytes) -> None:
        """Take more bytes; all frames before them were taken."""

    def end(self) -> None:
        """There are no more bytes."""

    def take_all(self) -> tuple[list[bytes], bytes] | None:
        """All frames that are whole, and the bytes that they are; None if not all is frames."""

    def give_back(self) -> None:
        """Undo take_all(): its frames will be taken one by one."""

    def take(self) -> bytes | Damage | None:
        """Return the next frame, or bytes that are none; None until more bytes come."""

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
            self._lines.extend(self._data.split(b"\n"))
            self._lines.pop()
        self._rest += memoryview(chunk)[cut:]
        if len(self._rest) > LONGEST:
            self._rest.clear()
            self._skipping = self._damaged = True
            self._lines.append(Damage("it is too long"))

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
        self._taken = cast("list[bytes]", list(self._lines))
        self._lines.clear()
        return self._taken, self._data

    def give_back(self) -> None:
        """Put the lines back, so that they are taken again."""
        self._lines.extend(self._taken)

    def take(self) -> bytes | Damage | None:
        """Return the next line."""
        return self._lines.popleft() if self._lines else None

    def reject(self) -> None:
        """Do nothing: no line begins within another."""

    def decoder(self, event: type[Event]) -> Callable[[bytes], Event]:
        """From a line to a row."""
        return msgspec.json.Decoder(event).decode


START = re.compile(rb"(?:[\x80-\x8f]|\xde..|\xdf....)\xa1v", re.DOTALL)
"""How each map of ours begins: with its version."""
_SPLIT = 6
"""Bytes of it that a chunk may end with."""
_FIRST_STEP, _STEP = 1 << 8, 1 << 14
"""Bytes that are handed to the unpacker at once, and again: it copies them."""
_CREDIT = 8 << 20
_PER_BYTE = 8
"""Where a frame is none of ours, bytes are looked at again: so many of a whole capture, and
so many more for each byte of it. Beyond that, what such a frame has swallowed stays lost."""


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
        """Of what take() or take_all() gave last."""
        self._at = 0
        """Behind it."""
        self._credit = _CREDIT
        self._rubbish = self._said = False
        """What stood before `_at` is no map; that was said."""
        self._ended = self._failed = False
        self._origin = self._fed = self._seen = 0
        """Where the unpacker began, how far it was given the data, and has looked at it."""
        self._step = _FIRST_STEP
        self._restart()

    @property
    def torn(self) -> bool:
        """It is at the end of all."""
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
        """Take the rest as it is."""
        self._ended = True

    def take_all(self) -> tuple[list[bytes], bytes] | None:
        """All maps that are whole, if nothing is between them."""
        begin, self._said = self._at, self._rubbish
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
        self._at, self._rubbish = self._begin, self._said
        self._restart()

    def take(self) -> bytes | Damage | None:
        """Return the next map, or the damaged bytes before it."""
        while self._at < len(self._data):
            self._begin, said = self._at, self._rubbish
            if not START.match(self._data, self._at):
                if not self._skip_rubbish():
                    return None
            elif self._whole():
                self._at = self._origin + self._unpacker.tell()
                self._rubbish = False
                return bytes(self._data[self._begin : self._at])
            elif not self._failed:
                return None
            else:
                self._look_within(self._seen)
            self._rubbish = True
            if not said:
                return Damage()
        return None

    def reject(self) -> None:
        """Continue within the map that take() returned."""
        end = self._at
        self._look_within(end)
        self._rubbish = self._at < end

    def _skip_rubbish(self) -> bool:
        """Go to where the next map begins; False until more bytes come."""
        found = START.search(self._data, self._at)
        # A beginning may be cut in two.
        stop = found.start() if found else len(self._data) - (0 if self._ended else _SPLIT)
        if stop <= self._at:
            return False
        self._at = stop
        self._restart()
        return True

    def _whole(self) -> bool:
        """Whether the unpacker gets to the end of a map; `_failed` if it never will."""
        self._failed = True
        try:
            while True:
                self._seen = self._fed
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
            self._seen = self._origin + self._unpacker.tell()
            return False

    def _look_within(self, stop: int) -> None:
        """Skip what is before `stop`, damaged or cut off; continue within it or behind it."""
        found = START.search(self._data, self._begin + 1, stop + _SPLIT)
        at = stop
        if found and found.start() < stop:
            again = stop - found.start()
            if again <= self._credit:
                self._credit -= again
                at = found.start()
        elif self._failed and not (found or self._ended):  # a beginning may be cut in two
            at = min(stop, max(self._begin + 1, len(self._data) - _SPLIT))
        self._at = at
        self._restart()

    def _restart(self) -> None:
        """Have an unpacker for what stands at `_at`."""
        self._origin = self._fed = self._at
        self._step = _FIRST_STEP
        self._unpacker: Any = msgpack.Unpacker(max_buffer_size=LONGEST * 4, strict_map_key=False)
        self._failed = False

    def decoder(self, event: type[Event]) -> Callable[[bytes], Event]:
        """From a map to a row."""
        return msgspec.msgpack.Decoder(event).decode

    def encode(self, rows: Sequence[Event]) -> bytes:
        """One map after the other."""
        return b"".join(map(self._encode_one, rows))


def format_of(data: bytes) -> Format:
    """By how it begins or, where that is damaged, by whose rows begin more often in it."""
    if data.startswith(b'{"v":'):
        return Jsonl()
    if START.match(data) or len(START.findall(data)) > data.count(b'{"v":'):
        return Msgpack()
    return Jsonl()
