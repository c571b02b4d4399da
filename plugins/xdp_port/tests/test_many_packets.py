"""Frames by the million: each passes unchanged, and is read as the references read it.

TCPLAT_FRAMES is how many mutated frames there are (a million with TCPLAT_LONG=1, else a tenth),
TCPLAT_SEED where they begin.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, IPOption_NOP
from scapy.layers.inet6 import IPv6, _IPv6ExtHdr
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

from .reference import parse
from .rig import ALWAYS_HAS, HAS_ACK, Fields, Rig
from .test_packets import (
    AUTHENTICATION,
    NOT_REPORTED,
    REPORTED,
    chain,
    extension,
    ip4,
    raw,
    tags,
)

pytestmark = pytest.mark.slow

LONG = os.environ.get("TCPLAT_LONG") == "1"
FRAMES = int(os.environ.get("TCPLAT_FRAMES", "1000000" if LONG else "100000"))
SEED = int(os.environ.get("TCPLAT_SEED", "1"))
BATCH = 4096
"""So many rows fit into the ring."""


def by_scapy(frame: bytes) -> Fields | None:
    """Return what scapy finds in a whole frame; None if it finds no TCP."""
    packet: Packet = Ether(frame)
    layer = packet.payload
    while isinstance(layer, Dot1Q | Dot1AD):
        layer = layer.payload
    ip = layer
    while isinstance(layer, IP | IPv6 | _IPv6ExtHdr) and not isinstance(layer.payload, IP | IPv6):
        layer = layer.payload
    if not isinstance(layer, TCP):
        return None
    length = ip.len if isinstance(ip, IP) else 40 + (ip.plen or 1 << 32)
    if len(ip.original) < length:
        return None  # it counts the bytes that there are
    if isinstance(ip, IP):
        ends = [b"\0" * 10 + b"\xff\xff" + socket.inet_aton(one) for one in (ip.src, ip.dst)]
    else:
        ends = [socket.inet_pton(socket.AF_INET6, one) for one in (ip.src, ip.dst)]
    has_ack = "A" in layer.flags
    return (
        *(ip.version, *ends, layer.sport, layer.dport, layer.seq),
        *(layer.ack if has_ack else 0, int(layer.flags) & 0xFF),  # scapy counts NS among them
        *(len(layer.original) - layer.dataofs * 4, ALWAYS_HAS | (HAS_ACK if has_ack else 0)),
    )


# --- well-formed frames, made by scapy

_PORT = st.one_of(st.just(9999), st.integers(0, 65535))
_WORD = st.integers(0, 2**32 - 1)
_EXTENSION = st.one_of(
    st.just(AUTHENTICATION),
    st.just(extension(44)),
    st.builds(extension, st.sampled_from([0, 60, 135, 139, 140]), st.integers(0, 20)),
    # Routing of type 0 has whole addresses (RFC 2460, 4.4); of half a one scapy makes TCP's header.
    st.builds(extension, st.just(43), st.integers(0, 10).map(lambda addresses: 2 * addresses)),
)


@st.composite
def _segments(draw: Any) -> Packet:
    options = draw(st.integers(0, 40))
    return TCP(
        sport=draw(_PORT),
        dport=draw(_PORT),
        seq=draw(_WORD),
        ack=draw(_WORD),
        flags=draw(st.integers(0, 255)),
        options=[("NOP", None)] * options,
    ) / Raw(draw(st.binary(max_size=100)))


@st.composite
def _frames(draw: Any) -> tuple[bytes, Packet]:
    """Return a frame, and the segment in it."""
    segment = draw(_segments())
    vlans = tags(*draw(st.lists(st.sampled_from([0x8100, 0x88A8, 0x9100]), max_size=4)))
    if draw(st.booleans()):
        packet = ip4(
            options=[IPOption_NOP()] * draw(st.integers(0, 40)),
            flags=draw(st.sampled_from(["", "DF", "MF"])),
            tos=draw(st.integers(0, 255)),
        )
        frame = bytes(vlans / packet / segment)
    else:
        whole = chain(*draw(st.lists(_EXTENSION, max_size=8)), final=segment)
        vlans.lastlayer().type = 0x86DD
        frame = bytes(vlans) + whole[14:]
    return frame + bytes(draw(st.integers(0, 50))), segment


@settings(
    max_examples=2000 if LONG else 200,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
@given(made=_frames())
def test_scapy_frames_are_read_as_the_reference_reads_them(
    rig: Rig, made: tuple[bytes, Packet]
) -> None:
    frame, segment = made
    seen = rig.see(frame)
    if 9999 not in (segment.sport, segment.dport):
        assert seen is None
        return
    assert seen is not None
    assert seen == parse(frame)
    assert by_scapy(frame) in (None, seen)
    assert seen[3:6] == (segment.sport, segment.dport, segment.seq)
    assert seen[6] == (segment.ack if seen[7] & 16 else 0)
    assert seen[7] == int(segment.flags)
    assert seen[8] == len(segment.payload)


# --- mutated frames

_TELLING = bytes([0, 1, 2, 4, 5, 6, 15, 0x40, 0x45, 0x46, 0x4F, 0x50, 0x60, 0xF0, 0x80, 0xFF])
_TELLING += bytes([0x81, 0x88, 0xA8, 0x91, 0x08, 0x86, 0xDD, 43, 44, 50, 51, 59, 60, 135, 140])


def mutated(templates: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """Frames that are nearly valid."""
    random_ = random.Random(seed)  # noqa: S311 - the same frames each time
    pick, below, bits = random_.choice, random_.randrange, random_.getrandbits
    for _ in range(count):
        frame = bytearray(pick(templates))
        for _ in range(1 + below(3)):
            # The kernel takes none that is shorter than its Ethernet header.
            frame = frame.ljust(15, b"\0")
            what, size = below(16), len(frame)
            if what < 5:
                frame[below(min(size, 110))] = pick(_TELLING)
            elif what < 8:
                frame[below(min(size, 110))] = bits(8)
            elif what < 11:
                frame[below(min(size, 110))] ^= 1 << bits(3)
            elif what == 11:
                del frame[14 + below(size - 14) :]
            elif what == 12:
                frame[12:12] = pick((b"\x81\0\0\1", b"\x88\xa8\0\1", b"\x91\0\0\1"))
            elif what == 13:
                at = below(size)
                frame[at:at] = bits(64).to_bytes(8, "big")
            elif what == 14:
                at = 12 + below(size - 12)
                del frame[at : at + 1 + below(8)]
            else:
                other = pick(templates)
                at = below(min(size, len(other)))
                frame[at:] = other[at:]
        yield bytes(frame.ljust(15, b"\0"))


def templates() -> list[bytes]:
    """All frames with a name, but for the very long ones."""
    named = [raw(frame) for frame, _ in REPORTED.values()] + list(map(raw, NOT_REPORTED.values()))
    return [frame for frame in named if len(frame) <= 1500]


@pytest.mark.timeout(1200)
def test_mutated_frames_are_read_as_the_references_read_them(
    everything: Rig, measured: Callable[[str], None]
) -> None:
    """Every frame through kernel and reference, one in 50 reported ones through scapy as well."""
    run, seen = everything.runner.run, everything.seen
    reported = asked = 0
    batch: list[bytes] = []

    def check() -> None:
        nonlocal reported, asked
        wanted = [(parse(frame), frame) for frame in batch]
        expected = [(found, frame) for found, frame in wanted if found]
        found = seen()
        for got, (want, frame) in zip(found, expected, strict=False):
            assert got == want, frame.hex()
        assert len(found) == len(expected)
        reported += len(found)
        for got, (_, frame) in list(zip(found, expected, strict=True))[::50]:
            shown = by_scapy(frame)
            asked += shown is not None
            assert shown in (None, got), frame.hex()
        batch.clear()

    for frame in mutated(templates(), FRAMES, SEED):
        assert run(frame) == 2, frame.hex()
        batch.append(frame)
        if len(batch) == BATCH:
            check()
    check()
    assert everything.books.dropped() == 0
    assert reported > FRAMES // 4
    measured(f"{FRAMES} frames, {reported} reported, {asked} of them compared with scapy")
