"""Who and what is wanted: constants that are compiled into the programs, and the same for rows."""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from .errors import UsageError
from .netns import inode

if TYPE_CHECKING:
    from .schema import Event

# The loader needs filters, and not what makes rows: that is imported where it is used.

_MOST_PIDS = 1 << 22
"""No process has a higher number; inodes of namespaces begin at 0xF0000000."""
_MAPPED = 0xFFFF << 32
"""::ffff:0:0/96, as a number."""


@attrs.frozen(kw_only=True)
class Filter:
    """All of these must hold; within one, any.

    Args:
        pids: Processes; None for all.
        comm: A process's name, or its beginning and ``*``.
        cgroup: Path below the cgroup2 mount, ``/system.slice/nginx.service``; its id
            (the folder's inode) and depth come with it.
        cgroup_id: See cgroup.
        ports: Either side's.
        lports: The local side's.
        rports: The remote side's.
        networks: Either side's address, CIDR.
        netns: Inode of a network namespace.
        netns_at: What the user called it; XDP programs go there unless told otherwise.
        ip: 4 or 6.
        min_ns: Rows that carry a duration need at least so much.
    """

    pids: tuple[int, ...] | None = None
    comm: str = ""
    cgroup: str = ""
    cgroup_id: int = 0
    ports: tuple[int, ...] = ()
    lports: tuple[int, ...] = ()
    rports: tuple[int, ...] = ()
    networks: tuple[str, ...] = ()
    netns: int = 0
    netns_at: str = ""
    ip: int = 0
    min_ns: int = 0

    @property
    def by_task(self) -> bool:
        """Whether it matters which process owns a socket."""
        return self.pids is not None or bool(self.comm) or bool(self.cgroup)

    def and_pid(self, pid: int) -> Filter:
        """The same with one more process."""
        return attrs.evolve(self, pids=(*(self.pids or ()), pid))

    def defines(self) -> dict[str, int | str]:
        """C constants for include/tcplat/filter.bpf.h."""
        defines: dict[str, int | str] = {"TCPLAT_MIN_NS": self.min_ns}
        if self.by_task:
            defines["TCPLAT_FILTER_TASK"] = 1
        if self.pids is not None:
            defines["TCPLAT_FILTER_PID"] = 1
        if self.comm:
            defines["TCPLAT_FILTER_COMM(comm)"] = _comm_test(self.comm)
        if self.cgroup:
            defines["TCPLAT_FILTER_CGROUP"] = f"{self.cgroup_id}ULL"
            defines["TCPLAT_FILTER_CGROUP_LEVEL"] = _level(self.cgroup)
        defines["TCPLAT_FILTER_ADDRS(a)"] = self._addrs_test()
        return defines

    def _addrs_test(self) -> str:
        both = [f"((a)->sport == {port} || (a)->dport == {port})" for port in self.ports]
        tests = [
            both,
            [f"(a)->sport == {port}" for port in self.lports],
            [f"(a)->dport == {port}" for port in self.rports],
            [_network_test(network) for network in self.networks],
            [f"(a)->netns == {self.netns}U"] if self.netns else [],
            [f"(a)->ip == {self.ip}"] if self.ip else [],
        ]
        return " && ".join(f"({' || '.join(any_of)})" for any_of in tests if any_of) or "1"

    def wants(self, pid: int, comm: bytes) -> bool:
        """Whether the owner of an older socket passes; pid 0 is nobody."""
        if not self.by_task:
            return True
        if not pid or (self.pids is not None and pid not in self.pids):
            return False
        wanted = os.fsencode(self.comm)
        if wanted.endswith(b"*"):
            if not comm.startswith(wanted[:-1]):
                return False
        elif wanted and comm != wanted:
            return False
        return not self.cgroup or _in_cgroup(pid, self.cgroup)


def _comm_test(pattern: str) -> str:
    letters = os.fsencode(pattern)
    # Without a star the NUL behind the name has to match as well.
    exact = letters[:-1] if letters.endswith(b"*") else (letters + b"\0")[:16]
    return " && ".join(f"(u8)(comm)[{at}] == {byte}" for at, byte in enumerate(exact)) or "1"


def _level(path: str) -> int:
    return len([part for part in path.split("/") if part])


def _network(text: str) -> tuple[int, int]:
    """Address and mask, of 16 bytes."""
    network = ipaddress.ip_network(text, strict=False)
    address, mask = int(network.network_address), int(network.netmask)
    if network.version == 4:  # noqa: PLR2004 - IPv4
        address, mask = _MAPPED | address, ~0xFFFFFFFF & (1 << 128) - 1 | mask
    return address, mask


def _network_test(text: str) -> str:
    address, mask = _network(text)
    tests = []
    for side in ("saddr", "daddr"):
        halves = [
            f"(((const u64 *)(a)->{side})[{half}] & {_half(mask, half)}) == {_half(address, half)}"
            for half in (0, 1)
        ]
        tests.append(f"({' && '.join(halves)})")
    return f"({' || '.join(tests)})"


def _half(number: int, half: int) -> str:
    """Eight of the sixteen bytes, as a number that this machine's memory order makes of them."""
    data = number.to_bytes(16, "big")[8 * half : 8 * half + 8]
    return f"0x{int.from_bytes(data, 'little'):x}ULL"


def _in_cgroup(pid: int, path: str) -> bool:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines():
            if line.startswith("0::"):
                own = line[3:].rstrip("/") + "/"
                return own.startswith(path.rstrip("/") + "/")
    return False


_MOST_OWNERS = 1 << 18
"""Connections whose owner is remembered for the sake of their packets."""


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
    """Namespace and addresses, local first -> whether the owner is wanted."""
    _inside: dict[str, bool] = attrs.field(factory=dict, init=False)
    """Address -> whether it is in one of the networks."""
    _latencies: dict[type[Event], list[str]] = attrs.field(factory=dict, init=False)
    _networks: list[tuple[int, int]] = attrs.field(init=False)

    _pattern: str = attrs.field(init=False)
    """`comm` as rows carry it: escaped."""

    def __attrs_post_init__(self) -> None:
        from .schema import text  # noqa: PLC0415 - see the top

        self._networks = list(map(_network, self.wanted.networks))
        self._pattern = text(os.fsencode(self.wanted.comm.removesuffix("*")))

    def learn(self, rows: Iterable[Event]) -> None:
        """Remember whose the connections are."""
        for row in rows:
            if row.sock and row.sport and row.dport:
                ends = (row.netns, row.saddr, row.sport, row.daddr, row.dport)
                if ends not in self._owners and len(self._owners) >= _MOST_OWNERS:
                    del self._owners[next(iter(self._owners))]
                self._owners[ends] = self._wants_owner(row)

    def passes(self, row: Event) -> bool:
        """Whether it is wanted."""
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
        number = int(parsed) if parsed.version == 6 else _MAPPED | int(parsed)  # noqa: PLR2004 - IPv6
        return any(number & mask == network for network, mask in self._networks)

    def _too_fast(self, row: Event) -> bool:
        event = type(row)
        if event not in self._latencies:
            from .schema import latencies  # noqa: PLC0415 - see the top

            self._latencies[event] = latencies(event)
        took = (getattr(row, name) for name in self._latencies[event])
        return any(us is not None and round(us * 1000) < self.wanted.min_ns for us in took)

    def _wants_owner(self, row: Event) -> bool:
        wanted = self.wanted
        # A process outside the PID namespace of the run has a name and no number.
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


def netns_recorded(text: str) -> int:
    """The same for rows of before: the inode's number will do, the namespace may be gone.

    Raises:
        UsageError: It is no number, and there is no such namespace.
    """
    if text.isdecimal() and int(text) > _MOST_PIDS:
        return int(text)
    return inode(text)


def cgroup_path(text: str) -> str:
    """A folder below the cgroup2 mount, as the path that the kernel calls it by.

    Raises:
        UsageError: It is no folder there.
    """
    folder = Path(text).resolve()
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        mounted, _, kind = line.partition(" - ")
        point = Path(mounted.split()[4])
        if kind.startswith("cgroup2 ") and folder.is_dir() and folder.is_relative_to(point):
            return f"/{folder.relative_to(point)}".removesuffix("/.")
    raise UsageError(f"{text} is no folder below a cgroup2 mount (mount -t cgroup2)")
