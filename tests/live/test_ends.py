"""How a run ends, what it leaves behind, and its delay from event to output."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest

from tcplat_core.run.signals import NOTHING_RECORDED
from tests.long import LONG

from .harness import (
    SLOW,
    TCPLAT,
    Listener,
    Puppet,
    Tcplat,
    at,
    burst,
    eventually,
    listen,
    loaded,
    needs,
    parse,
    patience,
    programs_of,
    reached,
    total,
)

Start = Callable[..., Tcplat]

CLOSED_STDOUT = ("sh", "-c", 'exec "$@" >&-', "sh", *TCPLAT)
"""Starts tcplat without a standard output."""


def connect_often(client: Puppet, server: Listener, times: int) -> None:
    """Make rows: seven for each time, or eight."""
    client(f"for _ in range({times}): socket.create_connection({server.address!r}).close()")


@pytest.mark.alone  # it measures a duration
def test_run_ends_after_its_duration(running_tcplat: Start) -> None:
    """Never shorter; longer on a busy machine, but not every time."""
    lasted: list[float] = []
    while len(lasted) < 5 and (not lasted or lasted[-1] >= 0.3 + 0.5 * SLOW):
        outcome = running_tcplat("--duration", "300ms").wait()
        assert outcome.returncode == 0
        lasted.append(outcome.report["duration_s"])
        assert lasted[-1] >= 0.3
    assert min(lasted) < 0.3 + 0.5 * SLOW


@pytest.mark.parametrize("count", [1, 7, 100])
def test_run_ends_after_count_rows(
    count: int, running_tcplat: Start, client: Puppet, server: Listener
) -> None:
    run = running_tcplat("-p", str(client.pid), "--count", str(count))
    connect_often(client, server, 50)
    outcome = run.wait()
    assert outcome.returncode == 0
    assert len(outcome.rows) == count
    assert outcome.report["delivered"] == count


def test_count_keeps_the_first_rows(
    running_tcplat: Start, client: Puppet, server: Listener
) -> None:
    run = running_tcplat("-p", str(client.pid), "--count", "20")
    client.connect(server)
    client("for n in range(1, 100): s.send(b'x' * n)")
    rows = run.wait().rows
    assert [row["bytes"] for row in at(rows, "send")] == list(range(1, 18))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_sigint_sigterm_and_sighup_end_the_run_cleanly(
    number: int, running_tcplat: Start, client: Puppet, server: Listener
) -> None:
    run = running_tcplat("-p", str(client.pid))
    connect_often(client, server, 10)
    outcome = run.stop(number)
    assert outcome.returncode == 0
    assert len(at(outcome.rows, "connect")) == 10
    # The last line is the complete report.
    data = run.path.read_bytes()
    assert data.endswith(b"\n")
    assert list(json.loads(data.splitlines()[-1])) == ["v", "report"]
    # One line of summary, nothing else.
    assert outcome.stderr.startswith("tcplat: tcp_client: ")
    assert outcome.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("gap_s", [0, 0.002, 0.02, 0.1])
def test_signal_that_comes_twice_ends_the_run_cleanly(
    number: int, gap_s: float, running_tcplat: Start, client: Puppet, server: Listener
) -> None:
    """As from timeout(1)."""
    run = running_tcplat("-p", str(client.pid))
    connect_often(client, server, 10)
    run.process.send_signal(number)
    time.sleep(gap_s)
    outcome = run.stop(number)
    assert outcome.returncode == 0
    assert len(at(outcome.rows, "connect")) == 10
    assert outcome.stderr.startswith("tcplat: tcp_client: ")


@pytest.mark.parametrize("what", ["file", "folder"])
def test_capture_removed_during_the_run_is_named_and_exits_with_1(
    what: str, tmp_path: Path, start_tcplat: Start
) -> None:
    folder = tmp_path / "captures"
    folder.mkdir()
    path = folder / "out.jsonl"
    run = start_tcplat(sinks=(f"jsonl:path={path}",)).wait_ready()
    path.unlink()
    if what == "folder":
        folder.rmdir()
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(patience()) == 1
    said = run.errors.read_text()
    assert said.endswith(
        f"tcplat: {path} is gone: it was removed or replaced while it was written\n"
    )


@pytest.mark.parametrize("times", [1, 2])
def test_signal_before_the_start_ends_cleanly(times: int, start_tcplat: Start) -> None:
    run = start_tcplat()
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")

    def loader_runs() -> bool:
        """Signals are handled from here on; the start script has other children before."""
        try:
            return any(
                b"tcplat_core.loader" in Path(f"/proc/{pid}/cmdline").read_bytes()
                for pid in children.read_text().split()
            )
        except OSError:  # that child has ended
            return False

    eventually(loader_runs, "the loader ran")
    assert run.process.poll() is None
    for _ in range(times - 1):
        run.process.send_signal(signal.SIGINT)
    outcome = run.stop()
    assert outcome.returncode == 0
    assert outcome.stderr == f"tcplat: {NOTHING_RECORDED}\n"


@pytest.mark.parametrize("sink", ["table", "jsonl"])
@pytest.mark.parametrize("idle", [False, True], ids=["busy", "idle"])
def test_run_ends_when_head_exits(
    sink: str,
    idle: bool,  # noqa: FBT001 - a parameter of the test
    running_tcplat: Start,
    client: Puppet,
    server: Listener,
) -> None:
    """`tcplat run | head -1` ends, also without further events."""
    read, write = os.pipe()
    with subprocess.Popen(["head", "-1"], stdin=read, stdout=subprocess.PIPE) as head:
        os.close(read)
        run = running_tcplat("-p", str(client.pid), sinks=[sink], stdout=write)
        os.close(write)
        connect_often(client, server, 1)
        assert head.wait(patience()) == 0

        def ended() -> bool:
            if not idle:
                connect_often(client, server, 1)
                server.accept().close()
            return run.process.poll() is not None

        eventually(ended, "it noticed that its reader has gone")
        assert run.process.returncode == 0
        assert head.stdout
        line = head.stdout.read()
    assert line.startswith(b"PID" if sink == "table" else b'{"v":2,')
    assert "Traceback" not in run.errors.read_text()


def test_stalled_reader_does_not_block_ctrl_c(
    running_tcplat: Start, client: Puppet, server: Listener
) -> None:
    """A full pipe blocks the sink, but not Ctrl-C."""
    read, write = os.pipe()
    run = running_tcplat("-p", str(client.pid), sinks=["jsonl"], stdout=write)
    os.close(write)
    client.connect(server)
    client("for _ in range(2000): s.send(b'x')")
    outcome = run.stop()
    os.close(read)
    assert "Traceback" not in outcome.stderr
    assert outcome.returncode in (0, 1)


@pytest.mark.parametrize("sink", ["table", "jsonl"])
def test_closed_stdout_is_one_sentence(sink: str, start_tcplat: Start) -> None:
    outcome = start_tcplat(
        "--duration", "100ms", sinks=[sink], program=CLOSED_STDOUT, stdout=None
    ).wait()
    assert "Traceback" not in outcome.stderr
    assert outcome.returncode in (0, 1, 2)
    assert outcome.stderr.count("\n") == 1


def test_closed_stdout_is_accepted_with_a_path(
    running_tcplat: Start, client: Puppet, server: Listener
) -> None:
    run = running_tcplat("-p", str(client.pid), program=CLOSED_STDOUT, stdout=None)
    connect_often(client, server, 1)
    run.wait_for("it was connected", reached("ESTABLISHED"))
    outcome = run.stop()
    assert outcome.returncode == 0
    assert outcome.report["switched_off"] == {}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_run_leaves_nothing_attached(number: int, running_tcplat: Start) -> None:
    needs("bpftool")
    run = running_tcplat()
    ids = programs_of(run.pid)
    assert len(loaded(ids)) == len(set(ids)) >= 6
    run.process.send_signal(number)
    run.process.wait(patience())
    eventually(lambda: not loaded(ids), "all its programs were unloaded")


def helpers(pid: int) -> list[int]:
    """Return the descendants of a process, loader and helpers included."""
    found = []
    with contextlib.suppress(OSError):  # it has ended
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found += [int(child), *helpers(int(child))]
    return found


def alive(pid: int) -> bool:
    """Whether it runs: one that waits for an init that collects none has ended."""
    with contextlib.suppress(OSError):
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def folders(pid: int) -> list[Path]:
    """Temporary folders of such a tcplat."""
    places = ("/var/cache/tcplat", "/tmp", "/var/tmp", "/dev/shm", "/run")  # noqa: S108 - where to look
    return [one for place in places for one in Path(place).glob(f"tcplat-work-{pid}-*")]


def remains(pid: int, there: Sequence[int], programs: Sequence[int], folder: Path) -> list[str]:
    """Return what is left of a killed tcplat: helpers, programs, folders."""
    return [
        *(f"process {one}" for one in there if alive(one)),
        *(f"program {one}" for one in loaded(programs)),
        *map(str, [*folders(pid), *folder.iterdir()]),
    ]


KILLED: Mapping[str, tuple[str, ...]] = {
    "run": ("run", "-q", "--probe", "tcp_client", "--sink", "jsonl", "--min-latency", "{new}"),
    "plugins check": ("plugins", "check", "xdp_port:iface=eth0,port={port}"),
}


@pytest.mark.parametrize("what", KILLED)
@pytest.mark.alone  # it measures how soon all is gone
def test_kill_at_any_instant_leaves_nothing(
    what: str, measured: Callable[[str], None], tmp_path: Path
) -> None:
    """No process, program or folder, half a second later; nothing has been compiled before."""
    within_s = 2 * SLOW  # on a machine that does nothing else, it compiles from 0.2 to 1 s

    def start() -> subprocess.Popen[bytes]:
        # A filter or a port that no run has had: no cache spares the compiler.
        new = f"{1 << 30 | int.from_bytes(os.urandom(4), 'big')}ns"
        port = 1 + random.randrange((1 << 16) - 1)  # noqa: S311 - not a secret
        words = [word.format(new=new, port=port) for word in KILLED[what]]
        return subprocess.Popen(
            [*TCPLAT, *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )

    busy, longest, times = 0, 0.0, 20 if LONG else 5
    for _ in range(times):
        one = start()
        time.sleep(random.uniform(0, within_s))  # noqa: S311 - any instant will do
        there = helpers(one.pid)
        programs: list[int] = []
        for pid in (one.pid, *there):
            with contextlib.suppress(OSError):
                programs += programs_of(pid)
        busy += bool(there)
        one.kill()
        killed = time.monotonic()
        one.wait()
        load = max(1, os.getloadavg()[0] / (os.cpu_count() or 1))
        left = partial(remains, one.pid, there, programs, tmp_path)
        deadline = killed + patience(0.5 * load)
        while found := left():
            assert time.monotonic() < deadline, found
            time.sleep(0.01)
        longest = max(longest, time.monotonic() - killed)
    assert busy, "never was anything under way"
    measured(
        f"{what} killed at {times} instants of {within_s:.1f} s, {busy} of them with helpers: "
        f"nothing left after {longest:.2f} s at most"
    )


def test_kill_during_loading_leaves_nothing(start_tcplat: Start) -> None:
    """The loader then has no session to answer, and ends as well."""
    run = start_tcplat()
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    pids = eventually(
        lambda: children.read_text().split() if children.exists() else [], "the loader ran"
    )
    run.kill()
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "the loader ended")


def test_all_sinks_receive_the_same_rows(
    running_tcplat: Start, client: Puppet, server: Listener, tmp_path: Path
) -> None:
    one, two, table = tmp_path / "one", tmp_path / "two", tmp_path / "table"
    run = running_tcplat(
        "-p",
        str(client.pid),
        sinks=[f"jsonl:path={one}", f"jsonl:path={two}", f"table:path={table}", "jsonl"],
        stdout=subprocess.PIPE,
    )
    connect_often(client, server, 10)
    outcome = run.stop()
    assert outcome.returncode == 0
    assert one.read_bytes() == two.read_bytes() == outcome.stdout
    rows, _, report = parse(one.read_bytes())
    assert report["delivered"] == len(rows)
    lines = table.read_text().splitlines()
    assert sum(not line.startswith("PID") for line in lines) == len(rows)


def test_full_disk_switches_off_its_sink_alone(
    running_tcplat: Start, client: Puppet, server: Listener, tmp_path: Path
) -> None:
    good = tmp_path / "good"
    run = running_tcplat(
        "-p", str(client.pid), sinks=["jsonl:path=/dev/full", f"jsonl:path={good}"]
    )
    connect_often(client, server, 1)
    eventually(lambda: good.read_bytes().count(b"\n") >= 3, "the first rows were written")
    connect_often(client, server, 10)
    outcome = run.stop()
    rows, _, report = parse(good.read_bytes())
    assert len(at(rows, "connect")) == 11
    assert "sink jsonl:path=/dev/full was switched off: " in outcome.stderr
    assert "No space left on device" in outcome.stderr
    assert list(report["switched_off"]) == ["jsonl:path=/dev/full"]


def test_run_ends_when_all_sinks_are_switched_off(
    running_tcplat: Start, client: Puppet, server: Listener
) -> None:
    run = running_tcplat("-p", str(client.pid), sinks=["jsonl:path=/dev/full"])
    connect_often(client, server, 1)
    outcome = run.wait()
    assert "Traceback" not in outcome.stderr
    assert outcome.returncode == 1
    assert "was switched off" in outcome.stderr


# --- quick


@pytest.mark.alone  # it measures a delay
def test_row_reaches_a_pipe_within_200_ms(
    running_tcplat: Start,
    client: Puppet,
    server: Listener,
    measured: Callable[[str], None],
) -> None:
    """200 ms at most from the event to the end of the pipe, also where little happens."""
    run = running_tcplat("-p", str(client.pid), sinks=["table"], stdout=subprocess.PIPE)
    assert run.process.stdout
    columns = run.process.stdout
    head = b""
    delays = []
    for _ in range(5):
        eventually(partial(is_asleep, run.pid), "it had nothing to do")
        client.connect(server)
        line = columns.readline()
        if line.startswith(b"PID"):
            head, line = line, columns.readline()
        arrived_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) / 1000
        event_us = int(line.split()[head.split().index(b"TIMESTAMP(us)")])
        delays.append((arrived_us - event_us) / 1000)
        server.accept().close()
        client("s.close()")
        while b"socket gone" not in line:
            line = columns.readline()
    measured(
        "first row of the table through a pipe: "
        f"{min(delays):.1f} to {max(delays):.1f} ms after its event"
    )
    # A sleeper that is not woken looks again after a second: by chance one row is fast.
    assert 0 < min(delays) <= sorted(delays)[2] <= 200 * SLOW


@pytest.mark.alone  # it measures for how long
def test_idle_run_sleeps(running_tcplat: Start, client: Puppet) -> None:
    run = running_tcplat("-p", str(client.pid))
    eventually(partial(is_asleep, run.pid), "it had nothing to do")
    began, before = time.monotonic(), sleeps(run.pid)
    eventually(lambda: sleeps(run.pid) > before + 2, "it looked around")
    # Once a second, and some by the scheduler.
    assert time.monotonic() - began > 1.5


def is_asleep(pid: int) -> bool:
    """Whether a process waits in poll(2)."""
    return "poll" in Path(f"/proc/{pid}/wchan").read_text()


def sleeps(pid: int) -> int:
    """How often a process has gone to sleep."""
    text = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in text.splitlines() if line.startswith("voluntary_ctxt"))
    return int(line.split()[1])


# Every probe has rows of this traffic, which goes on while the run ends.
REQUESTS = """
import threading
going = True
def serve():
    peer, _ = listening.accept()
    while data := peer.recv(10):
        peer.sendall(data)
def ask():
    s = socket.create_connection(listening.getsockname())
    while going:
        s.sendall(b"x")
        s.recv(1)
        time.sleep(0.002)
    s.close()
for one in (serve, ask):
    threading.Thread(target=one).start()
"""


@pytest.mark.alone  # it measures times
def test_rows_of_all_hooks_end_within_40_ms(running_tcplat: Start, client: Puppet) -> None:
    port = listen(client)
    run = running_tcplat("-p", str(client.pid), probes=("tcp_client", "tcp_service"))
    client(REQUESTS)
    run.wait_for("requests were answered", lambda rows: len(at(rows, "send")) > 100)
    rows = run.stop().rows
    client("going = False")
    last = {
        row["point"] + row["probe"]: row["ts_ns"]
        for row in rows
        if port in (row["sport"], row["dport"])
    }
    steady = [ts_ns for point, ts_ns in last.items() if point[:4] in ("send", "recv", "read")]
    assert len(steady) == 5
    # Detaching the programs one after the other takes the kernel 0.1 s and more.
    assert max(steady) - min(steady) < 0.04e9 * SLOW


# --- loss


def test_lost_events_are_counted_exactly(
    running_tcplat: Start,
    client: Puppet,
    server: Listener,
    measured: Callable[[str], None],
) -> None:
    run = running_tcplat("-p", str(client.pid), "--ring-size", "4K")
    assert burst(client, server, 20_000) == 20_000
    outcome = run.stop()
    assert outcome.returncode == 0
    dropped = outcome.report["dropped"]
    assert dropped > 0
    assert sum(loss["count"] for loss in outcome.losses) == dropped
    assert {loss["probe"] for loss in outcome.losses} == {"tcp_client"}
    # Every event is delivered or counted as lost.
    hooks = outcome.report["probes"]["tcp_client"]["hooks"]
    (sends,) = (hook for hook in hooks if hook["point"] == "send" and hook["produced"])
    assert sends["produced"] == 20_000
    assert sends["delivered"] == len(at(outcome.rows, "send"))
    assert outcome.hook_total("produced") == (
        len(outcome.rows) + dropped + outcome.hook_total("unread")
    )
    assert f"{dropped} lost" in outcome.stderr
    measured(f"4K ring, 20,000 sends in a burst: {len(outcome.rows)} rows, {dropped} lost")


@pytest.mark.alone  # 100,000 events fill the rings of other runs, too
def test_default_ring_loses_nothing_in_a_burst(
    running_tcplat: Start, client: Puppet, server: Listener
) -> None:
    """The ring holds three quarters of the burst: a run without a CPU that long may lose, once."""
    for _ in range(3):
        run = running_tcplat("-p", str(client.pid), "--fail-on-loss")
        assert burst(client, server, 100_000) == 100_000
        outcome = run.stop()
        client("s.close()")
        lost = outcome.report["dropped"]
        assert outcome.returncode == (5 if lost else 0)
        if not lost:
            break
    assert lost == 0
    assert total(outcome.rows, "send") - total(outcome.rows, "send_short") == 100_000


def test_fail_on_loss_exits_with_5(running_tcplat: Start, client: Puppet, server: Listener) -> None:
    run = running_tcplat("-p", str(client.pid), "--ring-size", "4K", "--fail-on-loss")
    burst(client, server, 20_000)
    outcome = run.stop()
    assert outcome.report["dropped"] > 0
    assert outcome.returncode == 5
    assert "Traceback" not in outcome.stderr


def test_loss_and_count_together_add_up(
    running_tcplat: Start, client: Puppet, server: Listener
) -> None:
    """The counters balance also where --count ends the run before all rows are read."""
    run = running_tcplat("-p", str(client.pid), "--ring-size", "4K", "--count", "50")
    burst(client, server, 20_000)
    outcome = run.wait()
    assert outcome.returncode == 0
    assert len(outcome.rows) == 50
    assert outcome.hook_total("produced") == (
        50 + outcome.report["dropped"] + outcome.hook_total("unread")
    )
