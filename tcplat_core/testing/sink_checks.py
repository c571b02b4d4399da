"""What a sink promises. Each check has a sink of its own, in a process of its own.

In there standard output is a file, a full device or a pipe that nobody reads; what the sink
holds in memory can be measured; and what it breaks is gone with the process.

Options have meanings by their names: what is written to ``path=`` is the sink's output, and at
``unix=`` a sink lets readers come: what one of them gets is its output. Every option that is the
path of a file (see is_path()) is one in a folder of the check's own, which is the current one.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, cast

import attrs
import msgpack

from tcplat_core.deliver.router import Router, spare_the_collector
from tcplat_core.deliver.sinks import Adapted, as_sink
from tcplat_core.errors import ReaderGoneError, TcplatError, in_a_line, is_the_users
from tcplat_core.event.fields import Event, Wire, fields
from tcplat_core.event.text import text
from tcplat_core.kernel.orphan import end_with
from tcplat_core.plugin.histogram import BUCKETS, Aggregates, Distribution, Group, Histogram, bucket
from tcplat_core.plugin.options import Options
from tcplat_core.plugin.output import held_back
from tcplat_core.plugin.report import HookReport, ProbeReport, RunReport
from tcplat_core.plugin.specs import Loss, Merge, RunInfo, Sink, SinkLike, SinkSpec

from .check import Check, Fault, NotChecked, Subject
from .rows import make_event

MANY = 1_000_000
"""Events that have to go through in bounded memory."""
WARM = 200_000
"""After so many a sink has what it remembers; its memory may grow by GROWTH from there."""
GROWTH = 64 << 20
"""Bytes."""
_PATIENCE_S = 300.0
_SOON_S = 2.0
"""A reader at a socket has by then what write() has handed over; a run polls all the while."""


def checks_of(_: Subject) -> dict[str, Check]:
    """All checks of a sink, by name."""
    return {
        "methods": _methods,
        "batches": _batches,
        "empty batch": _empty_batch,
        "nulls": _nulls,
        "every byte": _every_byte,
        "flushes": _flushes,
        "losses and report": _losses_and_report,
        "close twice": _close_twice,
        "full device": _full_device,
        "reader gone": _reader_gone,
        "bounded memory": _bounded_memory,
    }


class _OwnEvent(Event, gc=False):
    """A row of a third party's probe."""

    rto_us: Annotated[int | None, Wire("u32", "a field of its own", nullable=True)]


_INFO = RunInfo(("tcp_client", "theirs"), events={"tcp_client": Event, "theirs": _OwnEvent})
_REPLAYED = attrs.evolve(_INFO, live=False)
"""When a run began is not in what is written of its replay."""
_REPORT = RunReport(
    probes={
        "tcp_client": ProbeReport(
            hooks=(HookReport("send", "tcp_sendmsg", "kprobe", 12, 2, 9),),
            missing={"recv": "this kernel has no function tcp_recvmsg"},
            untracked=3,
            interfaces={"eth0": "native"},
            skipped={"tcp_sendmsg": 1},
            silent={"eth1": "it is gone"},
        )
    },
    duration_s=1.5,
    late=1,
    switched_off={"other": "writing failed: No space left on device"},
)
_LOSS = Loss("tcp_client", "send", 2)


def _stream(count: int, start: int = 0) -> list[Event]:
    """Connections of ten rows each: begun, used, and gone."""
    story = (
        *(("connect", "TCP_SYN_SENT", None), ("state", "TCP_ESTABLISHED", "TCP_SYN_SENT")),
        *(("send", "TCP_ESTABLISHED", None), ("recv", "TCP_ESTABLISHED", None)) * 2,
        *(("state", "TCP_FIN_WAIT1", "TCP_ESTABLISHED"), ("recv", "TCP_FIN_WAIT2", None)),
        *(("state", "TCP_CLOSE", "TCP_FIN_WAIT2"), ("close", "TCP_CLOSE", None)),
    )
    rows = []
    for number in range(start, start + count):
        connection, step = divmod(number, len(story))
        point, state, old_state = story[step]
        rows.append(
            make_event(
                ts_ns=1_000_000_000 + number * 1000,
                time_ns=1_700_000_000_000_000_000 + number * 1000,
                sock=connection + 1,
                sport=1024 + connection % 60_000,
                daddr=f"10.{connection >> 16 & 255}.{connection >> 8 & 255}.{connection & 255}",
                point=point,
                state=state,
                old_state=old_state,
                seq=number * 100 % 2**32,
            )
        )
    return rows


def _counted(samples: int, comms: Sequence[str] = ("curl",), *, final: bool = True) -> Aggregates:
    """What the kernel has counted of each process: so many durations of a millisecond."""
    counts = [0] * BUCKETS
    counts[bucket(1_000_000)] = samples
    return Aggregates(
        ts_ns=1_000_000_000,
        time_ns=1_700_000_000_000_000_000,
        elapsed_s=float(samples),
        distributions=[
            Distribution(
                probe="tcp_client",
                histogram=Histogram("connect", "SYN to established", ("connect",)),
                group=Group(pid=number, comm=comm),
                counts=counts,
                over=number % 2,
                unmeasured=number % 3,
            )
            for number, comm in enumerate(comms, 1)
        ],
        final=final,
    )


def _end(sink: Sink) -> None:
    """As a run ends it: what the kernel has counted, then the books."""
    sink.aggregates(_counted(3))
    sink.close(_REPORT)


# --- who reads a socket


def _at_socket(subject: Subject) -> bool:
    """Whether readers come to it, at a place that is ours to say."""
    names = {option.name for option in subject.spec.options}
    return "unix" in names and not {"unix", "tcp", "connect"} & subject.given.keys()


@contextlib.contextmanager
def _one_reads(path: str) -> Iterator[None]:
    """What he gets is written to standard output, all of it by the end."""
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
def _another_does_not(path: str) -> Iterator[None]:
    """Besides one who reads there is one who never does."""
    with socket.socket(socket.AF_UNIX) as made:
        made.connect(path)
        with _one_reads(path):
            yield


@contextlib.contextmanager
def _one_leaves(path: str) -> Iterator[None]:
    """He has come, and is gone before he got anything."""
    with socket.socket(socket.AF_UNIX) as made:
        made.connect(path)
    yield


def _written() -> int:
    """In the child: bytes of output so far, wherever the sink has them from."""
    return os.fstat(1).st_size


def _until_more(sink: Sink, least: int, seconds: float) -> int:
    """Bytes that its reader has, once they are more than so many or time is over."""
    end = time.monotonic() + seconds
    while _written() <= least and time.monotonic() < end:
        sink.poll()
        time.sleep(0.002)
    return _written()


# --- the process


@attrs.frozen
class _Ran:
    """What became of it."""

    output: bytes
    error: str
    """What the sink raised; empty if nothing."""
    told: Any
    """What the play returned."""

    def fine(self) -> _Ran:
        """Itself, where the sink raised nothing."""
        if self.error:
            raise Fault(f"it raises {self.error}: it has to take whatever a run may hand it")
        return self


def _run(
    subject: Subject,
    play: Callable[[Sink], Any],
    out: str | int = "",
    info: RunInfo = _INFO,
    readers: Callable[[str], AbstractContextManager[None]] = _one_reads,
) -> _Ran:
    """Make the sink in a child, its output at a file or `out`, and play with it there."""
    spec = subject.spec
    assert isinstance(spec, SinkSpec)  # noqa: S101 - checks() has looked
    options = dict(subject.options())
    with tempfile.TemporaryDirectory(prefix="tcplat-") as folder:
        file = Path(folder, "output")
        target = out or str(file)
        options |= subject.paths(folder)
        # Where it takes a path, it writes there; else to standard output.
        if "path" in options and isinstance(target, str):
            options["path"] = target
        if _at_socket(subject):
            options["unix"] = str(Path(folder, "socket"))
        if sys.stdout is not None:
            sys.stdout.flush()
        answer, theirs = os.pipe()
        parent, child = os.getpid(), os.fork()
        if not child:
            end_with(parent)
            about = readers(options["unix"]) if _at_socket(subject) else contextlib.nullcontext()
            _child(theirs, target, lambda: _made(spec, options, info, folder), play, about)
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
    return _Ran(output, told["error"], told["told"])


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
    """The sink, made and begun as a run does it, where a relative path lands in the folder."""
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


def _is_silent(subject: Subject) -> bool:
    """Whether nothing of it ever gets to standard output or path=."""

    def play(sink: Sink) -> None:
        sink.write(_stream(1000))
        _end(sink)

    if "silent" not in subject.known:
        subject.known["silent"] = not _run(subject, play).fine().output
    return bool(subject.known["silent"])


_NO_OUTPUT = "it writes neither to standard output nor to a path="


# --- the checks


def _methods(subject: Subject) -> None:
    """It has write(), lost() and close(), and each takes what a run hands it."""
    assert isinstance(subject.spec, SinkSpec)  # noqa: S101 - checks() has looked
    needed = ["write", "lost", *(["aggregates"] if subject.spec.aggregate else []), "close"]

    def play(sink: Sink) -> list[str]:
        faults = []
        assert isinstance(sink, Adapted)  # noqa: S101 - as each one here
        for name in needed:
            method = getattr(sink.sink, name, None)
            inherited = getattr(inspect.unwrap(method), "__func__", None) if method else None
            if not callable(method) or inherited is getattr(Sink, name):
                faults.append(f"it has no method {name}(): a run calls it")
                continue
            try:
                inspect.signature(method).bind(None)
            except TypeError:
                faults.append(f"{name}() does not take one argument, as a run gives it")
        sink.idle()
        sink.poll()
        return faults

    faults = _run(subject, play).fine().told
    if faults:
        raise Fault(faults[0])


def _batches(subject: Subject) -> None:
    """It takes rows of several probes, own fields and all, in batches of any size."""

    def play(sink: Sink) -> None:
        sink.write(_stream(1))
        sink.write(_stream(5000, 1))
        theirs = [make_event(_OwnEvent, probe="theirs", rto_us=rto) for rto in (None, 204_000)]
        sink.write(theirs)
        sink.write((*theirs, *_stream(3)))
        _end(sink)

    _run(subject, play).fine()
    # A replay has other batches than the run had, and must come to the same.
    whole, single = (
        _run(subject, _in_batches_of(size), info=_REPLAYED).fine().output for size in (100, 1)
    )
    if whole != single:
        raise Fault(
            "rows one by one give another output than the same rows at once: where a batch ends "
            "is chance, so let nothing depend on it"
        )


def _in_batches_of(size: int) -> Callable[[Sink], None]:
    def play(sink: Sink) -> None:
        rows = _stream(100)
        for start in range(0, len(rows), size):
            sink.write(rows[start : start + size])
        _end(sink)

    return play


def _empty_batch(subject: Subject) -> None:
    """A batch without rows is one."""

    def play(sink: Sink) -> None:
        sink.write([])
        sink.write(_stream(10))
        sink.write([])
        _end(sink)

    _run(subject, play).fine()


def _nulls(subject: Subject) -> None:
    """Each field may be null that the schema says may be, alone or with all others."""
    nullable = [field.name for field in fields(Event) if field.type.endswith("null")]

    def play(sink: Sink) -> str:
        for names in (*([name] for name in nullable), nullable):
            for number, row in enumerate(_stream(10)):
                known = {name: getattr(row, name) for name in row.__struct_fields__}
                try:
                    sink.write([make_event(**{**known, **dict.fromkeys(names)})])
                except BaseException as error:
                    if is_the_users(error):
                        raise
                    which = names[0] if len(names) == 1 else "every field that may be"
                    return f"{which} is null ({_stream(10)[number].point}): {in_a_line(error)}"
        sink.close(_REPORT)
        return ""

    fault = _run(subject, play).fine().told
    if fault:
        raise Fault(f"it fails where {fault}; a null says that nobody can know")


_TEXTS = ("comm", "desc", "ifname")


def _every_byte(subject: Subject) -> None:
    """No text, whatever is in it, breaks its lines or commands the terminal."""
    plain = _output_with(subject, lambda _: "-")
    if not plain:
        raise NotChecked(_NO_OUTPUT if _is_silent(subject) else "it tells nothing of single rows")
    # As the core escapes what a process calls itself; and as a capture that somebody has
    # written by hand may have it: then ESC and its like are what must not get through.
    for what, odd, harmful in (
        ("an escaped", lambda byte: text(bytes([byte])), "\x9f"),
        ("a raw", chr, "\x1f"),
    ):
        shown = _output_with(subject, odd)
        before, after = _control(plain), _control(shown)
        if before is None:
            continue  # it writes no text
        if after is None:
            raise Fault(f"{what} byte in a text makes its output no text any more")
        broken = _unbroken(plain) - _unbroken(shown)
        if broken:
            name, byte = min(broken)
            raise Fault(
                f"{what} byte ({byte:#04x} in {name}) breaks its lines: escape what is not "
                "printable (tcplat_core.printable)"
            )
        strange = sorted(char for char in after.keys() - before.keys() if char <= harmful)
        if strange:
            raise Fault(
                f"{what} byte ({strange[0]!r}) gets through to the terminal: escape what is not "
                "printable (tcplat_core.printable)"
            )


def _output_with(subject: Subject, odd: Callable[[int], str]) -> bytes:
    """Of 256 rows, each with another odd byte in each of its texts."""
    rows = []
    for byte in range(256):
        texts = {name: odd(byte).join(_marks(name, byte)) for name in _TEXTS}
        rows.append(make_event(sock=byte + 1, **texts))

    def play(sink: Sink) -> None:
        sink.write(rows)
        sink.aggregates(_counted(1, [row.comm or "" for row in rows]))
        sink.close(_REPORT)

    return _run(subject, play).fine().output


def _marks(name: str, byte: int) -> tuple[str, str]:
    """What stands before and behind an odd byte."""
    return f"{name[0]}{byte}{name[0]}", f"{name[0].upper()}{byte}{name[0].upper()}"


def _unbroken(output: bytes) -> set[tuple[str, int]]:
    """Field and byte of which both marks stand in one line."""
    lines = output.decode().split("\n")
    marks = {_marks(name, byte): (name, byte) for name in _TEXTS for byte in range(256)}
    return {
        what
        for (before, behind), what in marks.items()
        if any(behind in line.partition(before)[2] for line in lines)
    }


def _control(output: bytes) -> Counter[str] | None:
    """How many of each control character a text has; None where it is no text."""
    try:
        shown = output.decode()
    except UnicodeDecodeError:
        return None
    return Counter(char for char in shown if unicodedata.category(char) == "Cc")


def _flushes(subject: Subject) -> None:
    """What it has written when write() returns is whole, and nothing is held back."""
    soon = _SOON_S if _at_socket(subject) else 0

    def play(sink: Sink) -> list[int]:
        # What comes with a reader, a header say, is no row.
        sink.write([])
        sizes = [_until_more(sink, 0, soon / 10)]
        # A sink whose `joins` is true tells of many rows in one: a row alone may wait for others.
        joins = sink.joins
        for batch in (_stream(999 if joins else 1), _stream(1000, 999)):
            sink.aggregates(_counted(len(batch), final=False))
            sink.write(batch)
            sizes.append(_until_more(sink, sizes[-1], soon))
        _end(sink)
        return [*sizes, _written(), joins]

    ran = _run(subject, play).fine()
    before, first, second, last, joins = ran.told
    if not (last or ran.output):
        raise NotChecked(_NO_OUTPUT)
    if second == before:
        raise NotChecked("it writes nothing before close()")
    if first == before and joins:
        raise NotChecked("it tells of many rows in one, and has waited for more of them")
    if first == before:
        raise Fault(
            "a row is not in its output when write() returns: it has a buffer, "
            "which has to be flushed (tcplat_core.Output has none)"
        )
    if _control(ran.output) is not None and ran.output[second - 1 : second] != b"\n":
        raise Fault("when write() returns its output ends within a line: write whole ones")


def _losses_and_report(subject: Subject) -> None:
    """It is told of losses at any place, of hosts before the rows, and of how the run went."""

    def play(sink: Sink) -> None:
        for host in range(2):
            sink.merged(Merge(host, f"{host}.jsonl", bound_ns=host * 1000))
        sink.lost(_LOSS)
        sink.write(_stream(3))
        sink.lost(_LOSS)
        sink.lost(Loss("theirs", "retransmit", 2**40))
        sink.close(_REPORT)

    _run(subject, play).fine()
    _run(subject, lambda sink: sink.close(RunReport(probes={}, duration_s=0))).fine()


def _close_twice(subject: Subject) -> None:
    """A second close() does no harm."""

    def play(sink: Sink) -> str:
        sink.write(_stream(3))
        _end(sink)
        try:
            sink.close(_REPORT)
        except BaseException as error:
            if is_the_users(error):
                raise
            return in_a_line(error)
        return ""

    error = _run(subject, play).fine().told
    if error:
        raise Fault(f"a second close() raises {error}: let it do nothing")


def _full_device(subject: Subject) -> None:
    """What it could not write it does not keep to itself."""
    if _at_socket(subject):
        raise NotChecked("it writes to a socket, not to a device")
    if _is_silent(subject):
        raise NotChecked(_NO_OUTPUT)
    ran = _run(subject, _everything, "/dev/full")
    if not ran.error:
        raise Fault(
            "its output is on a full device, and nobody hears of it: let write() and close() "
            "raise what the operating system says"
        )
    _check_is_error(ran.error)


def _reader_gone(subject: Subject) -> None:
    """Where nobody reads any more it says so, and the run ends; where others may come, not."""
    if _at_socket(subject):
        gone = _run(subject, _everything, readers=_one_leaves)
        if gone.error:
            raise Fault(
                f"a reader has left its socket, and it raises {gone.error}: others may come, "
                "so let the run go on"
            )
        return
    if _is_silent(subject):
        raise NotChecked("it does not write to standard output")
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ran = _run(subject, _everything, writer)
    finally:
        os.close(writer)
    if not ran.error.startswith(ReaderGoneError.__name__):
        raise Fault(
            f"nobody reads its output any more, and it raises {ran.error or 'nothing'}: "
            "raise ReaderGoneError, as tcplat_core.Output does"
        )


def _everything(sink: Sink) -> None:
    sink.write(_stream(1000))
    sink.lost(_LOSS)
    _end(sink)


def _check_is_error(error: str) -> None:
    if error.startswith(("SystemExit", "KeyboardInterrupt")):
        raise Fault(f"it raises {error}, which ends the whole run: raise an error of its own")


def _bounded_memory(subject: Subject) -> None:
    """A million events go through it, and its memory does not grow, whoever does not read."""

    def play(sink: Sink) -> int:
        spare_the_collector()  # as in a run
        settled = 0
        for batch in _many():
            sink.write(batch)
            if not settled and batch[-1].ts_ns >= 1_000_000_000 + (WARM - 1) * 1000:
                settled = _resident()
        return _resident() - settled

    grown = _run(subject, play, os.devnull, readers=_another_does_not).fine().told
    if grown > GROWTH:
        raise Fault(
            f"its memory grows by {grown >> 20} MB over {MANY - WARM} events: "
            "let it forget what it has written, or keep sums instead of rows"
        )


def _many() -> Iterator[list[Event]]:
    for start in range(0, MANY, 1000):
        yield _stream(1000, start)


def _resident() -> int:
    """Bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
