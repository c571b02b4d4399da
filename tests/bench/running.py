"""What runs beside a measurement: tcplat, programs in C, and the CPUs that each may use."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import attrs

HERE = Path(__file__).parent

TCPLAT = (sys.executable, "-I", "-m", "tcplat_core")
CPUS = sorted(os.sched_getaffinity(0))


@attrs.define(eq=False)
class Run:
    """A running tcplat."""

    process: subprocess.Popen[str]
    folder: Path
    start_s: float

    @classmethod
    @contextmanager
    def of(
        cls, *arguments: str, sink: str | None = None, probe: str = "tcp_client", **how: Any
    ) -> Iterator[Self]:
        """Start it, and wait until it is attached."""
        with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
            folder = Path(name)
            ready = folder / "ready"
            began = time.monotonic()
            process = subprocess.Popen(
                [
                    *(*TCPLAT, "run", "--probe", probe, "--ready-file", str(ready)),
                    *("--sink", sink or f"jsonl:path={folder / 'out'}", *arguments),
                ],
                stderr=subprocess.PIPE,
                text=True,
                **how,
            )
            run = cls(process, folder, 0)
            try:
                while not ready.exists():
                    if process.poll() is not None:
                        raise SystemExit(f"tcplat: {process.communicate()[1]}")
                    time.sleep(0.0005)
                run.start_s = time.monotonic() - began
                yield run
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.communicate()

    def stop(self) -> dict[str, Any]:
        """End it; its report, once the books are known to balance."""
        self.process.terminate()
        said = self.process.communicate()[1]
        with (self.folder / "out").open("rb") as out:
            out.seek(max(0, (self.folder / "out").stat().st_size - 65536))
            last = out.read().splitlines()[-1]
        report: dict[str, Any] = json.loads(last)["report"]
        for probe in report["probes"].values():
            for hook in probe["hooks"]:
                if hook["produced"] != hook["delivered"] + hook["dropped"] + hook["unread"]:
                    raise SystemExit(f"the books do not balance: {hook} {said}")
        return report

    def lost(self) -> tuple[int, int]:
        """End it; return how many rows came and how many were lost, from what is on stderr."""
        self.process.terminate()
        stderr = self.process.communicate()[1]
        counts = re.findall(r"(\d+) rows, (\d+) lost", stderr)
        # A run that counts in the kernel makes no rows.
        if not counts and not re.search(r"\d+ counted \(", stderr):
            raise SystemExit(f"tcplat printed no counts of rows: {stderr}")
        return sum(int(rows) for rows, _ in counts), sum(int(lost) for _, lost in counts)

    def memory(self) -> int:
        """Resident bytes of all its processes, what they share counted once."""
        return pss(self.process.pid)


def pss(pid: int) -> int:
    """Proportional set size of a process and its children, in bytes."""
    total = 0
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for one in (pid, *map(int, children)):
        text = Path(f"/proc/{one}/smaps_rollup").read_text()
        total += int(text.partition("\nPss:")[2].split()[0]) * 1024
    return total


def cpu_s(pid: int) -> float:
    """CPU that a process has used, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def program(name: str, *arguments: object) -> Iterator[tuple[int, Callable[[], dict[str, float]]]]:
    """Yield the pid of a waiting C program, and a function that runs it and returns its figures."""
    process = subprocess.Popen(
        [str(built(name)), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout

    def go() -> dict[str, float]:
        figures: dict[str, float] = json.loads(process.communicate("\n")[0])
        return figures

    try:
        yield int(process.stdout.readline()), go
    finally:
        process.kill()
        process.communicate()


def built(name: str) -> Path:
    """Compile a program of this folder; return its path."""
    target = Path(tempfile.gettempdir()) / f"tcplat-bench-{os.getuid()}" / name
    target.parent.mkdir(mode=0o700, exist_ok=True)
    source = HERE / f"{name}.c"
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        subprocess.run(
            ["clang", "-O2", "-pthread", "-o", str(target), str(source)],
            check=True,
        )
    return target


@contextmanager
def on(cpus: set[int]) -> Iterator[None]:
    """Let what is started in the block use these CPUs only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
