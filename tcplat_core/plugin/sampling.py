"""Which connections have rows, with ``--sample``: include/tcplat/hash.bpf.h in Python."""

from __future__ import annotations

import ipaddress
from collections import deque
from typing import Annotated

import attrs
import msgspec

from tcplat_core.event.fields import Count

_MOST_CHANGES = 1 << 10
"""Most changes of the share that are kept; a request seldom lasts longer than ten of them."""
MOST = 1 << 20
"""Largest N of ``--sample 1/N``."""
_64 = (1 << 64) - 1
_MAPPED = 0xFFFF << 32


ALL = (1, 1)
"""Least and greatest `one_in` of a run without --sample."""
OneIn = Annotated[int, msgspec.Meta(ge=1, le=MOST)]


@attrs.frozen
class Sampled:
    """From here on, the rows are those of one connection in `one_in`.

    The two ends decide which ones, so that both hosts decide alike, and a connection that is in a
    smaller share is in every larger one. Rows that belong to no connection are all there.

    Args:
        one_in: 1 for all connections.
        since_ns: The first instant (CLOCK_MONOTONIC) at which the share holds; 0: from the first
            row on.
        host: Number of the host in a merged capture, else 0.
    """

    one_in: OneIn
    since_ns: Count = 0
    host: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)] = 0


@attrs.define
class Shares:
    """All shares of a run or a capture so far: the least and the greatest `one_in`.

    Attributes:
        one_in: The two; None before the first Sampled.
    """

    one_in: tuple[int, int] | None = None
    _since: deque[tuple[int, int]] = attrs.field(factory=deque, init=False)
    """Since when which share holds: the latest ones, in order."""

    def add(self, share: Sampled) -> None:
        """Take one."""
        own = share.one_in, share.one_in
        if self.one_in is None and share.since_ns:
            self.one_in = ALL  # until then
        self.one_in = own if self.one_in is None else both(self.one_in, own)
        if len(self._since) == _MOST_CHANGES:
            self._since.popleft()
        self._since.append((share.since_ns, share.one_in))

    def weight(self, began_ns: int, ended_ns: int) -> int:
        """Return for how many requests one stands that lasted from one instant to another.

        It is whole in the rows only if its connection was in each share meanwhile.
        """
        one_in = 1
        for since_ns, share in reversed(self._since):
            if since_ns <= ended_ns:
                one_in = max(one_in, share)
            if since_ns <= began_ns:
                break
        return one_in

    @property
    def text(self) -> str:
        """``1/64``, or ``1/1 to 1/64``; empty if all connections have rows."""
        return share_text(*self.one_in) if self.one_in not in (None, ALL) else ""

    def union(self, reported: tuple[int, int] | None) -> tuple[int, int]:
        """Return these and those that a report has; None: there was no report."""
        if self.one_in is None or reported is None:
            return self.one_in or reported or ALL
        return both(self.one_in, reported)


def both(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """Return the least and the greatest of two shares."""
    return min(one[0], other[0]), max(one[1], other[1])


def share_text(least: int, greatest: int = 0) -> str:
    """Return ``1/64``, or ``1/1 to 1/64``."""
    return f"1/{least}" if greatest in (0, least) else f"1/{least} to 1/{greatest}"


def connection_hash(saddr: str, sport: int, daddr: str, dport: int) -> int:
    """Return a connection's number, from 1 to 2^32 - 1: the same if its ends are swapped.

    Args:
        saddr: IPv4 or IPv6 address; ``::ffff:1.2.3.4`` is 1.2.3.4.
        sport: Its port.
        daddr: The other end's address.
        dport: The other end's port.

    Raises:
        ValueError: It is no address.
    """
    return (_mixed(_end(saddr, sport) + _end(daddr, dport)) >> 32) or 1


def is_in_share(number: int, one_in: int) -> bool:
    """Return whether the connection with this connection_hash() is in a share of 1/`one_in`."""
    return not number * one_in >> 32


def _end(address: str, port: int) -> int:
    parsed = ipaddress.ip_address(address)
    number = int(parsed) if parsed.version == 6 else _MAPPED | int(parsed)  # noqa: PLR2004 - IPv6
    data = number.to_bytes(16, "big")
    first, second = int.from_bytes(data[:8], "little"), int.from_bytes(data[8:], "little")
    return _mixed((first * 0x9E3779B97F4A7C15 ^ second) + port * 0xD1B54A32D192ED03)


def _mixed(number: int) -> int:
    """Return the finalizer of MurmurHash3, of 64 bits."""
    number &= _64
    number ^= number >> 33
    number = number * 0xFF51AFD7ED558CCD & _64
    number ^= number >> 33
    number = number * 0xC4CEB9FE1A85EC53 & _64
    return number ^ number >> 33
