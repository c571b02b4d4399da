"""Filters by process, address and time, which are compiled into the programs."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import attrs

from tcplat_core.errors import UsageError

MAPPED = 0xFFFF << 32
"""::ffff:0:0/96, as a number."""
_MOST_COMPARED = 4
"""Ports or networks of one list that are compared one by one. Each comparison is a branch, and
branches multiply in the verifier; a longer list is looked up in a map."""
_PORT_WORDS = 1 << 16 >> 6
"""64-bit words of tcplat_ports per list: a bit for each port."""

# Layouts of include/tcplat/filter.bpf.h.
_WORD = struct.Struct("=Q")
_INDEX = struct.Struct("=I")
_NETWORK = struct.Struct("=I16s")


@attrs.frozen(kw_only=True)
class Filter:
    """The filters of a run: all must match; within a list, any element.

    Args:
        pids: Process ids; None for all.
        comm: A process's name, or a prefix and ``*``.
        cgroup: Path below the cgroup2 mount, ``/system.slice/nginx.service``; its id
            (the folder's inode) and depth come with it.
        cgroup_id: See cgroup.
        ports: Ports of either side.
        lports: Local ports.
        rports: Remote ports.
        networks: Networks (CIDR) of either side's address.
        netns: Inode of a network namespace.
        netns_at: Its name as the user gave it; by default XDP programs are attached there.
        ip: 4 or 6.
        min_ns: Minimum duration, ns, of rows that have one.
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
        """Whether a filter depends on the process that owns a socket."""
        return self.pids is not None or bool(self.comm) or bool(self.cgroup)

    def and_pid(self, pid: int) -> Filter:
        """Return the same filter with one more process."""
        return attrs.evolve(self, pids=(*(self.pids or ()), pid))

    def defines(self) -> dict[str, int | str]:
        """Return the C constants for include/tcplat/filter.bpf.h."""
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
        if any(_is_long(ports) for ports in self._port_lists):
            defines["TCPLAT_FILTER_PORTS"] = len(self._port_lists) * _PORT_WORDS
        if _is_long(self.networks):
            defines["TCPLAT_FILTER_NETWORKS"] = 1
        defines["TCPLAT_FILTER_ADDRS(a)"] = self._addrs_test()
        return defines

    @property
    def _port_lists(self) -> tuple[tuple[int, ...], ...]:
        return self.ports, self.lports, self.rports

    def port_words(self) -> dict[bytes, bytes]:
        """Return the entries of tcplat_ports: a bit for each port of the long lists."""
        words: dict[int, int] = {}
        for number, ports in enumerate(self._port_lists):
            for port in ports if _is_long(ports) else ():
                at = number * _PORT_WORDS + (port >> 6)
                words[at] = words.get(at, 0) | 1 << (port & 63)
        return {_INDEX.pack(at): _WORD.pack(word) for at, word in words.items()}

    def network_keys(self) -> set[bytes]:
        """Return the keys of tcplat_networks; none if the list is short."""
        keys = set()
        for network in self.networks if _is_long(self.networks) else ():
            address, mask = network_and_mask(network)
            keys.add(_NETWORK.pack(mask.bit_count(), (address & mask).to_bytes(16, "big")))
        return keys

    def _addrs_test(self) -> str:
        tests = [
            _ports_test(0, self.ports, ("sport", "dport")),
            _ports_test(1, self.lports, ("sport",)),
            _ports_test(2, self.rports, ("dport",)),
            ["tcplat_in_networks(a)"]
            if _is_long(self.networks)
            else [_network_test(network) for network in self.networks],
            [f"(a)->netns == {self.netns}U"] if self.netns else [],
            [f"(a)->ip == {self.ip}"] if self.ip else [],
        ]
        return " && ".join(f"({' || '.join(any_of)})" for any_of in tests if any_of) or "1"

    def wants(self, pid: int, comm: bytes) -> bool:
        """Return whether the owner of an older socket passes; pid 0 is no process."""
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


def _is_long(wanted: Sequence[object]) -> bool:
    return len(wanted) > _MOST_COMPARED


def _ports_test(number: int, ports: Sequence[int], sides: Sequence[str]) -> list[str]:
    """Return alternative conditions; `number` is the index of the list in tcplat_ports."""
    if _is_long(ports):
        return [f"tcplat_has_port({number * _PORT_WORDS}, (a)->{side})" for side in sides]
    return [f"(a)->{side} == {port}" for port in ports for side in sides]


def _comm_test(pattern: str) -> str:
    name = os.fsencode(pattern)
    # Without a star the NUL after the name must match too.
    exact = name[:-1] if name.endswith(b"*") else (name + b"\0")[:16]
    return _bytes_test("(comm)", exact.ljust(16, b"\0"), (b"\xff" * len(exact)).ljust(16, b"\0"))


def _level(path: str) -> int:
    return len([part for part in path.split("/") if part])


def network_and_mask(text: str) -> tuple[int, int]:
    """Return address and mask of a network, as numbers of 16 bytes."""
    network = ipaddress.ip_network(text, strict=False)
    address, mask = int(network.network_address), int(network.netmask)
    if network.version == 4:  # noqa: PLR2004 - IPv4
        address, mask = MAPPED | address, ~0xFFFFFFFF & (1 << 128) - 1 | mask
    return address, mask


def _network_test(text: str) -> str:
    address, mask = (number.to_bytes(16, "big") for number in network_and_mask(text))
    return " || ".join(_bytes_test(f"(a)->{side}", address, mask) for side in ("saddr", "daddr"))


def _bytes_test(at: str, value: bytes, mask: bytes) -> str:
    """Return a condition on the 16 bytes at `at`: one branch, whatever the mask."""
    halves = []
    for half in (0, 1):
        # Little-endian, as both supported machines are.
        wanted, counts = (
            int.from_bytes(data[8 * half : 8 * half + 8], "little") for data in (value, mask)
        )
        if counts:
            word = f"((const u64 *){at})[{half}]"
            halves.append(f"(({word} & 0x{counts:x}ULL) ^ 0x{wanted & counts:x}ULL)")
    return f"!({' | '.join(halves)})" if halves else "1"


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
        UsageError: It is not a folder below a cgroup2 mount.
    """
    folder = Path(text).resolve()
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        mounted, _, kind = line.partition(" - ")
        point = Path(mounted.split()[4])
        if kind.startswith("cgroup2 ") and folder.is_dir() and folder.is_relative_to(point):
            return f"/{folder.relative_to(point)}".removesuffix("/.")
    raise UsageError(f"{text} is no folder below a cgroup2 mount (mount -t cgroup2)")
