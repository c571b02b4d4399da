"""B13: captures, offline, against DuckDB's scan of the same JSON lines.

Rows per CPU second of one process, its start included. DuckDB, with one thread, only reads the file
and counts rows by hook point. Both take turns, so that the machine's noise hits both; the least
time of each counts.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.bench import servers
from tests.bench.figure import Figure, Length
from tests.bench.running import TCPLAT, Run

SCAN = """
import sys, duckdb
duckdb.sql("SET threads = 1")
duckdb.sql(f"SELECT point, count(*) FROM read_json({sys.argv[1]!r}) GROUP BY point").fetchall()
"""
_PROBES = ("--probe", "tcp_service")
COMMANDS: dict[str, tuple[tuple[str, ...], float, int]] = {
    "stages": (("replay", "-q", "{path}", "--sink", "stages"), 0.24, 1),
    "summary": (("replay", "-q", "{path}", "--sink", "summary"), 0.24, 1),
    "waterfall:slow=10": (("replay", "-q", "{path}", "--sink", "waterfall:slow=10"), 0.24, 1),
    "report": (("report", "{path}", "-o", "{out}"), 0.24, 1),
    "report, Perfetto": (("report", "{path}", "--format", "perfetto", "-o", "{out}"), 0.24, 1),
    "diff": (("diff", "{path}", "{path}"), 0.30, 2),
}
"""Name -> arguments, the target as a part of DuckDB's rate, and how often it reads the capture."""


def reading(length: Length) -> Iterator[Figure]:
    """B13: rows per CPU second of each command, as a part of DuckDB's."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        path = folder / "capture.jsonl"
        count = record(path, length.rows)
        places = {"path": str(path), "out": str(folder / "out")}
        scan = (sys.executable, "-c", SCAN, str(path))
        for what, (arguments, target, times) in COMMANDS.items():
            command = (*TCPLAT, *(word.format(**places) for word in arguments))
            both = [(cpu_of(scan), cpu_of(command)) for _ in range(length.scans)]
            theirs = count / min(took for took, _ in both)
            ours = times * count / min(took for _, took in both)
            yield Figure(
                "B13",
                f"rows/s, {what} / DuckDB's scan",
                f"{theirs:,.0f}",
                f"{ours:,.0f}",
                ours / theirs,
                target,
            )


def record(path: Path, rows: int) -> int:
    """Record so many rows, at most, of nginx and wrk; return how many there are."""
    whole = path.with_suffix(".whole")
    with servers.nginx(1000) as server:
        ports = ("--port", ",".join(map(str, server.ports)))
        with Run.of(*_PROBES, *ports, "--ring-size", "64M", sink=f"jsonl:path={whole}"):
            while whole.stat().st_size < rows * 450:
                server.load(1)
    with whole.open("rb") as lines, path.open("wb") as some:
        some.writelines(itertools.islice(lines, rows))
    whole.unlink()
    with path.open("rb") as lines:
        return sum(1 for _ in lines)


def cpu_of(command: Sequence[str]) -> float:
    """Return the CPU time of a command, s."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} ended with {process.returncode}")
    return used.ru_utime + used.ru_stime
