"""readers.py PATH COUNT: read a unix socket COUNT times over; what each got, as JSON, at the end.

The first decodes what comes. The others look for how rows and gaps begin, at the speed of a
search, so that fifty of them leave some of a small machine to the run.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys

import attrs
import msgpack

_ROW = b"\xa1v\x02\xa5ts_ns"
_GAP = b"\x82\xa1v\x02\xa3gap"
_GAP_BYTES = 17
"""Of a gap's map, at most; something longer always follows it."""
_BUFFER = bytearray(1 << 20)


@attrs.define
class Reader:
    """What one reader has received so far."""

    socket: socket.socket
    rows: int = 0
    gap: int = 0
    tail: bytes = b""
    """The last bytes: too few to hold a gap."""

    def read(self) -> memoryview:
        """Read and count; what came."""
        old = len(self.tail)
        _BUFFER[:old] = self.tail
        size = self.socket.recv_into(memoryview(_BUFFER)[old:])
        end = old + size
        if size:
            self.rows += _BUFFER.count(_ROW, max(0, old - len(_ROW) + 1), end)
            at = _BUFFER.find(_GAP, 0, end - _GAP_BYTES + len(_GAP))
            while at >= 0:
                unpacker = msgpack.Unpacker()
                unpacker.feed(_BUFFER[at : at + _GAP_BYTES])
                self.gap += unpacker.unpack()["gap"]
                at = _BUFFER.find(_GAP, at + 1, end - _GAP_BYTES + len(_GAP))
            self.tail = bytes(_BUFFER[max(0, end - _GAP_BYTES + 1) : end])
        return memoryview(_BUFFER)[old:end]


def main() -> None:
    """Read until all have come to the end."""
    path, count = sys.argv[1], int(sys.argv[2])
    os.nice(5)  # fifty programs on two cores: leave CPU time to the traffic and to tcplat
    poll, readers = select.epoll(), {}
    for _ in range(count):
        made = socket.socket(socket.AF_UNIX)
        made.connect(path)
        poll.register(made, select.EPOLLIN)
        readers[made.fileno()] = Reader(made)
    first = next(iter(readers))
    unpacker = msgpack.Unpacker(max_buffer_size=1 << 30)
    rows = gap = last_ns = late = 0
    report = None
    left = count
    while left:
        for fd, _ in poll.poll():
            data = readers[fd].read()
            if not data:
                poll.unregister(fd)
                left -= 1
            elif fd == first:
                unpacker.feed(data)
                for one in unpacker:
                    rows += "point" in one
                    gap += one.get("gap", 0)
                    late += one.get("ts_ns", last_ns) < last_ns
                    last_ns = one.get("ts_ns", last_ns)
                    report = one.get("report", report)
    found = {
        "decoded": [rows, gap],
        "counted": [(reader.rows, reader.gap) for reader in readers.values()],
        "ends": len({reader.tail for reader in readers.values()}),
        "late": late,
        "whole": unpacker.read_bytes(1) == b"",
        "report": report,
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
