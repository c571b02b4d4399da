"""Request and answer between session and loader: msgpack over pipe and socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

import attrs
import msgpack

from tcplat_core.errors import CannotRunError
from tcplat_core.plugin.aggregates import Aggregation
from tcplat_core.plugin.hookpoints import Hook, HookPoint, Interfaces, Way

from .filter import Filter

MAX_FDS = 253
"""SCM_MAX_FD of the kernel: most fds in one message."""


def _packed(value: Any) -> bytes:
    # Names of files and interfaces are bytes, and need not be UTF-8.
    return bytes(msgpack.packb(value, unicode_errors="surrogateescape"))


def _unpacked(data: bytes) -> Any:
    return msgpack.unpackb(data, unicode_errors="surrogateescape")


@attrs.frozen(kw_only=True)
class ProbeRequest:
    """One probe, as C text and data. The plugin's Python code is not passed.

    Args:
        listen: The points to attach; None for all.
        maps: Maps that the session reads -> expected size of an entry, bytes.
        histograms: Names, in the order of their numbers.
    """

    name: str
    source: str
    struct: str
    """C definition of the record."""
    points: tuple[HookPoint, ...]
    types: tuple[str, ...]
    defines: Mapping[str, int | str]
    interfaces: Interfaces | None = None
    listen: tuple[str, ...] | None = None
    maps: Mapping[str, int] = attrs.field(factory=dict)
    histograms: tuple[str, ...] = ()
    track: bool = False
    """Track the owner of each socket."""


@attrs.frozen(kw_only=True)
class Request:
    """The probes to load, and how.

    Args:
        probes: In the order of attaching.
        attach: auto, or the only mechanism to use.
        filter: The filters.
        follow: Also trace children of the traced processes.
        debug: Compile tcplat_debug() in, and log the C as it is compiled.
        ring_bytes: Size of each probe's ring: a power of two.
        events: Some sink uses rows.
        acks: Some sink uses rows of packets that only acknowledge.
        aggregation: Histograms to be made in the kernel; None for none.
        sample: Rows are made of one connection in so many.
        max_overhead: Of fewer where the run costs more than this share of the CPU time; 0 for no
            limit.
    """

    probes: tuple[ProbeRequest, ...]
    attach: str = "auto"
    filter: Filter = attrs.field(factory=Filter)
    follow: bool = False
    debug: bool = False
    ring_bytes: int = 1 << 23
    events: bool = True
    acks: bool = True
    aggregation: Aggregation | None = None
    sample: int = 1
    max_overhead: float = 0

    @property
    def samples(self) -> bool:
        """Whether connections may have no rows."""
        return self.sample > 1 or self.max_overhead > 0

    def pack(self) -> bytes:
        """Return the message for the loader's standard input."""
        return _packed(attrs.asdict(self))

    @classmethod
    def unpack(cls, data: bytes) -> Request:
        """Return the inverse of pack()."""
        raw = _unpacked(data)
        raw["probes"] = tuple(_probe(probe) for probe in raw["probes"])
        lists = {key: tuple(value) for key, value in raw["filter"].items() if type(value) is list}
        raw["filter"] = Filter(**{**raw["filter"], **lists})
        if raw["aggregation"] is not None:
            raw["aggregation"] = Aggregation(**raw["aggregation"])
        return cls(**raw)


def _hook(raw: dict[str, Any]) -> Hook:
    return Hook(**{**raw, "args": tuple(raw["args"])})


def _probe(raw: dict[str, Any]) -> ProbeRequest:
    points = tuple(
        HookPoint(
            point["point"],
            tuple(Way(way["mechanism"], tuple(map(_hook, way["hooks"]))) for way in point["ways"]),
            point["optional"],
            tuple(map(_hook, point["also"])),
        )
        for point in raw["points"]
    )
    interfaces = raw["interfaces"]
    if interfaces is not None:
        interfaces = Interfaces(**{**interfaces, "names": tuple(interfaces["names"])})
    listen = raw["listen"]
    return ProbeRequest(
        **{
            **raw,
            "points": points,
            "types": tuple(raw["types"]),
            "interfaces": interfaces,
            "listen": listen if listen is None else tuple(listen),
            "histograms": tuple(raw["histograms"]),
        }
    )


@attrs.frozen(kw_only=True)
class Attached:
    """An interface with an XDP program of ours.

    Args:
        name: Name of the interface.
        index: Its ifindex, as in records.
        mode: native or generic.
        link_fd: fd of the link; the session closes it to detach.
        silent: Why it cannot receive packets at the moment; empty if it can.
    """

    name: str
    index: int
    mode: str
    link_fd: int
    silent: str = ""


@attrs.frozen
class LoadedMap:
    """A map that the session reads: its fd and number of entries."""

    fd: int
    entries: int


@attrs.frozen(kw_only=True)
class LoadedProbe:
    """One loaded probe. The session closes the fds."""

    ring_fd: int
    books_fd: int
    taken: Mapping[str, str]
    """Point -> mechanism."""
    programs: tuple[str, ...]
    """Names of the attached programs."""
    missing: Mapping[str, str]
    """Point -> why it is not served."""
    interfaces: tuple[Attached, ...] = ()
    skipped: Mapping[str, str] = attrs.field(factory=dict)
    """Interface -> why it was skipped."""
    program_fds: Mapping[str, int] = attrs.field(factory=dict)
    """Program -> its fd, whose fdinfo has the number of skipped runs."""

    maps: Mapping[str, LoadedMap] = attrs.field(factory=dict)
    """The maps that the session reads."""

    @property
    def fds(self) -> list[int]:
        """All its fds, in the order of the message."""
        links = (one.link_fd for one in self.interfaces)
        maps = (one.fd for one in self.maps.values())
        return [self.ring_fd, self.books_fd, *links, *self.program_fds.values(), *maps]


@attrs.frozen(kw_only=True)
class Answer:
    """The answer when everything is attached: the fds to read from and to hold open."""

    probes: Mapping[str, LoadedProbe]
    gate_fd: int
    """fd of tcplat_gate, which all probes share."""
    holding: tuple[int, ...]
    """Links and maps: when the last copy is closed, the kernel detaches."""
    share_fd: int | None = None
    """fd of tcplat_thinning, with --max-overhead."""
    hidden: tuple[str, ...] = ()
    """Sentences about older sockets that could not be read, with the remedy."""

    @property
    def fds(self) -> list[int]:
        """All fds, in the order of the message."""
        probes = (fd for probe in self.probes.values() for fd in probe.fds)
        share = () if self.share_fd is None else (self.share_fd,)
        return [self.gate_fd, *share, *probes, *self.holding]


@attrs.frozen
class Refusal:
    """The loader failed: a message, an exit code, and the log of the compiler or verifier."""

    sentence: str
    exit_code: int
    log: str = ""


def send_answer(to: socket.socket, answer: Answer | Refusal) -> None:
    """Send an answer from the loader to the session, with the fds in the order of the message."""
    if isinstance(answer, Refusal):
        to.sendall(_packed({"refusal": attrs.asdict(answer)}))
        return
    fds = answer.fds
    if len(fds) > MAX_FDS:
        raise CannotRunError(
            f"{len(fds)} programs, links and maps are more than the {MAX_FDS} file descriptors "
            "that a message carries: fewer probes, interfaces or maps will do"
        )
    socket.send_fds(to, [_packed(attrs.asdict(answer))], fds)


def receive_answer(source: socket.socket) -> Answer | Refusal | None:
    """Receive the answer in the session; None if the loader ended without one."""
    data, fds, _, _ = socket.recv_fds(source, 1 << 20, MAX_FDS)
    for fd in fds:
        # A process that a sink starts must not keep programs attached. (MSG_CMSG_CLOEXEC would
        # do, but recv_fds() ignores its flags, up to Python 3.13 at least.)
        os.set_inheritable(fd, False)
    if not data:
        return None
    raw = _unpacked(data)
    if "refusal" in raw:
        return Refusal(**raw["refusal"])
    received = iter(fds)
    gate_fd = next(received)
    share_fd = None if raw["share_fd"] is None else next(received)
    probes = {
        name: LoadedProbe(
            **{
                **probe,
                "ring_fd": next(received),
                "books_fd": next(received),
                "interfaces": tuple(
                    Attached(**{**one, "link_fd": next(received)}) for one in probe["interfaces"]
                ),
                "program_fds": {name: next(received) for name in probe["program_fds"]},
                "maps": {
                    name: LoadedMap(next(received), one["entries"])
                    for name, one in probe["maps"].items()
                },
            }
        )
        for name, probe in raw["probes"].items()
    }
    return Answer(
        probes=probes,
        gate_fd=gate_fd,
        share_fd=share_fd,
        holding=tuple(received),
        hidden=tuple(raw["hidden"]),
    )
