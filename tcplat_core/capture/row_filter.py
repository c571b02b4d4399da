"""Filters rows of a capture as the kernel would have filtered them."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable

import attrs

from tcplat_core.event.fields import Event, latencies
from tcplat_core.event.text import text
from tcplat_core.loader.filter import MAPPED, Filter, network_and_mask

_MOST_OWNERS = 1 << 18
"""Most connections whose owner is kept, to filter their packets."""


@attrs.define(eq=False)
class RowFilter:
    """A filter for rows that were recorded without it: what the kernel would have let pass.

    Packets (``sock`` is 0) have two ends, and which of them is the local one is not
    known: either will do. ``rx_ip`` knows, it is the receiver's, and ``nic_tx`` the sender's.
    A packet that carries no process is its connection's: let learn() see the rows around it first.
    ``--cgroup`` is not in a row.
    """

    wanted: Filter
    _owners: dict[tuple[object, ...], bool] = attrs.field(factory=dict, init=False)
    """Namespace and addresses, local first -> whether the owner passes."""
    _inside: dict[str, bool] = attrs.field(factory=dict, init=False)
    """Address -> whether it is in one of the networks."""
    _latencies: dict[type[Event], list[str]] = attrs.field(factory=dict, init=False)
    _networks: list[tuple[int, int]] = attrs.field(init=False)

    _pattern: str = attrs.field(init=False)
    """`comm` of the filter, escaped as in rows."""

    def __attrs_post_init__(self) -> None:
        self._networks = list(map(network_and_mask, self.wanted.networks))
        self._pattern = text(os.fsencode(self.wanted.comm.removesuffix("*")))

    def learn(self, rows: Iterable[Event]) -> None:
        """Record the owners of connections, for their packets."""
        for row in rows:
            if row.sock and row.sport and row.dport:
                ends = (row.netns, row.saddr, row.sport, row.daddr, row.dport)
                if ends not in self._owners and len(self._owners) >= _MOST_OWNERS:
                    del self._owners[next(iter(self._owners))]
                self._owners[ends] = self._wants_owner(row)

    def passes(self, row: Event) -> bool:
        """Return whether a row passes."""
        wanted = self.wanted
        if (wanted.ip and row.ip != wanted.ip) or (wanted.netns and row.netns != wanted.netns):
            return False
        local, remote = row.sport, row.dport
        if row.point == "rx_ip":
            local, remote = remote, local
        if not self._passes_ends(local, remote) and (
            row.sock or row.point in ("rx_ip", "nic_tx") or not self._passes_ends(remote, local)
        ):
            return False
        if wanted.networks and not (self._is_inside(row.saddr) or self._is_inside(row.daddr)):
            return False
        if wanted.min_ns and self._too_fast(row):
            return False
        return not wanted.by_task or self._wants_owner(row) or self._wants_packet(row)

    def _passes_ends(self, local: int | None, remote: int | None) -> bool:
        wanted = self.wanted
        return (
            (not wanted.ports or local in wanted.ports or remote in wanted.ports)
            and (not wanted.lports or local in wanted.lports)
            and (not wanted.rports or remote in wanted.rports)
        )

    def _is_inside(self, address: str) -> bool:
        inside = self._inside.get(address)
        if inside is None:
            if len(self._inside) >= _MOST_OWNERS:
                self._inside.clear()
            inside = self._inside[address] = self._find(address)
        return inside

    def _find(self, address: str) -> bool:
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        number = int(parsed) if parsed.version == 6 else MAPPED | int(parsed)  # noqa: PLR2004 - IPv6
        return any(number & mask == network for network, mask in self._networks)

    def _too_fast(self, row: Event) -> bool:
        event = type(row)
        if event not in self._latencies:
            self._latencies[event] = latencies(event)
        took = (getattr(row, name) for name in self._latencies[event])
        return any(us is not None and round(us * 1000) < self.wanted.min_ns for us in took)

    def _wants_owner(self, row: Event) -> bool:
        wanted = self.wanted
        # A process outside the run's PID namespace has a name and no pid.
        if not row.pid and (wanted.pids is not None or not row.comm):
            return False
        if wanted.pids is not None and row.pid not in wanted.pids:
            return False
        if not wanted.comm:
            return True
        comm = row.comm or ""
        if wanted.comm.endswith("*"):
            return comm.startswith(self._pattern)
        return comm == self._pattern

    def _wants_packet(self, row: Event) -> bool:
        if row.sock or row.pid or row.point == "rx_ip":
            return False
        there = (row.netns, row.saddr, row.sport, row.daddr, row.dport)
        back = (row.netns, row.daddr, row.dport, row.saddr, row.sport)
        return self._owners.get(there, False) or self._owners.get(back, False)
