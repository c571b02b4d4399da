"""What live tests share: tcplat as a child, puppets that make traffic, and waiting for conditions.

Everything that is started here ends with this process, killed or not: puppets
read standard input to its end, network namespaces go with the puppets in them,
and what tcplat attaches lives as long as its file descriptors.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any, Self, TypeVar

import attrs
import pytest

from tcplat_core.kernel import netns

T = TypeVar("T")
Row = dict[str, Any]

SLOW = float(os.environ.get("TCPLAT_SLOW", "1"))
"""The factor of all time limits: 20 in a virtual machine without KVM."""
ATTACH = os.environ.get("TCPLAT_ATTACH", "auto")
TCPLAT = (os.environ.get("TCPLAT") or str(Path(sys.executable).with_name("tcplat")),)

LOCAL = {4: "127.0.0.1", 6: "::1"}
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}

_IMPORTS = """
import asyncio, errno, mmap, os, select, signal, socket, struct, subprocess, sys, threading, time
"""


def patience(seconds: float = 60) -> float:
    """Return the limit in s for something that normally takes next to no time."""
    return seconds * SLOW


def eventually(condition: Callable[[], T], what: str, seconds: float = 60) -> T:
    """Wait until the condition is true, and return its value."""
    deadline = time.monotonic() + patience(seconds)
    while True:
        late = time.monotonic() > deadline  # before the last check: this process may have stalled
        value = condition()
        if value:
            return value
        if late:
            pytest.fail(f"timeout after {patience(seconds):.0f} s, waiting until {what}")
        time.sleep(0.002 * SLOW)


def needs(*programs: str) -> None:
    """Skip the test where one of these is not installed."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


# --- workers of pytest-xdist

_PORTS_FROM, _PORTS_TO = 12_000, 30_000
"""Below those of other namespaces, and without the ones that tests name."""
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def set_apart(worker: int, workers: int) -> None:
    """Give this process, and what it starts, a network namespace and ports of its own.

    Programs see all namespaces: a run tells the connections of its test by their port.
    """
    netns.unshare()
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    each = (_PORTS_TO - _PORTS_FROM) // workers
    first = _PORTS_FROM + worker * each
    _RANGE.write_text(f"{first} {first + each - 1}")
    # readline, in the pytest that started this one, has put the terminal's width there.
    os.environ.pop("COLUMNS", None)
    os.environ.pop("LINES", None)


def outside() -> tuple[str, ...]:
    """Return the prefix of a command that needs the Internet: a worker's namespace has none."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return ()
    return ("nsenter", f"--net=/proc/{os.getppid()}/ns/net")


# --- the puppets


@attrs.define(eq=False)
class Puppet:
    """A process that runs the Python it is sent.

    Args:
        within: The puppet that gives the network namespace; None for the test's own.
        alone: It gets a new network namespace, `lo` up.
        numbered: It gets a new PID namespace and its /proc: there it is process 1.
        pass_fds: File descriptors that it inherits.
    """

    process: subprocess.Popen[bytes]

    @classmethod
    def start(
        cls,
        *,
        within: Puppet | None = None,
        alone: bool = False,
        numbered: bool = False,
        pass_fds: Sequence[int] = (),
    ) -> Self:
        arguments = [sys.executable, "-I", str(Path(__file__).with_name("puppet.py"))]
        if within:
            arguments = ["nsenter", f"--net=/proc/{within.pid}/ns/net", *arguments]
        if alone:
            arguments = ["unshare", "--net", *arguments]
        if numbered:
            flags = ("--pid", "--fork", "--kill-child", "--mount-proc")
            arguments = ["unshare", *flags, *arguments]
        process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=pass_fds
        )
        puppet = cls(process)
        puppet(_IMPORTS)
        if alone:
            # A namespace begins with the kernel's ports, which every worker's have.
            puppet(f"""
subprocess.run(['ip', 'link', 'set', 'lo', 'up'], check=True)
open({str(_RANGE)!r}, 'w').write({_RANGE.read_text()!r})
""")
        return puppet

    @property
    def pid(self) -> int:
        return self.process.pid

    def tell(self, code: str) -> None:
        """Start the code; answer() waits for the end."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(code).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self, seconds: float = 60) -> Any:
        """Return the answer to a command."""
        assert self.process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(patience(seconds)):
                pytest.fail("the puppet does not answer")
        line = self.process.stdout.readline()
        assert line, f"the puppet is gone, status {self.process.poll()}"
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer["value"]

    def __call__(self, code: str) -> Any:
        """Run the code; return the value of the last line, if it is an expression."""
        self.tell(code)
        return self.answer()

    def connect(self, to: Listener, name: str = "s") -> None:
        """Connect a new socket, its variable `name`, to a listener of the test."""
        self(f"{name} = socket.create_connection({to.address!r})")

    def end(self) -> None:
        """Close its standard input, and wait for its end."""
        assert self.process.stdin
        assert self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(patience(5))  # one that hangs is killed
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


_LISTEN = """
family = socket.AF_INET if {ip} == 4 else socket.AF_INET6
listening = socket.create_server(("127.0.0.1" if {ip} == 4 else "::1", 0), family=family)
listening.getsockname()[1]
"""


def listen(puppet: Puppet, ip: int = 4) -> int:
    """Let a puppet listen (socket `listening`); return the port."""
    return int(puppet(_LISTEN.format(ip=ip)))


def network(puppet: Puppet, *, script: str) -> None:
    """Run commands of `ip` in the network namespace of a puppet, one per line."""
    for line in script.strip().splitlines():
        subprocess.run(
            ["nsenter", f"--net=/proc/{puppet.pid}/ns/net", "ip", *line.split()], check=True
        )


BLACKHOLE = """
link add hole0 type veth peer name hole1
link set hole1 up
link set hole0 up
address add 10.77.0.1/24 dev hole0
address add fd77::1/64 dev hole0 nodad
neigh add 10.77.0.2 lladdr 02:00:00:00:77:02 dev hole0 nud permanent
neigh add fd77::2 lladdr 02:00:00:00:77:02 dev hole0 nud permanent
"""
"""10.77.0.2 and fd77::2 are unassigned: packets to them are never answered."""


# --- the other end

_PORTS: set[int] = set()
"""Each is used by one test alone: tests that share a run find their rows by port."""


def _bound(ip: int, host: str) -> socket.socket:
    """Return a socket at a port that no other test has used."""
    while True:
        one = socket.socket(FAMILY[ip])
        one.bind((host, 0))
        port = one.getsockname()[1]
        if port not in _PORTS:
            _PORTS.add(port)
            return one
        one.close()


@attrs.define(eq=False)
class Listener:
    """A listening socket of the test's own process. The kernel answers SYNs by itself."""

    listening: socket.socket
    accepted: list[socket.socket] = attrs.field(factory=list)

    @classmethod
    def open(cls, ip: int = 4, host: str | None = None) -> Self:
        listening = _bound(ip, host or LOCAL[ip])
        listening.listen(128)
        listening.settimeout(patience())
        return cls(listening)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.listening.getsockname()[:2]
        return host, port

    @property
    def port(self) -> int:
        return self.address[1]

    def accept(self) -> socket.socket:
        peer, _ = self.listening.accept()
        peer.settimeout(patience())
        self.accepted.append(peer)
        return peer

    def close(self) -> None:
        for peer in self.accepted:
            peer.close()
        self.listening.close()


def only(*ports: int) -> tuple[str, str]:
    """Return the filter for connections of these ports: the same C for all, compiled once.

    A port alone is a constant in C. A list of more than four is a map, and no one uses the others.
    """
    return "--port", ",".join(map(str, [*(1, 2, 3, 4)[: 5 - len(ports)], *ports]))


def free_port(ip: int = 4) -> int:
    """Return a port without a listener."""
    with _bound(ip, LOCAL[ip]) as probe:
        return int(probe.getsockname()[1])


def read_exactly(peer: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        chunk = peer.recv(min(count - len(data), 1 << 18))
        assert chunk, f"the stream ended after {len(data)} of {count} bytes"
        data += chunk
    return bytes(data)


def read_to_end(peer: socket.socket) -> int:
    count = 0
    while chunk := peer.recv(1 << 18):
        count += len(chunk)
    return count


def burst(client: Puppet, server: Listener, times: int) -> int:
    """Connect and send single bytes, as fast as it goes; how many were taken."""
    client.connect(server)
    peer = server.accept()
    client.tell(f"""
for _ in range({times}):
    s.send(b"x")
""")
    count = len(read_exactly(peer, times))
    client.answer()
    return count


# --- tcplat


@attrs.frozen
class Outcome:
    """How a run of tcplat ended."""

    returncode: int
    stderr: str
    stdout: bytes
    rows: list[Row]
    losses: list[dict[str, Any]]
    report: dict[str, Any]

    def check(self) -> None:
        """Check what holds for every run: rows in order, balanced books, no traceback."""
        assert "Traceback" not in self.stderr
        times = [row["ts_ns"] for row in self.rows]
        late = sum(a > b for a, b in itertools.pairwise(times))
        assert late == 0, f"{late} of {len(times)} rows stand before an older one"
        assert self.report["late"] == 0
        assert self.report["delivered"] == len(self.rows)
        produced = delivered = dropped = 0
        for probe in self.report["probes"].values():
            for hook in probe["hooks"]:
                assert hook["unread"] >= 0, hook
                assert hook["produced"] == hook["delivered"] + hook["dropped"] + hook["unread"]
                produced += hook["produced"]
                delivered += hook["delivered"]
                dropped += hook["dropped"]
        assert delivered == self.report["delivered"]
        assert dropped == self.report["dropped"] >= sum(loss["count"] for loss in self.losses)
        check_mechanism(self.rows)

    def hook_total(self, key: str) -> int:
        """Sum of `produced`, `unread` ... over all hooks."""
        hooks = [hook for probe in self.report["probes"].values() for hook in probe["hooks"]]
        return sum(hook[key] for hook in hooks)


def check_mechanism(rows: Iterable[Row]) -> None:
    """Check that each row is of TCPLAT_ATTACH's mechanism, unless no function can observe it."""
    if ATTACH == "auto":
        return
    # The change to TCP_LISTEN is visible in one function alone, which is often inlined.
    others = [row for row in rows if row["state"] != "TCP_LISTEN" and row["attach"] != "xdp"]
    if ATTACH == "kprobe":
        # The tracepoint behind the function stands in where the kernel skipped the kprobe.
        ends = [row for row in others if row["point"] in ("state", "close")]
        stand_ins = [row for row in ends if row["attach"] == "tracepoint"]
        assert len(stand_ins) <= len(ends) / 2
        others = [row for row in others if row not in stand_ins]
    assert {row["attach"] for row in others} <= {ATTACH}


def parse(data: bytes) -> tuple[list[Row], list[dict[str, Any]], dict[str, Any]]:
    """Rows, losses and report of a JSONL capture; what stands after the last newline is not one.

    The lines of --sample are left out.
    """
    rows: list[Row] = []
    losses = []
    report: dict[str, Any] = {}
    for line in data.split(b"\n")[:-1]:
        value = json.loads(line)
        assert not report, "something follows the report"
        if "report" in value:
            report = value["report"]
        elif "lost" in value:
            losses.append(value["lost"])
        elif "sampled" not in value:
            rows.append(value)
    return rows, losses, report


@attrs.define(eq=False)
class Tcplat:
    """A running tcplat; `rows` in `path`."""

    process: subprocess.Popen[bytes]
    path: Path
    ready: Path
    errors: Path
    _seen: list[Row] = attrs.field(factory=list, init=False)
    _by_port: dict[int, list[Row]] = attrs.field(factory=dict, init=False)
    _offset: int = attrs.field(default=0, init=False)

    @classmethod
    def start(
        cls,
        folder: Path,
        *arguments: str,
        command: Sequence[str] = (),
        probes: Sequence[str] = ("tcp_client",),
        sinks: Sequence[str] | None = None,
        program: Sequence[str] = TCPLAT,
        attach: str = ATTACH,
        stdin: int | IO[bytes] | None = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = subprocess.DEVNULL,
        env: dict[str, str] | None = None,
    ) -> Self:
        """Start it, and do not wait.

        Args:
            folder: For its files.
            arguments: Of `tcplat run`, besides the ones that are always given.
            command: What comes after --.
            probes: What to observe, with options.
            sinks: Instead of JSON lines into a file.
            program: What runs it, with arguments of its own.
            attach: The mechanism.
            stdin: As for Popen.
            stdout: As for Popen.
            env: On top of the environment.
        """
        number = len(list(folder.glob("*.stderr")))
        path, ready = folder / f"{number}.jsonl", folder / f"{number}.ready"
        errors = folder / f"{number}.stderr"
        if sinks is None:
            sinks = (f"jsonl:path={path}",)
        plain = {k: v for k, v in os.environ.items() if k not in ("SUDO_UID", "SUDO_GID")}
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                [
                    # Under nohup(1) we ignore it, and a run would, too.
                    *("env", "--default-signal=HUP", *program),
                    "run",
                    *(word for probe in probes for word in ("--probe", probe)),
                    *("--attach", attach, "--ready-file", str(ready)),
                    *(word for sink in sinks for word in ("--sink", sink)),
                    *arguments,
                    *(("--", *command) if command else ()),
                ],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env={**plain, **(env or {})},
            )
        return cls(process, path, ready, errors)

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_ready(self) -> Self:
        """Wait until everything is attached."""

        def ready() -> bool:
            if self.ready.exists() and self.ready.stat().st_size:
                return True
            status = self.process.poll()
            assert status is None, f"it ended with {status}: {self.errors.read_text()}"
            return False

        eventually(ready, "tcplat was ready")
        return self

    def rows(self) -> list[Row]:
        """Return what it has written so far."""
        with self.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data.rpartition(b"\n")[0] + b"\n" if b"\n" in data else b""
        self._offset += len(whole)
        for row in parse(whole)[0]:
            self._seen.append(row)
            self._by_port.setdefault(row["dport"], []).append(row)
        return self._seen

    def rows_to(self, port: int) -> list[Row]:
        """Return the same for connections to this port."""
        self.rows()
        return self._by_port.get(port, [])

    def wait_for(self, what: str, found: Callable[[list[Row]], bool]) -> list[Row]:
        """Wait until the condition holds for its rows."""
        eventually(lambda: found(self.rows()), what)
        return self.rows()

    def stop(self, number: int = signal.SIGINT) -> Outcome:
        """Send it a signal; return its outcome."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self, seconds: float = 60) -> Outcome:
        """Wait for its end; return its outcome."""
        stdout = b""
        if self.process.stdout:
            stdout, _ = self.process.communicate(timeout=patience(seconds))
        else:
            self.process.wait(patience(seconds))
        data = self.path.read_bytes() if self.path.exists() else b""
        outcome = Outcome(self.process.returncode, self.errors.read_text(), stdout, *parse(data))
        if outcome.report:
            outcome.check()
        return outcome

    def kill(self) -> None:
        """Kill it if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()


CHANGED = """\
#!{python} -I
import sys
from tcplat_core.loader.attach import Loader
{change}
sys.argv[1:] = sys.argv[-2:]
import tcplat_core.loader.__main__
"""
SESSION = "import sys; sys.executable = sys.argv.pop(1); import tcplat_core.__main__ as m; m.main()"


def changed_loader(folder: Path, change: str) -> tuple[str, ...]:
    """Return the command for tcplat with `change` applied to the class Loader."""
    loader = folder / "loader"
    loader.write_text(CHANGED.format(python=sys.executable, change=change))
    loader.chmod(0o755)
    return (sys.executable, "-I", "-c", SESSION, str(loader))


@attrs.define(eq=False)
class Watched:
    """Processes that one tcplat traces for many tests: each looks at the rows of its own port.

    Starting tcplat is most of what a test costs, above all in a virtual machine.
    """

    client: Puppet
    stranded: Puppet
    """In a network where 10.77.0.2 and fd77::2 never answer."""
    run: Tcplat
    fence: Listener

    def to(self, port: int) -> Traffic:
        return Traffic(self, port)

    def settle(self) -> None:
        """Wait until all that happened before has been written: rows come in order of time."""
        before = len(at(self.run.rows_to(self.fence.port), "close"))
        self.client(f"socket.create_connection({self.fence.address!r}).close()")
        self.fence.accept().close()
        eventually(
            lambda: len(at(self.run.rows_to(self.fence.port), "close")) > before,
            "all rows were written",
        )


@attrs.frozen
class Traffic:
    """Rows of the connections of watched processes to one port."""

    watched: Watched
    port: int

    def wait_for(self, what: str, found: Callable[[list[Row]], bool]) -> list[Row]:
        """Wait until the condition holds for the rows."""
        eventually(lambda: found(self.watched.run.rows_to(self.port)), what)
        return list(self.watched.run.rows_to(self.port))

    def rows(self) -> list[Row]:
        """All rows of what has happened so far."""
        self.watched.settle()
        return list(self.watched.run.rows_to(self.port))


@attrs.frozen
class PidFile:
    """Where a command writes its pid first, so that it does not outlive a failing test."""

    path: Path

    def command(self, *words: str) -> list[str]:
        """Return the command with this prefix."""
        return ["sh", "-c", f'echo $$ > {self.path}; exec "$@"', "sh", *words]

    def pid(self) -> int:
        """Return the pid; 0 where the command has not begun."""
        text = self.path.read_text() if self.path.exists() else ""
        return int(text) if text.endswith("\n") else 0

    def alive(self) -> bool:
        return Path(f"/proc/{self.pid()}/stat").exists()

    def kill(self) -> None:
        if self.pid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid(), signal.SIGKILL)


# --- looking at rows


def of_port(rows: Iterable[Row], port: int) -> list[Row]:
    """Rows of connections to a port."""
    return [row for row in rows if row["dport"] == port]


def by_sock(rows: Iterable[Row]) -> dict[int, list[Row]]:
    """Rows of each socket."""
    socks: dict[int, list[Row]] = {}
    for row in rows:
        socks.setdefault(row["sock"], []).append(row)
    return socks


def at(rows: Iterable[Row], point: str) -> list[Row]:
    """Rows of a hook point."""
    return [row for row in rows if row["point"] == point]


def total(rows: Iterable[Row], point: str) -> int:
    """Bytes of a hook point."""
    return sum(row["bytes"] for row in at(rows, point))


def story(rows: Iterable[Row]) -> list[str]:
    """Return what happened, in short: the new state for a change of state, else the point."""
    return [
        row["state"].removeprefix("TCP_") if row["point"] == "state" else row["point"]
        for row in rows
    ]


def reached(state: str, count: int = 1) -> Callable[[list[Row]], bool]:
    """For wait_for(): so many changes to this state."""
    return lambda rows: story(rows).count(state) >= count


def gone(count: int = 1) -> Callable[[Iterable[Row]], bool]:
    """For wait_for(): so many sockets are closed."""
    return lambda rows: len(at(rows, "close")) >= count


def completes(row: Row) -> bool:
    """Whether a connect completes here."""
    change = (row["point"], row["old_state"], row["state"])
    return change == ("state", "TCP_SYN_SENT", "TCP_ESTABLISHED")


def assert_tiles(rows: Iterable[Row]) -> None:
    """Check that the send rows of a connection cover its stream without a gap."""
    expected = None
    for row in rows:
        if row["point"] == "send":
            assert expected in (None, row["seq"]), f"expected seq {expected}: {row}"
            expected = (row["seq"] + row["bytes"]) % 2**32
        elif row["point"] == "send_short":
            assert expected == (row["seq"] + row["bytes"]) % 2**32, row
            expected = row["seq"]


# --- the kernel


def programs_of(pid: int) -> list[int]:
    """Ids of the BPF programs that a process holds."""
    ids = []
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(OSError):
            words = info.read_text().split()
            if "prog_id:" in words:
                ids.append(int(words[words.index("prog_id:") + 1]))
    return ids


def tracepoints_of(pid: int) -> list[str]:
    """Name of the tracepoint of each link that a process holds (fdinfo, since 5.8)."""
    names = []
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(OSError):
            words = info.read_text().split()
            if "tp_name:" in words:
                names.append(words[words.index("tp_name:") + 1])
    return names


def loaded(ids: Iterable[int]) -> list[int]:
    """Which of these programs the kernel still has, in bpftool's words."""
    listed = subprocess.run(
        ["bpftool", "--json", "prog", "show"], check=True, capture_output=True
    ).stdout
    return sorted({program["id"] for program in json.loads(listed)} & set(ids))
