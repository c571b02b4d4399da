"""Every figure that tcplat promises, measured against a baseline or a peer in the same run.

    python -m tests.bench.bench [--quick] [NAME ...]        BENCH_JSON=path for the same as JSON

NAME is a row, such as B14, or one variant of a server's row, such as B14.stages. Blocks of base,
with, base take turns, so that the machine's noise hits both; medians are compared. Exit status 1
if a figure misses its target.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import attrs

from tests.bench import limit, offline, peers, rates, requests
from tests.bench.figure import FULL, QUICK, Figure, Length, table
from tests.bench.programs import kernel_statistics
from tests.bench.running import Run, cpu_s, program, pss

MANY = 1000
"""The least number of runs of a program for a meaningful time."""


def starting(length: Length) -> Iterator[Figure]:
    """B5, B6: from start to ready, and memory, against stock tcpstates."""
    warm, cold, stock, memory, theirs = [], [], [], [], []
    with Run.of():
        pass
    for _ in range(length.starts):
        with Run.of() as run:
            warm.append(run.start_s)
            time.sleep(0.3)
            memory.append(run.memory())
        peers.forget_compiled()
        with Run.of() as run:
            cold.append(run.start_s)
        with peers.tcpstates() as (pid, seconds):
            stock.append(seconds)
            theirs.append(pss(pid))
    base = statistics.median(stock)
    for what, times, target in (("warm", warm, 0.25), ("cold", cold, 0.5)):
        ours = statistics.median(times)
        cells = (f"{base:.2f} s", f"{ours:.2f} s")
        yield Figure("B5", f"start to ready, {what}", *cells, ours / base, target, at_least=False)
    base, ours = statistics.median(theirs), statistics.median(memory)
    cells = (f"{base / 2**20:.1f} MiB", f"{ours / 2**20:.1f} MiB")
    yield Figure("B6", "memory / stock tcpstates", *cells, ours / base, 0.25, at_least=False)


def kernel_side(_length: Length) -> Iterator[Figure]:
    """B7: what the kernel says that our programs took."""
    with kernel_statistics() as programs, Run.of() as run:
        requests.APART.pingpong()
        ran = programs(run.process.pid)
    took = [one.ns / one.runs for one in ran.values() if one.runs > MANY]
    mean = statistics.mean(took)
    yield Figure("B7", "kernel time per event", "", f"{mean:.0f} ns", mean, 250, False, " ns")


def packets(_length: Length) -> Iterator[Figure]:
    """B8: an uninteresting packet."""
    for name, (with_us, empty) in peers.boring_packets().items():
        yield Figure(
            "B8",
            f"XDP, uninteresting packet, {name}",
            f"{empty} ns",
            f"{with_us} ns",
            with_us - empty,
            15,
            at_least=False,
            unit=" ns",
        )


def idle(length: Length) -> Iterator[Figure]:
    """B9: no events."""
    with Run.of("-p", str(os.getpid())) as run:
        time.sleep(1)
        began, before = time.monotonic(), cpu_s(run.process.pid)
        time.sleep(length.idle_s)
        share = (cpu_s(run.process.pid) - before) / (time.monotonic() - began) * 100
    yield Figure("B9", "idle", "", f"{share:.2f} %", share, 0.3, at_least=False, unit=" %")


def delay(_length: Length) -> Iterator[Figure]:
    """B10: from the kernel to a flushed line."""
    delays = []
    with (
        program("flood", 1000, 5) as (pid, go),
        Run.of("-p", str(pid), "-q", sink="jsonl", stdout=subprocess.PIPE) as run,
        ExitStack() as stack,
    ):
        reader = stack.enter_context(peers.reader(run.process))
        go()
        delays = sorted(reader())
    p99 = delays[len(delays) * 99 // 100] / 1e6
    middle = f"p50 {delays[len(delays) // 2] / 1e6:.1f} ms"
    yield Figure("B10", "kernel to line, p99", "", middle, p99, 10, at_least=False, unit=" ms")


FIGURES: dict[str, Callable[[Length], Iterator[Figure]]] = {
    "B1": requests.throughput,
    "B1c": requests.on_all_cpus,
    "B1s": functools.partial(requests.beside_empty, requests.BYSTANDER),
    "B3": rates.draining,
    "B4": rates.lossless,
    "B5": starting,
    "B7": kernel_side,
    "B8": packets,
    "B9": idle,
    "B10": delay,
    "B12": functools.partial(requests.beside_empty, requests.COUNTED),
    "B13": offline.reading,
    **{row.name: functools.partial(limit.measure, row, limit.VARIANTS) for row in limit.ROWS},
}
PARTS: dict[str, Callable[[Length], Iterator[Figure]]] = {
    f"{row.name}.{variant.name}": functools.partial(limit.measure, row, (variant,))
    for row in limit.ROWS
    for variant in limit.VARIANTS
}


def main(arguments: list[str]) -> int:
    """Measure and print; 1 if something misses its target."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=", ".join([*FIGURES, "B14.stages"])
    )
    parser.add_argument("--quick", action="store_true", help="a row in a minute, with more noise")
    asked = parser.parse_args(arguments)
    if unknown := [name for name in asked.names if name not in FIGURES | PARTS]:
        parser.error(f"no row {unknown[0]}; there are {', '.join([*FIGURES, *PARTS])}")
    found: list[Figure] = []
    for name in asked.names or FIGURES:
        for figure in (FIGURES | PARTS)[name](QUICK if asked.quick else FULL):
            found.append(figure)
            print(" ".join(figure.cells()), file=sys.stderr)
    print(table(found))
    if path := os.environ.get("BENCH_JSON"):
        values = [{**attrs.asdict(figure), "missed": figure.missed} for figure in found]
        Path(path).write_text(json.dumps(values, indent=2) + "\n")
    return int(any(figure.missed for figure in found))


if __name__ == "__main__":
    # However it ends, its child processes have to end, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main(sys.argv[1:]))
