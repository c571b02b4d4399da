"""Finds the owning process of each TCP socket that is older than the run.

The kernel has no such list. sock_diag names each socket's inode and cookie,
/proc/PID/fd names the inodes that a process holds; joined, they say which cookie
belongs to which process. The loader passes the result to the BPF programs,
which can read a socket's cookie.

This is own netlink code, because pyroute2 takes 100 µs per socket: 10 s on a
host with 100,000 sockets.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs

from .netns import of_process, setns
from .rights import lacking

CLIENT, SERVER, LISTENER = 1, 2, 3
"""As TCPLAT_ROLE_* in include/tcplat/store.bpf.h."""
IPV4, IPV6, BOTH = 4, 6, 0
"""As `ip` of struct tcplat_port in include/tcplat/listener.bpf.h."""

_LISTEN = 10
_OPEN = (1, 8)
"""ESTABLISHED and CLOSE_WAIT. An orphaned socket has no inode either, but is in other states."""
_WITH_A_SOCKET = 0xFFF & ~(1 << 6)
"""inet_diag states: all but TIME_WAIT and NEW_SYN_RECV (12), which are no full sockets."""
_MAPPED = bytes(10) + b"\xff\xff"
_SKV6ONLY = 11
"""INET_DIAG_SKV6ONLY, an attribute of listening sockets."""
_ATTRIBUTE = struct.Struct("=HH")
_NLMSG = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBxI48x")
"""struct inet_diag_req_v2: family, protocol, extensions, states, an empty socket id."""
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_DUMP_REQUEST = 0x301
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_PF_EXITING = 4


@attrs.frozen
class Seed:
    """One socket.

    Args:
        cookie: The kernel's identifier of the socket (SO_COOKIE).
        role: CLIENT, SERVER or LISTENER.
        pid: Its owner; 0 if no process holds it.
        comm: The owner's name.
        others: Pids and names of the other processes that hold it.
        waiting: It is in the accept queue.
        netns: Inode of its network namespace.
        local: Its address, 16 bytes; IPv4 is mapped.
        remote: Address of the peer.
        lport: Its port.
        rport: Port of the peer.
        ip: 4 or 6; BOTH for a listener at the wildcard address of both.
        device: Index of the interface that it is bound to; 0 for all.
    """

    cookie: int
    role: int
    pid: int
    comm: bytes
    others: tuple[tuple[int, bytes], ...]
    waiting: bool
    netns: int
    local: bytes
    remote: bytes
    lport: int
    rport: int
    ip: int
    device: int

    @property
    def accepted_at(self) -> list[Place]:
        """Where its listener may be bound, in the kernel's lookup order."""
        return _accepted_at(self.ip, self.local, self.lport)

    @property
    def listens_at(self) -> Place:
        """Where it is bound, if it is a listener."""
        return self.ip, self.local, self.lport


Place = tuple[int, bytes, int]
"""IP version (4, 6 or BOTH), address and port."""


def _accepted_at(ip: int, local: bytes, port: int) -> list[Place]:
    wildcard = _MAPPED + bytes(4) if ip == IPV4 else bytes(16)
    return [(ip, local, port), (ip, wildcard, port), (BOTH, bytes(16), port)]


@attrs.frozen
class _Diag:
    state: int
    inode: int
    cookie: int
    local: bytes
    remote: bytes
    lport: int
    rport: int
    ip: int
    device: int


@attrs.define
class _Holder:
    pid: int
    comm: bytes
    others: list[tuple[int, bytes]] = attrs.field(factory=list)


@attrs.define
class Hidden:
    """What find() could not read for lack of rights.

    Args:
        processes: Number of processes whose file descriptors could not be read.
        sockets: Number of sockets that have a process, which was not found.
        namespaces: Number of network namespaces that could not be entered.
    """

    processes: int = 0
    sockets: int = 0
    namespaces: int = 0

    def sentences(self, *, mendable: bool = False) -> list[str]:
        """Return a sentence for each kind: what is missing, and the capability that gives it.

        Args:
            mendable: Leave out what the host refuses to root as well.
        """
        causes = []
        if self.processes and self.sockets:
            fds = (
                f"TCP sockets older than the run whose process is unknown: {self.sockets}; until "
                "it uses them, their rows have no pid, and -p, --comm and --cgroup leave them out; "
                f"/proc/PID/fd of {self.processes} processes cannot be read"
            )
            causes.append((fds, lacking("CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH")))
        if self.namespaces:
            entered = (
                f"network namespaces that cannot be entered: {self.namespaces}; sockets in them "
                "that are older than the run have no rows until they connect again"
            )
            causes.append((entered, lacking("CAP_SYS_ADMIN")))
        return [
            f"{what}; "
            + (
                f"it needs {' and '.join(missing)}"
                if missing
                else "the host refuses it to root as well"
            )
            for what, missing in causes
            if missing or not mendable
        ]


def find(hidden: Hidden | None = None) -> list[Seed]:
    """Return all TCP sockets of all network namespaces that have a process.

    Needs root's rights; what could not be read is counted in `hidden`. A socket that several
    processes hold belongs to the one with the lowest pid until one of them uses it. A socket
    counts as accepted if a listener is bound to its local address and port.
    """
    hidden = hidden or Hidden()
    holders: dict[int, _Holder] = {}
    pids = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
    for pid in pids:
        try:
            comm = Path(f"/proc/{pid}/comm").read_bytes().rstrip(b"\n")
            for inode in _held(pid):
                holder = holders.setdefault(inode, _Holder(pid, comm))
                if pid != holder.pid and (pid, comm) not in holder.others[-1:]:
                    holder.others.append((pid, comm))
        except PermissionError:
            hidden.processes += 1
        except OSError:  # it has ended meanwhile
            continue
    # With hidepid=2, /proc does not list other users' processes at all.
    if not Path("/proc/1").exists():
        hidden.processes += 1
    no_process = _Holder(0, b"")
    seeds = []
    for netns, diags in _namespaces(pids, hidden):
        listening = {(diag.ip, diag.local, diag.lport) for diag in diags if diag.state == _LISTEN}
        for diag in diags:
            places = _accepted_at(diag.ip, diag.local, diag.lport)
            role = CLIENT if listening.isdisjoint(places) else SERVER
            if diag.state == _LISTEN:
                role = LISTENER
            holder = holders.get(diag.inode, no_process)
            hidden.sockets += bool(diag.inode) and holder is no_process
            seeds.append(
                Seed(
                    diag.cookie,
                    role,
                    holder.pid,
                    holder.comm,
                    tuple(holder.others),
                    # An accepted socket has an inode.
                    not diag.inode and role == SERVER and diag.state in _OPEN,
                    netns,
                    diag.local,
                    diag.remote,
                    diag.lport,
                    diag.rport,
                    diag.ip,
                    diag.device,
                )
            )
    return seeds


def is_ending(pid: int) -> bool:
    """Return whether a process has ended or is exiting."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return True
    # After the name, which may contain anything: state, five numbers, flags.
    return bool(int(stat.rpartition(b")")[2].split()[6]) & _PF_EXITING)


def _held(pid: int) -> Iterator[int]:
    folder = f"/proc/{pid}/fd"
    for name in os.listdir(folder):
        try:
            link = os.readlink(f"{folder}/{name}")
        except FileNotFoundError:  # closed meanwhile
            continue
        if link.startswith("socket:["):
            yield int(link[8:-1])


def _namespaces(pids: Iterable[int], hidden: Hidden) -> Iterator[tuple[int, list[_Diag]]]:
    """Yield each network namespace and its sockets, this process's first."""
    own = of_process().stat().st_ino
    done = {own}
    yield own, list(_dump())
    home = os.open(of_process(), os.O_RDONLY | os.O_CLOEXEC)
    try:
        for pid in pids:
            with contextlib.suppress(OSError):
                there = os.open(of_process(pid), os.O_RDONLY | os.O_CLOEXEC)
                try:
                    inode = os.fstat(there).st_ino
                    if inode in done:
                        continue
                    done.add(inode)
                    try:
                        setns(there)
                    except PermissionError:
                        hidden.namespaces += 1
                        continue
                    try:
                        diags = list(_dump())
                    finally:
                        setns(home)
                finally:
                    os.close(there)
                yield inode, diags
    finally:
        os.close(home)


def _dump() -> Iterator[_Diag]:
    """Yield TCP sockets of the current network namespace (inet_diag_msg, linux/inet_diag.h)."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as diag:  # NETLINK_SOCK_DIAG
        diag.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        for family in (socket.AF_INET, socket.AF_INET6):
            body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, _WITH_A_SOCKET)
            head = _NLMSG.pack(
                _NLMSG.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_DUMP_REQUEST, 1, 0
            )
            diag.send(head + body)
            yield from _answers(diag)


def _answers(diag: socket.socket) -> Iterator[_Diag]:
    while True:
        data = diag.recv(1 << 18)
        offset = 0
        while offset + _NLMSG.size <= len(data):
            length, kind, _, _, _ = _NLMSG.unpack_from(data, offset)
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                (code,) = struct.unpack_from("=i", data, offset + _NLMSG.size)
                if code in (-2, -22):  # this kernel has no tcp_diag, or no IPv6
                    return
                raise OSError(-code, f"sock_diag: {os.strerror(-code)}")
            at = offset + _NLMSG.size
            lport, rport = struct.unpack_from(">HH", data, at + 4)
            local, remote = data[at + 8 : at + 24], data[at + 24 : at + 40]
            if data[at] == socket.AF_INET:
                local, remote = _MAPPED + local[:4], _MAPPED + remote[:4]
            (cookie,) = struct.unpack_from("=Q", data, at + 44)
            (inode,) = struct.unpack_from("=I", data, at + 68)
            (device,) = struct.unpack_from("=I", data, at + 40)
            ip = IPV4 if local.startswith(_MAPPED) else IPV6
            # An IPv6 listener at the wildcard address accepts IPv4 too, unless IPV6_V6ONLY is set.
            if data[at + 1] == _LISTEN and not any(local):
                ip = IPV6 if _is_v6only(data[at + 72 : offset + length]) else BOTH
            yield _Diag(data[at + 1], inode, cookie, local, remote, lport, rport, ip, device)
            offset += (length + 3) & ~3


def _is_v6only(attributes: bytes) -> bool:
    """Return whether IPV6_V6ONLY is set on a listener."""
    at = 0
    while at + _ATTRIBUTE.size <= len(attributes):
        length, kind = _ATTRIBUTE.unpack_from(attributes, at)
        if kind == _SKV6ONLY:
            return attributes[at + _ATTRIBUTE.size] != 0
        at += max((length + 3) & ~3, _ATTRIBUTE.size)
    return False
