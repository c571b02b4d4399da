"""Network interfaces: what there is in a network namespace, and what listens there already."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from .errors import TOO_MANY_FILES, UsageError
from .netns import NAMED, opened
from .owners import setns

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
        index: Its number in its network namespace.
        name: Its name there.
        is_up: Whether it is (IFF_UP).
        has_carrier: Whether it is up and its link, too (IFF_LOWER_UP).
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
    """All interfaces of the network namespace that this thread is in."""
    # Here and not at the top: it takes a tenth of a second, and few runs need it.
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


@contextlib.contextmanager
def inside(netns: str) -> Iterator[None]:
    """Have this thread live in a network namespace for a while.

    Args:
        netns: A name of ``ip netns``, a path or a process id; empty to stay.

    Raises:
        UsageError: There is none of that name.
    """
    if not netns:
        yield
        return
    with contextlib.ExitStack() as stack:
        home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, home)
        try:
            setns(stack.enter_context(opened(netns)))
        except OSError as error:
            if error.errno in TOO_MANY_FILES:
                raise
            raise UsageError(
                f"there is no network namespace {netns!r} ({error.strerror}); {_known()}"
            ) from error
        stack.callback(setns, home)
        yield


def _known() -> str:
    names = sorted(os.listdir(NAMED)) if NAMED.is_dir() else []
    if not names:
        return "ip netns has none, but a process id or a path will do as well"
    return f"ip netns has {', '.join(names)}"


def is_cut(link_fd: int) -> bool:
    """Whether the interface of an XDP link has gone. Needs neither root nor its namespace."""
    try:
        info = Path(f"/proc/self/fdinfo/{link_fd}").read_text(encoding="ascii")
    except OSError:  # before 5.14 not for a process that has given up root
        return False
    return any(line.split() == ["ifindex:", "0"] for line in info.splitlines())
