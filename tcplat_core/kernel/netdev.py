"""Network interfaces of a network namespace, and the XDP programs attached to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

_UP, _LOWER_UP = 1, 1 << 16
"""IFF_UP, IFF_LOWER_UP."""
_ETHERNET = (1, 772)
"""ARPHRD_ETHER and ARPHRD_LOOPBACK: both carry frames with an Ethernet header."""
_PROGRAMS = {
    "native": "IFLA_XDP_DRV_PROG_ID",
    "generic": "IFLA_XDP_SKB_PROG_ID",
    "offloaded": "IFLA_XDP_HW_PROG_ID",
}


@attrs.frozen
class Interface:
    """One interface.

    Args:
        index: Its index in its network namespace.
        name: Its name there.
        is_up: Whether it is up (IFF_UP).
        has_carrier: Whether its link is up too (IFF_LOWER_UP).
        is_ethernet: Whether its frames begin with an Ethernet header.
        xdp: XDP programs on it: mode -> id.
    """

    index: int
    name: str
    is_up: bool
    has_carrier: bool
    is_ethernet: bool
    xdp: Mapping[str, int]


def interfaces() -> list[Interface]:
    """Return all interfaces of this thread's network namespace."""
    # Imported here: it takes 0.1 s, and few runs need it.
    from pyroute2 import IPRoute  # noqa: PLC0415

    with IPRoute() as route:
        return [_interface(link) for link in route.link("dump")]


def _interface(link: Any) -> Interface:
    xdp = link.get_attr("IFLA_XDP")
    programs = {mode: xdp and xdp.get_attr(name) for mode, name in _PROGRAMS.items()}
    return Interface(
        link["index"],
        link.get_attr("IFLA_IFNAME"),
        bool(link["flags"] & _UP),
        bool(link["flags"] & _LOWER_UP),
        link["ifi_type"] in _ETHERNET,
        {mode: number for mode, number in programs.items() if number},
    )
