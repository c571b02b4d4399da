"""The accepting side: from the packet to the process that reads it, and the owner of each row."""

from __future__ import annotations

import platform
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.long import LONG

from .harness import (
    ATTACH,
    SLOW,
    Listener,
    Outcome,
    Puppet,
    Row,
    Tcplat,
    at,
    by_sock,
    check_mechanism,
    eventually,
    free_port,
    listen,
    needs,
    only,
    patience,
    total,
    tracepoints_of,
)
from .witness import by_direction, packet, tcpdump

SERVICE = ("--probe", "tcp_service")
MESSAGE = 3000


@pytest.fixture
def service(puppet: Callable[..., Puppet]) -> Puppet:
    """Return the process behind the service."""
    return puppet()


def address(port: int, ip: int = 4) -> tuple[str, int]:
    return ("127.0.0.1" if ip == 4 else "::1"), port


def exchange(client: Puppet, service: Puppet, port: int, ip: int = 4) -> None:
    """One connection, one message of 3,000 bytes there and back, closed by the client."""
    client(f"s = socket.create_connection({address(port, ip)!r})")
    service("peer, _ = listening.accept()")
    client(f"s.sendall(bytes({MESSAGE}))")
    service(f"data = peer.recv({MESSAGE}, socket.MSG_WAITALL); peer.sendall(data)")
    client(f"len(s.recv({MESSAGE}, socket.MSG_WAITALL)), s.close()")
    service("len(peer.recv(1)), peer.close()")


def comm_of(puppet: Puppet) -> str:
    return Path(f"/proc/{puppet.pid}/comm").read_text().strip()


def of_service(rows: list[Row], port: int) -> list[Row]:
    """Return what tcp_service saw of a port, on either side of the addresses."""
    ours = [row for row in rows if row["probe"] == "tcp_service"]
    return [row for row in ours if port in (row["sport"], row["dport"])]


def gone(port: int, times: int = 1) -> Callable[[list[Row]], bool]:
    return lambda rows: len(at(of_service(rows, port), "close")) >= times


@pytest.mark.parametrize("ip", [4, 6])
def test_message_has_packet_segment_wake_up_and_read_rows(
    ip: int, running_tcplat: Callable[..., Tcplat], client: Puppet, service: Puppet
) -> None:
    port = listen(service, ip)
    run = running_tcplat(*SERVICE)
    exchange(client, service, port, ip)
    run.wait_for("the connection was gone", gone(port))
    outcome = run.stop()
    rows = of_service(outcome.rows, port)
    assert {row["ip"] for row in rows} == {ip}
    assert {row["pid"] for row in rows} == {service.pid}
    assert all(row["saddr"] and row["daddr"] for row in rows)

    # From the first byte on: the packet, the segment at its socket, the wake-up, the read.
    sent = next(
        row
        for row in at(outcome.rows, "send")
        if row["probe"] == "tcp_client" and row["dport"] == port
    )
    first = {
        point: next(
            row
            for row in at(rows, point)
            if row["seq"] == sent["seq"] and row["bytes"] and row["ts_ns"] > sent["ts_ns"]
        )
        for point in ("rx_ip", "rx_tcp", "ready", "recv")
    }
    times = [row["ts_ns"] for row in (sent, *first.values())]
    assert times == sorted(times)
    assert first["rx_ip"]["bytes"] == first["rx_tcp"]["bytes"] == MESSAGE
    assert first["rx_ip"]["flags"] == first["rx_tcp"]["flags"] == "PSH|ACK"
    # A packet's addresses are as in its header, a socket's begin with its own.
    assert first["rx_ip"]["dport"] == first["recv"]["sport"] == port
    assert first["rx_ip"]["sport"] == first["recv"]["dport"] == sent["sport"]

    assert total(rows, "recv") == total(rows, "send") == MESSAGE
    assert at(rows, "recv")[-1]["bytes"] == 0
    assert len(at(rows, "accept")) == 1
    # By function the listener's handling of the SYN has a row, too.
    own = [row for row in rows if row["point"] not in ("rx_ip", "rx_tcp")]
    assert len({row["sock"] for row in own if row["state"] != "TCP_LISTEN"}) == 1


def test_each_packet_to_the_service_is_a_row(
    running_tcplat: Callable[..., Tcplat], client: Puppet, service: Puppet
) -> None:
    port = listen(service)
    run = running_tcplat(*SERVICE)
    exchange(client, service, port)
    run.wait_for("the connection was gone", gone(port))
    packets = at(of_service(run.stop().rows, port), "rx_ip")
    assert packets[0]["flags"] == "SYN"
    assert {row["dport"] for row in packets} == {port}
    assert sum(row["bytes"] for row in packets) == MESSAGE
    assert sum("FIN" in row["flags"] for row in packets) == 1


def test_data_on_the_last_handshake_packet_reach_the_socket(
    running_tcplat: Callable[..., Tcplat], client: Puppet, service: Puppet
) -> None:
    port = listen(service)
    run = running_tcplat(*SERVICE)
    client("s = socket.socket(); s.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)")
    client(f"s.connect({address(port)!r}); s.sendall(bytes({MESSAGE}))")
    service(f"peer, _ = listening.accept(); len(peer.recv({MESSAGE}, socket.MSG_WAITALL))")
    client("s.close()")
    service("peer.close()")
    run.wait_for("the connection was gone", gone(port))
    rows = of_service(run.stop().rows, port)
    packets = at(rows, "rx_ip")
    # The handshake's ACK was delayed until there were data.
    assert [row["bytes"] for row in packets][:2] == [0, MESSAGE]
    if {row["attach"] for row in rows} == {"tracepoint"}:
        pytest.skip("by tracepoint only segments of established connections are seen")
    (segment,) = [row for row in at(rows, "rx_tcp") if row["bytes"]]
    assert (segment["seq"], segment["bytes"]) == (packets[1]["seq"], MESSAGE)
    assert (segment["sport"], segment["dport"]) == (port, packets[1]["sport"])


def test_accept_row_has_the_time_waited(
    running_tcplat: Callable[..., Tcplat], client: Puppet, service: Puppet
) -> None:
    port = listen(service)
    run = running_tcplat(*SERVICE)
    before = client(f"""
before = time.monotonic_ns()
s = socket.create_connection({address(port)!r})
before
""")
    waiting, accepting, accepted = service("""
select.select([listening], [], [])
waiting = time.monotonic_ns()
while time.monotonic_ns() - waiting < 50_000_000: pass
accepting = time.monotonic_ns()
peer, _ = listening.accept()
waiting, accepting, time.monotonic_ns()
""")
    run.wait_for("it was accepted", lambda rows: bool(at(of_service(rows, port), "accept")))
    (row,) = at(of_service(run.stop().rows, port), "accept")
    # At least since it was seen to wait, at most from before it was connected to after accept.
    assert accepting - waiting <= row["accept_us"] * 1000 <= accepted - before


# accept4(2) as a 32-bit program calls it: ebx, ecx, edx and esi are its arguments.
COMPAT_ACCEPT = """
import ctypes
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes.fromhex("5389fb31c931d231f6b86c010000cd805bc3"))
_accept = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(
    ctypes.addressof(ctypes.c_char.from_buffer(code))
)
def compat_accept():
    fd = _accept(listening.fileno())
    assert fd >= 0, os.strerror(-fd)
    return socket.socket(fileno=fd)
"""
needs_compat = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="calls the kernel as a 32-bit program of x86 does"
)


USES = {
    "recv": "peer.recv(1)",
    "splice": "r, w = os.pipe(); os.splice(peer.fileno(), w, 1)",
    "send": "peer.sendall(b'y')",
    "close": "peer.shutdown(socket.SHUT_WR)",
}


def accepts_of(outcome: Outcome) -> int:
    """How many accept rows the books have: of a run that leaves out all other ports."""
    hooks = [hook for probe in outcome.report["probes"].values() for hook in probe["hooks"]]
    return sum(hook["delivered"] for hook in hooks if hook["point"] == "accept")


def seen(row: Row) -> tuple[str, bool]:
    """How a row says that a connection was accepted, and whether it says after which time."""
    return row["desc"], row["accept_us"] is not None


def of_accept(row: Row) -> None:
    """By function the call itself is seen; a tracepoint is not there for such a one."""
    by_call = row["attach"] != "tracepoint"
    assert seen(row) == (("accepted", True) if by_call else ("accept not seen", False))


@needs_compat
@pytest.mark.parametrize("use", ["recv", "send", "close"])
def test_unseen_accept_is_reported_at_the_first_use(
    use: str, running_tcplat: Callable[..., Tcplat], client: Puppet, service: Puppet
) -> None:
    port = listen(service)
    service(COMPAT_ACCEPT)
    run = running_tcplat(*SERVICE, *only(port))
    client(f"s = socket.create_connection({address(port)!r}); s.sendall(b'x')")
    service("peer = compat_accept()")
    run.wait_for("the reader was woken", lambda rows: bool(at(of_service(rows, port), "ready")))
    service(f"{USES[use]}; {USES['send' if use == 'recv' else 'recv']}")
    client("s.close()")
    service("peer.close()")
    run.wait_for("the connection was gone", gone(port))
    outcome = run.stop()
    rows = of_service(outcome.rows, port)
    (accept,) = at(rows, "accept")
    of_accept(accept)
    assert (accept["pid"], accept["comm"]) == (service.pid, comm_of(service))
    own = [row for row in rows if row["sock"] == accept["sock"]]
    used = own[own.index(accept) + 1]
    if accept["attach"] == "tracepoint":
        assert (used["point"], used["func"]) == ("state" if use == "close" else use, accept["func"])
    assert accepts_of(outcome) == 1


@pytest.mark.parametrize("use", USES)
def test_accept_that_waited_when_the_run_began_has_one_row(
    use: str, running_tcplat: Callable[..., Tcplat], client: Puppet, service: Puppet
) -> None:
    """By function its return is not seen, and the row is made at the first use."""
    port = listen(service)
    service.tell("peer, _ = listening.accept()")
    waits_in = Path(f"/proc/{service.pid}/wchan")
    eventually(lambda: waits_in.read_text().startswith("inet_csk"), "it waited in accept()")
    run = running_tcplat(*SERVICE, *only(port))
    client(f"one = socket.create_connection({address(port)!r}); one.sendall(b'xy')")
    service.answer()
    run.wait_for("the reader was woken", lambda rows: bool(at(of_service(rows, port), "ready")))
    service(f"{USES[use]}; peer.recv(1)")
    client(f"two = socket.create_connection({address(port)!r})")
    service("second, _ = listening.accept(); second.sendall(b'y')")
    client("one.close(), two.close()")
    service("peer.close(), second.close()")
    run.wait_for("both were gone", gone(port, 2))
    outcome = run.stop()
    rows = of_service(outcome.rows, port)
    waited, younger = at(rows, "accept")
    assert seen(younger) == ("accepted", True)
    assert {row["pid"] for row in (waited, younger)} == {service.pid}
    assert accepts_of(outcome) == 2
    if younger["attach"] == "tracepoint":
        assert seen(waited) == ("accepted", True)
        return
    assert seen(waited) == ("accept not seen", False)
    own = [row for row in rows if row["sock"] == waited["sock"]]
    used = own[own.index(waited) + 1]
    assert used["point"] == {"splice": "recv", "close": "state"}.get(use, use)
    assert (used["func"], used["attach"]) == (waited["func"], waited["attach"])


@needs_compat
def test_unseen_accept_is_reported_once_for_two_threads(
    running_tcplat: Callable[..., Tcplat], client: Puppet, service: Puppet
) -> None:
    port, connections = listen(service), 50
    service(COMPAT_ACCEPT)
    run = running_tcplat(*SERVICE)
    client(f"""
all = [socket.create_connection({address(port)!r}) for _ in range({connections})]
for s in all: s.sendall(b"xy")
""")
    service(f"""
peers = [compat_accept() for _ in range({connections})]
barrier = threading.Barrier(2)
def read():
    for peer in peers:
        barrier.wait()
        peer.recv(1)
threads = [threading.Thread(target=read) for _ in range(2)]
for one in threads: one.start()
for one in threads: one.join()
for peer in peers: peer.close()
""")
    client("for s in all: s.close()")
    run.wait_for("all were gone", gone(port, connections))
    rows = of_service(run.stop().rows, port)
    accepts = at(rows, "accept")
    for accept in accepts:
        of_accept(accept)
    assert Counter(row["sock"] for row in accepts) == dict.fromkeys(
        {row["sock"] for row in at(rows, "recv")}, 1
    )
    assert len(accepts) == connections


@needs_compat
def test_older_connection_has_no_late_accept(
    running_tcplat: Callable[..., Tcplat], client: Puppet, service: Puppet
) -> None:
    port = listen(service)
    service(COMPAT_ACCEPT)
    client(f"one, two = (socket.create_connection({address(port)!r}) for _ in range(2))")
    service("first = compat_accept()")
    run = running_tcplat(*SERVICE)
    service("second = compat_accept()")
    client("one.sendall(b'x'), two.sendall(b'x')")
    service("first.recv(1), second.recv(1), first.close(), second.close()")
    client("one.close(), two.close()")
    run.wait_for("both were gone", gone(port, 2))
    accepts = at(of_service(run.stop().rows, port), "accept")
    # By function that of the second is seen.
    assert [row["attach"] == "tracepoint" for row in accepts] == [False] * len(accepts)
    assert len(accepts) <= 1


def test_unaccepted_connection_has_no_accept_row(
    running_tcplat: Callable[..., Tcplat], client: Puppet, service: Puppet
) -> None:
    port = listen(service)
    run = running_tcplat(*SERVICE)
    client(f"s = socket.create_connection({address(port)!r}); s.sendall(b'x')")
    service("listening.close()")
    run.wait_for("the connection was gone", gone(port))
    assert not at(of_service(run.stop().rows, port), "accept")


def test_listener_has_one_row_for_each_state(
    running_tcplat: Callable[..., Tcplat], service: Puppet
) -> None:
    run = running_tcplat(*SERVICE)
    port = listen(service)
    service("listening.close()")
    run.wait_for(
        "it was closed",
        lambda rows: "TCP_CLOSE" in {row["state"] for row in of_service(rows, port)},
    )
    rows = of_service(run.stop().rows, port)
    assert [row["state"] for row in rows] == ["TCP_LISTEN", "TCP_CLOSE"]


_DISCONNECT = """
import ctypes
ctypes.CDLL(None).connect(listening.fileno(), struct.pack("=H26x", socket.AF_UNSPEC), 28)
"""


@pytest.mark.parametrize(
    ("ip", "there", "first"),
    [
        (4, "127.0.0.1", "127.0.0.1"),
        (6, "::1", "::1"),
        (6, "127.0.0.1", "::ffff:127.0.0.1"),
    ],
)
@pytest.mark.parametrize("probes", [SERVICE, ("--probe", "tcp_client", *SERVICE)])
def test_client_that_listens_after_a_disconnect_is_a_service(
    ip: int,
    there: str,
    first: str,
    probes: tuple[str, ...],
    running_tcplat: Callable[..., Tcplat],
    puppet: Callable[..., Puppet],
    client: Puppet,
) -> None:
    service, other = puppet(), puppet()
    before = listen(other, 4 if "." in first else 6)
    run = running_tcplat(*probes, probes=())
    service(f"listening = socket.socket(socket.AF_INET{6 if ip == 6 else ''})")
    service(f"listening.connect({(first, before)!r})")
    service(_DISCONNECT)
    service("listening.bind(('', 0)); listening.listen()")
    port = service("listening.getsockname()[1]")
    client(f"s = socket.create_connection({(there, port)!r})")
    service("listening.accept()[0].close()")
    client("s.close()")
    service("listening.close()")
    run.wait_for(
        "the listener was closed",
        lambda rows: any(row["old_state"] == "TCP_LISTEN" for row in of_service(rows, port)),
    )
    outcome = run.stop()
    rows = of_service(outcome.rows, port)
    changes = [row for row in at(rows, "state") if row["old_state"]]
    own = [row for row in changes if "TCP_LISTEN" in (row["state"], row["old_state"])]
    assert [row["desc"] for row in own] == ["listening", "closed"]
    nowhere = (ip, "0.0.0.0" if ip == 4 else "::", None)
    assert {(row["ip"], row["daddr"], row["dport"]) for row in own} == {nowhere}
    assert {row["pid"] for row in rows} == {service.pid}
    assert len(at(rows, "rx_ip")) >= 2  # the SYN and the ACK of the handshake at least
    as_client = [row for row in outcome.rows if row["probe"] == "tcp_client"]
    assert not [row for row in as_client if (row["pid"], row["sport"]) == (service.pid, port)]


def test_connection_handed_on_is_accepted_once(
    running_tcplat: Callable[..., Tcplat], client: Puppet, service: Puppet
) -> None:
    port = listen(service)
    run = running_tcplat(*SERVICE)
    client(f"s = socket.create_connection({address(port)!r}); s.sendall(b'x')")
    child = service("""
peer, _ = listening.accept()
child = os.fork()
if not child:
    peer.sendall(peer.recv(1))
    os._exit(0)
os.waitpid(child, 0)
peer.close()
child
""")
    client("s.recv(1); s.close()")
    run.wait_for("the connection was gone", gone(port))
    rows = of_service(run.stop().rows, port)
    (accept,) = at(rows, "accept")
    assert (accept["pid"], *seen(accept)) == (service.pid, "accepted", True)
    assert {row["pid"] for row in at(rows, "recv")} == {child}


def test_call_us_of_recv_is_the_time_inside_the_call(
    running_tcplat: Callable[..., Tcplat], client: Puppet, service: Puppet
) -> None:
    port = listen(service)
    run = running_tcplat(*SERVICE)
    client(f"s = socket.create_connection({address(port)!r})")
    service("peer, _ = listening.accept()")
    took = []
    for _ in range(5):
        service.tell("""
began = time.monotonic_ns()
peer.recv(10)
(time.monotonic_ns() - began) / 1000
""")
        client("""
began = time.monotonic_ns()
while time.monotonic_ns() - began < 50_000_000: pass
s.sendall(b"0123456789")
""")
        took.append(service.answer())
    run.wait_for("all was read", lambda rows: len(at(of_service(rows, port), "recv")) == 5)
    rows = at(of_service(run.stop().rows, port), "recv")
    if {row["attach"] for row in rows} == {"tracepoint"}:  # it has no entry
        assert {row["call_us"] for row in rows} == {None}
        return
    # The caller measures the call and, at best, next to nothing else.
    rest = [whole - row["call_us"] for whole, row in zip(took, rows, strict=True)]
    assert 0 <= min(rest) <= 0.1 * max(took) + 1000 * SLOW


def test_pid_filter_separates_two_services(
    running_tcplat: Callable[..., Tcplat], client: Puppet, puppet: Callable[..., Puppet]
) -> None:
    ours, other = puppet(), puppet()
    port, elsewhere = listen(ours), listen(other)
    run = running_tcplat(*SERVICE, "-p", str(ours.pid))
    exchange(client, other, elsewhere)
    exchange(client, ours, port)
    run.wait_for("the connection was gone", gone(port))
    rows = run.stop().rows
    assert not of_service(rows, elsewhere)
    assert {row["pid"] for row in rows} == {ours.pid}
    # The handshake is the process's, too: no other one listens there.
    assert at(rows, "rx_ip")[0]["flags"] == "SYN"
    first = next(row for row in at(rows, "state") if row["old_state"])
    assert first["state"] == "TCP_ESTABLISHED"


def test_older_connection_has_its_pid_from_the_first_packet(
    running_tcplat: Callable[..., Tcplat], client: Puppet, service: Puppet
) -> None:
    port = listen(service)
    client(f"s = socket.create_connection({address(port)!r})")
    service("peer, _ = listening.accept()")
    run = running_tcplat(*SERVICE, "-p", str(service.pid))
    client(f"s.sendall(bytes({MESSAGE}))")
    service(f"len(peer.recv({MESSAGE}, socket.MSG_WAITALL))")
    run.wait_for("it was read", lambda rows: bool(at(of_service(rows, port), "recv")))
    rows = run.stop().rows
    assert {row["pid"] for row in rows} == {service.pid}
    assert [row["point"] for row in rows][:2] == ["rx_ip", "rx_tcp"]


def test_connection_of_a_shared_listener_has_no_owner_before_accept(
    running_tcplat: Callable[..., Tcplat], client: Puppet, puppet: Callable[..., Puppet]
) -> None:
    master = puppet()
    port = listen(master)
    # A worker that inherits the listening socket, and accepts on command.
    worker = master("""
here, there = socket.socketpair()
child = os.fork()
if not child:
    there.recv(1)
    peer, _ = listening.accept()
    there.send(b"x")
    while peer.recv(3000): pass
    os._exit(0)
child
""")
    run = running_tcplat(*SERVICE)
    client(f"s = socket.create_connection({address(port)!r})")
    master("here.send(b'x'), here.recv(1)")
    client("s.sendall(b'hello'), s.close()")
    master("os.waitpid(child, 0)")
    run.wait_for("the connection was gone", gone(port))
    rows = of_service(run.stop().rows, port)
    accepted = at(rows, "accept")[0]["ts_ns"]
    assert {row["pid"] for row in rows if row["ts_ns"] < accepted} == {None}
    assert {row["pid"] for row in rows if row["ts_ns"] >= accepted} == {worker}


def test_min_latency_omits_fast_accepts_alone(
    running_tcplat: Callable[..., Tcplat], client: Puppet, service: Puppet
) -> None:
    port = listen(service)
    run = running_tcplat(*SERVICE, "--min-latency", "1h")
    exchange(client, service, port)
    run.wait_for("the connection was gone", gone(port))
    points = {row["point"] for row in of_service(run.stop().rows, port)}
    assert "accept" not in points
    assert {"rx_ip", "rx_tcp", "state", "ready", "send", "close"} <= points


# --- a real server: nginx, a master and two workers

REQUESTS = 10_000 if LONG else 2_000
_NGINX = """
daemon off;
worker_processes 2;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 512; multi_accept off; }}
http {{
    access_log off;
    keepalive_requests 100000;
    client_body_temp_path {folder}/a;
    proxy_temp_path {folder}/b;
    fastcgi_temp_path {folder}/c;
    uwsgi_temp_path {folder}/d;
    scgi_temp_path {folder}/e;
    {http}
    server {{
        listen 127.0.0.1:{port};
        location / {{ add_header Worker $pid; return 200 "it works"; }}
    }}
}}
"""


@contextmanager
def nginx(folder: Path, http: str = "") -> Iterator[tuple[int, list[int]]]:
    """Its port, and its workers; `http` is more of its configuration."""
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    port = free_port()
    config = folder / "nginx.conf"
    config.write_text(_NGINX.format(folder=folder, port=port, http=http))
    error_log = folder / "error.log"
    master = subprocess.Popen([program, "-p", folder, "-c", config, "-e", error_log])
    try:
        children = Path(f"/proc/{master.pid}/task/{master.pid}/children")

        def started() -> list[int]:
            assert master.poll() is None, error_log.read_text()
            pids = [int(word) for word in children.read_text().split()]
            names = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids]
            return pids if sum(b"worker" in name for name in names) == 2 else []

        yield port, eventually(started, "nginx had two workers")
    finally:
        master.send_signal(signal.SIGTERM)
        master.wait()


def curls(folder: Path, port: int, requests: int) -> dict[str, int]:
    """Send requests by four curls at once, half of them on new connections; return by worker."""
    clients = []
    for number in range(4):
        config, headers = folder / f"curl{number}", folder / f"headers{number}"
        one = f'url = "http://127.0.0.1:{port}/"\noutput = "/dev/null"\n'
        close = 'header = "Connection: close"\n' if number % 2 else ""
        config.write_text(f'silent\ndump-header = "{headers}"\n{close}{one * (requests // 4)}')
        clients.append((subprocess.Popen(["curl", "-q", "--config", config]), headers))
    workers: dict[str, int] = {}
    for client, headers in clients:
        assert client.wait(patience(300)) == 0
        for line in headers.read_text().splitlines():
            if line.startswith("Worker: "):
                workers[line[8:]] = workers.get(line[8:], 0) + 1
    return workers


@pytest.mark.alone  # neither tcpdump nor tcplat may lose a packet
def test_nginx_is_traced_by_all_three_probes(
    tmp_path: Path, running_tcplat: Callable[..., Tcplat], measured: Callable[[str], None]
) -> None:
    needs("curl", "tcpdump", "tshark")
    requests = REQUESTS if SLOW == 1 else 200
    pcap = tmp_path / "lo.pcap"
    with (
        nginx(tmp_path) as (port, pids),
        tcpdump(pcap, "lo", f"tcp port {port}", only_in=True) as witness,
    ):
        run = running_tcplat(
            *SERVICE, "--probe", f"xdp_port:iface=lo,port={port}", *only(port),
            *("--ring-size", "64M"),
        )  # fmt: skip
        workers = curls(tmp_path, port, requests)
        connections = requests // 2 + 2
        run.wait_for("all were gone", gone(port, connections))
        outcome = run.stop()
        packets = [packet(row) for row in at(outcome.rows, "nic_rx")]
        eventually(lambda: witness.count() >= len(packets), "tcpdump had written all")
        seen = witness.packets()
    assert sum(workers.values()) == requests
    assert outcome.report["dropped"] == 0
    rows = of_service(outcome.rows, port)
    measured(
        f"nginx, {requests} requests, three probes: {len(outcome.rows)} rows, 0 lost, "
        f"{len(packets)} packets as tcpdump has them"
    )
    assert Counter(packets) == Counter(seen)
    assert by_direction(packets) == by_direction(seen)

    # A row is its worker's from accept on, and has no owner before: it is never the master's.
    owned = [row for row in rows if row["point"] in ("accept", "recv", "send", "close")]
    assert {row["pid"] for row in owned} == set(pids)
    assert {row["pid"] for row in rows} <= {*pids, None}
    for sock in by_sock(owned).values():
        assert len({row["pid"] for row in sock}) == 1
    sends = [str(row["pid"]) for row in at(rows, "send")]
    assert {worker: sends.count(worker) for worker in workers} == workers
    assert len(at(rows, "accept")) == connections


def test_nginx_worker_is_traced_alone(
    tmp_path: Path, running_tcplat: Callable[..., Tcplat]
) -> None:
    needs("curl")
    with nginx(tmp_path) as (port, pids):
        run = running_tcplat(*SERVICE, "-p", str(pids[0]))
        workers = curls(tmp_path, port, 400)
        mine = workers.get(str(pids[0]), 0)
        run.wait_for(
            "its replies were there",
            lambda rows: len(at(of_service(rows, port), "send")) >= mine,
        )
        outcome = run.stop()
    assert outcome.report["dropped"] == 0
    assert {row["pid"] for row in outcome.rows} <= {pids[0]}
    assert len(at(of_service(outcome.rows, port), "send")) == mine


def test_requested_mechanism_is_used(
    running_tcplat: Callable[..., Tcplat], client: Puppet, service: Puppet, server: Listener
) -> None:
    del server
    if ATTACH == "auto":
        pytest.skip("TCPLAT_ATTACH names none")
    port = listen(service)
    run = running_tcplat(*SERVICE)
    exchange(client, service, port)
    run.wait_for("the connection was gone", gone(port))
    rows = of_service(run.stop().rows, port)
    check_mechanism(rows)
    assert ATTACH in {row["attach"] for row in rows}


@pytest.mark.skipif(
    ATTACH not in ("auto", "tracepoint"), reason="only links of tracepoints name it"
)
def test_probes_share_one_program_at_each_tracepoint(
    running_tcplat: Callable[..., Tcplat], client: Puppet, service: Puppet
) -> None:
    port = listen(service)
    run = running_tcplat(*SERVICE, attach="tracepoint")
    names = tracepoints_of(run.pid)
    exchange(client, service, port)
    run.wait_for("the connection was gone", gone(port))
    rows = run.stop().rows
    # The core's own program comes behind those of the probes.
    names.remove("tcp_destroy_sock")
    assert len(names) == len(set(names)), names
    for probe in ("tcp_client", "tcp_service"):
        mine = [
            row for row in rows if row["probe"] == probe and port in (row["sport"], row["dport"])
        ]
        assert (total(mine, "send"), total(mine, "recv")) == (MESSAGE, MESSAGE), probe
        assert len(at(mine, "close")) == 1
