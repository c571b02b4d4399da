"""Some capabilities instead of root: what works with them, and how the rest is reported."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from .harness import Listener, Puppet, Tcplat, at, needs, of_port, reached
from .test_planted import install

pytestmark = pytest.mark.alone  # it counts the sockets of the whole host whose process is unknown

Start = Callable[..., Tcplat]

FEW = "+bpf,+perfmon,+net_admin"
MORE = f"{FEW},+sys_ptrace,+dac_read_search"
UID = "65533"


@pytest.fixture(scope="module")
def program() -> Iterator[Callable[[str], Sequence[str]]]:
    """Return a tcplat that another user can read, with these capabilities."""
    needs("setpriv", "/usr/bin/python3")
    root = Path(tempfile.mkdtemp(prefix="tcplat-capable-", dir="/tmp"))
    try:
        root.chmod(0o755)
        install(root / "venv", root / "venv/bin/python")

        def with_rights(rights: str) -> Sequence[str]:
            options = (f"--{kind}=-all,{rights}" for kind in ("inh-caps", "ambient-caps"))
            ids = (f"--reuid={UID}", f"--regid={UID}", "--clear-groups")
            # Other users cannot enter the folder that it is in.
            return ("env", "-C", "/", "setpriv", *ids, *options, str(root / "venv/bin/tcplat"))

        command = [*with_rights(FEW), "plugins", "list"]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("no other user can read this Python and its packages")
        yield with_rights
    finally:
        shutil.rmtree(root)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield a folder that the user can write to."""
    found = Path(tempfile.mkdtemp(prefix="tcplat-capable-", dir="/tmp"))
    shutil.chown(found, int(UID), int(UID))
    yield found
    shutil.rmtree(found)


@pytest.mark.parametrize("rights", [FEW, MORE])
def test_older_socket_of_root_is_traced_with_capabilities(
    rights: str,
    program: Callable[[str], Sequence[str]],
    folder: Path,
    client: Puppet,
    server: Listener,
) -> None:
    """A row of softirq, of a socket that root owns and its process does not use."""
    client.connect(server)
    peer = server.accept()
    run = Tcplat.start(folder, "--port", str(server.port), program=program(rights)).wait_ready()
    peer.close()
    run.wait_for("the peer's FIN was there", reached("CLOSE_WAIT"))
    outcome = run.stop()
    (row,) = of_port(outcome.rows, server.port)
    if rights == MORE:
        assert row["pid"] == client.pid
        # Not more: with other network namespaces on the host, it is said that they stay closed.
        assert "whose process is unknown" not in outcome.stderr
    else:
        assert row["pid"] is row["comm"] is None
        assert "TCP sockets older than the run whose process is unknown: " in outcome.stderr
        assert "it needs CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH" in outcome.stderr


@pytest.mark.parametrize("rights", [FEW, MORE])
def test_accept_is_traced_or_its_missing_capability_is_named(
    rights: str,
    program: Callable[[str], Sequence[str]],
    folder: Path,
    client: Puppet,
    server: Listener,
) -> None:
    """By tracepoint it needs tracefs, which root alone can enter."""
    run = Tcplat.start(
        folder, "--port", str(server.port), probes=("tcp_service",), program=program(rights)
    ).wait_ready()
    client.connect(server)
    server.accept().close()
    run.wait_for("it was over", reached("FIN_WAIT1"))
    outcome = run.stop()
    said = "it with sudo or CAP_DAC_READ_SEARCH" in outcome.stderr
    assert bool(at(outcome.rows, "accept")) is not said
    assert not (rights == MORE and said)


def test_doctor_names_the_missing_capabilities(
    program: Callable[[str], Sequence[str]],
    server: Listener,  # noqa: ARG001 - a socket of another user
) -> None:
    found = [
        subprocess.run(
            [*program(rights), "doctor"], check=False, capture_output=True, text=True
        ).stdout
        for rights in (FEW, MORE)
    ]
    assert "it needs CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH" in found[0]
    assert "it takes" not in found[1]
