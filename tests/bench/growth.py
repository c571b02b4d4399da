"""How cost grows: with the rate of events, and with the sockets that are open already.

    python -m tests.bench.growth [FOLDER]

Prints both series and draws them into FOLDER (docs/): growth-rate.svg, growth-sockets.svg.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path

import attrs

from tests.bench.rates import kept_short
from tests.bench.running import Run, cpu_s, program

HERE = Path(__file__).parent

RATES = (1_000, 10_000, 100_000, 500_000)
SOCKETS = (10, 1_000, 100_000)
SECONDS = 6.0
TAIL = 4096
SPARE_FDS = 100
"""Of a process that holds sockets, for all else."""

Point = dict[str, float]


@attrs.define(eq=False)
class Delays:
    """How old the youngest line of a growing file is, each time that it grows: ns."""

    path: Path
    found: list[int] = attrs.field(factory=list)
    _over: threading.Event = attrs.field(factory=threading.Event)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look until the block ends."""
        thread = threading.Thread(target=self._watch)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _watch(self) -> None:
        size = 0
        with self.path.open("rb") as file:
            while not self._over.wait(0.001):
                now_size = file.seek(0, 2)
                now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
                if now_size == size:
                    continue
                size = now_size
                file.seek(max(0, size - TAIL))
                lines = file.read(TAIL).split(b"\n")
                if len(lines) > 2:
                    self.found.append(now - json.loads(lines[-2])["ts_ns"])

    def p99_ms(self) -> float:
        """Return the 99th percentile."""
        return statistics.quantiles(self.found, n=100)[-1] / 1e6


def at_rate(rate: int) -> Point:
    """CPU, memory, delay and loss at so many events per second."""
    with program("flood", rate, SECONDS) as (pid, go), Run.of("-p", str(pid)) as run:
        delays = Delays(run.folder / "out")
        before = cpu_s(run.process.pid)
        with delays.watched(), kept_short(run.folder / "out"):
            sent = go()
        used = cpu_s(run.process.pid) - before
        memory = run.memory()
        report = run.stop()
    events = report["delivered"] + report["dropped"]
    return {
        "events_per_s": events / sent["seconds"],
        "cpu_percent": used / sent["seconds"] * 100,
        "memory_mib": memory / 2**20,
        "delay_p99_ms": delays.p99_ms(),
        "lost_percent": report["dropped"] / events * 100,
    }


def hold(count: int, ready: Event, over: Event) -> None:
    """Open so many sockets, over loopback, both ends ours; until it is over."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=128))
        for _ in range(count // 2):
            stack.enter_context(socket.create_connection(listener.getsockname()))
            stack.enter_context(listener.accept()[0])
        ready.set()
        over.wait()


@contextmanager
def open_sockets(count: int) -> Iterator[None]:
    """So many sockets, in as many processes as the limit of open files asks for."""
    own = multiprocessing.get_context("spawn")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_FDS
    over = own.Event()
    holders = []
    try:
        while count > 0:
            ready = own.Event()
            holder = own.Process(target=hold, args=(min(count, most), ready, over))
            holder.start()
            holders.append(holder)
            while not ready.wait(0.1):
                if not holder.is_alive():
                    raise SystemExit(f"no {count} sockets can be open here")
            count -= most
        yield
    finally:
        over.set()
        for holder in holders:
            holder.join()


def with_sockets(count: int) -> Point:
    """Start to ready and memory, with the owners of so many sockets to learn."""
    starts, memory = [], []
    with open_sockets(count):
        for _ in range(3):
            with Run.of("-q") as run:
                starts.append(run.start_s)
                memory.append(run.memory())
    return {
        "sockets": count,
        "start_s": statistics.median(starts),
        "memory_mib": statistics.median(memory) / 2**20,
    }


def draw(points: Sequence[Point], axis: str, path: Path) -> None:
    """One small plot per figure, over `axis`."""
    import matplotlib as mpl  # noqa: PLC0415 - an extra, and slow to import

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "tcplat", "font.size": 8})
    from matplotlib import pyplot as plt  # noqa: PLC0415 - after the choice of the backend

    names = [name for name in points[0] if name != axis]
    figure, plots = plt.subplots(1, len(names), figsize=(2.4 * len(names), 2.2))
    for plot, name in zip(plots, names, strict=True):
        plot.plot([one[axis] for one in points], [one[name] for one in points], "o-", color="C0")
        plot.set(xscale="log", xlabel=axis, title=name, ylim=(0, None))
        plot.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(folder: Path) -> dict[str, list[Point]]:
    """Measure, print and draw."""
    series = {
        "rate": [at_rate(rate) for rate in RATES],
        "sockets": [with_sockets(count) for count in SOCKETS],
    }
    for points in series.values():
        print("  ".join(f"{name:>14}" for name in points[0]))
        for point in points:
            print("  ".join(f"{value:14,.4g}" for value in point.values()))
    draw(series["rate"], "events_per_s", folder / "growth-rate.svg")
    draw(series["sockets"], "sockets", folder / "growth-sockets.svg")
    return series


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else HERE.parents[1] / "docs")
