"""Who and what is wanted: constants that are compiled into the programs."""

from __future__ import annotations

import contextlib
import ipaddress
import os
from pathlib import Path

import attrs

from tcplat_core.errors import UsageError

MAPPED = 0xFFFF << 32
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
        """Return the same filter with one more process."""
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


def network_and_mask(text: str) -> tuple[int, int]:
    """Address and mask, of 16 bytes."""
    network = ipaddress.ip_network(text, strict=False)
    address, mask = int(network.network_address), int(network.netmask)
    if network.version == 4:  # noqa: PLR2004 - IPv4
        address, mask = MAPPED | address, ~0xFFFFFFFF & (1 << 128) - 1 | mask
    return address, mask


def _network_test(text: str) -> str:
    address, mask = network_and_mask(text)
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


def cgroup_path(text: str) -> str:
    """Return the kernel's path of a folder below the cgroup2 mount.

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
