"""Reads captures: JSON lines, or a stream of msgpack maps; from a file, a pipe or a socket.

What is damaged or foreign is left out, counted and reported, and never ends the reading.
Memory is bounded by one chunk, whatever the capture holds.
"""

from __future__ import annotations

import contextlib
import operator
import os
import re
import select
import socket
import stat
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import attrs
import msgpack
import msgspec

from .errors import TcplatError, UsageError
from .model import Loss, Merge, RunReport
from .schema import SCHEMA_VERSION, Event, fields, printable

CHUNK = 1 << 17
"""Bytes that are read, and decoded, at once: what is made of a megabyte is too much for a
core's cache, and costs half as much again."""
_LONGEST = 1 << 20
"""A longer line, or map, is none of ours."""
_MOST_CLASSES = 256
"""Probes that are not installed may bring so many sets of fields; the rest is foreign."""
_SAID = 3
"""So many of what is left out are reported one by one."""
_BEGINNING = 64
"""Bytes that tell JSON lines from msgpack; no row is so short."""
_CONNECT_S = 10
_PATIENCE_MS = 100
"""How long a source may keep us from looking at anything else."""

GAP = ("msgpack", "reader")
"""Probe and point of the loss that stands for rows which a socket's sink kept from its reader."""


_TEXTS = operator.attrgetter(*(field.name for field in fields() if "str" in field.type))


class _ForeignError(Exception):
    """A line is none of ours; says why."""


@attrs.define(eq=False)
class Source:
    """Where bytes come from.

    Args:
        fd: Open for reading.
        name: As the user calls it.
        size: Bytes of a file; 0 where nobody knows.
    """

    fd: int
    name: str
    size: int = 0
    consumed: int = attrs.field(default=0, init=False)

    @classmethod
    def open(cls, where: str) -> Source:
        """A path, ``-`` for standard input, ``unix:PATH`` or ``tcp:HOST:PORT``.

        Raises:
            UsageError: It cannot be read.
        """
        try:
            if where.startswith("unix:"):
                return cls._connect(socket.AF_UNIX, where.removeprefix("unix:"), where)
            if where.startswith("tcp:"):
                return cls._connect(socket.AF_UNSPEC, where.removeprefix("tcp:"), where)
            if where == "-":
                if sys.stdin is None:
                    raise UsageError("there is no standard input")
                fd = sys.stdin.fileno()
                return cls(fd, "standard input", os.fstat(fd).st_size)
            # Without O_NONBLOCK a FIFO that nobody writes would keep us here, deaf to Ctrl-C.
            fd = os.open(where, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            os.set_blocking(fd, True)
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):
                os.close(fd)
                raise UsageError(f"cannot read {where}: Is a directory")
            return cls(fd, where, status.st_size)
        except (OSError, UnicodeError) as error:
            why = (isinstance(error, OSError) and error.strerror) or error
            raise UsageError(f"cannot read {where}: {why}") from error

    @classmethod
    def _connect(cls, family: int, where: str, name: str) -> Source:
        with contextlib.ExitStack() as stack:
            if family == socket.AF_UNIX:
                made = stack.enter_context(socket.socket(family))
                made.connect(where)
            else:
                host, colon, port = where.rpartition(":")
                if not (colon and port.isdecimal() and 0 < int(port) < 1 << 16):
                    raise UsageError(f"{name} is not of the form tcp:HOST:PORT")
                address = (host.strip("[]"), int(port))
                made = stack.enter_context(socket.create_connection(address, _CONNECT_S))
                made.settimeout(None)
            return cls(made.detach(), name)

    def chunks(self) -> Iterator[bytes]:
        """What comes, and b"" where nothing has come for a while."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        while True:
            if not poll.poll(_PATIENCE_MS):
                yield b""
                continue
            try:
                data = os.read(self.fd, CHUNK)
            except ConnectionResetError:
                data = b""
            except OSError as error:
                raise TcplatError(f"reading {self.name} failed: {error.strerror}") from error
            if not data:
                return
            self.consumed += len(data)
            yield data


class _Format(Protocol):
    """What JSON lines and msgpack maps do not have in common."""

    noun: str
    head: re.Pattern[bytes]
    """Of a row as we write it, up to its probe."""

    def split(self, data: bytes, *, end: bool) -> tuple[list[bytes], int]:
        """What is whole of `data`, and where the rest begins."""

    def swallowed(self, data: bytes) -> list[bytes]:
        """What is whole again behind the beginning of something damaged."""

    def decoder(self, event: type[Event]) -> Callable[[bytes], Event]:
        """From bytes to a row."""

    def value(self, data: bytes) -> Any:
        """From bytes to whatever they are."""

    def encode(self, rows: Sequence[Event]) -> bytes:
        """As a sink of ours would write these rows."""


class _Jsonl:
    noun = "line"
    head = re.compile(rb'\{"v":1,"ts_ns":\d+,"time_ns":\d+,"probe":"([^"\\]+)"')

    def __init__(self) -> None:
        self._encoder = msgspec.json.Encoder()
        self.value = msgspec.json.Decoder().decode
        self.encode = self._encoder.encode_lines

    def split(self, data: bytes, *, end: bool) -> tuple[list[bytes], int]:
        lines = data.split(b"\n")
        rest = lines.pop()
        if end and rest:
            return [*lines, rest], len(data)
        return lines, len(data) - len(rest)

    def swallowed(self, data: bytes) -> list[bytes]:  # noqa: ARG002 - a newline ends each line
        return []

    def decoder(self, event: type[Event]) -> Callable[[bytes], Event]:
        return msgspec.json.Decoder(event).decode


_START = re.compile(rb"(?:[\x80-\x8f]|\xde..|\xdf....)\xa1v", re.DOTALL)
"""How each map of ours begins: with its version."""
_SPLIT = 6
"""Bytes of it that a chunk may end with."""


class _Msgpack:
    noun = "map"
    head = re.compile(
        rb"(?:[\x80-\x8f]|\xde..)\xa1v\x01"
        rb"\xa5ts_ns(?:[\x00-\x7f]|\xcc.|\xcd..|\xce.{4}|\xcf.{8})"
        rb"\xa7time_ns(?:[\x00-\x7f]|\xcc.|\xcd..|\xce.{4}|\xcf.{8})"
        rb"\xa5probe(?:[\xa0-\xbf]|\xd9.)([\w.-]+)\xa5point",
        re.DOTALL,
    )

    def __init__(self) -> None:
        self._encode_one = msgspec.msgpack.Encoder().encode
        self.value = msgspec.msgpack.Decoder().decode

    def split(self, data: bytes, *, end: bool) -> tuple[list[bytes], int]:
        maps: list[bytes] = []
        at = origin = 0
        unpacker = self._unpacker(data)
        while at < len(data):
            if not _START.match(data, at):
                # Rubbish, as far as the next map; a beginning may be cut in two.
                found = _START.search(data, at + 1)
                stop = found.start() if found else len(data)
                if not found and not end:
                    stop -= _SPLIT
                    if stop <= at:
                        return maps, at
                maps.append(data[at:stop])
                at = origin = stop
                unpacker = self._unpacker(data[at:])
                continue
            try:
                unpacker.skip()
            except msgpack.OutOfData:
                if not end and len(data) - at < _LONGEST:
                    return maps, at
                stop = at + 1
            except (ValueError, msgpack.UnpackException):
                stop = at + 1
            else:
                stop = origin + unpacker.tell()
                maps.append(data[at:stop])
                at = stop
                continue
            found = _START.search(data, stop)
            stop = found.start() if found else len(data)
            maps.append(data[at:stop])
            at = origin = stop
            unpacker = self._unpacker(data[at:])
        return maps, at

    def swallowed(self, data: bytes) -> list[bytes]:
        found = _START.search(data, 1)
        return self.split(data[found.start() :], end=True)[0] if found else []

    @staticmethod
    def _unpacker(data: bytes) -> Any:
        unpacker = msgpack.Unpacker(max_buffer_size=len(data) + 1, strict_map_key=False)
        unpacker.feed(data)
        return unpacker

    def decoder(self, event: type[Event]) -> Callable[[bytes], Event]:
        return msgspec.msgpack.Decoder(event).decode

    def encode(self, rows: Sequence[Event]) -> bytes:
        return b"".join(map(self._encode_one, rows))


def _format_of(data: bytes) -> _Format:
    """By whose rows begin more often in it."""
    if len(_START.findall(data)) > data.count(b'{"v":'):
        return _Msgpack()
    return _Jsonl()


@attrs.define(eq=False)
class Capture:
    """A capture, while it is read.

    Args:
        events: The row's class of each installed probe, by name. Rows of other
            probes get one that is made from their keys.
        say: Told what is left out, the first few one by one.
    """

    events: Mapping[str, type[Event]]
    say: Callable[[str], None] = lambda _: None
    reports: list[RunReport] = attrs.field(factory=list, init=False)
    """One, unless captures stand behind each other in one file."""
    ended: bool = attrs.field(default=False, init=False)
    """The last thing read was a report."""
    read: int = attrs.field(default=0, init=False)
    """Rows, losses, hosts, headers and reports."""
    left_out: int = attrs.field(default=0, init=False)
    noun: str = attrs.field(default="line", init=False)
    _number: int = attrs.field(default=0, init=False)
    _format: _Format = attrs.field(init=False)
    _known: dict[bytes, Callable[[bytes], Event]] = attrs.field(factory=dict, init=False)
    """Probe -> decoder for its rows as they were last."""
    _decoders: dict[type[Event], Callable[[bytes], Event]] = attrs.field(factory=dict, init=False)
    _numeric: set[type[Event]] = attrs.field(factory=set, init=False)
    """Classes that add no texts to the common ones."""
    _classes: dict[tuple[str, ...], type[Event]] = attrs.field(factory=dict, init=False)

    def items(self, chunks: Iterator[bytes]) -> Iterator[list[Event] | Loss | Merge | None]:
        """Batches of rows, losses and hosts, in place; None where nothing comes for a while."""
        data, skipping, begun = b"", False, False
        for chunk in chunks:
            if not chunk:
                yield None
                continue
            data += chunk
            if not begun:
                if len(data) < _BEGINNING:
                    continue
                self._begin(_format_of(data))
                begun = True
            if skipping:
                _, newline, data = data.partition(b"\n")
                skipping = not newline
                if skipping:
                    continue
            frames, consumed = self._format.split(data, end=False)
            yield from self._decode(frames, data[:consumed])
            data = data[consumed:]
            if len(data) > _LONGEST:
                self._number += 1
                self._leave_out(self._number, "it is too long")
                data, skipping = b"", True
        if not begun:
            self._begin(_format_of(data))
        if data and not skipping:
            frames, _ = self._format.split(data, end=True)
            yield from self._decode(frames, data, torn=True)

    def _begin(self, form: _Format) -> None:
        self._format, self.noun = form, form.noun
        for probe, event in self.events.items():
            self._know(probe, event)

    def _know(self, probe: str, event: type[Event]) -> None:
        if event not in self._decoders:
            self._decoders[event] = self._format.decoder(event)
            types = [field.type for field in fields(event) if field.own]
            if not any("str" in kind or "any" in kind for kind in types):
                self._numeric.add(event)
        self._known[probe.encode()] = self._decoders[event]

    def _decode(
        self, frames: Sequence[bytes], data: bytes, *, torn: bool = False
    ) -> Iterator[list[Event] | Loss | Merge]:
        rows = self._plain(frames, data)
        if rows is not None:
            self._number += len(frames)
            if rows:
                self.read += len(rows)
                self.ended = False
                yield rows
            return
        rows = []
        todo = deque(frames)
        while todo:
            frame = todo.popleft()
            self._number += 1
            try:
                # An empty line is nothing.
                item = self._one(frame) if frame.strip() else None
            except _ForeignError as error:
                todo.extendleft(reversed(self._format.swallowed(frame)))
                cut = torn and not todo
                self._leave_out(self._number, "it is cut off" if cut else str(error))
                continue
            if isinstance(item, Event):
                rows.append(item)
            elif item is not None:
                if rows:
                    yield rows
                rows = []
                yield item
        if rows:
            yield rows

    def _plain(self, frames: Sequence[bytes], data: bytes) -> list[Event] | None:
        """Rows where there is nothing but rows, each as we write it; else None."""
        head, known = self._format.head.match, self._known
        try:
            rows = [known[head(frame)[1]](frame) for frame in frames]  # type: ignore[index]
        # No match, no such probe, no such row: looked at one by one, it will be said.
        except (TypeError, KeyError, ValueError):
            return None
        # This proves that no key is too many.
        if self._format.encode(rows) != data:
            return None
        return rows if self._is_tidy(rows, data) else [_tidy(row) for row in rows]

    def _is_tidy(self, rows: Sequence[Event], data: bytes) -> bool:
        """Whether all texts are printable, as far as that is seen at a glance."""
        if data.isascii() and b"\\" not in data:  # JSON
            return True
        texts = {text for of_row in set(map(_TEXTS, rows)) for text in of_row if text is not None}
        return all(map(str.isprintable, texts)) and self._numeric.issuperset(map(type, rows))

    def _one(self, frame: bytes) -> Event | Loss | Merge | None:
        """Whatever it is; None for what is no row: a header, a report.

        Raises:
            _ForeignError: It is nothing of ours.
        """
        try:
            value = self._format.value(frame)
        except (ValueError, RecursionError) as error:
            raise _ForeignError("it is damaged, or not of a capture") from error
        if not isinstance(value, dict) or "v" not in value or set(map(type, value)) != {str}:
            raise _ForeignError("it is not of a capture")
        if value["v"] != SCHEMA_VERSION or value["v"] is True:
            version = str(value["v"])[:20]
            raise _ForeignError(
                f"its schema is {version!r}, and this tcplat reads {SCHEMA_VERSION}"
            )
        item: Event | Loss | Merge | None = None
        try:
            if "lost" in value:
                item = msgspec.convert(value["lost"], Loss)
            elif "merge" in value:
                item = msgspec.convert(value["merge"], Merge)
                item = attrs.evolve(item, name=printable(item.name))
            elif "gap" in value:
                item = Loss(*GAP, msgspec.convert(value["gap"], int))
            elif "report" in value:
                self.reports.append(RunReport.from_json(value["report"]))
            elif "schema" not in value:
                item = self._row(value)
        except (ValueError, TypeError) as error:
            words = str(error).split(" - at")[0]
            raise _ForeignError(f"it is not of a capture: {words}") from error
        self.read += 1
        self.ended = "report" in value
        return item

    def _row(self, value: dict[str, Any]) -> Event:
        probe = msgspec.convert(value.get("probe"), str)
        event = self.events.get(probe, Event)
        if set(value) != set(event.__struct_fields__):
            event = self._class(probe, [key for key in value if key not in Event.__struct_fields__])
        row = msgspec.convert(value, event)
        self._know(probe, event)
        return _tidy(row)

    def _class(self, probe: str, extra: Sequence[str]) -> type[Event]:
        """A class for rows with these fields besides the common ones."""
        made = self._classes.get((probe, *extra))
        if made is None:
            if len(self._classes) >= _MOST_CLASSES or not all(map(_is_field, extra)):
                raise ValueError("it has fields that no probe has")
            fields = [(key, Any) for key in extra]
            made = cast("type[Event]", msgspec.defstruct("Event", fields, bases=(Event,)))
            self._classes[probe, *extra] = made
        return made

    def _leave_out(self, number: int, reason: str) -> None:
        self.left_out += 1
        if self.left_out <= _SAID:
            self.say(f"{self.noun} {number} is left out: {reason}")


def _is_field(key: str) -> bool:
    return key.isidentifier() and not key.startswith("_") and not hasattr(Event, key)


def _tidy(row: Event) -> Event:
    """The row, with every text such that a terminal may have it: who wrote it, nobody knows."""
    for field in row.__struct_fields__:
        value = getattr(row, field)
        if isinstance(value, str) and not value.isprintable():
            setattr(row, field, printable(value))
    return row
