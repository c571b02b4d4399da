"""The process in which a sink is tried.

In there standard output is a file, a full device or a pipe that nobody reads; what the sink
holds in memory can be measured; and what it breaks is gone with the process.

Options have meanings by their names: what is written to ``path=`` is the sink's output, and at
``unix=`` a sink lets readers come: what one of them gets is its output. Every option that is the
path of a file (see is_path()) is one in a folder of the check's own, which is the current one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, cast

import attrs
import msgpack

from tcplat_core.deliver.router import Router
from tcplat_core.deliver.sinks import as_sink
from tcplat_core.errors import TcplatError, in_a_line
from tcplat_core.kernel.orphan import end_with
from tcplat_core.kernel.remover import passing_folder
from tcplat_core.plugin.options import Options
from tcplat_core.plugin.output import held_back
from tcplat_core.plugin.specs import RunInfo, Sink, SinkLike, SinkSpec

from .check import Fault, NotChecked, Subject
from .sink_rows import INFO, end_run, stream

_PATIENCE_S = 300.0


# --- who reads a socket


def at_socket(subject: Subject) -> bool:
    """Whether readers come to it, at a place that is ours to say."""
    names = {option.name for option in subject.spec.options}
    return "unix" in names and not {"unix", "tcp", "connect"} & subject.given.keys()


@contextlib.contextmanager
def one_reads(path: str) -> Iterator[None]:
    """Copy what the reader gets to standard output, all of it by the end."""
    with socket.socket(socket.AF_UNIX) as made:
        made.connect(path)
        reader = threading.Thread(target=_copy, args=(made,), daemon=True)
        reader.start()
        yield
        # What is under way still comes; the sink may be open yet.
        made.shutdown(socket.SHUT_RD)
        reader.join()


def _copy(made: socket.socket) -> None:
    with contextlib.suppress(ConnectionError):  # it may end with what he had to say unread
        while data := made.recv(1 << 18):
            os.write(1, data)


@contextlib.contextmanager
def another_does_not(path: str) -> Iterator[None]:
    """Besides one who reads there is one who never does."""
    with socket.socket(socket.AF_UNIX) as made:
        made.connect(path)
        with one_reads(path):
            yield


@contextlib.contextmanager
def one_leaves(path: str) -> Iterator[None]:
    """He has come, and is gone before he got anything."""
    with socket.socket(socket.AF_UNIX) as made:
        made.connect(path)
    yield


def written() -> int:
    """In the child: bytes of output so far, wherever the sink has them from."""
    return os.fstat(1).st_size


def until_more(sink: Sink, least: int, seconds: float) -> int:
    """Bytes that its reader has, once they are more than so many or time is over."""
    end = time.monotonic() + seconds
    while written() <= least and time.monotonic() < end:
        sink.poll()
        time.sleep(0.002)
    return written()


# --- the process


@attrs.frozen
class Ran:
    """What became of it."""

    output: bytes
    error: str
    """What the sink raised; empty if nothing."""
    told: Any
    """What the play returned."""

    def fine(self) -> Ran:
        """Itself, where the sink raised nothing."""
        if self.error:
            raise Fault(f"it raises {self.error}: it has to take whatever a run may hand it")
        return self


def try_sink(
    subject: Subject,
    play: Callable[[Sink], Any],
    out: str | int = "",
    info: RunInfo = INFO,
    readers: Callable[[str], AbstractContextManager[None]] = one_reads,
) -> Ran:
    """Make the sink in a child, its output at a file or `out`, and play with it there."""
    spec = subject.spec
    assert isinstance(spec, SinkSpec)  # noqa: S101 - checks() has looked
    options = dict(subject.options())
    with passing_folder() as folder:
        file = folder / "output"
        target = out or str(file)
        options |= subject.paths(str(folder))
        # Where it takes a path, it writes there; else to standard output.
        if "path" in options and isinstance(target, str):
            options["path"] = target
        if at_socket(subject):
            options["unix"] = str(folder / "socket")
        if sys.stdout is not None:
            sys.stdout.flush()
        answer, theirs = os.pipe()
        parent, child = os.getpid(), os.fork()
        if not child:
            end_with(parent)
            about = readers(options["unix"]) if at_socket(subject) else contextlib.nullcontext()
            _child(theirs, target, lambda: _made(spec, options, info, str(folder)), play, about)
        os.close(theirs)
        try:
            data = _read(answer, child)
        finally:
            os.close(answer)
            _, status = os.waitpid(child, 0)
        if not data:
            raise Fault(f"it ends the whole process (status {status}): let it raise instead")
        told = msgpack.unpackb(data)
        output = file.read_bytes() if file.exists() else b""
    if told["unable"]:
        raise NotChecked(told["unable"])
    if told["ours"]:
        raise RuntimeError(told["error"])
    return Ran(output, told["error"], told["told"])


_raised: list[BaseException] = []
"""In the child: what code of the sink's has raised. All else is the kit's own failure."""


@contextlib.contextmanager
def _the_sinks() -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        _raised.append(error)
        raise


class _Marked:
    """A sink that knows which exceptions are its own."""

    def __init__(self, sink: Any) -> None:
        self._sink = sink

    def __getattr__(self, name: str) -> Any:
        with _the_sinks():
            value = getattr(self._sink, name)
        if not callable(value):
            return value

        @functools.wraps(value)
        def call(*given: Any) -> Any:
            with _the_sinks():
                return value(*given)

        return call


def _made(spec: SinkSpec, options: Options, info: RunInfo, folder: str) -> Sink:
    """Make and begin the sink as a run does; a relative path lands in the folder."""
    os.chdir(folder)
    with held_back() as outputs, _the_sinks():
        sink = as_sink(cast("SinkLike", _Marked(spec.factory(options, info))))
    Router({"it": sink}, outputs=outputs).begin()
    return sink


def _child(
    answer: int,
    target: str | int,
    make: Callable[[], Sink],
    play: Callable[[Sink], Any],
    readers: AbstractContextManager[None],
) -> None:
    """Never returns: whatever happens is told through the pipe."""
    told: dict[str, Any] = {"unable": "", "error": "", "ours": False, "told": None}
    try:
        fd = target if isinstance(target, int) else os.open(target, os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(fd, 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - the sink's, until the end
        try:
            sink = make()
        except TcplatError as error:
            told["unable"] = str(error)
        else:
            with readers:
                told["told"] = play(sink)
    except BaseException as error:  # noqa: BLE001 - SystemExit is the sink's fault, too
        told["error"] = in_a_line(error)
        told["ours"] = not any(error is one for one in _raised)
    finally:
        os.write(answer, msgpack.packb(told, default=str))
        os._exit(0)


def _read(answer: int, child: int) -> bytes:
    """All that comes through the pipe; a child that hangs is ended."""
    deadline = time.monotonic() + _PATIENCE_S
    data = b""
    while select.select([answer], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(answer, 1 << 16)
        if not chunk:
            return data
        data += chunk
    os.kill(child, signal.SIGKILL)
    raise Fault(f"it did not return within {_PATIENCE_S:.0f} s")


def is_silent(subject: Subject) -> bool:
    """Whether nothing of it ever gets to standard output or path=."""

    def play(sink: Sink) -> None:
        sink.write(stream(1000))
        end_run(sink)

    if "silent" not in subject.known:
        subject.known["silent"] = not try_sink(subject, play).fine().output
    return bool(subject.known["silent"])


NO_OUTPUT = "it writes neither to standard output nor to a path="
