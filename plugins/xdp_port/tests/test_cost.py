"""What a packet that nobody asked for costs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from scapy.layers.inet import UDP
from scapy.layers.l2 import ARP, Dot1Q
from scapy.packet import Packet, Raw

from tcplat_core.loader import bpf

from .rig import RETURN_PASS, Rig, Runner
from .test_packets import ether, ip4, ip6, raw, tcp

LIMIT_NS = 15
ROUNDS = 40

BORING: dict[str, Packet] = {
    "tcp of another port": ether() / ip4() / tcp(1000, dport=443),
    "tcp of another port, ipv6": ether() / ip6() / tcp(1000, dport=443),
    "tcp of another port, in a vlan": ether() / Dot1Q(vlan=1) / ip4() / tcp(1000, dport=443),
    "udp": ether() / ip4() / UDP(sport=53, dport=53) / Raw(bytes(100)),
    "arp": ether() / ARP(psrc="192.0.2.1", pdst="192.0.2.2", hwsrc="02:00:00:00:00:01"),
}


@pytest.fixture(scope="module")
def empty(load: Callable[..., Rig]) -> Iterator[Runner]:
    """A program that returns XDP_PASS and does nothing else."""
    del load  # it has seen to it that we may
    program = bpf.program_load("empty", bpf.ProgramType.XDP, RETURN_PASS)
    yield Runner(program)
    os.close(program)


@pytest.mark.parametrize("ports", [1, 2, 32])
@pytest.mark.parametrize("name", BORING)
def test_a_boring_packet_costs_little(
    load: Callable[..., Rig],
    empty: Runner,
    measured: Callable[[str], None],
    name: str,
    ports: int,
) -> None:
    """The best of several rounds each: other programs on this machine only add to the time."""
    runner = load(port="+".join(str(9000 + port) for port in range(ports))).runner
    frame = raw(BORING[name])
    with_us, without = [], []
    for _ in range(ROUNDS):
        with_us.append(runner.cost_ns(frame))
        without.append(empty.cost_ns(frame))
        if len(with_us) > 4 and min(with_us) - min(without) <= LIMIT_NS:
            break
    measured(f"{name}, ports: {ports}: {min(with_us)} ns, an empty program {min(without)} ns")
    assert min(with_us) - min(without) <= LIMIT_NS
