"""xdp_port on `lo` and veth in network namespaces of our own, with tcpdump as the witness."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .harness import Outcome, Puppet, Tcplat, eventually, needs, network
from .witness import by_direction, packet, tcpdump

PORT = 9999
SERVER = {4: "10.78.0.2", 6: "fd78::2"}

VETH = """
link add va type veth peer name vb netns {pid}
link set va up
address add 10.78.0.1/24 dev va
address add fd78::1/64 dev va nodad
"""
VETH_THERE = """
link set vb up
address add 10.78.0.2/24 dev vb
address add fd78::2/64 dev vb nodad
"""

_SERVE = """
def _serve(listening):
    while True:
        peer, _ = listening.accept()
        asked = int.from_bytes(peer.recv(4, socket.MSG_WAITALL), "big")
        while peer.recv(1 << 16):
            pass
        peer.sendall(bytes(asked))
        peer.close()

for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listening.bind((host, 9999))
    listening.listen(128)
    threading.Thread(target=_serve, args=(listening,), daemon=True).start()
"""
_TALK = """
for number in range({count}):
    s = socket.create_connection(({host!r}, 9999))
    s.sendall((number * 211 % 40000).to_bytes(4, "big") + bytes(number * 173 % 30000))
    s.shutdown(socket.SHUT_WR)
    while s.recv(1 << 16):
        pass
    s.close()
"""


@pytest.fixture
def island(puppet: Callable[..., Puppet]) -> Puppet:
    """Yield a process alone in a network namespace, with a service on port 9999."""
    one = puppet(alone=True)
    one(_SERVE)
    return one


@pytest.fixture
def pair(puppet: Callable[..., Puppet], island: Puppet) -> tuple[Puppet, Puppet]:
    """Yield a client and the island, joined by va and vb."""
    client = puppet(alone=True)
    network(client, script=VETH.format(pid=island.pid))
    network(island, script=VETH_THERE)
    return client, island


def talk(client: Puppet, host: str, count: int = 1) -> None:
    """So many connections, with messages of all sizes."""
    client(_TALK.format(host=host, count=count))


def add_tun(there: Puppet) -> None:
    """Yield an interface without Ethernet, tun0."""
    if not Path("/dev/net/tun").exists():
        pytest.skip("there is no /dev/net/tun")
    network(there, script="tuntap add mode tun tun0")


def probe(there: Puppet, iface: str = "lo", **options: str) -> str:
    """Start the probe on an interface in a puppet's namespace."""
    given = {"iface": iface, "port": str(PORT), "netns": str(there.pid), **options}
    return "xdp_port:" + ",".join(f"{key}={value}" for key, value in given.items())


def links(there: Puppet) -> dict[str, dict[str, int]]:
    """XDP programs in a puppet's namespace: interface -> mode -> id."""
    shown = subprocess.run(
        ["nsenter", f"--net=/proc/{there.pid}/ns/net", "ip", "-j", "-d", "link", "show"],
        check=True,
        capture_output=True,
    ).stdout
    modes = {1: "native", 2: "generic"}
    return {
        link["ifname"]: {
            modes[one["mode"]]: one["prog"]["id"] for one in link.get("xdp", {}).get("attached", [])
        }
        for link in json.loads(shown)
    }


def none_attached(there: Puppet) -> bool:
    return not any(links(there).values())


# --- tcpdump is the witness


@pytest.mark.parametrize(
    ("interface", "mode", "mtu"),
    [
        ("lo", "auto", 65536),
        ("vb", "auto", 1500),
        ("vb", "auto", 9000),
        ("vb", "generic", 1500),
    ],
)
def test_each_packet_seen_by_tcpdump_has_a_row(
    interface: str,
    mode: str,
    mtu: int,
    pair: tuple[Puppet, Puppet],
    running_tcplat: Callable[..., Tcplat],
    tmp_path: Path,
    measured: Callable[[str], None],
) -> None:
    needs("tcpdump", "tshark")
    client, island = pair
    talker, hosts = (
        (island, ("127.0.0.1", "::1")) if interface == "lo" else (client, tuple(SERVER.values()))
    )
    if interface != "lo":
        network(island, script=f"link set vb mtu {mtu}")
        network(client, script=f"link set va mtu {mtu}")
    run = running_tcplat(probes=[probe(island, interface, mode=mode)])
    with tcpdump(
        tmp_path / "seen.pcap", interface, f"tcp port {PORT}", there=island, only_in=True
    ) as witness:
        for host in hosts:
            talk(talker, host, 150)
        eventually(lambda: witness.count() == len(run.rows()), "both had seen as many packets")
        outcome = run.stop()
        # As many a moment ago need not have been all.
        eventually(lambda: witness.count() >= len(outcome.rows), "tcpdump had written all")
        packets = witness.packets()
    assert outcome.returncode == 0
    wanted = "native" if (interface, mode) == ("vb", "auto") else "generic"
    assert outcome.report["probes"]["xdp_port"]["interfaces"] == {interface: wanted}
    rows = [packet(row) for row in outcome.rows]
    assert Counter(rows) == Counter(packets)
    assert by_direction(rows) == by_direction(packets)
    opened = [row for row in outcome.rows if row["flags"] == "SYN"]
    # Of a connection over lo both directions arrive there, over veth those from the client.
    assert len(opened) == 300
    largest = max(row["bytes"] for row in outcome.rows)
    measured(f"{interface} {wanted}, MTU {mtu}: {len(rows)} packets, the largest {largest} bytes")
    for row in outcome.rows:
        assert (row["probe"], row["point"], row["func"]) == ("xdp_port", "nic_rx", "xdp")
        assert (row["attach"], row["ifname"], row["sock"]) == ("xdp", interface, 0)
        assert row["pid"] is row["tid"] is row["comm"] is row["state"] is None
        assert row["netns"] == os.stat(f"/proc/{island.pid}/ns/net").st_ino
    assert {row["desc"] for row in opened} == {"SYN"}
    assert {row["desc"] for row in outcome.rows} <= {
        *("SYN", "SYN answered", "ACK", "data", "FIN", "data and FIN", "RST")
    }


def test_vlan_tags_and_extension_headers_are_parsed(
    pair: tuple[Puppet, Puppet], running_tcplat: Callable[..., Tcplat]
) -> None:
    """This kernel knows no VLAN: the frames are made by hand, and arrive by veth."""
    client, island = pair
    run = running_tcplat(probes=[probe(island, "vb", port="7")])
    client("""
ends = bytes.fromhex("020000000002020000000001")
tcp = struct.pack("!HHIIBBHHH", 7, 8, 100, 200, 0x50, 0x18, 0, 0, 0) + b"hello"
ip4 = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 45, 1, 0, 64, 6, 0, bytes(4), bytes(4)) + tcp
ip6 = struct.pack("!IHBB16s16s", 6 << 28, 33, 60, 64, bytes(16), bytes(16))
ip6 += b"\\6\\0\\1\\4\\0\\0\\0\\0" + tcp
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
raw.bind(("va", 0))
for tags in range(6):
    raw.send(ends + b"\\x81\\0\\0\\1" * tags + b"\\x08\\0" + ip4)
    raw.send(ends + b"\\x88\\xa8\\0\\1" * tags + b"\\x86\\xdd" + ip6)
raw.send(ends + b"\\x08\\0" + ip4.replace(b"hello", b"last."))
""")
    rows = run.wait_for("the last one is there", lambda rows: len(rows) == 11)
    assert [row["ip"] for row in rows] == [4, 6] * 5 + [4]
    assert {(row["bytes"], row["seq"], row["ack"], row["flags"]) for row in rows} == {
        (5, 100, 200, "PSH|ACK")
    }
    run.stop()


# --- where


@pytest.fixture
def named(island: Puppet) -> Iterator[str]:
    """Yield the name of `ip netns` for the island's namespace."""
    name = f"tcplat-test-{os.getpid()}"
    subprocess.run(["ip", "netns", "attach", name, str(island.pid)], check=True)
    yield name
    subprocess.run(["ip", "netns", "delete", name], check=True)


def test_netns_option_accepts_pid_name_and_path(
    island: Puppet, named: str, start_tcplat: Callable[..., Tcplat]
) -> None:
    inode = island("os.stat('/proc/self/ns/net').st_ino")
    for netns in (str(island.pid), named, f"/proc/{island.pid}/ns/net", f"/run/netns/{named}"):
        run = start_tcplat("-n", "3", probes=[probe(island, netns=netns)]).wait_ready()
        talk(island, "127.0.0.1")
        outcome = run.wait()
        assert outcome.returncode == 0, outcome.stderr
        assert {row["netns"] for row in outcome.rows} == {inode}
    refused = start_tcplat(probes=[probe(island, netns="nowhere")]).wait()
    assert refused.returncode == 2
    said, _, names = refused.stderr.strip().partition("; ip netns lists ")
    assert said == "tcplat: there is no network namespace 'nowhere' (No such file or directory)"
    assert named in names.split(", ")  # beside those of others on this host
    no_namespace = start_tcplat(probes=[probe(island, netns="/etc/passwd")]).wait()
    assert no_namespace.returncode == 2
    assert "'/etc/passwd' is not a network namespace" in no_namespace.stderr


def test_all_up_covers_every_interface_that_is_up(
    pair: tuple[Puppet, Puppet], running_tcplat: Callable[..., Tcplat]
) -> None:
    client, island = pair
    network(island, script="link add down0 type veth peer name down1")
    add_tun(island)
    network(island, script="link set tun0 up")
    run = running_tcplat(probes=[probe(island, "all-up")])
    assert {name: list(on) for name, on in links(island).items() if on} == {
        "lo": ["generic"],
        "vb": ["native"],
    }
    talk(client, SERVER[4])
    talk(island, "::1")
    run.wait_for(
        "both connections had ended",
        lambda rows: sum("FIN" in row["flags"] for row in rows) == 3,
    )
    outcome = run.stop()
    assert {(row["ifname"], row["ip"]) for row in outcome.rows} == {("vb", 4), ("lo", 6)}
    assert outcome.report["probes"]["xdp_port"]["silent"] == {
        "tun0": "it carries no Ethernet frames"
    }
    assert "xdp_port: no rows from tun0: it carries no Ethernet frames" in outcome.stderr
    assert none_attached(island)


def test_several_interfaces_and_ports_are_traced(
    pair: tuple[Puppet, Puppet], running_tcplat: Callable[..., Tcplat]
) -> None:
    client, island = pair
    run = running_tcplat(probes=[probe(island, "vb+lo", port="80+9999", dir="dst")])
    talk(island, "127.0.0.1")
    talk(client, SERVER[6])
    run.wait_for("both had ended", lambda rows: sum("FIN" in row["flags"] for row in rows) == 2)
    outcome = run.stop()
    assert {(row["ifname"], row["dport"]) for row in outcome.rows} == {("lo", 9999), ("vb", 9999)}


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        ("", 2, "needs iface="),
        ("iface=lo", 2, "needs port="),
        ("iface=lo,port=0", 2, "'0' is not a port"),
        ("iface=lo,port=80+x", 2, "'x' is not a port"),
        ("iface=lo,port=65536", 2, "'65536' is not a port"),
        ("iface=lo,port=1,dir=both", 2, "one of src, dst, either"),
        ("iface=lo,port=1,mode=fast", 2, "one of auto, native, generic"),
        ("iface=lo+,port=1", 2, "all-up"),
        (
            "iface=nic9,port=1",
            2,
            "there is no interface 'nic9' in network namespace {pid}; there is lo, vb",
        ),
        ("iface=lo,port=1,mode=native", 3, "lo: native XDP: Operation not supported; mode=generic"),
        ("iface=tun0,port=1", 3, "cannot listen on tun0: it carries no Ethernet frames"),
    ],
)
def test_impossible_options_are_refused_in_one_sentence(
    pair: tuple[Puppet, Puppet],
    start_tcplat: Callable[..., Tcplat],
    options: str,
    code: int,
    sentence: str,
) -> None:
    _, island = pair
    if "tun0" in options:
        add_tun(island)
    text = f"xdp_port:{options},netns={island.pid}" if options else "xdp_port"
    outcome = start_tcplat(probes=[text]).wait()
    assert outcome.returncode == code
    assert sentence.format(pid=island.pid) in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert none_attached(island)


# --- others

_FOREIGN = """
from tcplat_core.kernel import bpf
from pyroute2 import IPRoute
code = bytes.fromhex("b7000000020000009500000000000000")
program = bpf.program_load("someone", bpf.ProgramType.XDP, code)
"""
_BY_NETLINK = """
with IPRoute() as route:
    attributes = [("IFLA_XDP_FD", program), ("IFLA_XDP_FLAGS", {flags})]
    route.link("set", index={index}, xdp={{"attrs": attributes}})
"""
_BY_LINK = """
link = bpf.attach_xdp(program, {index}, {flags})
"""


@pytest.mark.parametrize("how", [_BY_NETLINK, _BY_LINK], ids=["netlink", "link"])
@pytest.mark.parametrize(
    ("interface", "flags", "mode"),
    [
        *(("lo", 2, mode) for mode in ("auto", "generic")),
        *(("vb", 2, mode) for mode in ("auto", "native", "generic")),
        *(("vb", 4, mode) for mode in ("auto", "native", "generic")),
    ],
)
def test_xdp_program_of_another_owner_is_left_attached(
    pair: tuple[Puppet, Puppet],
    start_tcplat: Callable[..., Tcplat],
    interface: str,
    flags: int,
    mode: str,
    how: str,
) -> None:
    _, island = pair
    index = island(f"socket.if_nametoindex({interface!r})")
    island(_FOREIGN + how.format(index=index, flags=flags))
    before = links(island)
    (number,) = before[interface].values()
    outcome = start_tcplat(probes=[probe(island, interface, mode=mode)]).wait()
    assert outcome.returncode == 3
    assert f"cannot listen on {interface}: it has an XDP program already" in outcome.stderr
    assert f"({'native' if flags == 4 else 'generic'} someone id {number})" in outcome.stderr
    assert links(island) == before
    if how == _BY_LINK:
        assert f"(pid {island.pid}), keeps it" in outcome.stderr
    remedy = re.search(r"(ip link set|bpftool link detach) .*", outcome.stderr)
    assert remedy
    inside = ["nsenter", f"--net=/proc/{island.pid}/ns/net"]
    subprocess.run([*inside, *remedy[0].split()], check=True)
    eventually(lambda: none_attached(island), "the remedy had taken the program off")


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("vb down", "xdp_port: no rows from vb for now: it is down (ip link set dev vb up)"),
        ("va down", "xdp_port: no rows from vb for now: it has no carrier"),
        ("va up", None),
    ],
)
def test_interface_that_cannot_receive_is_named_at_the_start(
    pair: tuple[Puppet, Puppet], start_tcplat: Callable[..., Tcplat], state: str, said: str | None
) -> None:
    home, island = pair
    name, change = state.split()
    network(island if name == "vb" else home, script=f"link set {name} {change}")
    outcome = start_tcplat("--duration", "0.2", probes=[probe(island, "vb")]).wait()
    assert outcome.returncode == 0
    assert ("for now" in outcome.stderr) == (said is not None)
    assert (said or "") in outcome.stderr


def test_second_tcplat_on_an_interface_is_refused(
    pair: tuple[Puppet, Puppet],
    running_tcplat: Callable[..., Tcplat],
    start_tcplat: Callable[..., Tcplat],
) -> None:
    _, island = pair
    first = running_tcplat(probes=[probe(island)])
    second = start_tcplat(probes=[probe(island, "vb+lo", port="80")]).wait()
    assert second.returncode == 3
    assert "lo: it has an XDP program already (generic tcplat_xdp_port id" in second.stderr
    # vb came first, and did not stay behind.
    assert [name for name, on in links(island).items() if on] == ["lo"]
    talk(island, "127.0.0.1")
    first.wait_for("the first still sees", lambda rows: len(rows) > 5)
    first.stop()
    assert none_attached(island)


# --- ends


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_run_leaves_no_program_attached(
    pair: tuple[Puppet, Puppet], running_tcplat: Callable[..., Tcplat], number: int
) -> None:
    _, island = pair
    run = running_tcplat(probes=[probe(island, "lo+vb")])
    assert not none_attached(island)
    assert run.stop(number).returncode == (-9 if number == signal.SIGKILL else 0)
    eventually(lambda: none_attached(island), "the interfaces were free again")


def test_run_ends_after_count_packets(
    island: Puppet, running_tcplat: Callable[..., Tcplat]
) -> None:
    run = running_tcplat("--count", "7", probes=[probe(island)])
    talk(island, "127.0.0.1", 3)
    outcome = run.wait()
    assert outcome.returncode == 0
    assert len(outcome.rows) == 7
    assert outcome.hook_total("unread") == outcome.hook_total("produced") - 7
    eventually(lambda: none_attached(island), "the interface was free again")


def test_command_is_traced_from_its_syn(
    island: Puppet, start_tcplat: Callable[..., Tcplat]
) -> None:
    run = start_tcplat(
        probes=[probe(island)],
        command=[
            *("nsenter", f"--net=/proc/{island.pid}/ns/net", "bash", "-c"),
            "exec 3<>/dev/tcp/127.0.0.1/9999; printf '\\0\\0\\0\\0' >&3; exit 5",
        ],
    )
    outcome = run.wait()
    assert outcome.returncode == 5
    assert outcome.rows[0]["desc"] == "SYN"


def gone(outcome: Outcome, interface: str) -> None:
    """Check that it was reported at once, only once, and stands in the report."""
    sentence = f"tcplat: xdp_port: no more rows from {interface}: the interface is gone\n"
    assert outcome.stderr.count(sentence) == 1
    assert outcome.stderr.count("gone") == 1
    assert outcome.report["probes"]["xdp_port"]["silent"] == {interface: "it is gone"}


def test_run_continues_when_one_of_two_interfaces_goes(
    pair: tuple[Puppet, Puppet], running_tcplat: Callable[..., Tcplat]
) -> None:
    client, island = pair
    run = running_tcplat(probes=[probe(island, "vb+lo")])
    network(client, script="link delete va")
    eventually(lambda: "gone" in run.errors.read_text(), "the message was printed")
    talk(island, "127.0.0.1")
    run.wait_for("the other still sees", lambda rows: len(rows) > 5)
    outcome = run.stop()
    assert outcome.returncode == 0
    gone(outcome, "vb")


def test_run_continues_for_another_probe_when_the_interface_goes(
    pair: tuple[Puppet, Puppet], running_tcplat: Callable[..., Tcplat]
) -> None:
    client, island = pair
    run = running_tcplat(probes=["tcp_client", probe(island, "vb")])
    network(client, script="link delete va")
    eventually(lambda: "gone" in run.errors.read_text(), "the message was printed")
    talk(island, "127.0.0.1")
    run.wait_for("the other still sees", lambda rows: len(rows) > 5)
    outcome = run.stop()
    assert outcome.returncode == 0
    gone(outcome, "vb")


def test_run_ends_with_the_last_interface(
    pair: tuple[Puppet, Puppet], running_tcplat: Callable[..., Tcplat]
) -> None:
    client, island = pair
    run = running_tcplat(probes=[probe(island, "vb")])
    talk(client, SERVER[4])
    network(client, script="link delete va")
    outcome = run.wait()
    assert outcome.returncode == 1
    gone(outcome, "vb")
    assert outcome.rows


def test_run_ends_with_the_network_namespace(
    puppet: Callable[..., Puppet], running_tcplat: Callable[..., Tcplat]
) -> None:
    one = puppet(alone=True)
    run = running_tcplat(probes=[probe(one)])
    one.end()
    outcome = run.wait()
    assert outcome.returncode == 1
    gone(outcome, "lo")


# --- never in the way


def retransmitted(there: Puppet) -> int:
    """Segments, by all sockets of a puppet's namespace."""
    names, values = there(
        "[line.split() for line in open('/proc/net/snmp') if line.startswith('Tcp:')]"
    )
    return int(dict(zip(names, values, strict=True))["RetransSegs"])


@pytest.mark.alone  # a late ACK is a retransmission
def test_full_ring_does_not_disturb_the_traffic(
    pair: tuple[Puppet, Puppet], running_tcplat: Callable[..., Tcplat]
) -> None:
    client, island = pair
    run = running_tcplat("--ring-size", "4K", probes=[probe(island, "vb+lo")])
    run.process.send_signal(signal.SIGSTOP)
    # What is dropped has to be sent again; where an ACK is late a segment is, too, but not always.
    before = retransmitted(client)
    for _ in range(5):
        talk(client, SERVER[4], 50)
        talk(island, "::1", 50)
        after = retransmitted(client)
        if after == before:
            break
        before = after
    assert after == before
    run.process.send_signal(signal.SIGCONT)
    talk(client, SERVER[4])
    outcome = run.stop()
    assert outcome.report["dropped"] > 500
    assert outcome.hook_total("produced") == len(outcome.rows) + outcome.report["dropped"]
