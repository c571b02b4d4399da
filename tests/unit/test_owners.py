"""Which process owns which socket: sockets made here, found through sock_diag and /proc."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tcplat_core.kernel import owners
from tcplat_core.kernel.owners import BOTH, CLIENT, IPV4, IPV6, LISTENER, SERVER, Seed

SO_COOKIE = 57

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: other processes' fds, and setns(2)"),
]

HERE = os.stat("/proc/self/ns/net").st_ino
COMM = Path("/proc/self/comm").read_bytes().rstrip(b"\n")


def cookie(sock: socket.socket) -> int:
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), sys.byteorder)


def found() -> dict[int, Seed]:
    return {seed.cookie: seed for seed in owners.find()}


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def connection(
    stack: ExitStack, family: socket.AddressFamily, host: str, to: str | None = None
) -> tuple[socket.socket, socket.socket, socket.socket]:
    """Yield a listener, an accepted and a connected socket."""
    listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind((host, 0))
    listener.listen()
    client = stack.enter_context(socket.create_connection((to or host, listener.getsockname()[1])))
    accepted = stack.enter_context(listener.accept()[0])
    return listener, accepted, client


@contextmanager
def child(code: str, *fds: int, command: tuple[str, ...] = ()) -> Iterator[tuple[int, str]]:
    """Start a Python in another process; yield its pid and first line. It ends with its stdin."""
    with subprocess.Popen(
        [*command, sys.executable, "-c", f"import sys\n{code}\nsys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=fds,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield process.pid, process.stdout.readline()


def mapped(host: str) -> bytes:
    if ":" in host:
        return socket.inet_pton(socket.AF_INET6, host)
    return bytes(10) + b"\xff\xff" + socket.inet_aton(host)


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
def test_each_end_is_found_with_its_role_and_owner(
    stack: ExitStack, family: socket.AddressFamily, host: str
) -> None:
    listener, accepted, client = connection(stack, family, host)
    seeds = found()
    port, client_port = listener.getsockname()[1], client.getsockname()[1]
    for sock, role, lport, rport in (
        (listener, LISTENER, port, 0),
        (accepted, SERVER, port, client_port),
        (client, CLIENT, client_port, port),
    ):
        seed = seeds[cookie(sock)]
        assert seed.role == role
        assert (seed.pid, seed.comm, seed.others) == (os.getpid(), COMM, ())
        assert (seed.lport, seed.rport, seed.netns) == (lport, rport, HERE)
        assert seed.local == mapped(host)
    assert seeds[cookie(client)].remote == mapped(host)


def test_dual_stack_socket_with_an_ipv4_peer_has_mapped_addresses(stack: ExitStack) -> None:
    listener, accepted, client = connection(stack, socket.AF_INET6, "::", "127.0.0.1")
    seeds = found()
    assert seeds[cookie(accepted)].local == seeds[cookie(client)].local == mapped("127.0.0.1")
    assert seeds[cookie(listener)].local == bytes(16)


def test_unconnected_socket_is_not_found(stack: ExitStack) -> None:
    """Neither bound nor connected: sock_diag does not list it."""
    sock = stack.enter_context(socket.socket())
    assert cookie(sock) not in found()


def test_closed_socket_is_not_found(stack: ExitStack) -> None:
    _, _, client = connection(stack, socket.AF_INET, "127.0.0.1")
    number = cookie(client)
    assert number in found()
    client.close()
    left = found().get(number)  # until the other end closes as well
    assert left is None or left.pid == 0


def test_udp_is_not_tcp(stack: ExitStack) -> None:
    sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sock.bind(("127.0.0.1", 0))
    assert cookie(sock) not in found()


def test_each_of_many_sockets_is_found_once(stack: ExitStack) -> None:
    """More than fit into one netlink message."""
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=512))
    clients = [
        stack.enter_context(socket.create_connection(listener.getsockname())) for _ in range(400)
    ]
    seeds = owners.find()
    ours = [seed.cookie for seed in seeds if seed.pid == os.getpid()]
    assert {cookie(client) for client in clients} <= set(ours)
    assert len(ours) == len(set(ours))


def test_unaccepted_connections_have_no_owner(stack: ExitStack) -> None:
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    client = stack.enter_context(socket.create_connection(listener.getsockname()))
    (waiting,) = [
        seed for seed in owners.find() if seed.rport == client.getsockname()[1] and seed.lport
    ]
    assert (waiting.role, waiting.pid, waiting.waiting) == (SERVER, 0, True)
    accepted = stack.enter_context(listener.accept()[0])
    assert cookie(accepted) == waiting.cookie
    taken = found()[waiting.cookie]
    assert (taken.pid, taken.waiting) == (os.getpid(), False)


def test_socket_held_by_two_processes_belongs_to_the_lowest_pid(stack: ExitStack) -> None:
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    with child("print(flush=True)", listener.fileno()) as (pid, _):
        seed = found()[cookie(listener)]
        assert seed.pid == min(os.getpid(), pid)
        assert [other for other, _ in seed.others] == [max(os.getpid(), pid)]
    assert not found()[cookie(listener)].others


LISTENS = f"""
import os, socket
listener = socket.create_server(("0.0.0.0", 0))
cookie = listener.getsockopt(socket.SOL_SOCKET, {SO_COOKIE}, 8)
netns = os.stat("/proc/self/ns/net").st_ino
print(int.from_bytes(cookie, sys.byteorder), netns, flush=True)
"""


@pytest.mark.skipif(not shutil.which("unshare"), reason="util-linux's unshare is not installed")
def test_a_socket_in_another_network_namespace_is_found() -> None:
    """The namespace belongs to the child alone, and goes with it even if this test fails."""
    with child(LISTENS, command=("unshare", "--net")) as (pid, said):
        number, netns = map(int, said.split())
        seed = found()[number]
        assert (seed.role, seed.pid, seed.netns) == (LISTENER, pid, netns)
        assert netns != HERE
        assert os.stat("/proc/self/ns/net").st_ino == HERE  # we are back
    assert number not in found()


def test_listener_in_another_namespace_makes_no_server(stack: ExitStack) -> None:
    """Each network namespace has ports of its own."""
    _, _, client = connection(stack, socket.AF_INET, "127.0.0.1")
    code = LISTENS.replace('"0.0.0.0", 0', f'"0.0.0.0", {client.getsockname()[1]}')
    with child(code, command=("unshare", "--net")):
        assert found()[cookie(client)].role == CLIENT


def test_process_that_ends_during_the_search_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    everyone = os.listdir

    def and_a_dead_one(path: str) -> list[str]:
        return [*everyone(path), "4194305"] if path == "/proc" else everyone(path)

    monkeypatch.setattr(os, "listdir", and_a_dead_one)
    assert isinstance(owners.find(), list)


def test_client_port_listened_on_at_another_address_stays_client(stack: ExitStack) -> None:
    elsewhere = stack.enter_context(socket.create_server(("127.0.0.2", 0)))
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    client = stack.enter_context(
        socket.create_connection(
            listener.getsockname(), source_address=("127.0.0.1", elsewhere.getsockname()[1])
        )
    )
    assert found()[cookie(client)].role == CLIENT


@pytest.mark.parametrize(
    ("family", "host", "v6only", "ip"),
    [
        (socket.AF_INET, "0.0.0.0", False, IPV4),
        (socket.AF_INET, "127.0.0.1", False, IPV4),
        (socket.AF_INET6, "::", True, IPV6),
        (socket.AF_INET6, "::", False, BOTH),
        (socket.AF_INET6, "::1", False, IPV6),
        (socket.AF_INET6, "::ffff:127.0.0.1", False, IPV4),
    ],
)
def test_listener_reports_its_ip_versions(
    stack: ExitStack,
    family: socket.AddressFamily,
    host: str,
    v6only: bool,  # noqa: FBT001 - a parameter of the test
    ip: int,
) -> None:
    listening = stack.enter_context(socket.socket(family))
    if family == socket.AF_INET6:
        listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
    listening.bind((host, 0))
    listening.listen()
    seed = found()[cookie(listening)]
    assert (seed.ip, seed.local, seed.device) == (ip, mapped(host), 0)


def test_listener_bound_to_a_device_reports_it(stack: ExitStack) -> None:
    listening = stack.enter_context(socket.socket())
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    assert found()[cookie(listening)].device == socket.if_nametoindex("lo")


def test_unidentified_sockets_and_namespaces_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owners, "lacking", lambda *names: list(names))
    assert owners.Hidden().sentences() == owners.Hidden(processes=3).sentences() == []
    fds, entered = owners.Hidden(processes=3, sockets=2, namespaces=1).sentences(mendable=True)
    assert "whose process is unknown: 2;" in fds
    assert fds.endswith("it needs CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH")
    assert entered.endswith("it needs CAP_SYS_ADMIN")


def test_access_denied_to_root_is_not_a_missing_capability(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(owners, "lacking", lambda *_: [])
    hidden = owners.Hidden(processes=1, sockets=1)
    assert hidden.sentences(mendable=True) == []
    assert hidden.sentences()[0].endswith("the host refuses it to root as well")


def test_unreadable_fds_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> list[int]:
        raise PermissionError

    monkeypatch.setattr(owners, "_held", refuse)
    hidden = owners.Hidden()
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.create_connection(listening.getsockname()) as client,
    ):
        peer, _ = listening.accept()
        port = listening.getsockname()[1]
        seeds = [seed for seed in owners.find(hidden) if seed.lport == port]
        peer.close()
        client.close()
    # They are accepted, whichever process holds them.
    assert {(seed.role, seed.pid, seed.waiting) for seed in seeds} == {
        (owners.LISTENER, 0, False),
        (owners.SERVER, 0, False),
    }
    assert hidden.processes > 0
    assert hidden.sockets >= 3


def test_ended_process_is_reported_as_ending() -> None:
    assert not owners.is_ending(os.getpid())
    process = subprocess.Popen(["true"])
    # A zombie, until it is waited for.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert owners.is_ending(process.pid)
    process.wait()
    assert owners.is_ending(process.pid)
