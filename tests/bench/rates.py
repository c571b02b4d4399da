"""B3, B4, B11: how many events per second, against bcc's callback."""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.bench import peers
from tests.bench.figure import Figure, Length
from tests.bench.running import HERE, Run, program


def draining(length: Length) -> Iterator[Figure]:
    """B3, B3b, B11: the same ring, drained by each in turn, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.drain", "--json", str(length.repeats)],
        cwd=HERE.parents[1],
        check=True,
        capture_output=True,
    )
    drained: dict[str, list[float]] = json.loads(done.stdout)
    for name, what, peer, mine, target in (
        ("B3", "drain to rows", "bcc rows", "tcplat rows", 8),
        ("B3", "the same / tuned bcc", "bcc tuned rows", "tcplat rows", None),
        ("B3b", "CPU per event, to JSONL", "bcc json", "tcplat jsonl", 6),
        ("B11", "CPU per event, table", "bcc printf", "tcplat table", 3),
    ):
        theirs, ours = drained[peer], drained[mine]
        base, with_us = (f"{statistics.median(rates):,.0f}/s" for rates in (theirs, ours))
        found = statistics.median(o / t for o, t in zip(ours, theirs, strict=True))
        yield Figure(name, what, base, with_us, found, target)


KEPT = 256 << 20
PUNCH_HOLE = 3
"""FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE (linux/falloc.h)."""


@contextmanager
def kept_short(path: Path) -> Iterator[None]:
    """While a file grows, the memory of all but its last 256 MiB goes back to be used again.

    A virtual machine gets memory that it has not used for seconds from its host, page by page,
    and each waits for the host: writing gigabytes would measure that.
    """
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    over = threading.Event()

    def shorten() -> None:
        begin = 0
        with path.open("r+b") as file:
            while not over.wait(0.05):
                end = max(begin, file.seek(0, os.SEEK_END) - KEPT) & ~0xFFFFF
                hole = (ctypes.c_int64(begin), ctypes.c_int64(end - begin))
                if end > begin and fallocate(file.fileno(), PUNCH_HOLE, *hole):
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
                begin = end

    with ThreadPoolExecutor(1) as executor:
        shortening = executor.submit(shorten)
        try:
            yield
        finally:
            over.set()
        shortening.result()


LADDER = (
    *range(200_000, 900_000, 100_000),
    *range(1_000_000, 2_200_000, 200_000),
)
"""Events per second."""


def offered(rate: int, seconds: float) -> tuple[float, int]:
    """Events per second that came, and how many of all were lost."""
    with program("flood", rate, seconds) as (pid, go), Run.of("-p", str(pid)) as run:
        with kept_short(run.folder / "out"):
            sent = go()
        report = run.stop()
    return 2 * sent["sends"] / sent["seconds"], report["dropped"]


def lossless(length: Length) -> Iterator[Figure]:
    """B4: the highest rate at which nothing is lost."""
    best, held, why = 0, 0.0, f"tries end at {LADDER[-1]:,}"
    for rate in LADDER:
        came, lost = offered(rate, length.trial_s)
        if lost:
            why = f"{lost:,} lost at {rate:,}"
        elif came < 0.95 * rate:
            # With two programs in each send(), one thread makes no more.
            why = f"the load ends at {came:,.0f}"
        else:
            best = rate
            continue
        break
    # What held for seconds has to hold for half a minute.
    while best >= LADDER[0] // 2:
        came, lost = offered(best, length.lossless_s)
        if not lost:
            held = came
            break
        why = f"{lost:,} lost at {best:,}"
        best -= best // 20
    peer = peers.lossless(lambda rate, seconds: program("flood", rate, seconds), length.trial_s)
    cells = (f"{peer:,.0f}/s", f"{held:,.0f}/s")
    what = f"lossless for {length.lossless_s:.0f} s, JSONL; {why}"
    yield Figure("B4", what, *cells, held, 500_000, unit="/s")
    yield Figure("B4", "the same / bcc idiom", *cells, held / peer if peer else 0, 5)
