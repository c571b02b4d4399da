"""One reader of the msgpack socket: what waits for it, and what it has missed."""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
from collections import deque

import attrs
import msgspec

from tcplat_core import SCHEMA_VERSION, Loss

_AT_ONCE = 64
"""Pieces that are handed to the kernel in one call."""

encode = msgspec.msgpack.Encoder().encode


@attrs.define(eq=False)
class Subscriber:
    """A reader of the socket, and the maps that wait for it: whole ones, in bounded memory.

    Args:
        socket: Does not block.
        limit: Bytes that may wait for it.
    """

    socket: socket.socket
    limit: int
    blocked: bool = attrs.field(default=False, init=False)
    """The kernel's buffer is full."""
    mute: bool = attrs.field(default=False, init=False)
    """It has shut its sending side; it may go on reading."""
    watched: int = attrs.field(default=select.EPOLLIN, init=False)
    """The events that epoll reports of it."""
    _queue: deque[memoryview] = attrs.field(factory=deque, init=False)
    _size: int = attrs.field(default=0, init=False)
    _gap: int = attrs.field(default=0, init=False)
    """Rows that it has missed since the last map in the queue."""
    _losses: dict[tuple[str, str], Loss] = attrs.field(factory=dict, init=False)
    """What the run has lost meanwhile, by probe and point."""

    @property
    def waiting(self) -> bool:
        """Whether something waits for it."""
        return bool(self._queue)

    def offer(self, data: bytes, rows: int) -> None:
        """Queue these rows, or count them as missed."""
        missing = self._gap or self._losses
        # Once it has missed something, half of the buffer is emptied first: one gap, not hundreds.
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
        """Queue what it has missed up to here."""
        if self._gap:
            self.push(encode({"v": SCHEMA_VERSION, "gap": self._gap}))
        for loss in self._losses.values():
            self.push(lost_map(loss))
        self._gap = 0
        self._losses.clear()

    def push(self, data: bytes) -> None:
        """Queue it, room or not."""
        self._queue.append(memoryview(data))
        self._size += len(data)

    def send(self) -> None:
        """Send what it takes.

        Raises:
            OSError: It is gone.
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
        """Discard what it sends: a socket that is closed with unread data is reset.

        Raises:
            OSError: It is gone.
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


def lost_map(loss: Loss) -> bytes:
    """Return a loss as a map."""
    return encode({"v": SCHEMA_VERSION, "lost": attrs.asdict(loss)})
