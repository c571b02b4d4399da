"""Bytes sent and received: how many, where in the stream, and what the kernel did not take."""

from __future__ import annotations

import itertools
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest

from .harness import (
    Listener,
    Puppet,
    Row,
    Traffic,
    Watched,
    assert_tiles,
    at,
    by_sock,
    patience,
    reached,
    read_exactly,
    read_to_end,
    story,
    total,
)

MEGABYTES_10 = 10_000_000


@pytest.fixture
def client(watched: Watched) -> Puppet:
    return watched.client


@attrs.define(eq=False)
class Connected:
    """A connection of a traced process: `s` in the puppet, `peer` here."""

    client: Puppet
    peer: socket.socket
    traffic: Traffic

    def rows(self) -> list[Row]:
        """All rows of it."""
        rows = self.traffic.rows()
        assert len({row["sock"] for row in rows}) == 1
        assert_tiles(rows)
        return rows


@pytest.fixture
def connected(client: Puppet, server: Listener, traffic: Traffic) -> Connected:
    client.connect(server)
    return Connected(client, server.accept(), traffic)


@pytest.fixture
def background() -> Iterator[Callable[[Callable[[], int]], Callable[[], int]]]:
    """Run a function in a thread; the returned function joins it and returns its value."""
    threads = []

    def start(function: Callable[[], int]) -> Callable[[], int]:
        values: list[int] = []
        thread = threading.Thread(target=lambda: values.append(function()))
        thread.start()
        threads.append(thread)

        def result() -> int:
            thread.join(patience())
            assert values, "the thread failed or hangs"
            return values[0]

        return result

    yield start
    for thread in threads:
        thread.join(patience())


def test_request_and_reply_have_a_row_each(connected: Connected) -> None:
    connected.client("s.sendall(b'x' * 100)")
    read_exactly(connected.peer, 100)
    connected.peer.sendall(b"y" * 200)
    connected.client("s.recv(50); s.recv(1000)")
    connected.peer.close()
    assert connected.client("len(s.recv(1000))") == 0
    rows = connected.rows()
    assert story(rows)[3:] == ["send", "recv", "recv", "CLOSE_WAIT", "recv"]
    sent, first, second, end = (row for row in rows if row["bytes"] is not None)
    assert sent["bytes"] == 100
    assert (first["bytes"], second["bytes"], end["bytes"]) == (50, 150, 0)
    # The rows of one direction lie next to each other in the stream.
    assert second["seq"] == (first["seq"] + 50) % 2**32
    assert [row["desc"] for row in (sent, first, second, end)] == [
        "message sent",
        "message read",
        "message read",
        "end of stream",
    ]
    assert {row["state"] for row in (sent, first, second)} == {"TCP_ESTABLISHED"}
    assert end["state"] == "TCP_CLOSE_WAIT"


def test_seq_is_that_on_the_wire(connected: Connected) -> None:
    """TCP_REPAIR gives the kernel's own sequence number."""
    connected.client("s.sendall(b'x' * 100)")
    read_exactly(connected.peer, 100)
    connected.peer.sendall(b"y" * 30)
    connected.client("s.recv(30)")
    next_sent, next_received = connected.client("""
def queue_seq(queue):
    s.setsockopt(socket.IPPROTO_TCP, 20, queue)  # TCP_REPAIR_QUEUE
    return s.getsockopt(socket.IPPROTO_TCP, 21) % 2**32  # TCP_QUEUE_SEQ
s.setsockopt(socket.IPPROTO_TCP, 19, 1)  # TCP_REPAIR
seqs = queue_seq(2), queue_seq(1)
s.setsockopt(socket.IPPROTO_TCP, 19, -1)
seqs
""")
    rows = connected.rows()
    (sent,), (received,) = at(rows, "send"), at(rows, "recv")
    assert (sent["seq"] + 100) % 2**32 == next_sent
    assert (received["seq"] + 30) % 2**32 == next_received


def test_seq_wraps_at_32_bits(traffic: Traffic, client: Puppet, server: Listener) -> None:
    # A socket may choose where its stream begins as long as it is closed (TCP_QUEUE_SEQ).
    client("""
s = socket.socket()
s.setsockopt(socket.IPPROTO_TCP, 19, 1)  # TCP_REPAIR
s.setsockopt(socket.IPPROTO_TCP, 20, 2)  # TCP_REPAIR_QUEUE: what is sent
s.setsockopt(socket.IPPROTO_TCP, 21, struct.pack("I", 2**32 - 250))  # TCP_QUEUE_SEQ
s.setsockopt(socket.IPPROTO_TCP, 19, -1)  # off, without a window probe
""")
    client(f"s.connect({server.address!r})")
    peer = server.accept()
    client("for _ in range(5): s.sendall(b'x' * 100)")
    read_exactly(peer, 500)
    rows = traffic.rows()
    seqs = [row["seq"] for row in at(rows, "send")]
    assert seqs == [2**32 - 249, 2**32 - 149, 2**32 - 49, 51, 151]
    assert_tiles(rows)


def test_send_across_the_wrap_is_one_row(
    traffic: Traffic, client: Puppet, server: Listener
) -> None:
    client("""
s = socket.socket()
s.setsockopt(socket.IPPROTO_TCP, 19, 1)
s.setsockopt(socket.IPPROTO_TCP, 20, 2)
s.setsockopt(socket.IPPROTO_TCP, 21, struct.pack("I", 2**32 - 500_000))
s.setsockopt(socket.IPPROTO_TCP, 19, -1)
""")
    client(f"s.connect({server.address!r})")
    peer = server.accept()
    client.tell("s.sendall(b'x' * 1_000_000)")
    read_exactly(peer, 1_000_000)
    client.answer()
    rows = traffic.rows()
    (sent,) = at(rows, "send")
    assert (sent["seq"], sent["bytes"]) == (2**32 - 499_999, 1_000_000)
    assert not at(rows, "send_short")


def test_many_small_sends_tile_the_stream(connected: Connected) -> None:
    connected.client("for n in range(1, 301): s.sendall(b'x' * n)")
    read_exactly(connected.peer, 300 * 301 // 2)
    rows = connected.rows()
    assert [row["bytes"] for row in at(rows, "send")] == list(range(1, 301))


def test_equal_sends_have_a_row_each(connected: Connected) -> None:
    """Repeated sends of one size are separate sends."""
    connected.client("for _ in range(1000): s.send(b'x' * 7)")
    read_exactly(connected.peer, 7000)
    rows = connected.rows()
    assert [row["bytes"] for row in at(rows, "send")] == [7] * 1000


def test_ten_megabytes_from_a_blocking_client_are_complete(
    connected: Connected, background: Callable[..., Callable[[], int]]
) -> None:
    count = background(lambda: read_to_end(connected.peer))
    connected.client(f"s.sendall(bytes({MEGABYTES_10})); s.close()")
    assert count() == MEGABYTES_10
    rows = connected.rows()
    assert total(rows, "send") - total(rows, "send_short") == MEGABYTES_10
    # One call, one row, however many segments the kernel made of it.
    assert len(at(rows, "send")) == 1


def test_ten_megabytes_in_both_directions_are_complete(
    connected: Connected, background: Callable[..., Callable[[], int]]
) -> None:
    """One thread sends, another one receives, on one socket."""
    connected.client.tell(f"""
def receive():
    global got
    got = 0
    while got < {MEGABYTES_10}:
        got += len(s.recv(1 << 16))
thread = threading.Thread(target=receive)
thread.start()
for _ in range(10):
    s.sendall(bytes({MEGABYTES_10} // 10))
thread.join()
got
""")
    count = background(lambda: len(read_exactly(connected.peer, MEGABYTES_10)))
    connected.peer.sendall(bytes(MEGABYTES_10))
    assert count() == MEGABYTES_10
    assert connected.client.answer() == MEGABYTES_10
    rows = connected.rows()
    assert len(at(rows, "send")) == 10
    assert total(rows, "send") - total(rows, "send_short") == MEGABYTES_10
    assert total(rows, "recv") == MEGABYTES_10


def test_ten_megabytes_from_a_nonblocking_client_are_complete(
    connected: Connected, background: Callable[..., Callable[[], int]]
) -> None:
    """The buffer is full at nearly every call: partial writes, and none at all."""
    count = background(lambda: read_to_end(connected.peer))
    partial = connected.client(f"""
s.setblocking(False)
s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 100_000)
left, partial = memoryview(bytes({MEGABYTES_10})), 0
while left:
    try:
        taken = s.send(left)
        partial += taken < len(left)
        left = left[taken:]
    except BlockingIOError:
        partial += 1
        select.select([], [s], [])
s.close()
partial
""")
    assert count() == MEGABYTES_10
    rows = connected.rows()
    assert total(rows, "send") - total(rows, "send_short") == MEGABYTES_10
    short = at(rows, "send_short")
    assert len(short) == partial > 0
    assert {row["desc"] for row in short} == {"not all taken"}


def test_ten_megabytes_from_asyncio_are_complete(
    connected: Connected, background: Callable[..., Callable[[], int]]
) -> None:
    count = background(lambda: read_to_end(connected.peer))
    connected.client(f"""
async def send():
    s.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=s)
    for _ in range(100):
        writer.write(bytes({MEGABYTES_10} // 100))
        await writer.drain()
    writer.close()
    await writer.wait_closed()
asyncio.run(send())
""")
    assert count() == MEGABYTES_10
    rows = connected.rows()
    assert total(rows, "send") - total(rows, "send_short") == MEGABYTES_10


def test_ten_megabytes_received_are_complete(
    connected: Connected, background: Callable[..., Callable[[], int]]
) -> None:
    def send() -> int:
        connected.peer.sendall(bytes(MEGABYTES_10))
        connected.peer.close()
        return MEGABYTES_10

    sent = background(send)
    calls = connected.client("""
calls = []
while not calls or calls[-1]:
    calls.append(len(s.recv(100_000)))
calls
""")
    sent()
    rows = at(connected.rows(), "recv")
    # Each call is a row, and its bytes are what the call returned.
    assert [row["bytes"] for row in rows] == calls
    assert sum(calls) == MEGABYTES_10
    assert rows[-1]["desc"] == "end of stream"
    for row, after in itertools.pairwise(rows):
        # The FIN has a sequence number, too, but is no byte.
        assert after["seq"] == (row["seq"] + row["bytes"]) % 2**32


def test_msg_peek_is_not_a_read(connected: Connected) -> None:
    connected.peer.sendall(b"x" * 100)
    assert connected.client("len(s.recv(100, socket.MSG_PEEK | socket.MSG_WAITALL))") == 100
    assert connected.client("len(s.recv(100, socket.MSG_PEEK))") == 100
    assert connected.client("len(s.recv(100))") == 100
    assert [row["bytes"] for row in at(connected.rows(), "recv")] == [100]


def test_nonblocking_recv_without_data_has_no_row(connected: Connected) -> None:
    connected.client("""
s.setblocking(False)
try:
    s.recv(100)
except BlockingIOError:
    pass
""")
    connected.peer.sendall(b"x" * 10)
    connected.client("s.setblocking(True); s.recv(100)")
    assert [row["bytes"] for row in at(connected.rows(), "recv")] == [10]


def test_recv_of_zero_bytes_is_not_end_of_stream(connected: Connected) -> None:
    connected.peer.sendall(b"x" * 10)
    # s.recv(0) never gets to the kernel.
    assert connected.client("select.select([s], [], []); s.recvmsg_into([])[0]") == 0
    connected.client("s.recv(100)")
    descriptions = [row["desc"] for row in at(connected.rows(), "recv")]
    assert "end of stream" not in descriptions
    assert descriptions[-1] == "message read"


@pytest.mark.parametrize(
    "call",
    [
        "s.sendmsg([b'x' * 10, b'y' * 20, b'', b'z' * 30])",
        "os.writev(s.fileno(), [b'x' * 10, b'y' * 20, b'z' * 30])",
        "os.write(s.fileno(), b'x' * 60)",
        "s.sendto(b'x' * 60, s.getpeername())",
    ],
)
def test_every_send_call_is_one_row(call: str, connected: Connected) -> None:
    assert connected.client(call) == 60
    read_exactly(connected.peer, 60)
    rows = connected.rows()
    assert [row["bytes"] for row in at(rows, "send")] == [60]
    assert not at(rows, "send_short")


@pytest.mark.parametrize(
    "call",
    [
        "buffers = [bytearray(10), bytearray(90)]; s.recvmsg_into(buffers)[0]",
        "os.readv(s.fileno(), [bytearray(10), bytearray(90)])",
        "len(os.read(s.fileno(), 100))",
        "s.recvfrom_into(bytearray(100))[0]",
    ],
)
def test_every_receive_call_is_one_row(call: str, connected: Connected) -> None:
    connected.peer.sendall(b"x" * 60)
    assert connected.client(call) == 60
    assert [row["bytes"] for row in at(connected.rows(), "recv")] == [60]


def test_send_of_zero_bytes_has_no_row(connected: Connected) -> None:
    connected.client("s.send(b''); s.send(b'x')")
    read_exactly(connected.peer, 1)
    assert [row["bytes"] for row in at(connected.rows(), "send")] == [1]


def test_failed_send_after_a_reset_counts_no_bytes(connected: Connected) -> None:
    """The first send after a reset fails: `send_short` cancels all its bytes."""
    connected.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connected.peer.close()
    connected.traffic.wait_for("it was reset", reached("CLOSE"))
    connected.client("""
try:
    s.send(b'x' * 100)
except OSError:
    pass
""")
    rows = connected.rows()
    assert total(rows, "send") - total(rows, "send_short") == 0


def test_sendfile_is_traced(
    connected: Connected, background: Callable[..., Callable[[], int]], tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(os.urandom(3_000_000))
    count = background(lambda: read_to_end(connected.peer))
    connected.client(f"""
with open({str(tmp_path / "file")!r}, "rb") as file:
    s.sendfile(file)
s.close()
""")
    assert count() == 3_000_000
    rows = connected.rows()
    assert total(rows, "send") - total(rows, "send_short") == 3_000_000


SPLICE = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def splice(source, target, count):
    done = libc.splice(source, None, target, None, ctypes.c_size_t(count), 0)
    assert done >= 0, os.strerror(ctypes.get_errno())
    return done
"""
"""os.splice() came with Python 3.10, but not in every build of it."""


def test_splice_from_a_pipe_is_traced(connected: Connected) -> None:
    connected.client(SPLICE)
    connected.client("""
r, w = os.pipe()
for _ in range(20):
    os.write(w, bytes(30_000))
    left = 30_000
    while left:
        left -= splice(r, s.fileno(), left)
""")
    read_exactly(connected.peer, 600_000)
    rows = connected.rows()
    assert total(rows, "send") - total(rows, "send_short") == 600_000


def test_splice_into_a_pipe_is_traced(connected: Connected) -> None:
    connected.peer.sendall(bytes(30_000))
    connected.client(SPLICE)
    assert (
        connected.client("""
r, w = os.pipe()
done = 0
while done < 30_000:
    done += splice(s.fileno(), w, 30_000 - done)
    os.read(r, 65536)
done
""")
        == 30_000
    )
    rows = connected.rows()
    if not at(rows, "recv") and {row["attach"] for row in rows} == {"tracepoint"}:
        pytest.skip("no tracepoint reports splice(2) from a socket")
    assert total(rows, "recv") == 30_000


def test_corked_sends_have_a_row_each(connected: Connected) -> None:
    connected.client("""
s.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
s.send(b"x" * 10)
s.send(b"x" * 20, socket.MSG_MORE)
s.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
s.send(b"x" * 30)
""")
    read_exactly(connected.peer, 60)
    assert [row["bytes"] for row in at(connected.rows(), "send")] == [10, 20, 30]


def test_zero_copy_sends_are_traced_and_their_notices_are_not(connected: Connected) -> None:
    """Completion notices of MSG_ZEROCOPY come over the error queue: that is not receiving."""
    connected.client("""
s.setsockopt(socket.SOL_SOCKET, 60, 1)  # SO_ZEROCOPY
for _ in range(10):
    s.send(bytes(10_000), 0x4000000)  # MSG_ZEROCOPY
""")
    read_exactly(connected.peer, 100_000)
    connected.client("""
for _ in range(1000):
    poll = select.poll()
    poll.register(s, 0)
    if not poll.poll(100):
        break
    s.recvmsg(0, 1000, socket.MSG_ERRQUEUE)
""")
    rows = connected.rows()
    assert [row["bytes"] for row in at(rows, "send")] == [10_000] * 10
    assert not at(rows, "recv")


def test_concurrent_connections_keep_their_rows_apart(
    traffic: Traffic, client: Puppet, server: Listener
) -> None:
    """One socket per thread, all at the same time: no row is in the wrong stream."""
    client(f"""
def work(number):
    with socket.create_connection({server.address!r}) as s:
        for _ in range(50):
            s.sendall(bytes(number + 1))
threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
""")
    sent = sorted(read_to_end(server.accept()) for _ in range(8))
    assert sent == [50 * (number + 1) for number in range(8)]
    socks = by_sock(traffic.rows())
    assert sorted(total(rows, "send") for rows in socks.values()) == sent
    for rows in socks.values():
        assert_tiles(rows)
        assert {row["bytes"] for row in at(rows, "send")} == {at(rows, "send")[0]["bytes"]}
        assert {row["pid"] for row in rows} == {client.pid}
        (tid,) = {row["tid"] for row in rows}
        assert tid != client.pid


def test_urgent_byte_sent_is_outside_the_stream(connected: Connected) -> None:
    """It has a sequence number, and is not among the bytes that the other end reads."""
    connected.client("""
s.sendall(b"x" * 10)
s.send(b"!", socket.MSG_OOB)
s.send(b"y" * 20 + b"!", socket.MSG_OOB)
s.sendall(b"z" * 30)
""")
    assert len(read_exactly(connected.peer, 60)) == 60
    sends = at(connected.traffic.rows(), "send")
    first = sends[0]["seq"]
    assert [(row["seq"] - first, row["bytes"]) for row in sends] == [(0, 10), (11, 20), (32, 30)]


@pytest.mark.parametrize("inline", [False, True])
def test_urgent_byte_read_is_outside_the_stream(
    inline: bool,  # noqa: FBT001 - a parameter of the test
    connected: Connected,
) -> None:
    """Unless SO_OOBINLINE is set."""
    peer = connected.peer
    connected.client(f"""
s.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, {int(inline)})
def read(count):
    return len(s.recv(count, socket.MSG_WAITALL))
""")
    peer.sendall(b"x" * 10)
    peer.send(b"!", socket.MSG_OOB)
    read = connected.client("read(10)")
    assert read == 10
    urgent = connected.client(f"len(s.recv(1, {0 if inline else 'socket.MSG_OOB'}))")
    assert urgent == 1
    peer.sendall(b"y" * 20)
    read = connected.client("read(20)")
    assert read == 20
    peer.close()
    connected.client("len(s.recv(1))")
    reads = at(connected.rows(), "recv")
    first = reads[0]["seq"]
    in_place = [(10, 1)] if inline else []
    assert [(row["seq"] - first, row["bytes"]) for row in reads] == [
        (0, 10),
        *in_place,
        (11, 20),
        (31, 0),
    ]


def test_partial_urgent_send_counts_its_last_byte_as_urgent(connected: Connected) -> None:
    """The last byte taken is urgent, outside the stream; the rest would have been in the stream."""
    taken = connected.client("""
s.setblocking(False)
taken = s.send(b"x" * 50_000_000, socket.MSG_OOB)
taken
""")
    assert taken < 50_000_000
    connected.client("s.setblocking(True)")
    count = len(read_exactly(connected.peer, taken - 1))
    connected.client("s.sendall(b'y' * 10)")
    read_exactly(connected.peer, 10)
    first, second = at(connected.traffic.rows(), "send")
    (short,) = at(connected.traffic.rows(), "send_short")
    assert first["bytes"] - short["bytes"] == count
    assert (short["seq"] - first["seq"]) % 2**32 == count
    assert (second["seq"] - first["seq"]) % 2**32 == taken
