"""Fifty readers at one socket, one of them silent: nothing is lost, and counts are exact."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.long import LONG

from .harness import Tcplat, eventually, patience

pytestmark = pytest.mark.alone  # its rate is what the machine can handle

RATE = 50_000
READERS = 50
SECONDS = 60 if LONG else 5
_HERE = Path(__file__).parent


def test_fifty_readers_get_exact_counts_beside_a_silent_one(
    tmp_path: Path,
    start_tcplat: Callable[..., Tcplat],
    measured: Callable[[str], None],
) -> None:
    """All counts are exact at any event rate; nothing is lost at a rate the machine can handle."""
    flood = tmp_path / "flood"
    source = _HERE.parent / "bench/flood.c"
    subprocess.run(["clang", "-O2", "-o", str(flood), str(source)], check=True)
    for rate in (RATE, RATE // 2, RATE // 4):
        with ExitStack() as stack:
            traffic = (str(flood), str(rate), str(SECONDS))
            if serve_fifty(stack, tmp_path / str(rate), traffic, start_tcplat, measured) == 0:
                return
    pytest.fail("events were lost at each rate")


def serve_fifty(
    stack: ExitStack,
    path: Path,
    command: Sequence[str],
    start_tcplat: Callable[..., Tcplat],
    measured: Callable[[str], None],
) -> int:
    """How many events were lost."""
    traffic = popen(stack, *command)
    assert traffic.stdout
    pid = int(traffic.stdout.readline())
    sink = f"msgpack:unix={path},wait={READERS}"
    run = start_tcplat("-p", str(pid), sinks=[sink])
    eventually(path.exists, "the socket was there")
    never = stack.enter_context(socket.socket(socket.AF_UNIX))
    never.connect(str(path))
    readers = popen(stack, sys.executable, str(_HERE / "readers.py"), str(path), str(READERS - 1))
    run.wait_ready()
    figures = json.loads(traffic.communicate(b"\n", timeout=patience(SECONDS + 30))[0])
    status = Path(f"/proc/{run.pid}/status").read_text(encoding="ascii")
    resident = int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) >> 10
    outcome = run.stop(signal.SIGINT)
    assert outcome.returncode == 0
    found = json.loads(readers.communicate(timeout=patience())[0])
    report = found["report"]
    rate = 2 * figures["sends"] / figures["seconds"]
    missed = [gap for _, gap in found["counted"]]
    measured(
        f"{READERS} readers, {rate:,.0f} events/s for {SECONDS} s: {report['delivered']:,} rows, "
        f"{report['dropped']} lost, {sum(missed) / len(missed) / report['delivered']:.1%} "
        f"kept from readers that read, {resident} MB resident"
    )
    assert report["delivered"] + report["dropped"] > 2 * figures["sends"]
    assert (found["late"], found["whole"]) == (0, True)
    assert found["decoded"] == found["counted"][0]
    # On a machine that has no time for fifty readers they miss some, and know how many.
    assert [sum(counts) for counts in found["counted"]] == [report["delivered"]] * (READERS - 1)
    assert found["ends"] == 1
    assert resident < 200
    return int(report["dropped"])


def popen(stack: ExitStack, *arguments: str) -> subprocess.Popen[bytes]:
    process = stack.enter_context(
        subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    )
    stack.callback(process.kill)
    return process
