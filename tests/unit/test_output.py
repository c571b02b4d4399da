"""Whole writes to files and pipes; neither a closed nor a stalled reader blocks for ever."""

from __future__ import annotations

import os
import pty
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcplat_core.errors import ReaderGoneError, TcplatError, UsageError
from tcplat_core.plugin.output import Output, held_back

BIG = bytes(range(256)) * 4096
"""A megabyte: no pipe takes it at once."""


def never() -> bool:
    return False


def always() -> bool:
    return True


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            continue  # the test has closed it


def write_to_a_reader(pipe: tuple[int, int], size: int) -> bytes:
    """Write BIG while another thread reads, so many bytes at a time; what it has got."""
    got = bytearray()

    def read() -> None:
        while chunk := os.read(pipe[0], size):
            got.extend(chunk)

    thread = threading.Thread(target=read)
    thread.start()
    Output(pipe[1], never).write(BIG)
    os.close(pipe[1])
    thread.join()
    return bytes(got)


# --- files


def test_file_is_created_and_receives_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "out"
    output = Output.open(str(path), always)
    output.write(BIG)
    output.write(b"")
    output.write(b"end")
    assert path.read_bytes() == BIG + b"end"  # before it is closed
    output.close()
    assert path.stat().st_mode & 0o133 == 0


def test_existing_file_is_truncated(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("of yesterday")
    Output.open(str(path), never).close()
    assert path.read_bytes() == b""


def test_output_fd_is_not_inherited_by_the_traced_command(tmp_path: Path) -> None:
    output = Output.open(str(tmp_path / "out"), never)
    assert not os.get_inheritable(output.fd)
    output.close()


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("missing/out", "No such file or directory"),
        (".", "Is a directory"),
        ("a_file/out", "Not a directory"),
    ],
)
def test_unwritable_path_is_a_usage_error(tmp_path: Path, path: str, why: str) -> None:
    (tmp_path / "a_file").touch()
    with pytest.raises(UsageError, match=f"cannot write .*{why}; use another path"):
        Output.open(str(tmp_path / path), never)


def test_full_disk_error_has_the_systems_message() -> None:
    output = Output.open("/dev/full", never)
    with pytest.raises(TcplatError, match="writing failed: No space left on device") as error:
        output.write(b"x")
    assert type(error.value) is TcplatError
    output.close()


def test_dev_null_takes_everything() -> None:
    output = Output.open("/dev/null", always)
    output.write(BIG)
    output.close()


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("second", ["out", "./out", "link", "folder/../out"])
def test_two_sinks_of_a_run_cannot_write_to_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str, *, exists: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("link").symlink_to("out")
    if exists:
        Path("out").write_text("before")
    with held_back() as outputs:
        Output.open("out", never)
        with pytest.raises(UsageError, match="two sinks write to"):
            Output.open(second, never)
        Output.open("other", never)
    for output in outputs:
        output.close()
    assert Path("out").exists() == exists


def test_sink_with_a_path_cannot_write_to_the_file_of_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    with path.open("w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        with held_back():
            Output.open(None, never)
            Output.open(None, never)  # these may share it
            with pytest.raises(UsageError, match="two sinks write to"):
                Output.open(str(path), never)


@pytest.mark.parametrize("captures", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("paths", [(None, None), (None, "/dev/stdout"), ("pipe", "pipe")])
@pytest.mark.parametrize("kind", ["file", "pipe", "terminal"])
def test_capture_shares_no_stream_with_another_sink(
    captures: tuple[bool, bool],
    paths: tuple[str | None, str | None],
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    main, terminal = pty.openpty()
    name = {"file": "out", "pipe": "pipe", "terminal": os.ttyname(terminal)}[kind]
    before = os.dup(1)
    with Path(name).open("w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        os.dup2(stdout.fileno(), 1)  # for /dev/stdout
        try:
            with held_back() as outputs:
                first, second = paths
                Output.open(first, never, alone=captures[0])
                with pytest.raises(UsageError, match="two sinks write to") as refused:
                    Output.open(second, never, alone=captures[1])
        finally:
            os.dup2(before, 1)
    assert str(refused.value).endswith(": give each a path of its own")
    for output in outputs:
        output.close()
    for fd in (reader, main, terminal, before):
        os.close(fd)


def test_several_sinks_may_write_to_a_device() -> None:
    with held_back() as outputs:
        Output.open("/dev/null", never).write(b"x")
        Output.open("/dev/null", never, alone=True).write(b"x")
    for output in outputs:
        output.close()


def test_file_that_another_run_writes_is_refused_and_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "out"
    first = Output.open(str(path), never)
    first.write(b"a row\n")
    with pytest.raises(UsageError, match="another run writes it; use another path"):
        Output.open(str(path), never)
    assert path.read_bytes() == b"a row\n"
    first.close()
    second = Output.open(str(path), never)
    second.write(b"another\n")
    second.close()
    assert path.read_bytes() == b"another\n"


def test_removed_file_is_noticed(tmp_path: Path) -> None:
    def written(name: str) -> Output:
        output = Output.open(str(tmp_path / name), never)
        output.write(b"a row\n")
        return output

    kept, linked, moved, gone, replaced = outputs = [
        *map(written, ("kept", "linked", "moved", "gone", "replaced"))
    ]
    (tmp_path / "elsewhere").hardlink_to(tmp_path / "linked")
    (tmp_path / "linked").unlink()
    (tmp_path / "moved").rename(tmp_path / "there")
    (tmp_path / "gone").unlink()
    (tmp_path / "new").write_text("")
    (tmp_path / "new").rename(tmp_path / "replaced")
    for _ in ("open", "closed"):
        assert [one.removed() for one in (kept, linked, moved)] == ["", "", ""]
        assert gone.removed() == str(tmp_path / "gone")
        assert replaced.removed() == str(tmp_path / "replaced")
        for output in outputs:
            output.close()


def test_file_that_had_no_name_is_not_called_removed() -> None:
    with tempfile.TemporaryFile() as file:
        output = Output.open(f"/proc/self/fd/{file.fileno()}", never)
        output.write(b"a row\n")
        assert not output.removed()
        output.close()
    assert not output.removed()


# --- standard output


def test_output_without_a_path_is_stdout_and_stays_open(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with os.fdopen(os.dup(pipe[1]), "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        output = Output.open(None, never)
        output.write(b"a row\n")
        output.close()
        output.write(b"another\n")
    assert os.read(pipe[0], 100) == b"a row\nanother\n"


# --- pipes


@pytest.mark.parametrize("size", [100, 4096, 1 << 20])
def test_slow_reader_receives_everything_in_order(pipe: tuple[int, int], size: int) -> None:
    assert write_to_a_reader(pipe, size) == BIG


def test_nonblocking_pipe_is_waited_for(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    assert write_to_a_reader(pipe, 1000) == BIG


def test_closed_pipe_raises_readergoneerror(pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    with pytest.raises(ReaderGoneError):
        Output(pipe[1], never).write(b"a row\n")


def test_pipe_closed_during_a_write_raises_readergoneerror(pipe: tuple[int, int]) -> None:
    closed: list[int] = []

    def leaves() -> bool:
        if not closed:
            closed.append(pipe[0])
            os.close(pipe[0])
        return False

    with pytest.raises(ReaderGoneError):
        Output(pipe[1], leaves).write(BIG)
    assert closed


def test_stalled_reader_does_not_block_a_stop(
    pipe: tuple[int, int],
) -> None:
    asked: list[float] = []

    def stopping() -> bool:
        asked.append(time.monotonic())
        return len(asked) == 3

    began = time.monotonic()
    with pytest.raises(TcplatError, match="the run was stopped while its reader did not read"):
        Output(pipe[1], stopping).write(BIG)
    assert len(asked) == 3
    assert time.monotonic() - began < 30


def test_reading_reader_is_served_while_stopping(pipe: tuple[int, int]) -> None:
    Output(pipe[1], always).write(b"the last row\n")
    assert os.read(pipe[0], 100) == b"the last row\n"


def test_closed_socket_raises_readergoneerror() -> None:
    ours, theirs = socket.socketpair()
    output = Output(ours.fileno(), never)
    output.look()
    theirs.close()
    with pytest.raises(ReaderGoneError):
        output.look()
    with pytest.raises(ReaderGoneError):
        output.write(BIG)
    ours.close()


def test_reset_connection_raises_readergoneerror() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    ours.send(b"unread")
    theirs.recv(1)
    theirs.close()
    with pytest.raises(ReaderGoneError):
        Output(ours.fileno(), never).write(BIG)
    ours.close()
