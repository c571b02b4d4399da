"""The command line: options, messages and exit codes."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import click
import msgspec
import pytest
from click.testing import CliRunner

from tcplat_core.cli.main import cli
from tcplat_core.cli.main import main as cli_main
from tcplat_core.cli.shared_options import _ports
from tcplat_core.cli.words import print_report
from tcplat_core.errors import UsageError
from tcplat_core.loader.filter import Filter
from tcplat_core.plugin.report import HookReport, ProbeReport, RunReport
from tcplat_core.registry.find import Plugins
from tcplat_core.run.loader_process import LoaderProcess
from tcplat_core.run.signals import NOTHING_RECORDED, NOTHING_REPLAYED, Signals
from tcplat_core.testing import FakeLoader, FakeProbe, make_event

ROOT = os.geteuid() == 0
UNPRIVILEGED = ("setpriv", "--bounding-set=-all") if ROOT else ()
"""The same user without any capability; root's files stay readable."""

PROGRAM = (sys.executable, "-I", "-m", "tcplat_core")
Tcplat = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def tcplat(tmp_path: Path) -> Tcplat:
    """Run the whole program in a process without capabilities."""
    if ROOT and not shutil.which("setpriv"):
        pytest.skip("util-linux's setpriv is not installed")

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*UNPRIVILEGED, *PROGRAM, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd=tmp_path,
            text=True,
            check=False,
            timeout=120,
        )

    return call


Capture = pytest.CaptureFixture[str]


def one_sentence(out: str, err: str) -> str:
    """Return the message of a usage error: nothing on stdout, one line on stderr."""
    assert out == ""
    assert re.fullmatch(r"tcplat: [^\n]+\n", err), err
    return err.removeprefix("tcplat: ").rstrip()


@pytest.fixture
def probe() -> Iterator[FakeProbe]:
    """Return the probe tcp_client, with handlers played by the test."""
    played = FakeProbe(Plugins.load().probe("tcp_client"))
    yield played
    played.close()


@pytest.fixture
def loader(probe: FakeProbe) -> FakeLoader:
    return FakeLoader([probe])


@pytest.fixture
def here(loader: FakeLoader, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the program in this process, on a fake kernel side; return its exit status."""
    monkeypatch.setattr(LoaderProcess, "start", lambda: loader)
    monkeypatch.setattr(Signals, "install", lambda _: None)

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["tcplat", *arguments])
        with pytest.raises(SystemExit) as end:
            cli_main()
        return cast("int", end.value.code)

    return call


# --- 2: usage


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("walk", "No such command 'walk'"),
        ("run", "Missing option '--probe'"),
        ("run --probe tcp_client:x", "'tcp_client:x': 'x' is not of the form key=value"),
        ("run --probe tcp_client:x=1", "probe tcp_client has no option 'x'"),
        ("run --probe tcp_client --sink table:hight=1", "sink table has no option 'hight'"),
        (
            "run --probe tcp_client --sink table:width=x",
            "option width='x': it must be a whole number",
        ),
        (
            "run --probe tcp_client --sink table:width=-1",
            "option width='-1': it must be a whole number from 0",
        ),
        ("run --probe tcp_client --probe tcp_client", "--probe tcp_client is given twice"),
        ("run --probe tcp_client --sink table --sink table", "--sink table is given twice"),
        (
            "run --probe tcp_client --sink jsonl --sink table",
            "two sinks write to standard output, and one of them a capture, which could not be",
        ),
        ("run --probe tcp_client --sink jsonl:path=no/where", "cannot write no/where: No such"),
        ("run --probe tcp_client --sink jsonl:path=/", "cannot write /: Is a directory"),
        (
            "run --probe xdp_port:iface=lo,port=1 --sink histogram",
            "--sink histogram: probe xdp_port has no histograms (of these: tcp_client, tcp",
        ),
        (
            "run --probe tcp_client --sink histogram --sink histogram:by=all",
            "one sink can have the kernel count, and histogram and histogram both want it",
        ),
        ("run --probe tcp_client --sink histogram -n 5", "--count needs a sink that takes rows"),
        ("run --probe tcp_client --sink histogram:by=x", "by='x': it must be one of process,"),
        ("run --probe tcp_client --sink histogram:every=1ms", "it must be a time of 100ms or more"),
        ("run --probe tcp_client --sink histogram:groups=5000", "a whole number from 1 to 4096"),
        ("run --probe tcp_client -p me", "-p 'me' is not a number"),
        ("run --probe tcp_client -p -1", "-p '-1' is not a number"),
        ("run --probe tcp_client -p ¹", "-p '¹' is not a number"),
        ("run --probe tcp_client -p 1,", "-p '' is not a number"),
        ("run --probe tcp_client -p 4194304", "there is no process 4194304"),
        ("run --probe tcp_client --comm sixteen_letters_", "the kernel keeps 15 bytes of a name"),
        ("run --probe tcp_client --comm=", "--comm must not be empty"),
        ("run --probe tcp_client --comm a*b", "* is allowed at the end only"),
        ("run --probe tcp_client --port 0", "port '0' is not a number from 1 to 65535"),
        (f"run --probe tcp_client --port {'9' * 5000}", "is not a number from 1 to 65535"),
        (f"run --probe tcp_client -p {'9' * 5000}", "is not a number from 1 to"),
        (f"run --probe tcp_client --netns {'9' * 5000}", "there is no network namespace"),
        (f"run --probe tcp_client --hold {'9' * 400}", "is not a time above 0; write 5"),
        (f"run --probe tcp_client --ring-size {'9' * 5000}", "is not a power of two"),
        (f"run --probe tcp_client --sink table:width={'9' * 5000}", "it must be a whole number"),
        (f"run --probe tcp_client --sink stages:every={'9' * 400}", "it is not a time"),
        ("run --probe tcp_client --lport 80,65536", "port '65536' is not a number"),
        ("run --probe tcp_client --rport http", "port 'http' is not a number"),
        (
            "run --probe tcp_client --addr 10.0.0.0/33",
            "--addr '10.0.0.0/33' is neither an address nor",
        ),
        ("run --probe tcp_client --addr localhost", "--addr 'localhost' is neither an address nor"),
        ("run --probe tcp_client --netns no-such", "there is no network namespace 'no-such'"),
        ("run --probe tcp_client --netns /dev/null", "'/dev/null' is not a network namespace"),
        ("run --probe tcp_client --cgroup /etc", "/etc is no folder below a cgroup2 mount"),
        ("run --probe tcp_client --attach uprobe", "Invalid value for '--attach'"),
        ("run --probe tcp_client --duration 0", "'0' is not a time above 0; write 5"),
        ("run --probe tcp_client --duration 5d", "'5d' is not a time"),
        ("run --probe tcp_client --count 0", "Invalid value for '-n' / '--count'"),
        ("run --probe tcp_client --ring-size 5000", "'5000' is not a power of two"),
        ("run --probe tcp_client --ring-size 2K", "'2K' is not a power of two from 4K to 1G"),
        ("run --probe tcp_client --ring-size 2G", "'2G' is not a power of two"),
        ("run --probe tcp_client --ring-size 0", "'0' is not a power of two"),
        ("run --probe tcp_client -- no-such-program", "there is no program 'no-such-program'"),
        ("plugins list --xml", "No such option"),
        ("plugins show tcp_client --kind hook", "Invalid value for '--kind'"),
        ("plugins new hook mine", "'hook' is not one of 'probe', 'sink'"),
        ("plugins new probe my-probe", "'my-probe' is not a valid name for a plugin"),
    ],
)
def test_usage_error_is_one_sentence_and_exit_code_2(
    here: Callable[..., int], capfd: Capture, arguments: str, said: str
) -> None:
    assert here(*arguments.split()) == 2
    assert said in one_sentence(*capfd.readouterr())


def test_pid_of_an_ended_process_is_refused(here: Callable[..., int], capfd: Capture) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert here("run", "--probe", "tcp_client", "-p", str(gone.pid)) == 2
    assert one_sentence(*capfd.readouterr()) == f"there is no process {gone.pid}"


def test_tcplat_without_a_command_prints_usage(tcplat: Tcplat) -> None:
    done = tcplat()
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Usage: tcplat" in done.stderr


# --- 3 and 4


def test_run_without_root_is_refused_with_exit_code_3(tcplat: Tcplat) -> None:
    done = tcplat("run", "--probe", "tcp_client", "--sink", "jsonl")
    said = one_sentence(done.stdout, done.stderr)
    # Root without capabilities, as in a container, has nothing to gain from sudo.
    remedy = (
        "needs CAP_BPF and CAP_PERFMON" if os.geteuid() == 0 else "needs root: run it with sudo"
    )
    assert said.startswith(f"loading BPF programs {remedy}")
    assert done.returncode == 3


def test_command_is_not_started_without_root(tcplat: Tcplat, tmp_path: Path) -> None:
    done = tcplat("run", "--probe", "tcp_client", "--", "touch", str(tmp_path / "mark"))
    assert done.returncode == 3
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--probe tcp_clinet", "there is no probe named 'tcp_clinet'; there is "),
        ("--probe tcp_client --sink tabel", "there is no sink named 'tabel'; there is "),
        ("--probe table", "there is no probe named 'table'"),
    ],
)
def test_unknown_plugin_is_named_with_exit_code_4(
    here: Callable[..., int], capfd: Capture, arguments: str, said: str
) -> None:
    assert here("run", *arguments.split()) == 4
    sentence = one_sentence(*capfd.readouterr())
    assert said in sentence
    assert sentence.endswith("(tcplat plugins list)")


def test_plugins_show_refuses_an_unknown_plugin(here: Callable[..., int], capfd: Capture) -> None:
    assert here("plugins", "show", "no_such") == 4
    assert "there is no plugin named 'no_such'; there is" in one_sentence(*capfd.readouterr())


def test_plugins_show_prints_json(here: Callable[..., int], capfd: Capture) -> None:
    assert here("plugins", "show", "xdp_port", "--json") == 0
    out, err = capfd.readouterr()
    assert err == ""
    shown = json.loads(out)
    assert shown["example"] == "sudo tcplat run --probe xdp_port:iface=eth0,port=80+443"
    assert [point["takes"] for point in shown["points"]] == ["xdp:xdp"]


@pytest.mark.parametrize(("probe", "exit_code"), [("no_such", 4), ("tcp_client:x=1", 2)])
def test_program_exits_with_the_code_of_its_error(
    tcplat: Tcplat, probe: str, exit_code: int
) -> None:
    done = tcplat("run", "--probe", probe)
    assert one_sentence(done.stdout, done.stderr)
    assert done.returncode == exit_code


# --- what needs nothing


def test_help_lists_every_option(here: Callable[..., int], capfd: Capture) -> None:
    assert here("run", "--help") == 0
    out, err = capfd.readouterr()
    assert err == ""
    command = cli.get_command(click.Context(cli), "run")
    assert command is not None
    for parameter in command.params:
        for option in parameter.opts:
            assert option in out or option == "command"


@pytest.mark.parametrize("asking", [("--help",), ("-h",), ("plugins", "--help")])
def test_help_exits_with_0(
    here: Callable[..., int], capfd: Capture, asking: tuple[str, ...]
) -> None:
    assert here(*asking) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert out.startswith("Usage: tcplat")


def test_version_is_printed(here: Callable[..., int], capfd: Capture) -> None:
    assert here("--version") == 0
    assert re.search(r"\b0\.\d+\.\d+\b", capfd.readouterr().out)


def test_plugins_are_listed_as_a_table(tcplat: Tcplat) -> None:
    done = tcplat("plugins", "list")
    assert (done.returncode, done.stderr) == (0, "")
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["NAME", "KIND", "VERSION", "DISTRIBUTION", "STATUS", "SUMMARY"]
    for line in lines:
        for word in ("KIND", "VERSION", "DISTRIBUTION", "STATUS", "SUMMARY"):
            at = head.index(word)
            assert line[at - 1] == " "
            assert line[at] != " "
    names = [line.split()[0] for line in lines]
    assert {"tcp_client", "table", "jsonl"} <= set(names)
    kinds = [line.split()[1] for line in lines]
    assert kinds == sorted(kinds)


def test_plugins_are_listed_as_json(here: Callable[..., int], capfd: Capture) -> None:
    assert here("plugins", "list", "--json") == 0
    out, err = capfd.readouterr()
    assert err == ""
    found = json.loads(out)
    assert all(
        list(one) == ["name", "kind", "version", "distribution", "status", "summary"]
        for one in found
    )
    (client,) = (one for one in found if one["name"] == "tcp_client")
    assert (client["kind"], client["distribution"], client["status"]) == ("probe", "tcplat", "ok")


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """Make a plugin that leaves a mark when imported, in a folder for PYTHONPATH."""
    folder = tmp_path / "planted"
    info = folder / "planted-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tcplat]\nplanted = planted\n")
    mark = tmp_path / "mark"
    (folder / "planted.py").write_text(f"open({str(mark)!r}, 'w').close()\n1 / 0")
    return folder


@pytest.mark.skipif(not ROOT, reason="only root is protected")
def test_root_imports_nothing_from_pythonpath(planted: Path) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "tcplat"), "plugins", "list"],
        env={**os.environ, "PYTHONPATH": str(planted)},
        cwd=planted,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "tcp_client" in done.stdout
    assert "planted" not in done.stdout
    assert not (planted.parent / "mark").exists()


def test_broken_plugin_is_listed_and_exit_code_stays_0(
    planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(planted))
    done = CliRunner().invoke(cli, ["plugins", "list"])
    assert done.exit_code == 0
    (line,) = (line for line in done.output.splitlines() if line.startswith("planted"))
    assert line.split()[1:5] == ["plugin", "1.0", "planted", "broken"]
    assert "ZeroDivisionError" in line


# --- a run


Run = Callable[..., int]


@pytest.fixture
def run(here: Callable[..., int]) -> Run:
    """``tcplat run --probe tcp_client``, and its exit code."""

    def call(*arguments: str) -> int:
        return here("run", "--probe", "tcp_client", "--ring-size", "64K", *arguments)

    return call


def test_rows_go_to_stdout_and_the_summary_to_stderr(
    run: Run, probe: FakeProbe, capfd: Capture
) -> None:
    probe.emit("tp_send", ts_ns=1000, pid=42, comm="curl")
    probe.emit("tp_close", ts_ns=2000, pid=42, comm="curl")
    assert run("--count", "2") == 0
    out, err = capfd.readouterr()
    head, *rows = out.splitlines()
    assert head.split()[:2] == ["PID", "COMM"]
    assert [row.split()[:2] for row in rows] == [["42", "curl"]] * 2
    assert err.startswith("tcplat: tcp_client: 2 rows, 0 lost (")
    assert "send 1" in err
    assert "close 1" in err
    assert len(err.splitlines()) == 1


def test_quiet_run_prints_nothing_on_stderr(run: Run, probe: FakeProbe, capfd: Capture) -> None:
    probe.emit("tp_send", ts_ns=1)
    assert run("--count", "1", "-q") == 0
    assert capfd.readouterr().err == ""


def test_jsonl_output_ends_with_the_report(run: Run, probe: FakeProbe, capfd: Capture) -> None:
    probe.emit("tp_send", ts_ns=1)
    assert run("--sink", "jsonl", "--count", "1") == 0
    row, report = map(json.loads, capfd.readouterr().out.splitlines())
    assert row["point"] == "send"
    assert report["report"]["delivered"] == 1


def test_one_run_feeds_several_sinks(
    run: Run, probe: FakeProbe, capfd: Capture, tmp_path: Path
) -> None:
    path = tmp_path / "out.jsonl"
    probe.emit("tp_send", ts_ns=1)
    assert run("--sink", "table", "--sink", f"jsonl:path={path}", "--count", "1") == 0
    assert len(path.read_text().splitlines()) == 2
    assert len(capfd.readouterr().out.splitlines()) == 2


def overflow(probe: FakeProbe) -> None:
    while probe.emit("tp_send", ts_ns=1):
        pass


def test_lost_events_are_reported_and_exit_code_stays_0(
    run: Run, probe: FakeProbe, capfd: Capture
) -> None:
    overflow(probe)
    assert run("--duration", "10ms") == 0
    err = capfd.readouterr().err
    assert " rows, 1 lost (" in err
    assert err.endswith("events were lost: a larger --ring-size keeps more of a burst\n")


@pytest.mark.parametrize(
    ("delivered", "dropped", "one_in", "advice"),
    [
        (500, 500, (1, 1), "50% of the events were lost: --sample 1/4 keeps all events of one"),
        (300, 700, (1, 1), "70% of the events were lost: --sample 1/8 keeps"),
        (970, 30, (8, 8), "3% of the events were lost: --sample 1/32 keeps"),
        (0, 9, (1, 1), "100% of the events were lost: --sample 1/32 keeps"),
    ],
)
def test_many_lost_events_are_reported_with_the_share_that_would_keep_whole_connections(
    delivered: int,
    dropped: int,
    one_in: tuple[int, int],
    advice: str,
    capfd: Capture,
) -> None:
    hook = HookReport("send", "f", "kprobe", delivered + dropped, dropped, delivered)
    probes = {"tcp_client": ProbeReport(hooks=(hook,))}
    report = RunReport(probes=probes, duration_s=1.0, one_in=one_in)
    print_report(report, dry_run=False, quiet=False)
    assert f"tcplat: {advice}" in capfd.readouterr().err


def test_fail_on_loss_exits_with_5_on_a_loss(run: Run, probe: FakeProbe, capfd: Capture) -> None:
    overflow(probe)
    assert run("--duration", "10ms", "--fail-on-loss") == 5
    assert capfd.readouterr().err.endswith(
        "tcplat: 1 events were lost; a larger --ring-size may help\n"
    )


def test_fail_on_loss_exits_with_0_without_a_loss(run: Run, probe: FakeProbe) -> None:
    probe.emit("tp_send", ts_ns=1)
    assert run("--count", "1", "--fail-on-loss") == 0


def test_run_exits_with_the_commands_status(run: Run, loader: FakeLoader) -> None:
    assert run("--", "sh", "-c", "exit 42") == 42
    assert loader.requests[0].follow


def test_status_of_a_command_ended_by_the_run_is_ignored(run: Run, probe: FakeProbe) -> None:
    probe.emit("tp_send", ts_ns=1)
    assert run("--count", "1", "--", "sleep", "60") == 0


def test_both_ip_versions_together_filter_nothing(run: Run, loader: FakeLoader) -> None:
    run("-4", "-6", "-d", "10ms", "-q")
    run("-6", "-d", "10ms", "-q")
    assert [request.filter.ip for request in loader.requests] == [0, 6]


def whole(*arguments: str, stdout: int = subprocess.PIPE, files: str = "") -> tuple[int, str, str]:
    """Run the whole program with a limit of open files; return exit status, stdout, stderr."""
    ended = subprocess.run(
        ["sh", "-c", 'test -z "$0" || ulimit -n "$0"; exec "$@"', files, *PROGRAM, *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return ended.returncode, ended.stdout or "", ended.stderr


@pytest.mark.parametrize("arguments", [("plugins", "list"), ("--help",), ("run", "--help")])
def test_every_command_reports_a_full_disk_in_one_sentence(arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("wb") as full:
        status, _, err = whole(*arguments, stdout=full.fileno())
    assert status == 1
    assert err == "tcplat: writing failed: No space left on device\n"


@pytest.mark.parametrize("arguments", [("plugins", "list"), ("--help",)])
def test_every_command_exits_with_0_when_its_reader_has_gone(arguments: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as gone:
        status, _, err = whole(*arguments, stdout=gone.fileno())
    assert (status, err) == (0, "")


def test_too_many_open_files_are_reported_in_one_sentence() -> None:
    status, out, err = whole("run", "--probe", "tcp_client", "--", "true", files="7")
    assert status == 1
    assert one_sentence(out, err) == "too many open files: raise the limit (ulimit -n)"


FILTER = """
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
call, number = int(sys.argv[1]), getattr(errno, sys.argv[2])
class Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_char_p)]
import struct
code = b"".join(struct.pack("HBBI", *one) for one in (
    (0x20, 0, 0, 0), (0x15, 0, 1, call), (0x06, 0, 0, 0x50000 | number), (0x06, 0, 0, 0x7FFF0000),
))
NO_NEW_PRIVS, SECCOMP, FILTER = 38, 22, 2
assert not libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0)
assert not libc.prctl(SECCOMP, FILTER, ctypes.byref(Program(4, code)))
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Run a program whose system call is refused, as by the seccomp filter of a container."""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are those of x86-64")
@pytest.mark.parametrize("error", ["EPERM", "ENOSYS"])
@pytest.mark.parametrize(
    ("call", "number"),
    [("memfd_create", 319), ("socketpair", 53), ("capset", 126), ("capget", 125)],
)
def test_system_call_refused_by_seccomp_is_named(call: str, number: int, error: str) -> None:
    if call == "capset" and not ROOT:
        pytest.skip("without rights there are none to give up")
    done = subprocess.run(
        [
            *(sys.executable, "-I", "-c", FILTER, str(number), error),
            *(*PROGRAM, "run", "--probe", "tcp_client", "--dry-run"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    sentence = one_sentence(done.stdout, done.stderr)
    assert sentence.startswith(f"{call}() is refused here (")
    assert "seccomp" in sentence
    assert done.returncode == 3


@pytest.mark.parametrize("more", [(), ("-q",), ("--dry-run",)])
def test_run_stopped_before_its_start_reports_that_nothing_was_recorded(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: Capture, more: tuple[str, ...]
) -> None:
    monkeypatch.setattr(Signals, "stopping", lambda _: True)
    monkeypatch.setattr(FakeLoader, "ask", lambda *_: None)
    assert run(*more) == 0
    said = "" if "-q" in more else f"tcplat: {NOTHING_RECORDED}\n"
    assert capfd.readouterr() == ("", said)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ("run --probe tcp_client", 0, NOTHING_RECORDED),
        ("run --probe tcp_client -q", 0, ""),
        ("run --probe tcp_client -- x -q", 0, NOTHING_RECORDED),
        ("replay x", 0, NOTHING_REPLAYED),
        ("doctor", 130, ""),
    ],
)
def test_ctrl_c_during_startup_is_one_sentence(
    here: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: Capture,
    arguments: str,
    status: int,
    said: str,
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "invoke", interrupted)
    assert here(*arguments.split()) == status
    assert capfd.readouterr().err.strip() == (f"tcplat: {said}" if said else "")


@pytest.mark.parametrize("module", ["tcplat_core.run.privileges", "tcplat_core.cli.main"])
def test_ctrl_c_during_imports_prints_no_traceback(tmp_path: Path, module: str) -> None:
    """Before main() it ends the process; after that it is the end of a run."""
    source = Path(__file__).parents[2] / "bin" / "tcplat-start"
    start = tmp_path / "start"
    finder = f"""
import os, sys
class Interrupts:
    def find_spec(self, name, *_):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), 2)
"""
    # First of all comes what the script does with the signal.
    head, imports, rest = source.read_text(encoding="utf-8").partition("try:\n")
    assert imports
    start.write_text(f"{head}{finder}sys.meta_path.insert(0, Interrupts())\n{imports}{rest}")
    done = subprocess.run(
        [sys.executable, "-I", str(start), "run", "--probe", "tcp_client"],
        capture_output=True,
        text=True,
        check=False,
    )
    if module == "tcplat_core.cli.main":
        assert (done.returncode, done.stderr) == (0, f"tcplat: {NOTHING_RECORDED}\n")
    else:
        assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_run_under_nohup_outlives_its_terminal() -> None:
    """Ignored signals stay ignored. In a process of its own: signals are process-wide."""
    text = """
import signal
from tcplat_core.run.signals import Signals
signal.signal(signal.SIGHUP, signal.SIG_IGN)
signals = Signals()
signals.install()
signal.raise_signal(signal.SIGHUP)
assert not signals.stopping()
signal.raise_signal(signal.SIGTERM)
assert signals.stopping()
"""
    subprocess.run([sys.executable, "-c", text], check=True)


def test_port_lists_accept_commas_and_plus_signs() -> None:
    assert _ports(["80+443", "8080,8081"]) == (80, 443, 8080, 8081)
    for text in ("80+", "+80", "80++443"):
        with pytest.raises(UsageError, match="port '' is not a number"):
            _ports([text])


def test_options_behind_two_dashes_belong_to_the_command(run: Run, capfd: Capture) -> None:
    assert run("-q", "--", "echo", "--count", "-p", "x") == 0
    assert "--count -p x\n" in capfd.readouterr().out


def test_failing_sink_is_reported_and_the_others_continue(
    run: Run, probe: FakeProbe, capfd: Capture
) -> None:
    probe.emit("tp_send", ts_ns=1)
    assert run("--sink", "table", "--sink", "jsonl:path=/dev/full", "--count", "1") == 1
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 2
    assert (
        "tcplat: sink jsonl:path=/dev/full was switched off: "
        "writing failed: No space left on device\n"
    ) in err


def test_run_with_no_sink_left_fails(run: Run, probe: FakeProbe, capfd: Capture) -> None:
    probe.emit("tp_send", ts_ns=1)
    assert run("--sink", "jsonl:path=/dev/full") == 1
    assert "No space left on device" in capfd.readouterr().err


def test_run_exits_with_0_when_its_reader_goes_away(
    run: Run, probe: FakeProbe, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()
    os.close(read)
    probe.emit("tp_send", ts_ns=1)
    with os.fdopen(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert run("-q") == 0


def test_loader_receives_the_users_options(run: Run, loader: FakeLoader) -> None:
    run("--attach", "kprobe", "-p", f"{os.getpid()},{os.getppid()}", "-d", "10ms", "-q")
    (request,) = loader.requests
    assert [probe.name for probe in request.probes] == ["tcp_client"]
    assert request.attach == "kprobe"
    assert request.filter == Filter(pids=(os.getpid(), os.getppid()))
    assert request.ring_bytes == 1 << 16
    assert not request.follow


def test_run_without_filters_requests_everything(run: Run, loader: FakeLoader) -> None:
    run("-d", "10ms", "-q")
    assert loader.requests[0].filter == Filter()
    assert loader.requests[0].attach == "auto"


BAD_SINK = """
import sys
from tcplat_core import Option, ReaderGoneError, SinkSpec, hookimpl

class Sink:
    def __init__(self, how): self.how = how
    def lost(self, loss): pass
    def write(self, batch):
        if self.how == "exit": sys.exit(0)
        if self.how == "clear": batch.clear()
    def close(self, report):
        if self.how == "close": sys.exit(0)

def make(options, run):
    how = options["how"]
    if how == "factory": sys.exit(0)
    if how == "gone": raise ReaderGoneError
    return 42 if how == "number" else Sink(how)

def read(text):
    if text == "option": raise GeneratorExit
    return text

@hookimpl
def tcplat_register_sinks():
    yield SinkSpec(name="bad", summary="b", factory=make,
                   options=(Option(name="how", help="h", convert=read, default=""),))
"""


@pytest.fixture
def bad_sink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Installs a sink `bad`, as pip would."""
    (tmp_path / "badsink.py").write_text(BAD_SINK, encoding="utf-8")
    info = tmp_path / "badsink-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: badsink\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[tcplat]\nbad = badsink\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("badsink", None)


SWITCHED_OFF = [
    ("exit", "SystemExit: 0"),
    ("clear", r"'\w+' object has no attribute 'clear'"),
    ("close", "SystemExit: 0"),
]


@pytest.mark.usefixtures("bad_sink")
@pytest.mark.parametrize(("how", "said"), SWITCHED_OFF)
def test_failing_sink_costs_other_sinks_no_rows(
    run: Run, probe: FakeProbe, capfd: Capture, how: str, said: str
) -> None:
    probe.emit("tp_send", ts_ns=1)
    assert run("--sink", f"bad:how={how}", "--sink", "jsonl", "--count", "1") == 1
    out, err = capfd.readouterr()
    row, report = map(json.loads, out.splitlines())
    assert row["point"] == "send"
    assert report["report"]["delivered"] == 1
    assert re.search(f"tcplat: sink bad:how={how} was switched off: {said}\n", err)


@pytest.mark.usefixtures("bad_sink")
@pytest.mark.parametrize(("how", "said"), SWITCHED_OFF)
def test_failing_sink_costs_other_sinks_no_rows_in_a_replay(
    here: Callable[..., int], tmp_path: Path, capfd: Capture, how: str, said: str
) -> None:
    capture = tmp_path / "capture.jsonl"
    capture.write_bytes(msgspec.json.encode(make_event(point="send")) + b"\n")
    assert here("replay", str(capture), "--sink", f"bad:how={how}", "--sink", "jsonl") == 1
    out, err = capfd.readouterr()
    row, report = map(json.loads, out.splitlines())
    assert row["point"] == "send"
    assert report["report"]["delivered"] == 1
    assert re.search(f"tcplat: sink bad:how={how} was switched off: {said}\n", err)


@pytest.mark.usefixtures("bad_sink")
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("factory", "sink bad: its factory failed: SystemExit: 0"),
        ("number", "sink bad: its factory returned no sink: int has no write()"),
        ("option", "sink bad: reading its option how failed: GeneratorExit"),
    ],
)
def test_sink_that_cannot_be_created_is_a_broken_plugin(
    run: Run, here: Callable[..., int], tmp_path: Path, capfd: Capture, how: str, said: str
) -> None:
    (tmp_path / "capture.jsonl").write_bytes(b"")
    assert run("--sink", f"bad:how={how}") == 4
    assert one_sentence(*capfd.readouterr()) == said
    assert here("replay", str(tmp_path / "capture.jsonl"), "--sink", f"bad:how={how}") == 4
    assert one_sentence(*capfd.readouterr()) == said


@pytest.mark.usefixtures("bad_sink")
def test_reader_gone_before_the_run_ends_it_cleanly(
    run: Run, here: Callable[..., int], probe: FakeProbe, tmp_path: Path, capfd: Capture
) -> None:
    probe.emit("tp_send", ts_ns=1)
    assert run("--sink", "bad:how=gone", "--sink", "jsonl", "-q") == 0
    out, err = capfd.readouterr()
    assert list(json.loads(out)) == ["v", "report"]
    assert err == ""
    capture = tmp_path / "capture.jsonl"
    capture.write_bytes(msgspec.json.encode(make_event(point="send")) + b"\n")
    assert here("replay", str(capture), "--sink", "bad:how=gone", "-q") == 0
    assert capfd.readouterr() == ("", "")


def test_unexpected_exception_is_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only errors that a user can cause are one sentence."""

    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(LoaderProcess, "start", broken)
    with pytest.raises(ZeroDivisionError):
        run()
