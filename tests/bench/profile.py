"""Where the time goes while events come: in each BPF program of tcplat, and in Python.

    python -m tests.bench.profile [EVENTS_PER_S]

The kernel counts for each program how often and how long it ran (bpf_stats_enabled);
py-spy looks 500 times a second at which line of Python is running.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.bench.programs import kernel_statistics
from tests.bench.running import Run, program

HERE = Path(__file__).parent

SECONDS = 8.0
MOST = 14


def python_side(pid: int, out: Path) -> subprocess.Popen[bytes]:
    """py-spy beside a process, its samples in a file."""
    return subprocess.Popen(
        [
            *(str(Path(sys.executable).with_name("py-spy")), "record", "--pid", str(pid)),
            *("--rate", "500", "--duration", str(int(SECONDS) - 1), "--format", "raw"),
            *("--output", str(out)),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def by_line(raw: str) -> Counter[str]:
    """Return the number of samples of each innermost frame."""
    found: Counter[str] = Counter()
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        found[stack.rpartition(";")[2]] += int(count)
    return found


def main(rate: int) -> None:
    """Print both."""
    with (
        tempfile.TemporaryDirectory() as folder,
        kernel_statistics() as programs,
        program("flood", rate, SECONDS) as (pid, go),
        Run.of("-p", str(pid)) as run,
    ):
        samples = Path(folder) / "samples"
        spy = python_side(run.process.pid, samples)
        sent = go()
        spy.wait()
        ran = programs(run.process.pid)
        report = run.stop()
        lines = by_line(samples.read_text())
    print(f"{report['delivered'] / sent['seconds']:,.0f} events/s, {report['dropped']} lost")
    print(f"\n{'program':24}{'runs':>12}{'ns each':>9}")
    for one in sorted(ran.values(), key=lambda one: -one.ns):
        if one.runs:
            print(f"{one.name:24}{one.runs:12,}{one.ns / one.runs:9.0f}")
    print(f"\n{'line of Python':60}{'samples':>8}")
    for line, count in lines.most_common(MOST):
        print(f"{line:60}{count / lines.total():8.1%}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 200_000)
