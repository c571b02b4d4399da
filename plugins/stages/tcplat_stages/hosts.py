"""The bounds of times between hosts, in a capture merged from several hosts."""

from __future__ import annotations

import attrs

from tcplat_core import HOST_BITS, Merge

from .connection import Connection

_WIRES = frozenset({"wire", "wire_back", "syn", "synack"})


@attrs.define
class Hosts:
    """How far each host's clock may be wrong, against that of host 0 (ns)."""

    bounds: dict[int, int] = attrs.field(factory=dict)

    def learn(self, merge: Merge) -> None:
        """Add a host of the capture."""
        self.bounds[merge.host] = merge.bound_ns

    def wire_bound_ns(self, conn: Connection) -> int | None:
        """Return how far its wire times may be wrong; None where one clock stamped both ends."""
        if not self.bounds:
            return None
        ends = [
            netns >> HOST_BITS
            for netns in (conn.flows[0].tx_netns, conn.flows[0].rx_netns)
            if netns is not None
        ]
        if len(set(ends)) < 2:  # noqa: PLR2004 - one host
            return None
        return sum(self.bounds.get(host, 0) for host in ends)

    def worst_ns(self) -> int | None:
        """Return the bound for any two hosts; None where there is only one."""
        return sum(sorted(self.bounds.values())[-2:]) if self.bounds else None


def crosses(stage: str) -> bool:
    """Return whether a stage begins by one host's clock and ends by another's."""
    return len(_WIRES & set(stage.split("+"))) == 1
