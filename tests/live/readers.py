"""readers.py PATH COUNT: read a unix socket COUNT times over; what each got, as JSON, at the end.

The first decodes what comes. The others are compared with it by length and checksum, so that
fifty of them are no more work than they must be.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import zlib

import attrs
import msgpack


@attrs.define
class Reader:
    """What one has got so far."""

    socket: socket.socket
    bytes: int = 0
    checksum: int = 1


def main() -> None:
    """Read until all have come to the end."""
    path, count = sys.argv[1], int(sys.argv[2])
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
    buffer = memoryview(bytearray(1 << 20))
    left = count
    while left:
        for fd, _ in poll.poll():
            reader = readers[fd]
            size = reader.socket.recv_into(buffer)
            if not size:
                poll.unregister(fd)
                left -= 1
                continue
            reader.bytes += size
            reader.checksum = zlib.adler32(buffer[:size], reader.checksum)
            if fd == first:
                unpacker.feed(buffer[:size])
                for one in unpacker:
                    rows += "point" in one
                    gap += one.get("gap", 0)
                    late += one.get("ts_ns", last_ns) < last_ns
                    last_ns = one.get("ts_ns", last_ns)
                    report = one.get("report", report)
    whole = unpacker.read_bytes(1) == b""
    found = {"rows": rows, "gap": gap, "late": late, "whole": whole, "report": report}
    sums = [(reader.bytes, reader.checksum) for reader in readers.values()]
    sys.stdout.write(json.dumps({**found, "sums": sums}))


if __name__ == "__main__":
    main()
