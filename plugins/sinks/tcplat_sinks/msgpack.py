"""Rows as msgpack maps to the readers of a socket; who is too slow misses rows, and is told."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import itertools
import math
import os
import platform
import select
import socket
import stat
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Self

import attrs
import msgspec

from tcplat_core import (
    SCHEMA_VERSION,
    Event,
    Loss,
    Merge,
    Place,
    ReaderGoneError,
    RunInfo,
    RunReport,
    Sink,
    UsageError,
    clock_offset_ns,
    connect,
    fields,
)

_PIECE = 256
"""Rows that a reader gets or misses together."""
_AT_ONCE = 64
"""Pieces that are handed to the kernel in one call."""
_BACKLOG = 128
_LEAST_S = 0.001
_LINGER_S = 1.0
"""At the end: how long readers may keep us waiting without taking anything."""
_END_S = 5.0
"""The same with taking something."""
_SILENCE_S = 60
"""A TCP peer that acknowledges nothing for so long has gone without a word."""

_encode = msgspec.msgpack.Encoder().encode


@attrs.define(eq=False)
class Reader:
    """Somebody who reads, and what he has yet to get: whole maps, in bounded memory.

    Args:
        socket: Does not block.
        limit: Bytes that may wait for him.
    """

    socket: socket.socket
    limit: int
    blocked: bool = attrs.field(default=False, init=False)
    """The kernel's buffer is full."""
    mute: bool = attrs.field(default=False, init=False)
    """He has said that he will say no more; he may well go on reading."""
    watched: int = attrs.field(default=select.EPOLLIN, init=False)
    """What epoll tells us of him."""
    _queue: deque[memoryview] = attrs.field(factory=deque, init=False)
    _size: int = attrs.field(default=0, init=False)
    _gap: int = attrs.field(default=0, init=False)
    """Rows that he has missed since the last map in the queue."""
    _losses: dict[tuple[str, str], Loss] = attrs.field(factory=dict, init=False)
    """What the run has lost meanwhile, by probe and point."""

    @property
    def waiting(self) -> bool:
        """Whether there is something left for him."""
        return bool(self._queue)

    def offer(self, data: bytes, rows: int) -> None:
        """Queue these rows, or count them as missed."""
        missing = self._gap or self._losses
        # Once he has missed something, half of the buffer is emptied first: one gap, not hundreds.
        room = self.limit // 2 if missing else self.limit
        if self._size and self._size + len(data) > room:
            self._gap += rows
            return
        self.tell()
        self.push(data)

    def lose(self, loss: Loss, data: bytes) -> None:
        """Queue a loss of the run's, or remember it until there is room."""
        if self._gap or self._losses or self._size + len(data) > self.limit:
            of = loss.probe, loss.point
            self._losses[of] = _both(self._losses[of], loss) if of in self._losses else loss
        else:
            self.push(data)

    def tell(self) -> None:
        """Say what he has missed up to here."""
        if self._gap:
            self.push(_encode({"v": SCHEMA_VERSION, "gap": self._gap}))
        for loss in self._losses.values():
            self.push(_loss(loss))
        self._gap = 0
        self._losses.clear()

    def push(self, data: bytes) -> None:
        """Queue it, room or not."""
        self._queue.append(memoryview(data))
        self._size += len(data)

    def send(self) -> None:
        """Send what he takes.

        Raises:
            OSError: He is gone.
        """
        self.blocked = False
        while self._queue:
            try:
                sent = self.socket.sendmsg(list(itertools.islice(self._queue, _AT_ONCE)))
            except BlockingIOError:
                self.blocked = True
                return
            self._size -= sent
            while self._queue and sent >= len(self._queue[0]):
                sent -= len(self._queue.popleft())
            if sent:
                self._queue[0] = self._queue[0][sent:]
            if not self._queue:
                self.tell()

    def listen(self) -> None:
        """Throw away what he says: unread, it would cut our last words short.

        Raises:
            OSError: He is gone.
        """
        with contextlib.suppress(BlockingIOError):
            self.mute = self.mute or not self.socket.recv(1 << 16)


def _both(one: Loss, other: Loss) -> Loss:
    """Return the two as one, of the same point; without a time unless both have one."""
    if not (one.until_ns and other.until_ns):
        return Loss(one.probe, one.point, one.count + other.count)
    return attrs.evolve(
        one,
        count=one.count + other.count,
        since_ns=min(one.since_ns, other.since_ns),
        until_ns=max(one.until_ns, other.until_ns),
    )


def _loss(loss: Loss) -> bytes:
    return _encode({"v": SCHEMA_VERSION, "lost": attrs.asdict(loss)})


@attrs.define(eq=False)
class Msgpack(Sink):
    """A socket for many readers, or a connection to one.

    Args:
        run: What is known of the run.
        limit: Bytes that may wait for one reader.
        listening: Where readers come; None if we went to ours.
        place: Of the unix socket, with its device and inode.
    """

    run: RunInfo
    limit: int
    listening: socket.socket | None = None
    place: tuple[Place, int, int] | None = None
    readers: dict[int, Reader] = attrs.field(factory=dict, init=False)
    """By fd."""
    _left_s: float = attrs.field(factory=time.monotonic, init=False)
    """When readers had been served last."""
    _until_s: float = attrs.field(default=math.inf, init=False)
    """How long they are served now."""
    _epoll: select.epoll = attrs.field(factory=select.epoll, init=False)
    _classes: set[tuple[str, type[Event]]] = attrs.field(factory=set, init=False)
    _schema: dict[str, list[tuple[str, str]]] = attrs.field(factory=dict, init=False)
    _hosts: list[bytes] = attrs.field(factory=list, init=False)
    _about: Mapping[str, Any] = attrs.field(init=False)

    @_about.default
    def _who_and_when(self) -> Mapping[str, Any]:
        if not self.run.live:  # a capture does not say
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
            UsageError: That cannot be.
            ReaderGoneError: The one that we went to has gone, or the user wanted to end before
                it was there.
        """
        unix, tcp = options["unix"], options["tcp"]
        if (unix is None) == (tcp is None):
            raise UsageError("sink msgpack needs unix=PATH or tcp=HOST:PORT, one of them")
        where = f"unix={unix}" if tcp is None else f"tcp={tcp[0]}:{tcp[1]}"
        try:
            if options["connect"]:
                made = _connected(unix, tcp, run)
                sink = cls(run, options["buffer"])
                try:
                    sink.add(made)
                except BaseException:
                    sink.cancel()
                    raise
            elif unix is not None:
                sink = cls(run, options["buffer"], *_listen_at(unix))
            else:
                sink = cls(run, options["buffer"], _listen_on(*tcp, public=options["public"]))
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
            data = b"".join(map(_encode, rows))
            for reader in self.readers.values():
                reader.offer(data, len(rows))
            self._send()
        self._left_s = time.monotonic()

    def lost(self, loss: Loss) -> None:
        """A map at the place of the gap."""
        for reader in self.readers.values():
            reader.lose(loss, _loss(loss))
        self._send()

    def merged(self, merge: Merge) -> None:
        """A map for each host; who comes later gets it with the header."""
        self._hosts.append(_encode({"v": SCHEMA_VERSION, "merge": attrs.asdict(merge)}))
        for reader in self.readers.values():
            reader.push(self._hosts[-1])
        self._send()

    def poll(self) -> None:
        """Let readers come and go, and take what waits for them."""
        self._begin()
        self.serve(0)
        self._send()
        self._left_s = time.monotonic()

    def close(self, report: RunReport) -> None:
        """The books; then who still reads gets what waits for him. Again it does nothing."""
        if self._epoll.closed:
            return
        self.poll()
        self._until_s = math.inf
        for reader in self.readers.values():
            reader.tell()
            reader.push(_encode({"v": SCHEMA_VERSION, "report": report.as_json()}))
        with contextlib.suppress(ReaderGoneError):
            self._send()
            end = time.monotonic() + _END_S
            while any(reader.waiting for reader in self.readers.values()):
                if not self.serve(_LINGER_S) or time.monotonic() > end:
                    break
        self.cancel()

    def cancel(self) -> None:
        """Leave no reader waiting, and no socket behind. Again it does nothing."""
        if self._epoll.closed:
            return
        for fd in list(self.readers):
            self._remove(fd)
        self._epoll.close()
        if self.listening:
            self.listening.close()
            self._unlink()

    def serve(self, seconds: float) -> bool:
        """Wait until something happens, not longer than so long; whether it did.

        Raises:
            ReaderGoneError: The one that we went to is gone.
        """
        happened = self._epoll.poll(seconds)
        for fd, events in happened:
            reader = self.readers.get(fd)
            if reader is None:
                self._accept()
                continue
            try:
                if events & select.EPOLLIN:
                    reader.listen()
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
        """A reader has come: first of all he gets the header."""
        made.setblocking(False)
        if made.family != socket.AF_UNIX:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENCE_S * 1000)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENCE_S)
        reader = self.readers[made.fileno()] = Reader(made, self.limit)
        reader.push(self._header(*self._schema))
        for host in self._hosts:
            reader.push(host)
        self._epoll.register(made, select.EPOLLIN)
        self._send()

    def _accept(self) -> None:
        while self.listening:
            try:
                made, _ = self.listening.accept()
            except OSError:  # nobody more, or gone again, or we have no fd left
                return
            self.add(made)

    def _begin(self) -> None:
        """Readers get no more of our time than the run had since they were served last."""
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

    def _watch(self, fd: int, reader: Reader) -> None:
        wanted = (0 if reader.mute else select.EPOLLIN) | (select.EPOLLOUT if reader.blocked else 0)
        if wanted != reader.watched:
            self._epoll.modify(fd, wanted)
            reader.watched = wanted

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
        return _encode({"v": SCHEMA_VERSION, "schema": schema, **self._about})

    def _unlink(self) -> None:
        if self.place:
            place, device, inode = self.place
            with contextlib.suppress(OSError), contextlib.closing(place):
                found = place.look()
                # Else it is another's by now.
                if found and (found.st_dev, found.st_ino) == (device, inode):
                    place.unlink()


def _connected(unix: str, tcp: tuple[str, int] | None, run: RunInfo) -> socket.socket:
    if tcp:
        return connect(tcp, run.stopping)
    # In a folder that others can write to, another user's socket would get the rows.
    with contextlib.closing(Place.find(unix)) as place, place.there() as address:
        return connect(address, run.stopping)


def _listen_on(host: str, port: int, *, public: bool) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    if not (public or ipaddress.ip_address(address[0]).is_loopback):
        raise UsageError(
            f"sink msgpack: every host that reaches {host} could read the rows; "
            "add public=1 to allow it"
        )
    made = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    made.setblocking(False)
    return made


def _listen_at(path: str) -> tuple[socket.socket, tuple[Place, int, int]]:
    """A unix socket that its owner alone may use; takes the place of one that nobody listens at."""
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(contextlib.closing(Place.find(path, follow=False)))
        made = stack.enter_context(socket.socket(socket.AF_UNIX))
        # bind(2) gives the file the mode of the socket; a moment later would be too late.
        os.fchmod(made.fileno(), 0o600)
        try:
            made.bind(place.address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _clear_away(place)
            made.bind(place.address)
        made.listen(_BACKLOG)
        made.setblocking(False)
        found = place.look()
        if found is None:
            raise UsageError(f"sink msgpack: {path} was removed at once; use another path")
        stack.pop_all()
        return made, (place, found.st_dev, found.st_ino)


def _clear_away(place: Place) -> None:
    found = place.look()
    if found is None:
        return
    if not stat.S_ISSOCK(found.st_mode):  # a symbolic link is none, wherever it leads
        raise UsageError(f"sink msgpack: {place.path} is there already, and is no socket")
    place.judge(found)
    with socket.socket(socket.AF_UNIX) as other:
        other.setblocking(False)
        if other.connect_ex(place.address) != errno.ECONNREFUSED:
            raise UsageError(f"sink msgpack: another process listens at {place.path}")
    place.unlink()
