#!/usr/bin/env python3
"""Run the scripted traffic in each kernel with each mechanism, and print the matrix.

    python tests/vm/matrix.py [--kernel 6.1] [--timeout 1500] [--jobs 2]

Exit status 0 when every cell is ok; pytest's output for the others is above the matrix.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from tests.long import LONG  # noqa: E402 - wherever it is called from
from tests.vm.run import (  # noqa: E402 - the same
    KERNELS,
    MORE_KERNELS,
    Cache,
    Kernel,
    default_cache,
    read_kernels,
)

MECHANISMS = ("kprobe", "fentry")
COLUMNS = ("tcp_client", "tcp_service", "xdp_port", "tcp_stats", "histograms")
VERSIONS = (4, 6)
OTHERS = (
    "tests/live/test_filters.py::test_cgroup_filter_includes_descendants",
    "tests/live/test_owners.py::test_older_listener_owns_all_connections_before_accept",
)
"""Tests that also differ between kernels, without a cell of the matrix.

They differ little between mechanisms: each kernel has one of the two, unless TCPLAT_LONG=1.
"""
SLOW = 20
"""How much slower than the machine a guest without KVM may be."""

BCC_TOOLS = ("6.1",)
"""Where the bcc tools of Debian 12 still compile."""

# All in one boot, and one pytest per mechanism: starting Python takes longer than the tests.
IN_THE_GUEST = """
status=0
export TCPLAT_SLOW={slow} TCPLAT_REQUIRE_ROOT=1
for mechanism in {mechanisms}; do
    others=
    case " {others_by} " in *" $mechanism "*) others="{others}" ;; esac
    TCPLAT_ATTACH=$mechanism "$@" tests/live/test_matrix.py $others \\
        --junitxml="$TCPLAT_VM_OUT/$mechanism.xml" || status=1
done
# By tracepoint alone.
tcplat run --probe dev_xmit --dry-run || status=1
if [ -n "{headers}" ]; then
    BCC_KERNEL_SOURCE="{headers}" TCPLAT_ATTACH=kprobe "$@" tests/live/test_bcc_tools.py \\
        --junitxml="$TCPLAT_VM_OUT/tools.xml" || status=1
fi
exit $status
"""


def ways_of_others(kernels: int) -> list[Sequence[str]]:
    """Return for each kernel the mechanisms by which the tests without a cell run there."""
    turns = [(MECHANISMS[number % len(MECHANISMS)],) for number in range(kernels)]
    return [MECHANISMS if LONG else turn for turn in turns]


def hot() -> list[Path]:
    """Return what each guest reads most: this Python, its packages, the project, the compiler."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    parts = [path for path in stdlib.iterdir() if path.name not in ("site-packages", "test")]
    library = next(Path("/usr/lib").glob("*/libbcc.so.0"), None)
    compiler = needed(library) if library else []
    project, venv = HERE.parent.parent, Path(sys.prefix)
    packages = [] if venv.is_relative_to(project) else [venv]
    return [*parts, project, *packages, *compiler]


def needed(library: Path) -> list[Path]:
    """Return a library and those that it needs."""
    said = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
    found = [Path(word) for word in said.split() if word.startswith("/")]
    return [path.resolve() for path in (library, *found)]


def run(kernel: Kernel, others_by: Sequence[str], out: Path, timeout: float) -> int:
    """Boot one kernel and test there; its results are in `out`/`kernel.name`."""
    with_tools = kernel.name in BCC_TOOLS
    headers = Cache(default_cache()).headers(kernel) if with_tools else ""
    script = IN_THE_GUEST.format(
        mechanisms=" ".join(MECHANISMS),
        slow=SLOW,
        headers=headers,
        others=" ".join(OTHERS),
        others_by=" ".join(others_by),
    )
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=900"]
    harness = [sys.executable, str(HERE / "run.py"), "--kernel", kernel.name, "--out", str(out)]
    command = ["sh", "-c", script, "sh", *pytest]
    harness += [f"--copy={path}" for path in hot()]
    call = [*harness, "--timeout", str(timeout), "--", *command]
    return subprocess.run(call, check=False).returncode


def cells(results: Path) -> dict[tuple[str, int], str]:
    """(column, IP version) -> ok, FAIL or skip, from pytest's XML; empty if there is none."""
    if not results.exists():
        return {}
    found = {}
    for case in ET.parse(results).iter("testcase"):  # noqa: S314 - our own file
        name, _, version = case.attrib["name"].partition("[")
        if name.removeprefix("test_") not in COLUMNS:
            continue
        bad = any(case.find(kind) is not None for kind in ("failure", "error"))
        verdict = "FAIL" if bad else "skip" if case.find("skipped") is not None else "ok"
        found[name.removeprefix("test_"), int(version.rstrip("]"))] = verdict
    return found


def main(arguments: Sequence[str]) -> int:
    """Print the matrix; 0 if every cell is ok."""
    usual = read_kernels(KERNELS.read_text())
    known = usual | read_kernels(MORE_KERNELS.read_text())
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernel", action="append", choices=known)
    parser.add_argument("--timeout", type=float, default=1500)
    # A guest keeps little more than one CPU of the machine busy.
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="guests at a time")
    options = parser.parse_args(arguments)
    lines, bad = [], 0
    with tempfile.TemporaryDirectory() as folder:
        names = list(options.kernel or usual)
        with ThreadPoolExecutor(options.jobs) as guests:
            statuses = list(
                guests.map(
                    lambda name, by: run(known[name], by, Path(folder), options.timeout),
                    names,
                    ways_of_others(len(names)),
                )
            )
        for kernel, status in zip(names, statuses, strict=True):
            bad += status != 0
            for mechanism in MECHANISMS:
                found = cells(Path(folder) / kernel / f"{mechanism}.xml")
                row = [found.get((p, v), "none") for p in COLUMNS for v in VERSIONS]
                bad += sum(verdict != "ok" for verdict in row)
                lines.append([kernel, mechanism, *row])
    head = ["kernel", "mechanism", *(f"{p}/v{v}" for p in COLUMNS for v in VERSIONS)]
    for line in (head, *lines):
        print(
            " ".join(word.ljust(max(9, len(name))) for word, name in zip(line, head, strict=True))
        )
    cells_ok = sum(verdict == "ok" for line in lines for verdict in line[2:])
    print(f"{cells_ok} passed, {len(lines) * (len(head) - 2) - cells_ok} failed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
