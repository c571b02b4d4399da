"""Events come faster than sinks take them: the books stay exact, memory bounded, Ctrl-C works."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .harness import SLOW, Listener, Puppet, Tcplat, eventually, patience

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
    """The most memory that a process ever had resident."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) / 1024


def our_share() -> float:
    """Of a core: the floods go on meanwhile, and want both."""
    runnable = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
    return min(1.0, (os.cpu_count() or 1) / max(1, runnable))


@pytest.mark.parametrize("ring", ["1M", "8M"])
def test_more_than_any_sink_takes(
    ring: str,
    running_tcplat: Callable[..., Tcplat],
    puppet: Callable[..., Puppet],
    server: Listener,
    measured: Callable[[str], None],
) -> None:
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
        eventually(lambda: b'{"v":1,"lost":' in file.read(), "something was lost", 60)
    peak, share = peak_mib(run.pid), our_share()
    began = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    status = run.process.wait(patience(30))
    took = time.monotonic() - began
    outcome = run.wait()
    assert status == 0
    dropped = outcome.report["dropped"]
    measured(
        f"overload, {ring} ring: {len(outcome.rows)} rows, {dropped} lost, "
        f"{peak:.0f} MiB at most, Ctrl-C took {took:.2f} s"
    )
    # Outcome.check() has seen that produced is delivered, dropped and unread, hook by hook.
    assert dropped > 0
    assert f"{dropped} lost" in outcome.stderr
    assert peak <= MOST_MIB
    assert took * share <= SLOW
