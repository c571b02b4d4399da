"""Every figure that tcplat promises, measured against a baseline or a peer in the same run.

    python -m tests.bench.bench [FIGURE ...]        BENCH_JSON=path for the same as JSON

Blocks of base, with, base take turns, so that the machine's noise hits both; medians
are compared. Exit status 1 if a figure misses its target.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import attrs

from tests.bench import peers

HERE = Path(__file__).parent

TCPLAT = (sys.executable, "-I", "-m", "tcplat_core")
REPEATS = 13
BLOCK_S = 0.7
MANY = 1000
"""The least number of runs of a program for a meaningful time."""


@attrs.frozen
class Figure:
    """One line of the table."""

    name: str
    what: str
    base: str
    """Of the peer, or without tcplat."""
    ours: str
    value: float
    """What is compared with the target."""
    target: float | None
    """None for a figure of another tracer."""
    at_least: bool = True
    unit: str = ""

    @property
    def missed(self) -> bool:
        """Whether it is worse than promised."""
        if self.target is None:
            return False
        return self.value < self.target if self.at_least else self.value > self.target

    def cells(self) -> list[str]:
        """As printed."""
        value = f"{self.value:,.3g}" if abs(self.value) < 1000 else f"{self.value:,.0f}"
        cells = [self.name, self.what, self.base, self.ours, f"{value}{self.unit}"]
        if self.target is None:
            return [*cells, "", ""]
        sign = ">=" if self.at_least else "<="
        return [*cells, f"{sign} {self.target:,g}{self.unit}", "MISS" if self.missed else "ok"]


# --- what runs beside the measurement


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

    def interleaved(self, *traced: Callable[[], Any]) -> tuple[list[dict[str, float]], ...]:
        """Blocks of base, each of `traced`, base: bases in front, bases behind, then theirs."""
        first, second = [], []
        with_us: tuple[list[dict[str, float]], ...] = tuple([] for _ in traced)
        for _ in range(REPEATS):
            first.append(self.pingpong())
            for blocks, what in zip(with_us, traced, strict=True):
                with ExitStack() as stack:
                    with on(self.ours):
                        stack.enter_context(what())
                    blocks.append(self.pingpong())
            second.append(self.pingpong())
        return first, second, *with_us


CPUS = sorted(os.sched_getaffinity(0))
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


# --- the figures


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


def throughput() -> Iterator[Figure]:
    """B1, B2 and the null test: all of tcp_client to JSONL, and nothing."""
    first, second, ours = APART.interleaved(Run.of)
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


def on_all_cpus() -> Iterator[Figure]:
    """B1 on shared CPUs; and bpftrace in tcplat's place: one line per event."""
    for what, traced in (("tcplat", Run.of), ("bpftrace", peers.bpftrace)):
        first, second, with_it = TOGETHER.interleaved(traced)
        base = both(first, second)
        yield requests("B1", f"the same, no CPU spare, {what}", base, with_it)


SENDING = ("tcp_sendmsg_locked", "sock_send_length", "sock_recv_length")
"""Where tcp_client attaches that an established connection passes."""
RECEIVING = ("netif_receive_skb", "sk_data_ready", "sock_recv_length")
"""Where tcp_service measures how long bytes are on their way."""


def bystander() -> Iterator[Figure]:
    """B1s: another process is traced; and the cost of empty programs there."""
    first, second, ours, empty = APART.interleaved(
        lambda: Run.of("-p", str(os.getpid())), lambda: peers.empty_programs(SENDING)
    )
    base = both(first, second)
    yield requests("B1s", "throughput, -p of another", base, ours, 0.97)
    yield requests("B1s", "throughput, empty programs", base, empty)


def aggregated() -> Iterator[Figure]:
    """B12, B12s: durations are counted in the kernel, and no rows are made.

    Both ends are on this host: tcp_service looks at every packet, wake-up and recv of the
    client's, too, before it knows that they are none of its own.
    """
    client, service = (
        functools.partial(Run.of, probe=probe, sink=f"histogram:path={os.devnull}")
        for probe in ("tcp_client", "tcp_service")
    )
    first, second, clients, services, empty = APART.interleaved(
        client, service, lambda: peers.empty_programs(RECEIVING)
    )
    base = both(first, second)
    yield requests("B12", "throughput, histogram, tcp_client", base, clients, 0.95)
    yield requests("B12s", "throughput, histogram, tcp_service", base, services, 0.95)
    yield requests("B12s", "throughput, empty programs", base, empty)


def draining() -> Iterator[Figure]:
    """B3, B3b, B11: the same ring, drained by each in turn, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.drain", "--json"],
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


LADDER = (200_000, 300_000, 400_000, 500_000, 600_000, 700_000, 800_000)
TRIAL_S = 4.0
LONG_S = 30.0


def offered(rate: int, seconds: float) -> tuple[float, int]:
    """Events per second that came, and how many of all were lost."""
    with program("flood", rate, seconds) as (pid, go), Run.of("-p", str(pid)) as run:
        with kept_short(run.folder / "out"):
            sent = go()
        report = run.stop()
    return 2 * sent["sends"] / sent["seconds"], report["dropped"]


def lossless() -> Iterator[Figure]:
    """B4: the highest rate at which nothing is lost."""
    best, came = 0.0, 0.0
    for rate in LADDER:
        came, lost = offered(rate, TRIAL_S)
        if lost or came < 0.95 * rate:
            break
        best = rate
    # What held for seconds has to hold for half a minute.
    while best:
        came, lost = offered(int(best), LONG_S)
        if not lost:
            break
        best -= 50_000
    peer = peers.lossless(lambda rate, seconds: program("flood", rate, seconds), TRIAL_S)
    cells = (f"{peer:,.0f}/s", f"{came:,.0f}/s")
    yield Figure("B4", f"lossless for {LONG_S:.0f} s, JSONL", *cells, came, 500_000, unit="/s")
    yield Figure("B4", "the same / bcc idiom", *cells, came / peer if peer else 0, 5)


def starting() -> Iterator[Figure]:
    """B5, B6: from start to ready, and memory, against stock tcpstates."""
    warm, cold, stock, memory, theirs = [], [], [], [], []
    with Run.of():
        pass
    for _ in range(5):
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


@contextmanager
def kernel_statistics() -> Iterator[Callable[[int], dict[str, tuple[int, int]]]]:
    """Enable the kernel's BPF statistics; yield name -> (runs, ns in all) of a run's programs."""
    knob = Path("/proc/sys/kernel/bpf_stats_enabled")
    before = knob.read_text()
    knob.write_text("1")

    def programs(pid: int) -> dict[str, tuple[int, int]]:
        found = {}
        for info in Path(f"/proc/{pid}/fdinfo").iterdir():
            lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
            if int(lines.get("run_cnt", 0)):
                name = program_name(int(lines["prog_id"]))
                found[name] = int(lines["run_cnt"]), int(lines["run_time_ns"])
        return found

    try:
        yield programs
    finally:
        knob.write_text(before)


def program_name(number: int) -> str:
    """Return the name that bpftool shows of a program."""
    shown = subprocess.run(
        ["bpftool", "--json", "prog", "show", "id", str(number)], check=True, capture_output=True
    )
    return str(json.loads(shown.stdout)["name"])


def kernel_side() -> Iterator[Figure]:
    """B7: what the kernel says that our programs took."""
    with kernel_statistics() as programs, Run.of() as run:
        APART.pingpong()
        ran = programs(run.process.pid)
    took = [total_ns / count for count, total_ns in ran.values() if count > MANY]
    mean = statistics.mean(took)
    yield Figure("B7", "kernel time per event", "", f"{mean:.0f} ns", mean, 250, False, " ns")


def packets() -> Iterator[Figure]:
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


def idle() -> Iterator[Figure]:
    """B9: no events."""
    with Run.of("-p", str(os.getpid())) as run:
        time.sleep(1)
        began, before = time.monotonic(), cpu_s(run.process.pid)
        time.sleep(20)
        share = (cpu_s(run.process.pid) - before) / (time.monotonic() - began) * 100
    yield Figure("B9", "idle", "", f"{share:.2f} %", share, 0.3, at_least=False, unit=" %")


def delay() -> Iterator[Figure]:
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


FIGURES: dict[str, Callable[[], Iterator[Figure]]] = {
    "B1": throughput,
    "B1c": on_all_cpus,
    "B1s": bystander,
    "B3": draining,
    "B4": lossless,
    "B5": starting,
    "B7": kernel_side,
    "B8": packets,
    "B9": idle,
    "B10": delay,
    "B12": aggregated,
}
HEAD = ("", "figure", "base or peer", "ours", "value", "target", "")


def main(names: list[str]) -> int:
    """Measure and print; 1 if something misses its target."""
    found: list[Figure] = []
    for name in names or FIGURES:
        for figure in FIGURES[name]():
            found.append(figure)
            print(" ".join(figure.cells()), file=sys.stderr)
    table = [HEAD, *(figure.cells() for figure in found)]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip())
    if path := os.environ.get("BENCH_JSON"):
        values = [{**attrs.asdict(figure), "missed": figure.missed} for figure in found]
        Path(path).write_text(json.dumps(values, indent=2) + "\n")
    return int(any(figure.missed for figure in found))


if __name__ == "__main__":
    # However it ends, its child processes have to end, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main(sys.argv[1:]))
