"""Frames by name: what is found in each, and what must not be."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP, UDP, IPOption_NOP, IPOption_Timestamp
from scapy.layers.inet6 import (
    HBHOptUnknown,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
)
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

from .reference import parse
from .rig import ALWAYS_HAS, HAS_ACK, RECORD, Fields, Rig, member

SYN, ACK, PSH = 2, 16, 8
SOURCE4, TARGET4 = "192.0.2.1", "198.51.100.7"
SOURCE6, TARGET6 = "2001:db8::1", "2001:db8:ffff::7"
SEQ, ACKED = 0xFFFFFFF0, 0x80000001


def ether(**fields: Any) -> Packet:
    # Without addresses scapy would ask the network for them.
    return Ether(**{"src": "02:00:00:00:00:01", "dst": "02:00:00:00:00:02", **fields})


def tcp(payload: int = 5, **fields: Any) -> Packet:
    given = {"sport": 40000, "dport": 9999, "seq": SEQ, "ack": ACKED, "flags": "PA", **fields}
    return TCP(**given) / Raw(b"x" * payload)


def ip4(**fields: Any) -> Packet:
    return IP(**{"src": SOURCE4, "dst": TARGET4, **fields})


def ip6(**fields: Any) -> Packet:
    return IPv6(**{"src": SOURCE6, "dst": TARGET6, **fields})


def fields(ip: int = 4, payload: int = 5, flags: int = PSH | ACK) -> Fields:
    """Return what must be reported of a packet made by tcp()."""
    if ip == 4:
        ends = [b"\0" * 10 + b"\xff\xff" + socket.inet_aton(one) for one in (SOURCE4, TARGET4)]
    else:
        ends = [socket.inet_pton(socket.AF_INET6, one) for one in (SOURCE6, TARGET6)]
    has_ack = bool(flags & ACK)
    return (
        *(ip, ends[0], ends[1], 40000, 9999, SEQ),
        *(ACKED if has_ack else 0, flags, payload, ALWAYS_HAS | (HAS_ACK if has_ack else 0)),
    )


def tags(*kinds: int) -> Packet:
    """VLAN tags, the outermost first."""
    packet = ether()
    for number, kind in enumerate(kinds):
        packet.lastlayer().type = kind
        packet /= Dot1Q(vlan=100 + number)
    return packet


def extension(kind: int, units: int = 0) -> tuple[int, Callable[[int], bytes]]:
    """Return an extension header of this kind, 8 * (units + 1) bytes."""
    return kind, lambda following: bytes([following, units]) + bytes(6 + 8 * units)


AUTHENTICATION = (51, lambda following: struct.pack("!BBHII12s", following, 4, 0, 1, 1, b""))


def chain(*extensions: tuple[int, Callable[[int], bytes]], final: Packet | None = None) -> bytes:
    """Return an IPv6 packet with these extension headers."""
    kinds = [kind for kind, _ in extensions] + [6]
    data = b"".join(
        make(following) for (_, make), following in zip(extensions, kinds[1:], strict=True)
    )
    segment = bytes(ip6(nh=6) / (final or tcp()))[40:]
    return bytes(ether(type=0x86DD) / ip6(nh=kinds[0], plen=len(data + segment))) + data + segment


def hop_by_hop(*options: bytes, following: int = 6) -> bytes:
    data = b"".join(options)
    assert len(data) % 8 == 6
    return bytes([following, len(data) // 8]) + data


def jumbogram(length: int, real: int = 70_000) -> bytes:
    """With the length where Linux writes it (BIG TCP)."""
    segment = bytes(ip6(nh=6) / tcp(payload=0))[40:]
    head = bytes(ether(type=0x86DD) / ip6(nh=0, plen=0))
    return head + hop_by_hop(b"\xc2\x04" + length.to_bytes(4, "big")) + segment + bytes(real)


REPORTED: dict[str, tuple[Packet | bytes, Fields]] = {
    "ipv4": (ether() / ip4() / tcp(), fields()),
    "ipv6": (ether() / ip6() / tcp(), fields(6)),
    "no payload": (ether() / ip4() / tcp(0), fields(payload=0)),
    "padded to 60 bytes": (bytes(ether() / ip4() / tcp(0)).ljust(60, b"\0"), fields(payload=0)),
    "ack without its flag": (ether() / ip4() / tcp(0, flags="S"), fields(payload=0, flags=SYN)),
    "all flags": (ether() / ip4() / tcp(flags=0xFF), fields(flags=0xFF)),
    "no flags": (ether() / ip4() / tcp(flags=0), fields(flags=0)),
    "tcp options": (
        ether() / ip4() / tcp(options=[("MSS", 1460), ("SAckOK", b""), ("WScale", 7)]),
        fields(),
    ),
    "40 bytes of tcp options": (ether() / ip4() / tcp(options=[("NOP", None)] * 40), fields()),
    "ip options": (ether() / ip4(options=[IPOption_NOP()] * 4) / tcp(), fields()),
    "40 bytes of ip options": (
        ether() / ip4(options=[IPOption_Timestamp(length=40)]) / tcp(),
        fields(),
    ),
    "not to be fragmented": (ether() / ip4(flags="DF") / tcp(), fields()),
    "first fragment": (ether() / ip4(flags="MF") / tcp(), fields()),
    "first fragment, ipv6": (ether() / ip6() / IPv6ExtHdrFragment(m=1, id=9) / tcp(), fields(6)),
    "hop by hop": (
        ether() / ip6() / IPv6ExtHdrHopByHop(options=[HBHOptUnknown(optdata=b"12345678")]) / tcp(),
        fields(6),
    ),
    "routing": (ether() / ip6() / IPv6ExtHdrRouting(addresses=["::1", "::2"]) / tcp(), fields(6)),
    "destination options": (
        ether() / ip6() / IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(12))]) / tcp(),
        fields(6),
    ),
    "authentication": (chain(AUTHENTICATION), fields(6)),
    "mobility": (chain(extension(135)), fields(6)),
    "host identity": (chain(extension(139, 4)), fields(6)),
    "shim6": (chain(extension(140, 1)), fields(6)),
    "the longest extension": (chain(extension(60, 255)), fields(6)),
    "eight extensions": (
        chain(
            *(extension(0), extension(60, 3), extension(43, 2), extension(44)),
            *(AUTHENTICATION, extension(60), extension(135), extension(139, 7)),
        ),
        fields(6),
    ),
    "eight long extensions": (chain(*[extension(60, 15)] * 8), fields(6)),
    "jumbogram": (jumbogram(70_028), fields(6, 70_000)),
    "9000 bytes": (ether() / ip4() / tcp(8960), fields(payload=8960)),
    "as long as ipv4 can be": (ether() / ip4() / tcp(65_495), fields(payload=65_495)),
    "as long as ipv6 can be": (ether() / ip6() / tcp(65_515), fields(6, 65_515)),
    # A card hands over what it got; tcpdump shows such a packet as well.
    "payload cut off": (bytes(ether() / ip4() / tcp(1000))[:54], fields(payload=1000)),
    **{
        f"{count} tags of {kind:04x}, ipv{ip}": (
            tags(*[kind] * count) / (ip4() if ip == 4 else ip6()) / tcp(),
            fields(ip),
        )
        for kind in (0x8100, 0x88A8, 0x9100)
        for count in (1, 2, 3, 4)
        for ip in (4, 6)
    },
    "QinQ": (ether() / Dot1AD(vlan=1) / Dot1Q(vlan=2) / ip4() / tcp(), fields()),
    "all at once": (
        ether()
        / Dot1AD(vlan=1)
        / Dot1Q(vlan=2)
        / ip4(options=[IPOption_NOP()] * 8, flags="MF")
        / tcp(options=[("Timestamp", (1, 2))]),
        fields(),
    ),
}

NOT_REPORTED: dict[str, Packet | bytes] = {
    "five tags": tags(*[0x8100] * 5) / ip4() / tcp(),
    "another port": ether() / ip4() / tcp(dport=9998),
    "the port's bytes swapped": ether() / ip4() / tcp(dport=0x0F27),
    "udp": ether() / ip4() / UDP(sport=9999, dport=9999),
    "udp over ipv6": ether() / ip6() / UDP(sport=9999, dport=9999),
    "arp": ether() / ARP(psrc=SOURCE4, pdst=TARGET4, hwsrc="02:00:00:00:00:01"),
    "802.3, no ethertype": b"\xff" * 12 + b"\0\x40" + bytes(ip4() / tcp()),
    "mpls": bytes(ether(type=0x8847)) + b"\0\0\x11\xff" + bytes(ip4() / tcp()),
    "ip in ip": ether() / ip4(proto=4) / ip4() / tcp(),
    "a later fragment": ether() / ip4(frag=1, proto=6) / tcp(),
    "the last fragment": ether() / ip4(frag=8191, proto=6) / tcp(),
    "a later fragment, ipv6": ether() / ip6() / IPv6ExtHdrFragment(offset=1, nh=6) / tcp(),
    "the last fragment, ipv6": ether() / ip6() / IPv6ExtHdrFragment(offset=8191, nh=6) / tcp(),
    "ihl of 4 words": ether() / ip4(ihl=4) / tcp(),
    "ihl beyond the frame": ether() / ip4(ihl=15) / tcp(0),
    "version 5": ether() / ip4(version=5) / tcp(),
    "version 6 as ipv4": ether() / ip4(version=6) / tcp(),
    "version 4 as ipv6": ether() / ip6(version=4) / tcp(),
    "ipv4 behind the ethertype of ipv6": bytes(ether(type=0x86DD)) + bytes(ip4() / tcp()),
    "total length of 0": ether() / ip4(len=0) / tcp(),
    "total length without tcp": ether() / ip4(len=20) / tcp(),
    "total length within tcp": ether() / ip4(len=39) / tcp(),
    "total length within tcp options": (ether() / ip4(len=43) / tcp(options=[("NOP", None)] * 4)),
    "payload length of 0": ether() / ip6(plen=0) / tcp(),
    "payload length within tcp": ether() / ip6(plen=19) / tcp(),
    "payload length within the extension": (
        bytes(ether() / ip6(plen=27, nh=60)) + extension(60)[1](6) + bytes(tcp())
    ),
    "doff of 4 words": ether() / ip4() / tcp(dataofs=4),
    "doff of 0": ether() / ip4() / tcp(dataofs=0),
    "doff beyond the packet": ether() / ip4() / tcp(0, dataofs=6),
    "doff beyond the packet, not the frame": (
        bytes(ether() / ip4(len=40) / tcp(0, dataofs=6)) + bytes(60)
    ),
    "esp": chain(extension(50)),
    "no next header": ether() / ip6(nh=59) / tcp(),
    "unknown extension": chain(extension(253)),
    "nine extensions": chain(*[extension(60)] * 9),
    "an extension beyond the frame": chain(extension(60, 255))[:200],
    "jumbogram of a small length": jumbogram(65_535),
    "jumbogram whose option is another": (
        bytes(ether(type=0x86DD) / ip6(nh=0, plen=0))
        + hop_by_hop(b"\xc3\x04\0\x01\0\0")
        + bytes(tcp())
    ),
    "jumbogram whose option has another length": (
        bytes(ether(type=0x86DD) / ip6(nh=0, plen=0))
        + hop_by_hop(b"\xc2\x03\0\x01\0\0")
        + bytes(tcp())
    ),
    "nothing but an ethernet header": ether(type=0x0800),
    "as short as it gets": b"\0" * 14,
}


def raw(frame: Packet | bytes) -> bytes:
    return frame if isinstance(frame, bytes) else bytes(frame)


@pytest.mark.parametrize("name", REPORTED)
def test_tcp_frame_is_reported(rig: Rig, name: str) -> None:
    frame, expected = REPORTED[name]
    assert parse(raw(frame)) == expected, "the reference is wrong"
    assert rig.see(raw(frame)) == expected


@pytest.mark.parametrize("name", NOT_REPORTED)
def test_frame_without_a_matching_tcp_header_is_not_reported(rig: Rig, name: str) -> None:
    assert rig.see(raw(NOT_REPORTED[name])) is None


@pytest.mark.parametrize(
    "name", [name for name in REPORTED if "long" not in name and "jumbo" not in name]
)
def test_truncated_frame_is_reported_once_its_tcp_header_is_whole(rig: Rig, name: str) -> None:
    """Until the TCP header is whole nothing is reported, and from then on always the same."""
    frame, expected = REPORTED[name]
    whole = raw(frame)
    seen = [rig.see(whole[:size]) for size in range(14, min(len(whole), 700) + 1)]
    assert seen == [parse(whole[:size]) for size in range(14, min(len(whole), 700) + 1)]
    first = seen.index(expected)
    assert seen[:first] == [None] * first
    assert seen[first:] == [expected] * (len(seen) - first)


def ports(rig: Rig) -> Iterator[tuple[int, int]]:
    """Which ports, source and destination, a program reports."""
    for sport in (80, 443, 5000):
        for dport in (80, 443, 5000):
            if rig.see(raw(ether() / ip4() / tcp(sport=sport, dport=dport))):
                yield sport, dport


def test_dir_selects_the_port_that_counts(load: Callable[..., Rig]) -> None:
    assert list(ports(load(port="80", dir="src"))) == [(80, 80), (80, 443), (80, 5000)]
    assert list(ports(load(port="80", dir="dst"))) == [(80, 80), (443, 80), (5000, 80)]
    either = [(80, 80), (80, 443), (80, 5000), (443, 80), (5000, 80)]
    assert list(ports(load(port="80"))) == either


def test_any_of_several_ports_matches(load: Callable[..., Rig]) -> None:
    assert list(ports(load(port="80+443", dir="dst"))) == [
        (sport, dport) for sport in (80, 443, 5000) for dport in (80, 443)
    ]
    many = load(port="+".join(str(1000 + port) for port in range(32)))
    seen = [
        port
        for port in range(990, 1050)
        if many.see(raw(ether() / ip4() / tcp(sport=5000, dport=port)))
    ]
    assert seen == list(range(1000, 1032))


def test_port_all_matches_every_port(everything: Rig) -> None:
    assert everything.see(raw(ether() / ip4() / tcp(sport=1, dport=65535)))
    assert not everything.see(raw(ether() / ip4() / UDP()))


def test_row_has_interface_and_time(rig: Rig) -> None:
    assert rig.runner.run(raw(ether() / ip4() / tcp())) == 2
    (record,) = rig.records()
    # BPF_PROG_TEST_RUN lends the program this namespace's lo.
    assert member(record, "ifindex") == socket.if_nametoindex("lo") == 1
    assert member(record, "netns") == Path("/proc/self/ns/net").stat().st_ino
    assert member(record, "ts_ns") > 0
    assert [member(record, name) for name in ("pid", "tid", "sock", "err")] == [0] * 4
    assert member(record, "comm") == bytes(16)


def test_full_ring_costs_rows_and_nothing_else(load: Callable[..., Rig]) -> None:
    small = load(ring_bytes=4096)
    frame = raw(ether() / ip4() / tcp())
    for _ in range(1000):
        assert small.runner.run(frame) == 2
    delivered = len(small.seen())
    assert 0 < delivered <= 4096 // RECORD.size
    assert small.books.read() == [(1000, 1000 - delivered)]
    # And it goes on as soon as there is room.
    assert small.see(frame) == fields()
