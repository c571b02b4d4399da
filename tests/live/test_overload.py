"""Events come faster than sinks take them: counters stay exact, memory bounded, Ctrl-C works."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .harness import SLOW, TCPLAT, Listener, Puppet, Tcplat, eventually

pytestmark = pytest.mark.alone  # it fills both CPUs, and measures how soon a run ends

MOST_MIB = 200
_FLOOD = """
flood = socket.create_connection({address!r})
flood.setblocking(False)
def run():
    data = bytes(1 << 20)
    while True:
        try:
            flood.send(data)
        except BlockingIOError:  # both buffers are full: from now on two events per call
            pass
threading.Thread(target=run, daemon=True).start()
"""


def peak_mib(pid: int) -> float:
    """Return the peak resident memory of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) / 1024


def waited_s(pid: int) -> float:
    """Return how long a process, which may be a zombie, has waited for a CPU, in s."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


@pytest.mark.parametrize("ring", ["1M", "8M"])
def test_ctrl_c_ends_an_overloaded_run_and_every_loss_is_counted(
    ring: str,
    running_tcplat: Callable[..., Tcplat],
    puppet: Callable[..., Puppet],
    server: Listener,
    measured: Callable[[str], None],
) -> None:
    """Ctrl-C ends it within a second, at best: the floods go on meanwhile on both CPUs."""
    for _ in range(3):
        took = end_a_flood(ring, running_tcplat, puppet, server, measured)
        if took <= SLOW:
            return
    pytest.fail(f"Ctrl-C took {took:.2f} s, not counted what it waited for a CPU")


def end_a_flood(
    ring: str,
    running_tcplat: Callable[..., Tcplat],
    puppet: Callable[..., Puppet],
    server: Listener,
    measured: Callable[[str], None],
) -> float:
    """Check what holds every time; return how long Ctrl-C took, without waits for a CPU."""
    floods = [puppet(), puppet()]
    run = running_tcplat(
        *("-p", ",".join(str(one.pid) for one in floods), "--ring-size", ring),
        # Two sinks take more than twice as long as one.
        *("--sink", "table:path=/dev/null,width=200"),
    )
    for one in floods:
        one(_FLOOD.format(address=server.address))
        server.accept()
    with run.path.open("rb") as file:
        eventually(lambda: b'{"v":2,"lost":' in file.read(), "something was lost")
    peak, waited = peak_mib(run.pid), waited_s(run.pid)
    began = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    os.waitid(os.P_PID, run.pid, os.WEXITED | os.WNOWAIT)
    whole = time.monotonic() - began
    took = whole - (waited_s(run.pid) - waited)
    outcome = run.wait()
    for one in floods:
        one.end()
    assert outcome.returncode == 0
    dropped = outcome.report["dropped"]
    measured(
        f"overload, {ring} ring: {len(outcome.rows)} rows, {dropped} lost, "
        f"{peak:.0f} MiB at most, Ctrl-C took {whole:.2f} s, {took:.2f} without waiting for a CPU"
    )
    # Outcome.check() has seen that produced is delivered, dropped and unread, hook by hook.
    assert dropped > 0
    assert f"{dropped} lost" in outcome.stderr
    assert peak <= MOST_MIB
    return took


_ASK = """
import select, socket, sys, threading, time
listener = socket.create_server(("127.0.0.1", 0))
def serve(conn):
    while conn.recv(4096):
        conn.send(b"+OK")
    conn.close()
def listen():
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
threading.Thread(target=listen, daemon=True).start()
conns = [socket.create_connection(listener.getsockname()) for _ in range(8)]
longest, end = 0, time.monotonic() + 2
while time.monotonic() < end:
    asked = {conn: time.monotonic_ns() for conn in conns if conn.send(b"PING")}
    while asked:
        for conn in select.select(list(asked), [], [])[0]:
            conn.recv(4096)
            longest = max(longest, time.monotonic_ns() - asked.pop(conn))
for conn in conns:
    conn.close()
print(longest, file=open(sys.argv[1], "w"))
"""


def test_lost_events_never_lengthen_an_exchange(
    start_tcplat: Callable[..., Tcplat], tmp_path: Path, measured: Callable[[str], None]
) -> None:
    capture, shown, again = (tmp_path / name for name in ("0.jsonl", "shown", "again"))
    stages = "stages:group_by=none,format=json,path="
    run = start_tcplat(
        *("--ring-size", "64K"),
        probes=("tcp_client", "tcp_service"),
        sinks=(f"jsonl:path={capture}", f"{stages}{shown}"),
        command=[sys.executable, "-I", "-c", _ASK, str(tmp_path / "longest")],
    )
    assert (outcome := run.wait()).returncode == 0
    longest_us = int((tmp_path / "longest").read_text()) / 1000
    lines = [json.loads(line) for line in shown.read_text().splitlines()]
    (total,) = [line for line in lines if line.get("stage") == "total"]
    (left_out,) = [line["spans_loss"] for line in lines if "spans_loss" in line]
    measured(
        f"ring of 64K: {total['count']} exchanges shown, {left_out} left out; "
        f"max {total['max_us']:.0f} us, and {longest_us:.0f} by the client's clock"
    )
    assert total["count"] > 100 < left_out
    # A histogram's bucket is up to 3 % wide.
    assert total["max_us"] <= longest_us * 1.03
    assert outcome.losses
    assert all(0 < one["since_ns"] < one["until_ns"] for one in outcome.losses)
    subprocess.run(
        [*TCPLAT, "replay", "-q", str(capture), "--sink", stages + str(again)], check=True
    )
    assert again.read_bytes() == shown.read_bytes()
