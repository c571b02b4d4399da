"""What xdp_port should report of a frame, implemented a second time, in Python.

Test code: short rather than fast, and checked against scapy itself.
"""

from __future__ import annotations

from .rig import ALWAYS_HAS, HAS_ACK, Fields

_VLAN = {b"\x81\x00", b"\x88\xa8", b"\x91\x00"}
_BY_EIGHT = {0, 43, 60, 135, 139, 140}
_FRAGMENT, _AUTHENTICATION, _TCP = 44, 51, 6
_JUMBO = b"\xc2\x04"
_MAPPED = bytes(10) + b"\xff\xff"


def parse(frame: bytes) -> Fields | None:
    """Return the packet in a frame; None if it has no valid TCP header."""
    at = 12
    for _ in range(4):
        if frame[at : at + 2] not in _VLAN:
            break
        at += 4
    kind, at = frame[at : at + 2], at + 2
    if kind == b"\x08\x00":
        found = _ipv4(frame, at)
    elif kind == b"\x86\xdd":
        found = _ipv6(frame, at)
    else:
        found = None
    if found is None:
        return None
    ip, saddr, daddr, at, left = found
    header = frame[at : at + 20]
    if len(header) < 20:
        return None
    words = (header[12] >> 4) * 4
    if words < 20 or words > left or at + words > len(frame):
        return None
    flags = header[13]
    has_ack = flags & 0x10
    return (
        ip,
        saddr,
        daddr,
        int.from_bytes(header[0:2], "big"),
        int.from_bytes(header[2:4], "big"),
        int.from_bytes(header[4:8], "big"),
        int.from_bytes(header[8:12], "big") if has_ack else 0,
        flags,
        left - words,
        ALWAYS_HAS | (HAS_ACK if has_ack else 0),
    )


_Found = tuple[int, bytes, bytes, int, int]
"""IP version, addresses, where the TCP header is, and how much there is from it on."""


def _ipv4(frame: bytes, at: int) -> _Found | None:
    header = frame[at : at + 20]
    if len(header) < 20 or header[0] >> 4 != 4 or header[9] != _TCP:
        return None
    if (header[6] & 0x1F) or header[7]:
        return None
    size, total = (header[0] & 15) * 4, header[2] << 8 | header[3]
    if size < 20 or total < size + 20:
        return None
    return 4, _MAPPED + header[12:16], _MAPPED + header[16:20], at + size, total - size


def _ipv6(frame: bytes, at: int) -> _Found | None:
    header = frame[at : at + 40]
    if len(header) < 40 or header[0] >> 4 != 6:
        return None
    length, kind = int.from_bytes(header[4:6], "big"), header[6]
    begin = at = at + 40
    for _ in range(8):
        if kind == _TCP:
            break
        extension = frame[at : at + 8]
        size = _size(kind, extension)
        if size is None:
            return None
        if kind == 0 and not length and extension[2:4] == _JUMBO:
            length = int.from_bytes(extension[4:8], "big")
            length = length if length > 0xFFFF else -1
        kind, at = extension[0], at + size
    left = length - (at - begin)
    if kind != _TCP or left < 20:
        return None
    return 6, header[8:24], header[24:40], at, left


def _size(kind: int, extension: bytes) -> int | None:
    """How long an extension header is; None for what ends the search."""
    if len(extension) < 8:
        return None
    if kind in _BY_EIGHT:
        return (extension[1] + 1) * 8
    if kind == _AUTHENTICATION:
        return (extension[1] + 2) * 4
    is_first = not extension[2] and not extension[3] & 0xF8
    return 8 if kind == _FRAGMENT and is_first else None
