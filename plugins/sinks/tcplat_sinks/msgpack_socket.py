"""Sink msgpack: sends rows as maps to readers of a socket; a slow reader gets a count of gaps."""

from __future__ import annotations

import contextlib
import math
import platform
import select
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import attrs

from tcplat_core import (
    SCHEMA_VERSION,
    Event,
    Loss,
    Merge,
    Place,
    ReaderGoneError,
    RunInfo,
    RunReport,
    Sampled,
    Sink,
    UsageError,
    clock_offset_ns,
    fields,
)

from .listening import connected, listen_at, listen_on
from .subscriber import Subscriber, encode, lost_map

_PIECE = 256
"""Rows that a reader receives or misses together."""
_LEAST_S = 0.001
_LINGER_S = 1.0
"""Wait at the end for readers that take no data, s."""
_END_S = 5.0
"""Wait at the end for readers that take data, s."""
_SILENCE_S = 60
"""A TCP peer that acknowledges nothing for this time, s, is gone."""


@attrs.define(eq=False)
class Msgpack(Sink):
    """A socket for many readers, or a connection to one.

    Args:
        run: Information about the run.
        limit: Most bytes queued for one reader.
        listening: Where readers connect; None if the sink connected to its reader.
        place: The unix socket's place, with its device and inode.
    """

    run: RunInfo
    limit: int
    listening: socket.socket | None = None
    place: tuple[Place, int, int] | None = None
    readers: dict[int, Subscriber] = attrs.field(factory=dict, init=False)
    """By fd."""
    _left_s: float = attrs.field(factory=time.monotonic, init=False)
    """When the last send round ended."""
    _until_s: float = attrs.field(default=math.inf, init=False)
    """When the current send round ends."""
    _epoll: select.epoll = attrs.field(factory=select.epoll, init=False)
    _classes: set[tuple[str, type[Event]]] = attrs.field(factory=set, init=False)
    _schema: dict[str, list[tuple[str, str]]] = attrs.field(factory=dict, init=False)
    _hosts: list[bytes] = attrs.field(factory=list, init=False)
    _shares: dict[int, bytes] = attrs.field(factory=dict, init=False)
    """By host: which part of the connections has rows now."""
    _about: Mapping[str, Any] = attrs.field(init=False)

    @_about.default
    def _who_and_when(self) -> Mapping[str, Any]:
        if not self.run.live:  # a capture does not have them
            return {"host": None, "start_ns": None, "clock_offset_ns": None}
        return {
            "host": platform.node(),
            "start_ns": time.time_ns(),
            "clock_offset_ns": clock_offset_ns(),
        }

    def __attrs_post_init__(self) -> None:
        for probe, event in self.run.events.items():
            self._learn(probe, event)
        if self.listening:
            self._epoll.register(self.listening, select.EPOLLIN)

    @classmethod
    def open(cls, options: Mapping[str, Any], run: RunInfo) -> Self:
        """Listen, or connect.

        Raises:
            UsageError: The address cannot be used.
            ReaderGoneError: The reader that the sink connected to has gone, or the run was
                ended before it was there.
        """
        unix, tcp = options["unix"], options["tcp"]
        if (unix is None) == (tcp is None):
            raise UsageError("sink msgpack needs unix=PATH or tcp=HOST:PORT, one of them")
        where = f"unix={unix}" if tcp is None else f"tcp={tcp[0]}:{tcp[1]}"
        try:
            if options["connect"]:
                made = connected(unix, tcp, run)
                sink = cls(run, options["buffer"])
                try:
                    sink.add(made)
                except BaseException:
                    sink.cancel()
                    raise
            elif unix is not None:
                sink = cls(run, options["buffer"], *listen_at(unix))
            else:
                sink = cls(run, options["buffer"], listen_on(*tcp, public=options["public"]))
                who = "every host that reaches it" if options["public"] else "every local user"
                run.say(f"sink msgpack: {who} can read the rows at {where}; unix=PATH is private")
        except InterruptedError as error:
            raise ReaderGoneError from error
        except (OSError, UnicodeError) as error:
            why = (isinstance(error, OSError) and error.strerror) or error
            raise UsageError(f"sink msgpack: {where}: {why}") from error
        while len(sink.readers) < options["wait"] and not run.stopping():
            sink.serve(0.1)
        return sink

    def write(self, batch: Sequence[Event]) -> None:
        """Send each row to every reader that has room for it."""
        self._begin()
        self.serve(0)
        for probe, event in {(row.probe, type(row)) for row in batch} - self._classes:
            self._learn(probe, event)
            for reader in self.readers.values():
                reader.push(self._header(probe))
        if not self.readers:
            return
        for at in range(0, len(batch), _PIECE):
            rows = batch[at : at + _PIECE]
            data = b"".join(map(encode, rows))
            for reader in self.readers.values():
                reader.offer(data, len(rows))
            self._send()
        self._left_s = time.monotonic()

    def lost(self, loss: Loss) -> None:
        """Queue a map at the place of the loss."""
        for reader in self.readers.values():
            reader.lose(loss, lost_map(loss))
        self._send()

    def merged(self, merge: Merge) -> None:
        """Queue a map for a host; later readers get it with the header."""
        self._hosts.append(encode({"v": SCHEMA_VERSION, "merge": attrs.asdict(merge)}))
        for reader in self.readers.values():
            reader.push(self._hosts[-1])
        self._send()

    def sampled(self, share: Sampled) -> None:
        """Queue a map for a share of the connections; later readers get it with the header."""
        self._shares[share.host] = encode({"v": SCHEMA_VERSION, "sampled": attrs.asdict(share)})
        for reader in self.readers.values():
            reader.push(self._shares[share.host])
        self._send()

    def poll(self) -> None:
        """Take new readers, drop those that have gone, and send what waits."""
        self._begin()
        self.serve(0)
        self._send()
        self._left_s = time.monotonic()

    def close(self, report: RunReport) -> None:
        """Send the report, then what still waits for each reader. Idempotent."""
        if self._epoll.closed:
            return
        self.poll()
        self._until_s = math.inf
        for reader in self.readers.values():
            reader.flush_gaps()
            reader.push(encode({"v": SCHEMA_VERSION, "report": report.as_json()}))
        with contextlib.suppress(ReaderGoneError):
            self._send()
            end = time.monotonic() + _END_S
            while any(reader.waiting for reader in self.readers.values()):
                if not self.serve(_LINGER_S) or time.monotonic() > end:
                    break
        self.cancel()

    def cancel(self) -> None:
        """Close all connections and remove the socket. Idempotent."""
        if self._epoll.closed:
            return
        for fd in list(self.readers):
            self._remove(fd)
        self._epoll.close()
        if self.listening:
            self.listening.close()
            self._unlink()

    def serve(self, seconds: float) -> bool:
        """Wait for events of the sockets, for `seconds` at most; return whether there were any.

        Raises:
            ReaderGoneError: The reader that the sink connected to is gone.
        """
        happened = self._epoll.poll(seconds)
        for fd, events in happened:
            reader = self.readers.get(fd)
            if reader is None:
                self._accept()
                continue
            try:
                if events & select.EPOLLIN:
                    reader.discard()
                if events & select.EPOLLOUT and time.monotonic() < self._until_s:
                    reader.send()
                if events & (select.EPOLLHUP | select.EPOLLERR):
                    raise BrokenPipeError
            except OSError:
                self._lose(fd)
            else:
                self._watch(fd, reader)
        return bool(happened)

    def add(self, made: socket.socket) -> None:
        """Add a new reader, and queue the header for it first."""
        made.setblocking(False)
        if made.family != socket.AF_UNIX:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENCE_S * 1000)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENCE_S)
        reader = self.readers[made.fileno()] = Subscriber(made, self.limit)
        reader.push(self._header(*self._schema))
        for data in (*self._hosts, *self._shares.values()):
            reader.push(data)
        self._epoll.register(made, select.EPOLLIN)
        self._send()

    def _accept(self) -> None:
        while self.listening:
            try:
                made, _ = self.listening.accept()
            except OSError:  # no reader waits, it is gone again, or no fd is left
                return
            self.add(made)

    def _begin(self) -> None:
        """Cap sending time at the time elapsed since the last send round."""
        now = time.monotonic()
        self._until_s = now + max(_LEAST_S, now - self._left_s)

    def _send(self) -> None:
        for fd, reader in list(self.readers.items()):
            if not reader.waiting or reader.blocked:
                continue
            if time.monotonic() > self._until_s:
                return
            self.readers[fd] = self.readers.pop(fd)  # the last one in the next round
            try:
                reader.send()
            except OSError:
                self._lose(fd)
            else:
                self._watch(fd, reader)

    def _watch(self, fd: int, reader: Subscriber) -> None:
        events = 0 if reader.write_closed else select.EPOLLIN
        events |= select.EPOLLOUT if reader.blocked else 0
        if events != reader.events:
            self._epoll.modify(fd, events)
            reader.events = events

    def _lose(self, fd: int) -> None:
        self._remove(fd)
        if not self.listening:
            raise ReaderGoneError

    def _remove(self, fd: int) -> None:
        self._epoll.unregister(fd)
        self.readers.pop(fd).socket.close()

    def _learn(self, probe: str, event: type[Event]) -> None:
        self._classes.add((probe, event))
        self._schema[probe] = [(field.name, field.type) for field in fields(event)]

    def _header(self, *probes: str) -> bytes:
        fields = {probe: self._schema[probe] for probe in probes}
        schema = {"version": SCHEMA_VERSION, "probes": fields}
        return encode({"v": SCHEMA_VERSION, "schema": schema, **self._about})

    def _unlink(self) -> None:
        if self.place:
            place, device, inode = self.place
            with contextlib.suppress(OSError), contextlib.closing(place):
                found = place.look()
                # Otherwise another process has replaced it.
                if found and (found.st_dev, found.st_ino) == (device, inode):
                    place.unlink()
