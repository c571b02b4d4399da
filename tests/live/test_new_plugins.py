"""What `tcplat plugins new` writes, installed by pip into a fresh venv, sees real traffic."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from .harness import Listener, Puppet, Tcplat, patience, read_exactly
from .packages import Venv


@attrs.frozen
class UserVenv:
    """A venv with tcplat as a user installs it, without the tools of its developers."""

    venv: Venv

    def program(self, name: str) -> str:
        return self.venv.program(name)

    def run(self, program: str, *arguments: str) -> str:
        """Run one of its programs to its end; what it printed."""
        done = subprocess.run(
            [self.program(program), *arguments],
            cwd=self.venv.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=patience(300),
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def user_venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> UserVenv:
    venv = Venv.make(tmp_path_factory.mktemp("user"))
    venv.pip(wheel)
    user_venv = UserVenv(venv)
    for kind, name in (("probe", "demo1"), ("sink", "demo_2")):
        assert "8 files" in user_venv.run("tcplat", "plugins", "new", kind, name)
    venv.pip(venv.folder / "tcplat-demo1", venv.folder / "tcplat-demo-2")
    return user_venv


@pytest.fixture
def start(user_venv: UserVenv, start_tcplat: Callable[..., Tcplat]) -> Callable[..., Tcplat]:
    """Start the tcplat of this venv, and wait until it is attached."""

    def start(*arguments: str, **how: Any) -> Tcplat:
        how = {"probes": ("demo1",), "attach": "auto", **how}
        return start_tcplat(
            *arguments, program=(user_venv.program("tcplat"),), stdout=subprocess.PIPE, **how
        ).wait_ready()

    return start


def talk(client: Puppet, server: Listener, times: int) -> None:
    """Make connections one after the other; each carries a byte and the client closes it."""
    for _ in range(times):
        client.connect(server)
        peer = server.accept()
        client("s.send(b'x')")
        assert read_exactly(peer, 1) == b"x"
        client("s.close()")
        assert peer.recv(1) == b""
        peer.close()


def test_new_plugins_are_listed_and_described(user_venv: UserVenv) -> None:
    found = {
        one["name"]: one for one in json.loads(user_venv.run("tcplat", "plugins", "list", "--json"))
    }
    assert (found["demo1"]["distribution"], found["demo1"]["status"]) == ("tcplat-demo1", "ok")
    assert (found["demo_2"]["distribution"], found["demo_2"]["status"]) == ("tcplat-demo-2", "ok")
    shown = json.loads(user_venv.run("tcplat", "plugins", "show", "demo1", "--json"))
    assert shown["points"] == [
        {
            "point": "end",
            "optional": False,
            "takes": "tracepoint:tcp:tcp_destroy_sock",
            "perhaps": None,
            "why_not": None,
        }
    ]


@pytest.mark.parametrize("name", ["demo1", "demo_2"])
def test_new_plugins_conform(user_venv: UserVenv, name: str) -> None:
    (shown,) = json.loads(user_venv.run("tcplat", "plugins", "check", name, "--json"))
    assert shown["passed"] > 0
    assert [one for one in shown["checks"] if one["verdict"] == "failed"] == []


def test_new_probe_ends_after_five_rows(
    start: Callable[..., Tcplat], client: Puppet, server: Listener
) -> None:
    run = start("--count", "5", "-p", str(client.pid))
    talk(client, server, 5)
    outcome = run.wait()
    assert outcome.returncode == 0
    assert len(outcome.rows) == 5
    assert "tcplat: demo1: 5 rows, 0 lost (end 5)" in outcome.stderr
    for row in outcome.rows:
        assert (row["probe"], row["point"], row["desc"]) == ("demo1", "end", "connection over")
        assert (row["pid"], row["dport"], row["resent"]) == (client.pid, server.port, 0)
        assert 0 < row["srtt_us"] < 1_000_000


def test_new_probe_has_a_row_for_both_ends(
    start: Callable[..., Tcplat], client: Puppet, server: Listener
) -> None:
    run = start()
    talk(client, server, 3)
    rows = run.wait_for(
        "all have ended",
        lambda rows: sum(server.port in (row["sport"], row["dport"]) for row in rows) >= 6,
    )
    ours = [row for row in rows if server.port in (row["sport"], row["dport"])]
    assert sorted(row["dport"] == server.port for row in ours) == [False] * 3 + [True] * 3
    assert run.stop().returncode == 0


def test_new_probe_describes_a_reset(
    start: Callable[..., Tcplat], client: Puppet, server: Listener
) -> None:
    run = start("--count", "1", "-p", str(client.pid))
    client.connect(server)
    peer = server.accept()
    client("s.send(b'x')")
    peer.close()  # with a byte unread: that is a reset
    client("s.close()")
    (row,) = run.wait().rows
    assert row["desc"] == "ECONNRESET"


def test_option_of_the_new_probe_omits_fast_connections(
    start: Callable[..., Tcplat], client: Puppet, server: Listener
) -> None:
    run = start("-p", str(client.pid), probes=("demo1:min_srtt=10s", "tcp_client"))
    talk(client, server, 2)
    run.wait_for("both were closed", lambda rows: sum(row["point"] == "close" for row in rows) >= 2)
    outcome = run.stop()
    assert outcome.report["probes"]["demo1"]["delivered"] == 0
    assert {row["probe"] for row in outcome.rows} == {"tcp_client"}


def test_fields_of_the_new_probe_are_table_columns(
    start: Callable[..., Tcplat], client: Puppet, server: Listener
) -> None:
    run = start("--count", "1", "-p", str(client.pid), sinks=("table",))
    talk(client, server, 1)
    head, line = run.wait().stdout.decode().splitlines()
    assert head.split()[-4:] == [
        "TCP_DESCRIPTION",
        "SRTT(us)",
        "RESENT",
        "TCP_CONNECT_TIME(us)",
    ]
    srtt_us, resent = line.split()[-2:]
    assert int(srtt_us) > 0
    assert resent == "0"


def test_wrong_option_of_the_new_probe_is_refused_before_loading(user_venv: UserVenv) -> None:
    done = subprocess.run(
        [user_venv.program("tcplat"), "run", "--probe", "demo1:min_srtt=soon"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "tcplat: probe demo1: option min_srtt='soon': "
        "it is not a time; write 5, 500ms, 30s, 2m or 1h\n"
    )


def test_new_sink_sums_the_bytes_of_the_rows(
    start: Callable[..., Tcplat], client: Puppet, server: Listener, tmp_path: Path
) -> None:
    run = start(
        *("-p", str(client.pid)),
        probes=("tcp_client",),
        sinks=("demo_2:by=pid", f"jsonl:path={tmp_path / '0.jsonl'}"),
    )
    talk(client, server, 5)
    run.wait_for("all were closed", lambda rows: sum(row["point"] == "close" for row in rows) == 5)
    outcome = run.stop()
    head, line, _ = outcome.stdout.decode().splitlines()
    assert head.split() == ["ROWS", "SENT", "RECEIVED", "PID"]
    assert line.split() == [str(len(outcome.rows)), "5", "0", str(client.pid)]
