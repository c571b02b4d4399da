"""B0, B1, B2, B12: requests and replies over loopback, one at a time."""

from __future__ import annotations

import functools
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import attrs

from tests.bench import peers
from tests.bench.figure import Figure, Length
from tests.bench.programs import empty_programs, hooks_of
from tests.bench.running import CPUS, Run, on, program

BLOCK_S = 0.7


@attrs.frozen
class Load:
    """Requests and answers over loopback: where they run, and where tcplat does."""

    cpus: set[int]
    ours: set[int]
    connections: int

    def pingpong(self) -> dict[str, float]:
        """One block."""
        with on(self.cpus), program("pingpong", BLOCK_S, self.connections) as (_, go):
            return go()

    def interleaved(
        self, repeats: int, *traced: Callable[[], Any]
    ) -> tuple[list[dict[str, float]], ...]:
        """Blocks of base, each of `traced`, base: bases in front, bases behind, then theirs."""
        first, second = [], []
        with_us: tuple[list[dict[str, float]], ...] = tuple([] for _ in traced)
        for _ in range(repeats):
            first.append(self.pingpong())
            for blocks, what in zip(with_us, traced, strict=True):
                with ExitStack() as stack:
                    with on(self.ours):
                        stack.enter_context(what())
                    blocks.append(self.pingpong())
            second.append(self.pingpong())
        return first, second, *with_us


APART = Load({CPUS[0]}, {CPUS[-1]}, connections=1)
"""One connection on one CPU, and tcplat on another: what a request costs is what its path costs."""
TOGETHER = Load(set(CPUS), set(CPUS), connections=2)
"""Every CPU is busy, and tcplat takes its share of them."""


def ratio(name: str, ours: list[dict[str, float]], base: list[dict[str, float]]) -> float:
    """Median of the ratios of neighbours."""
    return statistics.median(o[name] / b[name] for o, b in zip(ours, base, strict=True))


def both(first: list[dict[str, float]], second: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return the mean of the neighbours."""
    return [
        {name: (one[name] + other[name]) / 2 for name in one}
        for one, other in zip(first, second, strict=True)
    ]


def requests(
    name: str,
    what: str,
    base: list[dict[str, float]],
    ours: list[dict[str, float]],
    target: float | None = None,
) -> Figure:
    """Return requests per second with tcplat, or what replaces it, and without."""
    before, after = (
        f"{statistics.median(one['requests'] for one in blocks) / BLOCK_S:,.0f}/s"
        for blocks in (base, ours)
    )
    return Figure(name, what, before, after, ratio("requests", ours, base), target)


def throughput(length: Length) -> Iterator[Figure]:
    """B1, B2 and the null test: all of tcp_client to JSONL, and nothing."""
    first, second, ours = APART.interleaved(length.repeats, Run.of)
    base = both(first, second)
    null = ratio("requests", second, first)
    yield Figure("B0", "null test: base / base", "", "", abs(null - 1), 0.03, at_least=False)
    yield requests("B1", "throughput, all of tcp_client", base, ours, 0.90)
    for name, target in (("p50", 1.5), ("p99", 5)):
        before, after = (
            statistics.median(one[f"{name}_ns"] for one in blocks) / 1000 for blocks in (base, ours)
        )
        added = statistics.median(
            (o[f"{name}_ns"] - b[f"{name}_ns"]) / 1000 for o, b in zip(ours, base, strict=True)
        )
        yield Figure(
            "B2",
            f"added latency, {name}",
            f"{before:.1f} µs",
            f"{after:.1f} µs",
            added,
            target,
            at_least=False,
            unit=" µs",
        )


def on_all_cpus(length: Length) -> Iterator[Figure]:
    """B1 on shared CPUs; and bpftrace in tcplat's place: one line per event."""
    for what, traced in (("tcplat", Run.of), ("bpftrace", peers.pingpong_lines)):
        first, second, with_it = TOGETHER.interleaved(length.repeats, traced)
        base = both(first, second)
        yield requests("B1", f"the same, no CPU spare, {what}", base, with_it)


@attrs.frozen
class Traced:
    """A run whose cost is compared with empty programs at its hooks."""

    name: str
    what: str
    target: float
    """Requests, as a part of those with empty programs."""
    arguments: tuple[str, ...] = ()
    how: dict[str, str] = attrs.field(factory=dict)

    def start(self) -> AbstractContextManager[Run]:
        """As Run.of."""
        return Run.of(*self.arguments, **self.how)


# Both ends are on this host: tcp_service looks at every packet, wake-up and recv of the client's,
# too, before it knows that they are none of its own.
BYSTANDER = (Traced("B1s", "-p of another", 0.98, ("-p", str(os.getpid()))),)
COUNTED = tuple(
    Traced(
        *(name, f"histogram, {probe}", 0.95),
        how={"probe": probe, "sink": f"histogram:path={os.devnull}"},
    )
    for name, probe in (("B12", "tcp_client"), ("B12s", "tcp_service"))
)


def beside_empty(traced: Sequence[Traced], length: Length) -> Iterator[Figure]:
    """B1s, B12, B12s: against empty programs at the same hooks, in the same run."""
    plan: list[Callable[[], Any]] = []
    for one in traced:
        plan += (functools.partial(empty_programs, hooks_of(one.start())), one.start)
    first, second, *blocks = APART.interleaved(length.repeats, *plan)
    base = both(first, second)
    for one, empty, ours in zip(traced, blocks[::2], blocks[1::2], strict=True):
        yield requests(
            one.name, f"throughput / empty programs, {one.what}", empty, ours, one.target
        )
        yield requests(one.name, f"throughput, {one.what}", base, ours)
        yield requests(one.name, "throughput, empty programs", base, empty)
