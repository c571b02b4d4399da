"""One reader of the msgpack socket: its queue, and the gaps in it."""

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
"""Pieces per sendmsg(2)."""

encode = msgspec.msgpack.Encoder().encode


@attrs.define(eq=False)
class Subscriber:
    """A reader of the socket, and its bounded queue of whole maps.

    Args:
        socket: Nonblocking.
        limit: Most bytes in the queue.
    """

    socket: socket.socket
    limit: int
    blocked: bool = attrs.field(default=False, init=False)
    """The socket's send buffer is full."""
    write_closed: bool = attrs.field(default=False, init=False)
    """Peer shut down its write side; it may still read."""
    events: int = attrs.field(default=select.EPOLLIN, init=False)
    """Registered epoll events."""
    _queue: deque[memoryview] = attrs.field(factory=deque, init=False)
    _size: int = attrs.field(default=0, init=False)
    _gap: int = attrs.field(default=0, init=False)
    """Rows missed since the last map in the queue."""
    _losses: dict[tuple[str, str], Loss] = attrs.field(factory=dict, init=False)
    """Losses of the run since that map, by probe and point."""

    @property
    def waiting(self) -> bool:
        """Whether the queue holds data."""
        return bool(self._queue)

    def offer(self, data: bytes, rows: int) -> None:
        """Queue these rows, or count them as missed."""
        missing = self._gap or self._losses
        # After a gap, wait until half of the queue is sent: one long gap instead of hundreds.
        limit = self.limit // 2 if missing else self.limit
        if self._size and self._size + len(data) > limit:
            self._gap += rows
            return
        self.flush_gaps()
        self.push(data)

    def lose(self, loss: Loss, data: bytes) -> None:
        """Queue a loss of the run, or keep it until the queue has room."""
        if self._gap or self._losses or self._size + len(data) > self.limit:
            of = loss.probe, loss.point
            self._losses[of] = _both(self._losses[of], loss) if of in self._losses else loss
        else:
            self.push(data)

    def flush_gaps(self) -> None:
        """Queue the counts of missed rows and lost events so far."""
        if self._gap:
            self.push(encode({"v": SCHEMA_VERSION, "gap": self._gap}))
        for loss in self._losses.values():
            self.push(lost_map(loss))
        self._gap = 0
        self._losses.clear()

    def push(self, data: bytes) -> None:
        """Queue a map, regardless of the limit."""
        self._queue.append(memoryview(data))
        self._size += len(data)

    def send(self) -> None:
        """Send as much of the queue as the socket accepts.

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
                self.flush_gaps()

    def discard(self) -> None:
        """Discard data from the peer: closing a socket with unread data resets the connection.

        Raises:
            OSError: It is gone.
        """
        with contextlib.suppress(BlockingIOError):
            self.write_closed = self.write_closed or not self.socket.recv(1 << 16)


def _both(one: Loss, other: Loss) -> Loss:
    """Return the sum of two losses of one point; without a time unless both have one."""
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
