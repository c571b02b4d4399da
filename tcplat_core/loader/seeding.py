"""Enters sockets that are older than the run into the maps of the BPF programs."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence

import attrs

from tcplat_core.kernel import bpf
from tcplat_core.kernel.owners import CLIENT, LISTENER, Place, Seed, is_ending

from .filter import Filter

# Layouts of include/tcplat/store.bpf.h, listener.bpf.h, filter.bpf.h and flow.bpf.h.
_SEED = struct.Struct("=QIBBBB16s")
_PORT = struct.Struct("=16sIHBx")
_LISTENER = struct.Struct("=IIBBB5xQQ8x16s")
_SERVED_BY = struct.Struct("=II")
_SERVICE = struct.Struct("=8xBB6x16s")
_ADDRS = struct.Struct("=16s16sIHHB7x")
_FLOW = struct.Struct("=QQ")
_OLDER = 1 << 31
_SERVED, _SERVED_BY_DEVICE = 1, 2
_MAPPED = bytes(10) + b"\xff\xff"


_Owner = tuple[int, int, int, bytes]
"""Pid, 0 if unknown; whether it passes the filter, and would under any name; its name."""
_Wants = Callable[[int, bytes], bool]


def fill(maps: Mapping[str, int], seeds: Sequence[Seed], wanted: Filter, capacity: int) -> None:
    """Enter the sockets into tcplat_seeds, tcplat_flows, tcplat_listeners and tcplat_served.

    The processes that listen go into tcplat_listening and tcplat_services.

    Args:
        maps: Name -> fd.
        seeds: The sockets.
        wanted: The filter.
        capacity: Entries for which each map has space.
    """
    wants = functools.cache(wanted.wants)  # a process may hold 100,000 sockets
    asks = functools.cache(attrs.evolve(wanted, comm="").wants)
    listeners = _listeners(seeds, wants, asks)
    served: dict[int, int] = {}
    for seed in seeds:
        if seed.role != CLIENT:
            how = _SERVED_BY_DEVICE if seed.role == LISTENER and seed.device else _SERVED
            served[seed.lport] = max(how, served.get(seed.lport, 0))
    by_cookie: dict[bytes, bytes] = {}
    flows: dict[bytes, bytes] = {}
    for seed in seeds:
        comm = seed.comm[:15]
        owner = (seed.pid, int(wants(seed.pid, comm)), int(asks(seed.pid, b"")), comm)
        if seed.waiting:  # it belongs to its listener's process
            found = (listeners.get(_port(seed.netns, place)) for place in seed.accepted_at)
            owner = next((one.owner for one in found if one), owner)
            if served[seed.lport] == _SERVED_BY_DEVICE:
                owner = (0, owner[1], 0, b"")
        pid, is_wanted, asked, comm = owner
        by_cookie[struct.pack("=Q", seed.cookie)] = _SEED.pack(
            *(0, pid, seed.role, is_wanted, asked, int(seed.waiting), comm)
        )
        if seed.role == LISTENER:
            continue
        ip = 4 if seed.remote.startswith(_MAPPED) else 6
        addrs = (seed.local, seed.remote, seed.netns, seed.lport, seed.rport, ip)
        flows[_ADDRS.pack(*addrs)] = _FLOW.pack(0, seed.cookie)
    services: dict[bytes, bytes] = {}
    for seed in seeds:
        if seed.role == LISTENER and seed.pid:
            comm = seed.comm[:15]
            key = _SERVED_BY.pack(seed.pid, seed.lport)
            services[key] = _SERVICE.pack(wants(seed.pid, comm), asks(seed.pid, b""), comm)
    bpf.map_update_many(maps["tcplat_seeds"], list(by_cookie.items())[:capacity])
    # Keeps existing entries: a flow that began after attaching is already in the map.
    bpf.map_insert_many(maps["tcplat_flows"], list(flows.items())[:capacity])
    _enter_listening(maps["tcplat_listening"], {one.pid for one in seeds if one.role == LISTENER})
    bpf.map_update_many(maps["tcplat_services"], list(services.items()))
    bpf.map_update_many(
        maps["tcplat_listeners"], [(port, one.packed()) for port, one in listeners.items()]
    )
    bpf.map_update_many(
        maps["tcplat_served"],
        [(struct.pack("=I", port), bytes([how])) for port, how in sorted(served.items())],
    )


def _enter_listening(fd: int, pids: Iterable[int]) -> None:
    pids = sorted(pid for pid in pids if pid)
    keys = {pid: struct.pack("=I", pid | _OLDER) for pid in pids}
    bpf.map_update_many(fd, [(key, bytes(8)) for key in keys.values()])
    # tcplat_on_exit ran before the entry existed if the process has ended meanwhile.
    for pid in pids:
        if is_ending(pid):
            bpf.map_delete(fd, keys[pid])


def _port(netns: int, place: Place) -> bytes:
    ip, local, lport = place
    return _PORT.pack(local, netns, lport, ip)


@attrs.define
class _Listener:
    """The listeners of a port.

    Args:
        owner: The process; pid 0 if there are several.
        pids: The pid of each socket that listens there.
        inherited: Several processes hold one of these sockets.
    """

    owner: _Owner
    pids: list[int] = attrs.field(factory=list)
    inherited: bool = False

    def packed(self) -> bytes:
        pid, is_wanted, asked, comm = self.owner
        squares = sum(one * one for one in self.pids)
        flags = (is_wanted, asked, int(self.inherited))
        return _LISTENER.pack(pid, len(self.pids), *flags, sum(self.pids), squares, comm)


def _listeners(seeds: Sequence[Seed], wants: _Wants, asks: _Wants) -> dict[bytes, _Listener]:
    """Return the listeners by port."""
    found: dict[bytes, _Listener] = {}
    for seed in seeds:
        if seed.role != LISTENER:
            continue
        pid, comm = (0, b"") if seed.others else (seed.pid, seed.comm[:15])
        asked = int(asks(pid, b""))
        port = _port(seed.netns, seed.listens_at)
        listener = found.setdefault(port, _Listener((pid, 1, asked, comm)))
        known, all_wanted, _, comm = listener.owner
        all_wanted &= all(
            wants(one, name[:15]) for one, name in ((seed.pid, seed.comm), *seed.others)
        )
        same = known == pid
        listener.owner = (pid, all_wanted, asked, comm) if same else (0, all_wanted, 0, b"")
        listener.pids.append(seed.pid)
        listener.inherited |= bool(seed.others)
    return found
