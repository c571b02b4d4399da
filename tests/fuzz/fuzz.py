"""``make fuzz``: hostile captures through every sink and command.

None may end in a traceback, take more than two seconds of CPU, let a control character through,
switch a sink off, or take more than 200 MB. Prints its seed: the same seed makes the same captures.
The smallest capture that shows a failure is written to tests/fuzz/found/; once the failure is
mended, it belongs into tests/fuzz/cases/.

    python -m tests.fuzz.fuzz --seconds 600 --seed 7 --jobs 2
    python -m tests.fuzz.fuzz --again tests/fuzz/cases/*
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import attrs
import click

from tcplat_core import TcplatError
from tcplat_core.cli import replay
from tcplat_core.cli.main import cli
from tcplat_core.kernel.orphan import end_with
from tcplat_core.registry import command_group
from tcplat_core.registry.find import Plugins

from .mutate import FOLDER, mutant, seeds

CPU_S = 2.0
MOST_BYTES = 200 << 20
_REAL_EVERY = 499
"""One capture in so many is also read by a separate process; odd: each worker has its turn."""
_SMALLER_S = 20.0
_CHUNK = 200
"""Captures per process: commands leave open files and classes behind when they end."""
_STUCK_S = 120.0
"""A worker without output for so many seconds hangs where signals are not handled."""
CONTROLS = re.compile(
    rb"[\x00-\x09\x0b-\x1f\x7f]|\xc2[\x80-\x9f]|\xe2\x80[\x8e\x8f\xa8-\xae]|\xe2\x81[\xa6-\xa9]"
)
_ODD = b"was switched off: "

_FILTERS: tuple[tuple[str, ...], ...] = (
    (),
    ("--port", "42104"),
    ("--lport", "42104", "--rport", "42104"),
    ("--addr", "127.0.0.0/8", "-4"),
    ("--addr", "::1", "-6"),
    ("--comm", "python*"),
    ("-p", "24410"),
    ("--min-latency", "1us"),
    ("--netns", "4026531833"),
    ("--probe", "tcp_client", "--point", "send"),
    ("-n", "3"),
)


def ways(number: int, path: str, base: str, page: str, reader: str) -> Iterator[list[str]]:
    """Yield the commands for the capture of this number; a few captures in a row cover all."""

    def turn(*choices: Any) -> Any:
        return choices[number % len(choices)]

    filters = list(_FILTERS[number // 2 % len(_FILTERS)])
    sinks = [
        f"table:width={turn(0, 20, 80, 132)}",
        f"waterfall:{turn('slow=3', 'format=json', 'min_stage=queue:1us', 'slow=1,format=json')}",
        f"summary:{turn('format=text', 'format=json')}",
        f"stages:group_by={turn('process', 'remote', 'port', 'process+remote')}"
        + turn("", ",every=1s", ",every=1s,format=json"),
        turn("waterfall", "stages", "stages:format=json"),
        "jsonl",
    ]
    if reader and number % 4 == 0:
        sinks.append(f"msgpack:unix={reader},connect=1")
    if number % 2:
        filters = []
    yield ["replay", path, *filters, *(word for sink in sinks for word in ("--sink", sink))]
    yield ["report", path, "-o", page]
    yield ["report", path, "-o", "-", "--format", "perfetto"]
    two = [path, base] if number % 2 else [base, path]
    yield ["diff", *two, *turn([], ["--format", "json"], ["--group-by", "process+remote"])]
    yield ["merge", *two, "-o", "-"]
    if number % 8 == 0:
        again = shutil.copyfile(path, f"{path}-again")  # merge refuses one file twice
        yield ["merge", path, again, "-o", "-"]
        yield ["replay", path, "--sink", "histogram"]


class _HangError(BaseException):
    """A command took too much CPU time."""


def _out_of_time(*_: object) -> NoReturn:
    raise _HangError


@attrs.frozen
class Failure:
    """What went wrong, and with which command."""

    what: str
    command: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The same for the same fault: the smallest capture has to show it, too."""
        words = self.what.strip().splitlines()
        places = [line for line in words if line.startswith('  File "')]
        return words[-1].split(":")[0] + (places[-1] if places else self.command[0])


def find_plugins_once() -> None:
    """Keep what each process would find anew: here that would be a million times."""
    found, entries = Plugins.load(), command_group._entries()
    Plugins.load = lambda *_: found  # type: ignore[method-assign]
    command_group._entries = lambda: entries
    replay.give_up_root = lambda **_: None  # type: ignore[attr-defined]


@attrs.define(eq=False)
class Worker:
    """Commands in this process: starting one costs more than all else."""

    folder: Path
    output: int = attrs.field(init=False)
    reader: str = attrs.field(init=False)
    _seen: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        self.output = os.memfd_create("output")
        os.dup2(self.output, 1)
        os.dup2(self.output, 2)
        signal.signal(signal.SIGPROF, _out_of_time)
        (self.folder / "base").write_bytes((FOLDER / "corpus" / "ipv4.jsonl").read_bytes())
        self.reader = str(self.folder / "reader")
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(self.reader)
        listening.listen(8)
        threading.Thread(target=_read_all, args=(listening,), daemon=True).start()

    def failures(self, data: bytes, number: int) -> Iterator[Failure]:
        """Yield what goes wrong with this capture."""
        path, page = self.folder / "capture", self.folder / "page"
        path.write_bytes(data)
        base = str(self.folder / "base")
        for command in ways(number, str(path), base, str(page), self.reader):
            what = self._run(command)
            if not what and command[:1] == ["report"] and page.exists():
                what = _in_page(page.read_bytes())
                page.unlink()
            if what:
                yield Failure(what, tuple(command))

    def _run(self, command: Sequence[str]) -> str:
        os.ftruncate(self.output, 0)
        os.lseek(self.output, 0, os.SEEK_SET)
        what = ""
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        try:
            cli.main(list(command), prog_name="tcplat", standalone_mode=False, obj=None)
        except (TcplatError, click.ClickException) as error:
            what = _in_output(f"{error}".encode("utf-8", "surrogateescape").replace(b"\n", b"\0"))
            what = "" if what and error.__cause__ is not None else what
        except SystemExit:
            pass
        except _HangError:
            what = f"{traceback.format_exc(-8)}more than {CPU_S} s"
        except BaseException:  # noqa: BLE001 - that is what is looked for
            what = traceback.format_exc()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            self._close_captures()
        with contextlib.suppress(ValueError, OSError):
            sys.stdout.flush()
        if what:
            return what
        size = os.fstat(self.output).st_size
        what = _in_output(os.pread(self.output, min(size, 64 << 20), 0))
        most = _peak_bytes()
        if not what and most > MOST_BYTES and most > self._seen:
            self._seen = most
            what = f"memory: {most >> 20} MB"
        return what

    def _close_captures(self) -> None:
        """Close the captures that commands left open, because they end with their process."""
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{name}").startswith(f"{self.folder}/"):
                    os.close(int(name))


def _read_all(listening: socket.socket) -> None:
    while True:
        made, _ = listening.accept()
        with made, contextlib.suppress(OSError):
            while made.recv(1 << 16):
                pass


def _in_output(data: bytes) -> str:
    if found := CONTROLS.search(data):
        around = data[max(0, found.start() - 60) : found.end() + 20]
        return f"control character: {found[0]!r} in {around!r}"
    if (at := data.find(_ODD)) >= 0:
        line = data[at:].split(b"\n")[0].decode("utf-8", "replace")
        return f"a sink {line}".replace(": ", " ", 1)
    return ""


def _in_page(data: bytes) -> str:
    return _in_output(data.replace(b"\t", b" "))


def in_a_process(data: bytes, number: int, folder: Path) -> Iterator[Failure]:
    """Yield what goes wrong with the whole program, as a user starts it."""
    path, page = folder / "real", folder / "page"
    path.write_bytes(data)
    base = str(FOLDER / "corpus" / "ipv4.jsonl")
    for command in ways(number, str(path), base, str(page), ""):
        with subprocess.Popen(
            [sys.executable, "-I", "-m", "tcplat_core", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=functools.partial(end_with, os.getpid()),  # noqa: PLW1509 - one thread
        ) as process:
            out, _ = process.communicate()
        what = _in_output(out)
        if b"Traceback" in out:
            what = out.decode("utf-8", "replace")
        if process.returncode not in (0, 1, 2):
            what = f"status: {process.returncode}"
        if what:
            yield Failure(what, tuple(command))


def smaller(data: bytes, fails: Callable[[bytes], bool]) -> bytes:
    """Return the smallest part found in time that still fails."""
    end = time.monotonic() + _SMALLER_S
    for cut in (_lines, _bytes):
        parts = cut(data)
        size = len(parts) // 2
        while size and time.monotonic() < end:
            at = 0
            while at < len(parts) and time.monotonic() < end:
                fewer = parts[:at] + parts[at + size :]
                if fails(b"".join(fewer)):
                    parts = fewer
                else:
                    at += size
            size //= 2
        data = b"".join(parts)
    return data


def _lines(data: bytes) -> list[bytes]:
    if data.startswith(b"{"):
        return data.splitlines(keepends=True)
    begins = rb"(?=\xde..\xa1v|[\x80-\x8f]\xa1v)"
    return [part for part in re.split(begins, data, flags=re.DOTALL) if part]


def _bytes(data: bytes) -> list[bytes]:
    step = max(1, len(data) // 400)
    return [data[at : at + step] for at in range(0, len(data), step)]


def _keep(data: bytes, failure: Failure, seed: str) -> str:
    digest = hashlib.sha256(data).hexdigest()[:12]
    found = FOLDER / "found"
    found.mkdir(exist_ok=True)
    (found / digest).write_bytes(data)
    words = f"seed {seed}\ntcplat {' '.join(failure.command)}\n{failure.what}\n"
    (found / f"{digest}.txt").write_text(words, encoding="utf-8", errors="backslashreplace")
    return f"tests/fuzz/found/{digest}: {words}"


def _tell(to: int, kind: str, words: str = "") -> None:
    os.write(to, f"{kind} {words}".encode("utf-8", "replace").replace(b"\n", b"\x1e") + b"\n")


def _work(numbers: Sequence[int], seed: int, end: float, to: int) -> None:
    """Try the captures of these numbers, each chunk in a process of its own, and report."""
    find_plugins_once()
    with tempfile.TemporaryDirectory(prefix="tcplat-fuzz") as name:
        for first in range(0, len(numbers), _CHUNK):
            if time.monotonic() > end:
                break
            folder = Path(name, str(first))
            folder.mkdir()
            chunk = numbers[first : first + _CHUNK]
            parent, pid = os.getpid(), os.fork()
            if not pid:
                end_with(parent)
                _child(to, functools.partial(_try, chunk, seed, end, to, folder))
            _, status = os.waitpid(pid, 0)
            if status:
                _tell(to, "failed", f"a worker ended with {status}")
            shutil.rmtree(folder)


def _try(numbers: Sequence[int], seed: int, end: float, to: int, folder: Path) -> None:
    known: set[str] = set()
    worker = Worker(folder)
    captures = seeds()
    for number in numbers:
        if time.monotonic() > end:
            break
        data = mutant(captures, random.Random(f"{seed}:{number}"))
        failures = list(worker.failures(data, number))
        if not number % _REAL_EVERY:
            failures += in_a_process(data, number, folder)
        for failure in failures:
            if failure.kind in known:
                _tell(to, "again")
                continue
            known.add(failure.kind)

            def fails(part: bytes, failure: Failure = failure, number: int = number) -> bool:
                return any(one.kind == failure.kind for one in worker.failures(part, number))

            least = data if failure.what.startswith("memory") else smaller(data, fails)
            _tell(to, "failed", _keep(least, failure, f"{seed}:{number}"))
        _tell(to, "done")
    _tell(to, "memory", str(_peak_bytes() >> 20))


def _peak_bytes() -> int:
    """Return the most memory that was resident since this program was executed.

    getrusage(2) inherits the peak of the process that started it, so that of pytest.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@attrs.define
class Tally:
    """The results of all workers."""

    done: int = 0
    failed: int = 0
    most_mb: int = 0
    words: list[str] = attrs.field(factory=list)

    def take(self, line: str) -> None:
        """Count a line of a worker."""
        kind, _, words = line.partition(" ")
        self.done += kind == "done"
        self.failed += kind in ("failed", "again")
        if kind == "failed":
            self.words.append(words.replace("\x1e", "\n"))
            print(self.words[-1], flush=True)  # noqa: T201 - this is its output
        elif kind == "memory":
            self.most_mb = max(self.most_mb, int(words))


def fuzz(seed: int, count: int, seconds: float, jobs: int) -> Tally:
    """Try so many captures, or for so long."""
    tally, end = Tally(), time.monotonic() + seconds
    pipes: dict[int, tuple[int, bytes]] = {}
    parent = os.getpid()
    for job in range(jobs):
        mine, theirs = os.pipe()
        pid = os.fork()
        if not pid:
            end_with(parent)
            _child(theirs, functools.partial(_work, range(job, count, jobs), seed, end, theirs))
        os.close(theirs)
        pipes[mine] = (pid, b"")
    while pipes:
        ready, _, _ = select.select(list(pipes), [], [], _STUCK_S)
        if not ready:
            tally.take("failed all workers are stuck")
            for pid, _ in pipes.values():
                os.kill(pid, signal.SIGKILL)
        for fd in ready:
            pid, rest = pipes[fd]
            data = os.read(fd, 1 << 16)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                tally.take(line.decode())
            pipes[fd] = (pid, rest)
            if not data:
                del pipes[fd]
                os.close(fd)
                _, status = os.waitpid(pid, 0)
                if status:
                    tally.take(f"failed a worker ended with {status}")
    return tally


def _child(to: int, work: Callable[[], None]) -> NoReturn:
    """Run the work in a child, which must never return into the parent's code."""
    status = 1
    try:
        work()
        status = 0
    except BaseException:  # noqa: BLE001 - the parent reports it
        words = traceback.format_exc().replace("\n", "\x1e")
        os.write(to, f"failed {words}\n".encode("utf-8", "replace"))
    finally:
        os._exit(status)


def again(paths: Iterable[Path]) -> list[Failure]:
    """Return what goes wrong with stored captures, with each command."""
    found: list[Failure] = []
    sys.stdout.flush()
    before = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryDirectory(prefix="tcplat-fuzz") as name:
        find_plugins_once()
        worker = Worker(Path(name))
        for path in paths:
            for number in range(2 * len(_FILTERS)):
                found += worker.failures(path.read_bytes(), number)
    for fd, old in enumerate(before, 1):
        os.dup2(old, fd)
    return found


def main() -> int:
    """Fuzz, or try the stored captures again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--count", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--again", nargs="+", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.again:
        failures = again(options.again)
        for failure in failures:
            print(" ".join(failure.command), failure.what, sep="\n")  # noqa: T201 - the same
        return bool(failures)
    print(f"seed {options.seed}", flush=True)  # noqa: T201 - the same
    tally = fuzz(options.seed, options.count, options.seconds, options.jobs)
    print(  # noqa: T201 - the same
        f"{tally.done} captures, {tally.failed} failures, {tally.most_mb} MB at most, "
        f"seed {options.seed}"
    )
    return bool(tally.failed)


if __name__ == "__main__":
    sys.exit(main())
