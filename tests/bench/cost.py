"""What each BPF program of a run costs a server, by the kernel's own statistics.

    python -m tests.bench.cost [ROW] [VARIANT] [-- ARGUMENT ...]

ROW is one of the bench's servers (B14), VARIANT one of its runs (stages); ARGUMENTs of `tcplat
run` are added to it. The kernel adds up the time inside of each program
(kernel.bpf_stats_enabled). What else runs on the machine makes no program longer, except by its
caches and interrupts: of several blocks, the least time of each program counts. So this
is steady where throughput is not, and says which program to make shorter.

Reading the clock twice is in each time: empty programs at the same hooks show how much.
Getting to a program is in none; the bench's row of empty programs has that.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import statistics
import sys
from collections.abc import Iterator

import attrs

from tests.bench import limit
from tests.bench.programs import Hook, attached, empty_programs, hooks_of, kernel_statistics
from tests.bench.servers import Server

SELDOM = 0.001
"""Runs per request below which a program is not listed."""


@attrs.frozen
class Cost:
    """One program, for one request."""

    name: str
    hook: str
    runs: float
    """Per request: median of the blocks."""
    each_ns: float
    """Per run: the least of the blocks."""

    @property
    def ns(self) -> float:
        """Per request."""
        return self.runs * self.each_ns


def costs(server: Server, pid: int, blocks: int, seconds: int) -> tuple[list[Cost], float]:
    """Return what the programs of a process cost, the dearest first, and requests per second."""
    hooks = {number: hook for hook, numbers in attached(pid).items() for number in numbers}
    rates: list[float] = []
    ran: dict[int, list[tuple[float, float]]] = {}
    names: dict[int, str] = {}
    with kernel_statistics() as programs:
        before = programs(pid)
        for _ in range(blocks):
            block = server.load(seconds)
            after = programs(pid)
            rates.append(block.rate)
            for number, one in after.items():
                new = one.since(before.get(number))
                names[number] = one.name
                if new.runs:
                    ran.setdefault(number, []).append((new.runs / block.count, new.ns / new.runs))
            before = after
    found = [
        Cost(
            names[number],
            where(hooks.get(number)),
            statistics.median(runs for runs, _ in pairs),
            min(each for _, each in pairs),
        )
        for number, pairs in ran.items()
    ]
    listed = [cost for cost in found if cost.runs >= SELDOM]
    return sorted(listed, key=lambda cost: -cost.ns), statistics.median(rates)


def where(hook: Hook | None) -> str:
    """Return the place of a program in words."""
    if hook is None:
        return "-"
    return f"xdp {hook.where}" if hook.kind == "xdp" else hook.where


def lines(unit: str, ours: list[Cost], empty: list[Cost], rate: float) -> Iterator[str]:
    """Yield the table."""
    yield f"{'program':18}{'hook':24}{'runs':>8}{'ns each':>9}{'ns':>9}   per {unit}"
    for cost in ours:
        yield f"{cost.name:18}{cost.hook:24}{cost.runs:8.2f}{cost.each_ns:9.0f}{cost.ns:9.0f}"
    runs, ns = (sum(getattr(cost, field) for cost in ours) for field in ("runs", "ns"))
    yield f"{'all':42}{runs:8.2f}{'':9}{ns:9.0f}   at {rate:,.0f}/s"
    nothing = sum(cost.ns for cost in empty)
    spent = sum(cost.runs for cost in empty)
    yield f"{'empty programs at these hooks':42}{spent:8.2f}{'':9}{nothing:9.0f}"
    yield f"{'all without what empty ones take':42}{'':17}{ns - nothing:9.0f}"


def main(arguments: list[str]) -> None:
    """Measure and print."""
    rows = {row.name: row for row in limit.ROWS}
    variants = {variant.name: variant for variant in limit.VARIANTS}
    parser = argparse.ArgumentParser(prog="python -m tests.bench.cost")
    parser.add_argument("row", nargs="?", default="B14", choices=rows)
    parser.add_argument("variant", nargs="?", default="stages", choices=variants)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=1, help="of each block")
    parser.epilog = "-- ARGUMENT ...: of tcplat run, added to the variant's"
    own, behind = arguments, []
    if "--" in arguments:
        at = arguments.index("--")
        own, behind = arguments[:at], arguments[at + 1 :]
    asked = parser.parse_args(own)
    row, variant = rows[asked.row], variants[asked.variant]
    with row.serve() as server:
        start = functools.partial(variant.run, server, *behind)
        with start() as run:
            ours, rate = costs(server, run.process.pid, asked.blocks, asked.seconds)
        with empty_programs(hooks_of(start())):
            empty, _ = costs(server, os.getpid(), asked.blocks, asked.seconds)
    what = " ".join((variant.what, *behind))
    print(f"{row.what}: {what}")
    print("\n".join(lines(row.unit.removesuffix("s"), ours, empty, rate)))


if __name__ == "__main__":
    # However it ends, its child processes have to end, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    main(sys.argv[1:])
