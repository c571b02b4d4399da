"""Filters give the same answer in the kernel, as C, and for older sockets."""

from __future__ import annotations

import functools
import ipaddress
import os
import random
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import attrs
import pytest

from tcplat_core.capture.row_filter import RowFilter
from tcplat_core.errors import UsageError
from tcplat_core.event.text import text
from tcplat_core.kernel.netns import netns_recorded
from tcplat_core.loader.filter import Filter, cgroup_path
from tcplat_core.registry.find import Plugins
from tcplat_core.testing import make_event


@attrs.frozen(kw_only=True)
class Addrs:
    """The struct tcplat_addrs of include/tcplat/filter.bpf.h."""

    saddr: bytes = bytes(16)
    daddr: bytes = bytes(16)
    netns: int = 1
    sport: int = 40_000
    dport: int = 80
    ip: int = 4


def packed(address: str) -> bytes:
    parsed = ipaddress.ip_address(address)
    return parsed.packed if parsed.version == 6 else bytes(10) + b"\xff\xff" + parsed.packed


@functools.lru_cache(1)
def _compiled(expression: str) -> CodeType:
    """Return a C condition as Python."""
    python = re.sub(r"\(\(const u64 \*\)([^[]+)\)\[(\d)\]", r"half(\1, \2)", expression)
    python = python.replace("(a)->", "a.").replace("!(", "not (")
    python = re.sub(r"\b(0x[0-9a-f]+|\d+)(ULL|U)\b", r"\1", python)
    python = python.replace("&&", "and").replace("||", "or")

    return compile(python, "a filter", "eval")


def evaluate(expression: str | int, **names: Any) -> bool:
    """Evaluate a C condition of the kinds that filters are made of."""

    def half(data: bytes, number: int) -> int:
        return int.from_bytes(data[8 * number : 8 * number + 8], sys.byteorder)

    return bool(eval(_compiled(str(expression)), {"half": half, **names}))  # noqa: S307 - our own


@functools.lru_cache(1)
def in_the_kernel(wanted: Filter) -> tuple[str, dict[bytes, bytes], set[bytes]]:
    """Return the condition, and what is in its maps of ports and networks."""
    test = wanted.defines()["TCPLAT_FILTER_ADDRS(a)"]
    return str(test), wanted.port_words(), wanted.network_keys()


def passes(wanted: Filter, addrs: Addrs) -> bool:
    test, words, keys = in_the_kernel(wanted)

    def has_port(place: int, port: int) -> bool:
        """Read tcplat_ports as filter.bpf.h does."""
        word = words.get(struct.pack("=I", place + (port >> 6)), bytes(8))
        return bool(struct.unpack("=Q", word)[0] >> (port & 63) & 1)

    def in_networks(addrs: Addrs) -> bool:
        """Look up tcplat_networks: the longest prefix first."""
        sides = [int.from_bytes(side, "big") for side in (addrs.saddr, addrs.daddr)]
        cut = [
            (bits, side >> (128 - bits) << (128 - bits)) for bits in range(129) for side in sides
        ]
        return any(
            struct.pack("=I16s", bits, side.to_bytes(16, "big")) in keys for bits, side in cut
        )

    return evaluate(test, a=addrs, tcplat_has_port=has_port, tcplat_in_networks=in_networks)


def comm_passes(pattern: str, comm: str) -> bool:
    test = Filter(comm=pattern).defines()["TCPLAT_FILTER_COMM(comm)"]
    return evaluate(test, comm=comm.encode().ljust(16, b"\0"))


# --- addresses and ports, in the kernel


@pytest.mark.parametrize("count", [1, 4, 5, 64, 1000])
@pytest.mark.parametrize(
    ("wanting", "local", "remote"),
    [
        (lambda listed: Filter(ports=listed), True, True),
        (lambda listed: Filter(lports=listed), True, False),
        (lambda listed: Filter(rports=listed), False, True),
    ],
)
def test_port_list_of_any_length_matches_exactly(
    wanting: Callable[[tuple[int, ...]], Filter], count: int, *, local: bool, remote: bool
) -> None:
    listed = tuple(range(2, 65536, 65533 // count))[:count]
    wanted = wanting(listed)
    for port in {*listed, *(one + 1 for one in listed), 65535}:
        assert passes(wanted, Addrs(sport=port, dport=1)) == (local and port in listed)
        assert passes(wanted, Addrs(sport=1, dport=port)) == (remote and port in listed)


@pytest.mark.parametrize("count", [1, 4, 5, 64])
def test_network_list_of_any_length_matches_exactly(count: int) -> None:
    listed = tuple(f"10.{one}.128.0/17" for one in range(count - 1))
    wanted = Filter(networks=(*listed, "fe80::/10"))
    for one in range(count + 1):
        for host, expected in ((f"10.{one}.200.1", one < count - 1), (f"10.{one}.1.1", False)):
            assert passes(wanted, Addrs(saddr=packed(host))) == expected
            assert passes(wanted, Addrs(daddr=packed(host))) == expected
    assert passes(wanted, Addrs(daddr=packed("febf::1")))
    assert not passes(wanted, Addrs(daddr=packed("fec0::1")))


def test_empty_filter_passes_everything() -> None:
    assert passes(Filter(), Addrs())
    assert not Filter().by_task
    assert set(Filter().defines()) == {"TCPLAT_MIN_NS", "TCPLAT_FILTER_ADDRS(a)"}


@pytest.mark.parametrize(
    ("wanted", "sport", "dport", "expected"),
    [
        (Filter(ports=(80,)), 40_000, 80, True),
        (Filter(ports=(80,)), 80, 40_000, True),
        (Filter(ports=(80,)), 8080, 800, False),
        (Filter(ports=(80, 443)), 40_000, 443, True),
        (Filter(lports=(80,)), 80, 1, True),
        (Filter(lports=(80,)), 1, 80, False),
        (Filter(rports=(80,)), 1, 80, True),
        (Filter(rports=(80,)), 80, 1, False),
        (Filter(lports=(1, 2), rports=(80,)), 2, 80, True),
        (Filter(lports=(1, 2), rports=(80,)), 2, 81, False),
        (Filter(lports=(1, 2), rports=(80,)), 3, 80, False),
    ],
)
def test_filters_of_one_kind_are_ored_and_kinds_are_anded(
    wanted: Filter, sport: int, dport: int, *, expected: bool
) -> None:
    assert passes(wanted, Addrs(sport=sport, dport=dport)) == expected


def test_namespace_and_ip_version_must_match() -> None:
    assert passes(Filter(netns=4_026_531_840, ip=6), Addrs(netns=4_026_531_840, ip=6))
    assert not passes(Filter(netns=4_026_531_840), Addrs(netns=1))
    assert not passes(Filter(ip=6), Addrs(ip=4))


@pytest.mark.parametrize(
    ("network", "address", "inside"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("10.0.0.0/8", "10.255.255.255", True),
        ("10.0.0.0/8", "11.0.0.0", False),
        ("10.1.2.3/8", "10.0.0.1", True),
        ("0.0.0.0/0", "203.0.113.7", True),
        ("0.0.0.0/0", "2001:db8::1", False),
        ("::/0", "2001:db8::1", True),
        ("::1", "::1", True),
        ("::1", "::2", False),
        ("2001:db8::/65", "2001:db8::7fff:ffff:ffff:ffff", True),
        ("2001:db8::/65", "2001:db8:0:0:8000::", False),
        ("2001:db8::/33", "2001:db8:7fff::", True),
        ("2001:db8::/33", "2001:db8:8000::", False),
    ],
)
def test_network_filter_matches_either_address(network: str, address: str, *, inside: bool) -> None:
    wanted, other = Filter(networks=(network,)), packed("fe80::bad")
    assert passes(wanted, Addrs(saddr=packed(address), daddr=other)) == inside
    assert passes(wanted, Addrs(saddr=other, daddr=packed(address))) == inside


def test_network_filter_agrees_with_ipaddress() -> None:
    chance = random.Random(20_240_504)  # noqa: S311 - reproducible on purpose
    for _ in range(2000):
        make, bits = chance.choice(((ipaddress.IPv4Network, 32), (ipaddress.IPv6Network, 128)))
        network = make((chance.getrandbits(bits), chance.randint(0, bits)), strict=False)
        near = int(network.network_address) ^ (1 << chance.randrange(bits))
        address = type(network.network_address)(near)
        addrs = Addrs(saddr=packed(str(address)), daddr=packed(str(address)))
        expected = address in network
        assert passes(Filter(networks=(str(network),)), addrs) == expected, (network, address)


# --- processes


@pytest.mark.parametrize(
    ("pattern", "comm", "expected"),
    [
        ("curl", "curl", True),
        ("curl", "curly", False),
        ("curl", "cur", False),
        ("curl*", "curl", True),
        ("curl*", "curly", True),
        ("curl*", "cur", False),
        ("*", "anything", True),
        ("fifteen letters", "fifteen letters", True),
        ("fifteen letters", "fifteen letterz", False),
        ("Bücher", "Bücher", True),
        ('"); x("', '"); x("', True),
        ('"); x("', "harmless", False),
    ],
)
def test_comm_pattern_matches_in_the_kernel_as_in_python(
    pattern: str, comm: str, *, expected: bool
) -> None:
    assert comm_passes(pattern, comm) == expected
    assert Filter(comm=pattern).wants(1, comm.encode()) == expected


def test_comm_pattern_puts_no_text_into_the_c() -> None:
    test = str(Filter(comm='a"\\\n;*').defines()["TCPLAT_FILTER_COMM(comm)"])
    assert re.fullmatch(r"(?:const u64|comm|0x[\da-f]+ULL|[\d\s()\[\]*&|^!])+", test)


def test_pid_filter_passes_its_processes_alone() -> None:
    wanted = Filter(pids=(10, 20))
    assert [pid for pid in (0, 10, 15, 20) if wanted.wants(pid, b"x")] == [10, 20]
    assert wanted.defines()["TCPLAT_FILTER_PID"] == 1


def test_empty_pid_list_passes_no_process() -> None:
    assert not Filter(pids=()).wants(1, b"x")
    assert Filter().wants(0, b"")


def test_socket_without_owner_passes_no_process_filter() -> None:
    assert not Filter(comm="*").wants(0, b"")
    assert not Filter(pids=(0,)).wants(0, b"")
    assert Filter(ports=(80,)).wants(0, b"")


def test_process_filters_are_anded() -> None:
    wanted = Filter(pids=(10,), comm="curl")
    assert wanted.wants(10, b"curl")
    assert not wanted.wants(10, b"wget")
    assert not wanted.wants(11, b"curl")


def test_traced_command_is_added_to_the_pids() -> None:
    assert Filter().and_pid(7) == Filter(pids=(7,))
    assert Filter(pids=(3,), comm="x").and_pid(7) == Filter(pids=(3, 7), comm="x")


def test_cgroup_filter_includes_descendants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "1:cpu:/other\n0::/a.slice/b.service\n")
    assert Filter(cgroup="/a.slice").wants(1, b"x")
    assert Filter(cgroup="/a.slice/b.service").wants(1, b"x")
    assert not Filter(cgroup="/a.slice/b").wants(1, b"x")
    assert not Filter(cgroup="/a.slice/b.service/c").wants(1, b"x")
    assert not Filter(cgroup="/other").wants(1, b"x")
    levels = [
        Filter(cgroup=path, cgroup_id=5).defines()["TCPLAT_FILTER_CGROUP_LEVEL"]
        for path in ("/a.slice", "/a.slice/b.service", "/a/b/c/")
    ]
    assert levels == [1, 2, 3]


# --- rows that were recorded


def turned(addrs: Addrs) -> Addrs:
    return attrs.evolve(
        addrs, saddr=addrs.daddr, daddr=addrs.saddr, sport=addrs.dport, dport=addrs.sport
    )


PLACES = ("127.0.0.1", "10.0.0.1", "10.0.0.2", "::1", "2001:db8::1", "fe80::1")
NETWORKS = ("127.0.0.1", "10.0.0.0/31", "0.0.0.0/0", "::/0", "2001:db8::/32", "::ffff:0:0/96")


def test_row_filter_agrees_with_the_kernel_filter() -> None:
    chance = random.Random(20_261_125)  # noqa: S311 - reproducible on purpose
    outcomes = set()
    for _ in range(5000):

        def some(values: tuple[Any, ...], most: int = 2) -> tuple[Any, ...]:
            wanted = chance.random() < 0.3
            return tuple(chance.sample(values, chance.randint(1, most))) if wanted else ()

        wanted = Filter(
            ports=some((80, 443)),
            lports=some((80, 1024)),
            rports=some((80, 1024)),
            networks=some(NETWORKS),
            netns=next(iter(some((1, 2), 1)), 0),
            ip=next(iter(some((4, 6), 1)), 0),
        )
        saddr, daddr = chance.choices(PLACES, k=2)
        addrs = Addrs(
            saddr=packed(saddr),
            daddr=packed(daddr),
            netns=chance.choice((1, 2)),
            sport=chance.choice((0, 80, 443, 1024)),
            dport=chance.choice((80, 443, 1024)),
            ip=6 if ":" in saddr else 4,
        )
        point, sock = chance.choice((("send", 7), ("rx_ip", 0), ("nic_rx", 0), ("nic_tx", 0)))
        row = make_event(
            point=point,
            sock=sock,
            ip=addrs.ip,
            netns=addrs.netns,
            saddr=saddr,
            daddr=daddr,
            sport=addrs.sport or None,
            dport=addrs.dport,
        )
        # As report_packet() and tcplat_wanted_packet() do it.
        ways = {"rx_ip": (turned(addrs),), "nic_rx": (addrs, turned(addrs))}
        expected = any(passes(wanted, way) for way in ways.get(point, (addrs,)))
        assert RowFilter(wanted).passes(row) == expected, (wanted, row)
        outcomes.add((point, expected))
    assert len(outcomes) == 8


@pytest.mark.parametrize(
    "pattern", ["curl", "cur*", "*", "Bücher", "Büc*", "a\\*", "a\\b", "x\x1b*"]
)
@pytest.mark.parametrize("comm", ["curl", "curly", "Bücher", "a\\b", "a\x01", "x\x1bc", "x\\x1bc"])
def test_comm_of_a_row_matches_as_in_the_kernel(pattern: str, comm: str) -> None:
    row = make_event(comm=text(comm.encode()))
    assert RowFilter(Filter(comm=pattern)).passes(row) == comm_passes(pattern, comm)


def test_row_without_a_process_passes_no_process_filter() -> None:
    row = make_event(pid=None, comm=None)
    assert not RowFilter(Filter(comm="*")).passes(row)
    outside = make_event(pid=None, comm="curl")  # of the PID namespace that the run was in
    assert RowFilter(Filter(comm="curl")).passes(outside)
    assert not RowFilter(Filter(pids=(4711,))).passes(outside)
    assert not RowFilter(Filter(pids=(4711,))).passes(row)
    assert RowFilter(Filter(pids=(4711,))).passes(make_event())
    assert not RowFilter(Filter(pids=(4711,), comm="wget")).passes(make_event())


def test_packet_rows_pass_with_the_process_of_their_connection() -> None:
    rows = RowFilter(Filter(pids=(4711,)))
    rows.learn([make_event(), make_event(pid=7, sport=50_000)])
    packet = {"point": "nic_rx", "sock": 0, "pid": None, "comm": None}
    assert rows.passes(make_event(**packet))
    assert rows.passes(make_event(**packet, sport=9999, dport=40_000))
    assert not rows.passes(make_event(**packet, sport=50_000))
    assert not rows.passes(make_event(**packet, sport=60_000))
    assert not rows.passes(make_event(**packet, netns=1))
    assert not rows.passes(make_event(**{**packet, "point": "rx_ip"}))


def test_min_latency_passes_rows_without_a_duration() -> None:
    rows = RowFilter(Filter(min_ns=1_000_001))
    service = Plugins.load().probe("tcp_service").event
    for took, expected in ((None, True), (1000.0, False), (1000.001, True), (2e6, True)):
        assert rows.passes(make_event(connect_us=took)) == expected
        for name in ("call_us", "accept_us"):
            times = {"call_us": None, "accept_us": None, name: took}
            assert rows.passes(make_event(service, **times)) == expected


# --- what users say


def test_recorded_namespace_is_given_by_inode() -> None:
    assert netns_recorded("4026531840") == 4_026_531_840
    assert netns_recorded(str(os.getpid())) == os.stat("/proc/self/ns/net").st_ino
    with pytest.raises(UsageError, match="there is no network namespace"):
        netns_recorded("no-such")


@pytest.mark.parametrize("text", ["/", "/no/where", "/etc/passwd"])
def test_folder_outside_cgroup2_is_named(text: str) -> None:
    with pytest.raises(UsageError, match=f"{text} is no folder below a cgroup2 mount"):
        cgroup_path(text)


def test_cgroup_path_is_relative_to_the_cgroup2_mount(monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = "25 1 0:22 / {} rw shared:9 - {} none rw\n"
    table = mounts.format("/proc", "proc") + mounts.format("/usr", "cgroup2")
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: table)
    assert cgroup_path("/usr/bin") == "/bin"
    assert cgroup_path("/usr/share/../bin/.") == "/bin"
    assert cgroup_path("/usr/share/doc") == "/share/doc"
