"""The process in which a sink is tried.

There, standard output is a file, a full device or a pipe without a reader; the memory of the sink
can be measured; and what it breaks is gone with the process.

The names of options have a meaning: what is written to ``path=`` is the sink's output, and at
``unix=`` the sink accepts readers: what one of them receives is its output. Every option that is
the path of a file (see is_path()) points into the current folder, which is the check's own.
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

_TIMEOUT_S = 300.0


# --- readers of a socket


def at_socket(subject: Subject) -> bool:
    """Return whether readers connect to it, at a path that the kit chooses."""
    names = {option.name for option in subject.spec.options}
    return "unix" in names and not {"unix", "tcp", "connect"} & subject.given.keys()


@contextlib.contextmanager
def reader(path: str) -> Iterator[None]:
    """Connect a reader, and copy all that it receives to standard output."""
    with socket.socket(socket.AF_UNIX) as made:
        made.connect(path)
        copying = threading.Thread(target=_copy, args=(made,), daemon=True)
        copying.start()
        yield
        # What is in the socket's buffer is still read. The sink may not have closed its end.
        made.shutdown(socket.SHUT_RD)
        copying.join()


def _copy(made: socket.socket) -> None:
    with contextlib.suppress(ConnectionError):  # the sink may reset it
        while data := made.recv(1 << 18):
            os.write(1, data)


@contextlib.contextmanager
def silent_and_normal_reader(path: str) -> Iterator[None]:
    """Connect a reader, and another one that never reads."""
    with socket.socket(socket.AF_UNIX) as made:
        made.connect(path)
        with reader(path):
            yield


@contextlib.contextmanager
def gone_reader(path: str) -> Iterator[None]:
    """Connect a reader that closes its socket before it has received anything."""
    with socket.socket(socket.AF_UNIX) as made:
        made.connect(path)
    yield


def written() -> int:
    """In the child: return the bytes of output so far, of a file or of a reader."""
    return os.fstat(1).st_size


def until_more(sink: Sink, least: int, seconds: float) -> int:
    """Return the bytes of output, as soon as they are more than `least`, or after the timeout."""
    end = time.monotonic() + seconds
    while written() <= least and time.monotonic() < end:
        sink.poll()
        time.sleep(0.002)
    return written()


# --- the process


@attrs.frozen
class Ran:
    """The result of a trial."""

    output: bytes
    error: str
    """What the sink raised; empty if nothing."""
    returned: Any
    """What the play returned."""

    def fine(self) -> Ran:
        """Return itself; raise Fault if the sink raised an error."""
        if self.error:
            raise Fault(f"it raises {self.error}: it has to accept whatever a run may pass to it")
        return self


def try_sink(
    subject: Subject,
    play: Callable[[Sink], Any],
    out: str | int = "",
    info: RunInfo = INFO,
    readers: Callable[[str], AbstractContextManager[None]] = reader,
) -> Ran:
    """Create the sink in a child process, with its output in a file or at `out`; run `play`."""
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
        result = msgpack.unpackb(data)
        output = file.read_bytes() if file.exists() else b""
    if result["unable"]:
        raise NotChecked(result["unable"])
    if result["ours"]:
        raise RuntimeError(result["error"])
    return Ran(output, result["error"], result["returned"])


_raised: list[BaseException] = []
"""In the child: what code of the sink has raised. Anything else is a failure of the kit."""


@contextlib.contextmanager
def _the_sinks() -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        _raised.append(error)
        raise


class _Marked:
    """A sink, with a record of the exceptions that its code raised."""

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
    """Create and begin the sink as a run does; a relative path is one in the folder."""
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
    """Never returns: the result goes through the pipe."""
    result: dict[str, Any] = {"unable": "", "error": "", "ours": False, "returned": None}
    try:
        fd = target if isinstance(target, int) else os.open(target, os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(fd, 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - the sink's, until the end
        try:
            sink = make()
        except TcplatError as error:
            result["unable"] = str(error)
        else:
            with readers:
                result["returned"] = play(sink)
    except BaseException as error:  # noqa: BLE001 - SystemExit is the sink's fault, too
        result["error"] = in_a_line(error)
        result["ours"] = not any(error is one for one in _raised)
    finally:
        os.write(answer, msgpack.packb(result, default=str))
        os._exit(0)


def _read(answer: int, child: int) -> bytes:
    """Return all that comes through the pipe; kill a child that hangs."""
    deadline = time.monotonic() + _TIMEOUT_S
    data = b""
    while select.select([answer], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(answer, 1 << 16)
        if not chunk:
            return data
        data += chunk
    os.kill(child, signal.SIGKILL)
    raise Fault(f"it did not return within {_TIMEOUT_S:.0f} s")


def is_silent(subject: Subject) -> bool:
    """Return whether the sink writes nothing to standard output or path=."""

    def play(sink: Sink) -> None:
        sink.write(stream(1000))
        end_run(sink)

    if "silent" not in subject.known:
        subject.known["silent"] = not try_sink(subject, play).fine().output
    return bool(subject.known["silent"])


NO_OUTPUT = "it writes neither to standard output nor to a path="
