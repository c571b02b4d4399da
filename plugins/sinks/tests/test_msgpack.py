"""The socket: whole maps, exact counts, and no reader that delays the run."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import select
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tcplat_sinks.msgpack_socket import Msgpack
from tcplat_sinks.subscriber import Subscriber

from tcplat_core import (
    SCHEMA_VERSION,
    Event,
    Loss,
    Merge,
    ReaderGoneError,
    RunInfo,
    RunReport,
    Sampled,
    UsageError,
)
from tcplat_core.plugin.options import read_options
from tcplat_core.registry.find import Plugins
from tcplat_core.testing import make_event

PLUGINS = Plugins.load()
CLIENT = PLUGINS.probe("tcp_client").event
RUN = RunInfo(("tcp_client",), events={"tcp_client": CLIENT})
REPORT = RunReport(probes={}, duration_s=1.5)
LOSS = Loss("tcp_client", "send", 3)

Map = dict[str, Any]


@attrs.define
class Client:
    """A reader of the stream."""

    socket: socket.socket
    sink: Msgpack | None = None
    """In this process: it has to be polled while we wait."""
    unpacker: Any = attrs.field(factory=lambda: msgpack.Unpacker(max_buffer_size=1 << 30))

    def read(self, count: int) -> list[Map]:
        """So many maps."""
        maps: list[Map] = []
        while len(maps) < count:
            try:
                maps.append(self.unpacker.unpack())
            except msgpack.OutOfData:
                while self.sink and not select.select([self.socket], [], [], 0.01)[0]:
                    self.sink.poll()
                data = self.socket.recv(1 << 20)
                assert data, f"the stream ended after {maps}"
                self.unpacker.feed(data)
        return maps

    def take(self) -> None:
        """Return what is there, without waiting."""
        with contextlib.suppress(BlockingIOError):
            self.unpacker.feed(self.socket.recv(1 << 20, socket.MSG_DONTWAIT))

    def rest(self) -> list[Map]:
        """Return the rest until the end, whole maps only."""
        while data := self.socket.recv(1 << 20):
            self.unpacker.feed(data)
        maps = list(self.unpacker)
        assert self.unpacker.read_bytes(1) == b"", "the last map is not whole"
        return maps


@attrs.define
class Bench:
    """A folder for sockets, and what has to be closed."""

    folder: Path
    stack: ExitStack
    made: Msgpack | None = None

    @property
    def path(self) -> str:
        return str(self.folder / "s")

    def sink(self, run: RunInfo = RUN, **given: Any) -> Msgpack:
        """Make a sink at `path`."""
        spec = PLUGINS.sink("msgpack")
        if "tcp" not in given:
            given = {"unix": self.path, **given}
        sink = spec.factory(read_options("sink msgpack", spec.options, given), run)
        assert isinstance(sink, Msgpack)
        self.made = sink
        return sink

    def client(self, where: str | tuple[str, int] | None = None) -> Client:
        """Return a connected reader."""
        where = where or self.path
        made = socket.socket(socket.AF_UNIX if isinstance(where, str) else socket.AF_INET)
        self.stack.callback(made.close)
        made.settimeout(120)
        made.connect(where)
        return Client(made, self.made)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(tmp_path, stack)


def rows(count: int, start: int = 0) -> list[Event]:
    return [make_event(CLIENT, ts_ns=number) for number in range(start, start + count)]


def counts(maps: Sequence[Map]) -> tuple[int, int]:
    """Return the number of rows, and of rows reported as missing."""
    return sum("point" in one for one in maps), sum(one.get("gap", 0) for one in maps)


# --- the stream


def test_stream_is_header_rows_losses_and_report(bench: Bench) -> None:
    sink = bench.sink()
    client = bench.client()
    sink.write(rows(2))
    sink.lost(LOSS)
    sink.write(rows(1, 2))
    sink.close(REPORT)
    header, *maps = client.rest()
    assert header["v"] == header["schema"]["version"] == SCHEMA_VERSION
    assert header["host"] == platform.node()
    assert abs(header["start_ns"] - time.time_ns()) < 60e9
    monotonic_ns = time.time_ns() - time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    assert abs(header["clock_offset_ns"] - monotonic_ns) < 1e9
    fields = header["schema"]["probes"]["tcp_client"]
    assert [name for name, _ in fields] == list(CLIENT.__struct_fields__)
    assert dict(fields)["pid"] == "int or null"
    expected = [msgspec.structs.asdict(row) for row in rows(3)]
    lost = {"v": SCHEMA_VERSION, "lost": attrs.asdict(LOSS)}
    assert maps == [
        *expected[:2],
        lost,
        expected[2],
        {"v": SCHEMA_VERSION, "report": REPORT.as_json()},
    ]


def test_late_reader_gets_the_header_and_later_rows(bench: Bench) -> None:
    sink = bench.sink()
    sink.write(rows(5))
    client = bench.client()
    sink.poll()
    (header,) = client.read(1)  # at once, without a row
    assert "schema" in header
    sink.write(rows(5, 5))
    assert [one["ts_ns"] for one in client.read(5)] == [5, 6, 7, 8, 9]
    sink.close(REPORT)
    assert ["report" in one for one in client.rest()] == [True]


def test_hosts_precede_the_rows_for_late_readers_too(bench: Bench) -> None:
    hosts = [Merge(0, "a.jsonl"), Merge(1, "b.jsonl", offset_ns=-5, bound_ns=30_000, packets=7)]
    sink = bench.sink()
    first = bench.client()
    sink.poll()
    for host in hosts:
        sink.merged(host)
    sink.write(rows(2))
    second = bench.client()
    sink.poll()
    sink.write(rows(1, 2))
    sink.close(REPORT)
    expected = [{"v": SCHEMA_VERSION, "merge": attrs.asdict(host)} for host in hosts]
    for client, count in ((first, 3), (second, 1)):
        header, *maps = client.rest()
        assert "schema" in header
        assert maps[:2] == expected
        assert [one["ts_ns"] for one in maps[2:-1]] == [0, 1, 2][-count:]


def test_late_readers_get_the_share_that_holds(bench: Bench) -> None:
    shares = [Sampled(2), Sampled(8, since_ns=5), Sampled(1, host=1)]
    sink = bench.sink()
    first = bench.client()
    sink.poll()
    for share in shares:
        sink.sampled(share)
    sink.write(rows(1))
    second = bench.client()
    sink.poll()
    sink.close(REPORT)
    maps = [{"v": SCHEMA_VERSION, "sampled": attrs.asdict(share)} for share in shares]
    assert first.rest()[1:4] == maps
    assert second.rest()[1:3] == maps[1:]


def test_new_probe_has_its_header_before_its_first_row(bench: Bench) -> None:
    class Retransmit(Event):
        why: object

    sink = bench.sink(RunInfo((), live=False))
    client = bench.client()
    sink.write(rows(1))
    sink.write([make_event(Retransmit, probe="retransmit", why="x"), *rows(1)])
    _, first, _, second, row, _ = client.read(6)
    assert list(first["schema"]["probes"]) == ["tcp_client"]
    assert second["schema"]["probes"]["retransmit"][-1] == ["why", "any"]
    assert row["why"] == "x"
    assert first["host"] is first["start_ns"] is first["clock_offset_ns"] is None
    late = bench.client()
    sink.poll()
    assert set(late.read(1)[0]["schema"]["probes"]) == {"tcp_client", "retransmit"}
    sink.close(REPORT)


# --- readers that are slow


def ended(sink: Msgpack, client: Client) -> list[Map]:
    """Return what a client gets that begins to read at the end."""
    while any(reader.waiting for reader in sink.readers.values()):
        client.take()
        sink.poll()
    sink.close(REPORT)
    return client.rest()


def test_slow_reader_gets_the_count_and_place_of_missed_rows(bench: Bench) -> None:
    sink = bench.sink(buffer="64K")
    slow, quick = bench.client(), bench.client()
    sink.poll()
    got = quick.read(1)
    for start in range(0, 20_000, 100):
        sink.write(rows(100, start))
        got += quick.read(100)
        assert all(reader._size < (64 << 10) + 100 * 400 for reader in sink.readers.values())
    seen = slow.read(300)  # some room again
    sink.poll()
    sink.write(rows(100, 20_000))
    got += quick.read(100)
    seen += ended(sink, slow)
    expected = 0
    for one in seen:
        expected += one.get("gap", 0)
        if "ts_ns" in one:
            assert one["ts_ns"] == expected
            expected += 1
    assert expected == sum(counts(seen)) == 20_100
    assert 15_000 < counts(seen)[1] < 20_000
    assert seen[-1] == {"v": SCHEMA_VERSION, "report": REPORT.as_json()}
    assert counts(got) == (20_100, 0)


def test_losses_of_the_run_reach_a_slow_reader(bench: Bench) -> None:
    sink = bench.sink(buffer="64K")
    slow = bench.client()
    for start in range(0, 20_000, 100):
        sink.write(rows(100, start))
        sink.lost(attrs.evolve(LOSS, since_ns=start + 1, until_ns=start + 50))
    maps = ended(sink, slow)
    assert sum(counts(maps)) == 20_000
    lost = [one["lost"] for one in maps if "lost" in one]
    assert sum(one["count"] for one in lost) == 200 * LOSS.count
    assert len(lost) < 200
    # Each has the interval of all losses that it stands for.
    assert [one["since_ns"] for one in lost] == [1, *(one["until_ns"] + 51 for one in lost[:-1])]
    assert lost[-1]["until_ns"] == 19_950


@pytest.mark.parametrize("without_time", [0, 1])
def test_merged_losses_have_a_time_only_if_each_has_one(without_time: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        reader, unpacker = Subscriber(ours, 100), msgpack.Unpacker()
        reader.offer(b"\x00" * 100, 1)
        losses = [attrs.evolve(LOSS, since_ns=5, until_ns=7)] * 2
        losses[without_time] = LOSS
        for loss in losses:
            reader.lose(loss, msgspec.msgpack.encode({"lost": attrs.asdict(loss)}))
        drain(reader, theirs, unpacker)
        (shown,) = [one["lost"] for one in unpacker if one]
    assert shown == {**attrs.asdict(LOSS), "count": 2 * LOSS.count}
    assert shown["since_ns"] == shown["until_ns"] == 0


def test_silent_reader_delays_close_by_at_most_1s(bench: Bench) -> None:
    took: list[float] = []
    while len(took) < 3 and (not took or took[-1] >= 4):  # a busy machine delays it, too
        sink = bench.sink(buffer="64K")
        bench.client()
        for start in range(0, 10_000, 100):
            sink.write(rows(100, start))
        began = time.monotonic()
        sink.close(REPORT)
        took.append(time.monotonic() - began)
    assert 0.9 < min(took) < 4


@settings(max_examples=100)
@given(st.lists(st.one_of(st.integers(1, 400), st.just("lost"), st.just("read")), max_size=60))
def test_rows_and_gaps_add_up_in_any_order(steps: list[int | str]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        reader, unpacker = Subscriber(ours, 20_000), msgpack.Unpacker(max_buffer_size=1 << 30)
        sent = lost = 0
        for step in [*steps, "read"]:
            if step == "lost":
                lost += LOSS.count
                reader.lose(LOSS, msgspec.msgpack.encode({"lost": attrs.asdict(LOSS)}))
            elif step == "read":
                drain(reader, theirs, unpacker)
            else:
                numbers = range(sent, sent + int(step))
                data = b"".join(msgspec.msgpack.encode({"n": number}) for number in numbers)
                reader.offer(data, len(numbers))
                sent += len(numbers)
            assert reader._size <= 20_000
        maps = list(unpacker)
    expected = 0
    for one in maps:
        expected += one.get("gap", 0)
        if "n" in one:
            assert one["n"] == expected
            expected += 1
    assert expected == sent
    assert sum(one["lost"]["count"] for one in maps if "lost" in one) == lost


def drain(reader: Subscriber, theirs: socket.socket, unpacker: Any) -> None:
    """Read until no data is pending."""
    reader.send()
    while True:
        try:
            unpacker.feed(theirs.recv(1 << 16))
        except BlockingIOError:
            if not reader.waiting:
                return
        reader.send()


# --- readers that come and go


def test_leaving_reader_does_not_disturb_the_others(bench: Bench) -> None:
    sink = bench.sink()
    leaving, staying = bench.client(), bench.client()
    sink.write(rows(10))
    leaving.read(3)
    leaving.socket.close()
    for start in range(10, 100, 10):
        sink.write(rows(10, start))
    assert len(sink.readers) == 1
    sink.close(REPORT)
    assert counts(staying.rest()) == (100, 0)


def test_leaving_reader_is_noticed_without_rows(bench: Bench) -> None:
    sink = bench.sink()
    client = bench.client()
    sink.poll()
    assert len(sink.readers) == 1
    client.socket.close()
    sink.poll()
    assert len(sink.readers) == 0
    sink.close(REPORT)


def test_reader_that_sends_data_gets_every_row(bench: Bench) -> None:
    sink = bench.sink(tcp=f"127.0.0.1:{free_port()}")
    assert sink.listening
    client = bench.client(sink.listening.getsockname())
    for start in range(0, 100, 10):
        client.socket.sendall(os.urandom(10_000))
        sink.write(rows(10, start))
    sink.close(REPORT)
    assert counts(client.rest()) == (100, 0)


def test_half_closed_reader_gets_every_row(bench: Bench) -> None:
    sink = bench.sink()
    client = bench.client()
    client.socket.shutdown(socket.SHUT_WR)
    for start in range(0, 100, 10):
        sink.write(rows(10, start))
        sink.poll()
    sink.close(REPORT)
    assert counts(client.rest()) == (100, 0)


def test_tcp_keepalive_drops_a_dead_peer_after_a_minute(bench: Bench) -> None:
    """By the kernel: the test checks the socket options."""
    sink = bench.sink(tcp=f"127.0.0.1:{free_port()}")
    assert sink.listening
    bench.client(sink.listening.getsockname())
    sink.poll()
    (reader,) = sink.readers.values()
    for option, value in ((socket.TCP_USER_TIMEOUT, 60_000), (socket.TCP_KEEPIDLE, 60)):
        assert reader.socket.getsockopt(socket.IPPROTO_TCP, option) == value
    assert reader.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    sink.close(REPORT)


def test_run_without_readers_is_not_an_error(bench: Bench) -> None:
    sink = bench.sink()
    sink.write(rows(10))
    sink.lost(LOSS)
    sink.poll()
    sink.close(REPORT)


def test_close_leaves_no_fd_open(bench: Bench) -> None:
    before = os.listdir("/proc/self/fd")
    sink = bench.sink()
    client = bench.client()
    sink.poll()
    sink.close(REPORT)
    client.socket.close()
    assert sorted(os.listdir("/proc/self/fd")) == sorted(before)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


# --- the other way round


def test_sink_connects_to_a_listening_reader_and_ends_with_it(bench: Bench) -> None:
    listening = socket.socket(socket.AF_UNIX)
    with listening:
        listening.bind(bench.path)
        listening.listen()
        sink = bench.sink(connect="1")
        peer, _ = listening.accept()
        client = Client(peer)
        sink.write(rows(3))
        assert counts(client.read(4)) == (3, 0)
        peer.close()
        with pytest.raises(ReaderGoneError):
            sink.poll()
    assert Path(bench.path).exists()  # it is the reader's


def test_reader_that_closes_immediately_leaves_no_fd_open(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair()
    theirs.close()
    monkeypatch.setattr("tcplat_sinks.listening.connect", lambda *_: ours)
    with pytest.raises(ReaderGoneError):
        bench.sink(tcp="127.0.0.1:1", connect="1")
    assert ours.fileno() == -1
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_missing_listening_reader_is_a_usage_error(bench: Bench) -> None:
    with pytest.raises(UsageError, match=r"sink msgpack: unix=.*: No such file or directory"):
        bench.sink(connect="1")
    with pytest.raises(UsageError, match="Connection refused"):
        bench.sink(connect="1", tcp=f"127.0.0.1:{free_port()}")


# --- the path


def test_socket_file_is_private_and_removed_at_the_end(bench: Bench) -> None:
    sink = bench.sink()
    status = os.lstat(bench.path)
    assert stat.S_ISSOCK(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_uid == os.geteuid()
    sink.close(REPORT)
    assert not Path(bench.path).exists()


def test_stale_socket_file_is_replaced(bench: Bench) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(bench.path)
    sink = bench.sink()
    client = bench.client()
    sink.close(REPORT)
    assert len(client.rest()) == 2


def test_socket_file_with_a_listener_is_left_alone(bench: Bench) -> None:
    sink = bench.sink()
    with pytest.raises(UsageError, match=r"another process listens at"):
        bench.sink()
    client = bench.client()
    sink.close(REPORT)
    assert len(client.rest()) == 2


@pytest.mark.parametrize("make", ["file", "link to a file", "dangling link", "link to a socket"])
def test_file_that_is_not_a_socket_is_left_alone(bench: Bench, make: str) -> None:
    other = bench.folder / "other"
    if make == "file":
        Path(bench.path).write_text("precious")
    else:
        Path(bench.path).symlink_to(other)
        if make == "link to a file":
            other.write_text("precious")
        elif make == "link to a socket":
            with socket.socket(socket.AF_UNIX) as left:
                left.bind(str(other))
    before = {path: os.lstat(path) for path in bench.folder.iterdir()}
    with pytest.raises(UsageError, match="is there already, and is no socket"):
        bench.sink()
    assert {path: os.lstat(path) for path in bench.folder.iterdir()} == before


def test_file_that_replaced_the_socket_is_not_removed(bench: Bench) -> None:
    sink = bench.sink()
    Path(bench.path).unlink()
    Path(bench.path).write_text("another's")
    sink.close(REPORT)
    assert Path(bench.path).read_text() == "another's"


def test_shared_folder_admits_own_sockets_alone(bench: Bench) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    bench.folder.chmod(0o1777)
    with socket.socket(socket.AF_UNIX) as planted:
        planted.bind(bench.path)
        planted.listen()
        os.chown(bench.path, 4711, 4711)
        with pytest.raises(UsageError, match="of another user"):
            bench.sink(connect="1")
        with pytest.raises(UsageError, match="of another user"):
            bench.sink()
        planted.setblocking(False)
        with pytest.raises(BlockingIOError):
            planted.accept()
    assert Path(bench.path).exists()


def test_symlink_of_another_user_is_not_followed(bench: Bench) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    bench.folder.chmod(0o1777)
    (bench.folder / "real").mkdir()
    (bench.folder / "link").symlink_to("real")
    os.chown(bench.folder / "link", 4711, 4711, follow_symlinks=False)
    with pytest.raises(UsageError, match="a symbolic link of another user"):
        bench.sink(unix=str(bench.folder / "link" / "s"))
    # A folder in one that others can write to may be exchanged: the socket is made in that one.
    (bench.folder / "real").chmod(0o777)
    sink = bench.sink(unix=str(bench.folder / "real" / "s"))
    assert stat.S_IMODE(os.lstat(bench.folder / "real" / "s").st_mode) == 0o600
    sink.close(REPORT)
    assert not (bench.folder / "real" / "s").exists()


def test_cancelled_run_removes_its_socket(bench: Bench) -> None:
    sink = bench.sink()
    sink.poll()
    client = bench.client()
    sink.poll()
    sink.cancel()
    sink.cancel()
    assert not Path(bench.path).exists()
    assert len(client.rest()) == 1  # the header, and then the end


# --- TCP, and options


@pytest.mark.parametrize(
    ("given", "who"),
    [
        ({"tcp": ":0"}, "every local user can read the rows at tcp=127.0.0.1:0"),
        ({"tcp": "[::1]:0"}, "every local user can read the rows at tcp=::1:0"),
        ({"tcp": "0.0.0.0:0", "public": "1"}, "every host that reaches it can read the rows"),
        ({}, ""),
    ],
)
def test_access_to_the_rows_is_reported(bench: Bench, given: dict[str, str], who: str) -> None:
    said: list[str] = []
    sink = bench.sink(attrs.evolve(RUN, say=said.append), **given)
    sink.cancel()
    assert ([who in one for one in said] == [True]) if who else not said


def test_address_without_a_host_means_loopback(bench: Bench) -> None:
    sink = bench.sink(tcp=f":{free_port()}")
    assert sink.listening
    assert sink.listening.getsockname()[0] == "127.0.0.1"
    sink.close(REPORT)


def test_wildcard_address_needs_public(bench: Bench) -> None:
    with pytest.raises(UsageError, match=r"every host that reaches 0\.0\.0\.0 could read the rows"):
        bench.sink(tcp=f"0.0.0.0:{free_port()}")
    bench.sink(tcp=f"0.0.0.0:{free_port()}", public="1").close(REPORT)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "needs unix=PATH or tcp=HOST:PORT"),
        ({"unix": "x", "tcp": ":1"}, "one of them"),
        ({"tcp": "x"}, "write HOST:PORT"),
        ({"tcp": "x:99999"}, "write HOST:PORT"),
        ({"unix": "x" * 200}, "too long"),
        ({"unix": "/no/where"}, "No such file or directory"),
        ({"unix": "x", "buffer": "1K"}, "it must be 64K or more"),
        ({"unix": "x", "connect": "2"}, "it must be yes or no"),
        ({"unix": "x", "wait": "-1"}, "it must be a whole number from 0"),
    ],
)
def test_invalid_options_are_refused(given: dict[str, str], said: str) -> None:
    spec = PLUGINS.sink("msgpack")
    with pytest.raises(UsageError, match=re.escape(said)):
        spec.factory(read_options("sink msgpack", spec.options, given), RUN)


def test_port_in_use_is_a_usage_error(bench: Bench) -> None:
    sink = bench.sink(tcp=f"127.0.0.1:{free_port()}")
    assert sink.listening
    with pytest.raises(UsageError, match="Address already in use"):
        bench.sink(tcp="{}:{}".format(*sink.listening.getsockname()))
    sink.close(REPORT)


# --- the program


@pytest.fixture
def tcplat(bench: Bench) -> Callable[..., subprocess.Popen[bytes]]:
    """Start the whole program."""

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-I", "-m", "tcplat_core", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        bench.stack.enter_context(process)
        bench.stack.callback(process.kill)
        return process

    return start


def eventually(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def sockets(path: str) -> list[list[str]]:
    """Return the fields of the unix sockets at a path, as /proc/net/unix has them."""
    lines = Path("/proc/net/unix").read_text(encoding="utf-8").splitlines()
    return [line.split() for line in lines if line.endswith(f" {path}")]


def connections(path: str) -> int:
    """Return the connections to a unix socket, accepted or not."""
    return sum(fields[5] == "03" for fields in sockets(path))


def listens(path: str) -> bool:
    """Return whether a unix socket accepts connections: it exists a moment before it does."""
    return any(fields[3] == "00010000" for fields in sockets(path))


def capture_of(batch: Sequence[Event]) -> bytes:
    lines: list[object] = [*batch, {"v": SCHEMA_VERSION, "report": REPORT.as_json()}]
    return b"".join(msgspec.json.encode(line) + b"\n" for line in lines)


def test_readme_example_reads_the_stream(
    bench: Bench, tcplat: Callable[..., subprocess.Popen[bytes]]
) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    writer = tcplat("replay", "-", "--sink", f"msgpack:unix={bench.path},wait=1")
    eventually(lambda: listens(bench.path))
    reader = subprocess.Popen(
        [sys.executable, "-c", code, bench.path], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    writer.communicate(capture_of(rows(3)), timeout=120)
    out, err = reader.communicate(timeout=120)
    assert (out, err) == (b"send 127.0.0.1 127.0.0.1 100\n" * 3, b"")


def test_header_comes_before_rows_and_replay_reads_live(
    bench: Bench, tcplat: Callable[..., subprocess.Popen[bytes]]
) -> None:
    writer = tcplat("replay", "-", "--sink", f"msgpack:unix={bench.path}")
    eventually(lambda: listens(bench.path))
    client = bench.client()
    assert "schema" in client.read(1)[0]
    reader = tcplat("replay", f"unix:{bench.path}", "--sink", "jsonl")
    eventually(lambda: connections(bench.path) == 2)
    data = capture_of(rows(3))
    writer.communicate(data, timeout=120)
    out, _ = reader.communicate(timeout=120)
    assert out.splitlines()[:3] == data.splitlines()[:3]
    assert counts(client.rest()) == (3, 0)
    assert (reader.returncode, writer.returncode) == (0, 0)


def test_gap_of_a_slow_reader_is_a_loss_in_its_replay(
    bench: Bench, tcplat: Callable[..., subprocess.Popen[bytes]]
) -> None:
    path = bench.folder / "capture.mp"
    maps: list[Any] = [*rows(2), {"v": SCHEMA_VERSION, "gap": 7}, *rows(1, 9)]
    path.write_bytes(b"".join(map(msgspec.msgpack.encode, maps)))
    done = tcplat("replay", str(path), "--sink", "jsonl")
    out, err = done.communicate(timeout=120)
    third = msgspec.json.decode(out.splitlines()[2])
    assert third == {
        "v": SCHEMA_VERSION,
        "lost": {"probe": "msgpack", "point": "reader", "count": 7, "since_ns": 0, "until_ns": 0},
    }
    assert b"7 rows were missed, because this reader was too slow" in err
