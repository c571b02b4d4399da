"""B14 to B19: real servers at their limit, with and without tcplat, and with what it replaces.

Server and load keep all CPUs busy, so that tcplat competes with them. Blocks of base, of each
variant, of empty programs at the same hooks and of bpftrace at the same tracepoints take turns,
each second turn backwards; the ratio of each to its neighbours in the same turn is taken, and of
these ratios the median.
"""

from __future__ import annotations

import functools
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import attrs

from tests.bench import peers, servers
from tests.bench.figure import Figure, Length
from tests.bench.programs import Hook, empty_programs, event_folder, hooks_of
from tests.bench.running import Run
from tests.bench.servers import Block, Server

# --- what is promised


@attrs.frozen
class Target:
    """A ratio that is promised: of throughput at least, of p99 at most."""

    quantity: str
    """rate or p99."""
    to: str
    """base, or empty: programs that do nothing, at the same hooks."""
    limit: float

    def met_by(self, value: float) -> float:
        """How far `value` is on the right side of it; 1 is just met."""
        return value / self.limit if self.quantity == "rate" else self.limit / value


@attrs.frozen
class Variant:
    """A run of tcplat, and its targets. Of two for one quantity, one has to be met."""

    name: str
    what: str
    probes: tuple[str, ...]
    sink: str | None
    """None for JSON lines to a file in memory."""
    targets: tuple[Target, ...]
    bpftrace: str
    """What bpftrace does at the same tracepoints."""
    lossless: bool = False
    """Whether no row may be lost in a live run at the limit."""

    def run(self, server: Server, *more: str) -> AbstractContextManager[Run]:
        """Start it, for the ports of a server and with more arguments."""
        # xdp_port has its ports as an option; the other probes take what the filter lets through.
        first, *others = (
            probe.format(ports="+".join(map(str, server.ports))) for probe in self.probes
        )
        probes = [word for probe in others for word in ("--probe", probe)]
        ports = ("--port", ",".join(map(str, server.ports)))
        return Run.of(*probes, *ports, *more, probe=first, sink=self.sink)


BOTH = ("tcp_client", "tcp_service")
STAGES = f"stages:path={os.devnull}"
VARIANTS = (
    Variant(
        "stages",
        "client and service, live stages",
        BOTH,
        STAGES,
        (Target("rate", "base", 0.95), Target("rate", "empty", 0.97), Target("p99", "empty", 1.06)),
        peers.COUNTS,
        lossless=True,
    ),
    Variant(
        "jsonl",
        "client and service, JSON lines",
        BOTH,
        None,
        (Target("rate", "base", 0.85), Target("p99", "base", 1.3)),
        peers.LINES,
    ),
    Variant(
        "four",
        "all four probes, live stages",
        (*BOTH, "xdp_port:iface=lo,port={ports}", "dev_xmit:port={ports}"),
        STAGES,
        # An XDP program on lo costs what it costs: the kernel runs it in its generic way.
        (Target("rate", "base", 0.90), Target("rate", "empty", 0.90)),
        peers.COUNTS,
    ),
    Variant(
        "histogram",
        "client and service, histogram",
        BOTH,
        f"histogram:path={os.devnull}",
        (Target("rate", "base", 0.97), Target("rate", "empty", 0.97)),
        peers.COUNTS,
    ),
)


@attrs.frozen
class Row:
    """A server at its limit."""

    name: str
    what: str
    serve: Callable[[], AbstractContextManager[Server]]
    unit: str = "requests"


ROWS = (
    Row("B14", "nginx, 1 kB", functools.partial(servers.nginx, 1000)),
    Row("B15", "nginx, 100 kB", functools.partial(servers.nginx, 100_000)),
    Row("B16", "nginx, 1 MB", functools.partial(servers.nginx, 1_000_000)),
    Row("B17", "nginx as a proxy, 1 kB", functools.partial(servers.nginx, 1000, proxied=True)),
    Row("B18", "Redis, pipelined", servers.redis),
    Row("B19", "iperf3", servers.iperf3, "MB"),
)

# --- measuring


@attrs.define(eq=False)
class Blocks:
    """The blocks of one row: kind -> one per turn. Each turn begins and ends with base."""

    server: Server
    seconds: int
    starts: dict[str, Callable[[], AbstractContextManager[Any]]] = attrs.field(factory=dict)
    found: dict[str, list[Block]] = attrs.field(factory=dict)
    lost: dict[str, list[tuple[int, int]]] = attrs.field(factory=dict)
    """Kind -> rows that came and rows that were lost, of each block."""

    def turn(self, *, backwards: bool) -> None:
        """Run one block of each."""
        kinds = list(self.starts)
        for kind in ("base first", *(reversed(kinds) if backwards else kinds), "base last"):
            with self.starts.get(kind, nullcontext)() as started:
                self.found.setdefault(kind, []).append(self.server.load(self.seconds))
                if isinstance(started, Run):
                    self.lost.setdefault(kind, []).append(started.lost())

    def of(self, kind: str, quantity: str) -> list[float]:
        """Return one value per turn; of base the mean of its two."""
        if kind != "base":
            return [float(getattr(one, FIELDS[quantity])) for one in self.found[kind]]
        pairs = zip(self.of("base first", quantity), self.of("base last", quantity), strict=True)
        return [(first + last) / 2 for first, last in pairs]

    def ratio(self, kind: str, to: str, quantity: str) -> float:
        """Return the median of the turns' ratios."""
        pairs = zip(self.of(kind, quantity), self.of(to, quantity), strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)


FIELDS = {"rate": "rate", "p99": "p99_us"}


def measure(row: Row, variants: Sequence[Variant], length: Length) -> Iterator[Figure]:
    """Yield the figures of one row."""
    with row.serve() as server:
        blocks = Blocks(server, length.block_s)
        server.load(length.block_s)  # the machine finds its pace
        empty: dict[tuple[Hook, ...], str] = {}
        empty_of = {}
        for variant in variants:
            hooks = hooks_of(variant.run(server))
            # Variants with the same hooks share the blocks of empty programs.
            kind = empty.setdefault(hooks, f"{len(hooks)} empty programs, hooks of {variant.name}")
            blocks.starts[kind] = functools.partial(empty_programs, hooks)
            blocks.starts[variant.name] = functools.partial(variant.run, server)
            blocks.starts.setdefault(
                bpftrace_name(variant),
                functools.partial(peers.at_tracepoints, list(events(hooks)), variant.bpftrace),
            )
            empty_of[variant] = kind
        for number in range(length.turns):
            blocks.turn(backwards=number % 2 == 1)
        yield from base_figures(row, blocks)
        for variant in variants:
            yield from figures(row, variant, blocks, empty_of[variant])
            if variant.lossless:
                yield lost_rows(row, variant, server, length.limit_s)
        for kind in (*empty.values(), *dict.fromkeys(map(bpftrace_name, variants))):
            yield from peer_figures(row, blocks, kind)


def bpftrace_name(variant: Variant) -> str:
    """Return the kind of block in which bpftrace takes its place."""
    what = "lines" if variant.bpftrace == peers.LINES else "counts"
    return f"bpftrace in its place, {what}"


def events(hooks: Sequence[Hook]) -> Iterator[str]:
    """Yield the tracepoints among them as bpftrace calls them; it has no XDP."""
    for hook in hooks:
        if hook.kind != "xdp" and (folder := event_folder(hook.where)):
            yield f"{folder.parent.name}:{folder.name}"


# --- the lines of the table


def base_figures(row: Row, blocks: Blocks) -> Iterator[Figure]:
    """How far two blocks without tcplat differ: what is less than that is noise."""
    off = abs(blocks.ratio("base last", "base first", "rate") - 1)
    yield Figure(row.name, f"{row.what}: null test, base / base, off by", "", "", off, None)


def quantities(blocks: Blocks) -> list[str]:
    """Throughput, and p99 where the load has it."""
    return ["rate", *(["p99"] if blocks.found["base first"][0].p99_us is not None else [])]


def figure(
    row: Row, blocks: Blocks, what: str, kinds: tuple[str, str], target: Target | None, of: str
) -> Figure:
    """Return a ratio of two kinds of blocks: ours, and what it is compared with."""
    ours, to = kinds
    theirs, mine = (shown(row, of, statistics.median(blocks.of(kind, of))) for kind in (to, ours))
    value = blocks.ratio(ours, to, of)
    limit = target.limit if target else None
    return Figure(row.name, what, theirs, mine, value, limit, at_least=of == "rate")


def shown(row: Row, quantity: str, value: float) -> str:
    """Return a median as text."""
    if quantity == "p99":
        return f"{value / 1000:.3g} ms"
    return f"{value:,.0f} MB/s" if row.unit == "MB" else f"{value:,.0f}/s"


def figures(row: Row, variant: Variant, blocks: Blocks, empty: str) -> Iterator[Figure]:
    """Yield throughput and p99 of a variant, against base and against empty programs."""
    kinds = {"base": "base", "empty": empty}
    for of in quantities(blocks):
        word = "throughput" if of == "rate" else "p99"
        wanted = [target for target in variant.targets if target.quantity == of]
        counts = best_met({one: blocks.ratio(variant.name, kinds[one.to], of) for one in wanted})
        for to, kind in kinds.items():
            suffix = "" if to == "base" else " / empty programs"
            target = counts if counts and counts.to == to else None
            what = f"{row.what}: {variant.what}, {word}{suffix}"
            yield figure(row, blocks, what, (variant.name, kind), target, of)
    if not variant.lossless and (ended := blocks.lost.get(variant.name)):
        rows, lost = (sum(column) for column in zip(*ended, strict=True))
        if rows + lost:
            what = f"{row.what}: {variant.what}, rows lost"
            share = lost / (rows + lost) * 100
            yield Figure(row.name, what, "", f"{rows:,} came", share, None, unit=" %")


def best_met(values: dict[Target, float]) -> Target | None:
    """Return the target that counts: the one that is met best, as one of them suffices."""
    return max(values, key=lambda target: target.met_by(values[target]), default=None)


def lost_rows(row: Row, variant: Variant, server: Server, seconds: int) -> Figure:
    """Rows lost in one live run at the limit."""
    with variant.run(server) as run:
        server.load(seconds)
        rows, lost = run.lost()
    what = f"{row.what}: {variant.what}, rows lost in {seconds} s"
    return Figure(row.name, what, "", f"{rows:,} came", lost, 0, at_least=False)


def peer_figures(row: Row, blocks: Blocks, kind: str) -> Iterator[Figure]:
    """Yield throughput and p99 of something in tcplat's place, against base."""
    for of in quantities(blocks):
        word = "throughput" if of == "rate" else "p99"
        yield figure(row, blocks, f"{row.what}: {kind}, {word}", (kind, "base"), None, of)
