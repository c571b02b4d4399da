"""Tells the programs in the kernel about the sockets that were there before them."""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Mapping

from tcplat_core.filters import Filter
from tcplat_core.owners import CLIENT, LISTENER, Seed

from . import bpf

# Layouts of include/tcplat/owner.bpf.h.
_SEED = struct.Struct("=IBBxx16s")
_PORT = struct.Struct("=IHxx")
_LISTENER = struct.Struct("=IIB7x16s")
_ADDRS = struct.Struct("=16s16sIHHB7x")
_FLOW = struct.Struct("=QQ")
_MAPPED = bytes(10) + b"\xff\xff"


def fill(maps: Mapping[str, int], seeds: Iterable[Seed], wanted: Filter, room: int) -> None:
    """Enter the sockets into tcplat_seeds, tcplat_flows, tcplat_listeners and tcplat_served.

    Args:
        maps: Name -> fd.
        seeds: The sockets.
        wanted: Whose sockets are wanted.
        room: Entries that the maps have.
    """
    by_cookie: dict[bytes, bytes] = {}
    flows: dict[bytes, bytes] = {}
    listeners: dict[bytes, tuple[int, int, int, bytes]] = {}
    served: set[int] = set()
    wants = functools.cache(wanted.wants)  # a process may hold 100,000 sockets
    # Listeners first: what waits to be accepted there is theirs.
    for seed in sorted(seeds, key=lambda seed: seed.role != LISTENER):
        comm = seed.comm[:15]
        owner: tuple[int, int, bytes] = (seed.pid, wants(seed.pid, comm), comm)
        port = _PORT.pack(seed.netns, seed.lport)
        if seed.waiting and port in listeners:
            pid, _, is_wanted, comm = listeners[port]
            owner = (pid, is_wanted, comm if pid else b"")
        by_cookie[struct.pack("=Q", seed.cookie)] = _SEED.pack(owner[0], seed.role, *owner[1:])
        if seed.role != CLIENT:
            served.add(seed.lport)
        if seed.role == LISTENER:
            pid = 0 if seed.others else seed.pid
            known, users, all_wanted, _ = listeners.get(port, (pid, 0, 1, b""))
            all_wanted &= wants(seed.pid, comm)
            all_wanted &= all(wants(pid, comm[:15]) for pid, comm in seed.others)
            listeners[port] = (pid if known == pid else 0, users + 1, all_wanted, comm)
            continue
        ip = 4 if seed.remote.startswith(_MAPPED) else 6
        addrs = (seed.local, seed.remote, seed.netns, seed.lport, seed.rport, ip)
        flows[_ADDRS.pack(*addrs)] = _FLOW.pack(0, seed.cookie)
    entries = [(port, _LISTENER.pack(*listener)) for port, listener in listeners.items()]
    bpf.map_update_many(maps["tcplat_seeds"], list(by_cookie.items())[:room])
    bpf.map_update_many(maps["tcplat_flows"], list(flows.items())[:room])
    bpf.map_update_many(maps["tcplat_listeners"], entries)
    bpf.map_update_many(
        maps["tcplat_served"], [(struct.pack("=I", port), b"\1") for port in sorted(served)]
    )
