"""What the session asks of the loader, and what it answers: msgpack over pipe and socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

import attrs
import msgpack

from tcplat_core.errors import CannotRunError
from tcplat_core.plugin.histogram import Aggregation
from tcplat_core.plugin.hookpoints import Hook, HookPoint, Interfaces, Way

from .filter import Filter

MAX_FDS = 253
"""SCM_MAX_FD of the kernel: so many fds go with one message."""


def _packed(value: Any) -> bytes:
    # Names of files and interfaces are bytes, and need not be UTF-8.
    return bytes(msgpack.packb(value, unicode_errors="surrogateescape"))


def _unpacked(data: bytes) -> Any:
    return msgpack.unpackb(data, unicode_errors="surrogateescape")


@attrs.frozen(kw_only=True)
class ProbeRequest:
    """One probe, as C text and data. No Python of the plugin's crosses over.

    Args:
        listen: The points that are wanted; None for all.
        maps: What the session wants to map, and the size that it expects an entry to have.
        histograms: Their names, in the order of their numbers.
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
    """The core is to learn who owns each socket."""


@attrs.frozen(kw_only=True)
class Request:
    """What to load.

    Args:
        probes: In the order in which they are attached.
        attach: auto, or the one mechanism that may be used.
        filter: Who and what is wanted.
        follow: Their children, too.
        debug: Compile tcplat_debug() in, and log the C as it is compiled.
        ring_bytes: Size of each probe's ring: a power of two.
        events: Some sink wants rows.
        aggregation: What is to be counted in the kernel.
    """

    probes: tuple[ProbeRequest, ...]
    attach: str = "auto"
    filter: Filter = attrs.field(factory=Filter)
    follow: bool = False
    debug: bool = False
    ring_bytes: int = 1 << 23
    events: bool = True
    aggregation: Aggregation | None = None

    def pack(self) -> bytes:
        """For the loader's standard input."""
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


def _probe(raw: dict[str, Any]) -> ProbeRequest:
    points = tuple(
        HookPoint(
            point["point"],
            tuple(
                Way(
                    way["mechanism"],
                    tuple(Hook(**{**hook, "args": tuple(hook["args"])}) for hook in way["hooks"]),
                )
                for way in point["ways"]
            ),
            point["optional"],
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
    """An interface with an XDP program of ours on it.

    Args:
        name: The interface's.
        index: What it is called in records.
        mode: native or generic.
        link_fd: Closing it detaches; the session's to close.
        silent: Why no packet comes through it for now; empty if packets can.
    """

    name: str
    index: int
    mode: str
    link_fd: int
    silent: str = ""


@attrs.frozen
class LoadedMap:
    """A map that the session asked for: its fd, and how many entries it has."""

    fd: int
    entries: int


@attrs.frozen(kw_only=True)
class LoadedProbe:
    """What the session needs of one loaded probe. The fds are the session's to close."""

    ring_fd: int
    books_fd: int
    taken: Mapping[str, str]
    """Point -> mechanism."""
    programs: tuple[str, ...]
    """What is attached."""
    missing: Mapping[str, str]
    """Point -> why it is not served."""
    interfaces: tuple[Attached, ...] = ()
    skipped: Mapping[str, str] = attrs.field(factory=dict)
    """Interface -> why it was left out."""
    program_fds: Mapping[str, int] = attrs.field(factory=dict)
    """Program -> its fd: the kernel counts there how often it did not run it."""

    maps: Mapping[str, LoadedMap] = attrs.field(factory=dict)
    """What the session asked for."""

    @property
    def fds(self) -> list[int]:
        """All its fds, in the order in which they cross over."""
        links = (one.link_fd for one in self.interfaces)
        maps = (one.fd for one in self.maps.values())
        return [self.ring_fd, self.books_fd, *links, *self.program_fds.values(), *maps]


@attrs.frozen(kw_only=True)
class Answer:
    """All is attached: what to read from, and what to hold open."""

    probes: Mapping[str, LoadedProbe]
    gate_fd: int
    """Of tcplat_gate, which the probes have in common."""
    holding: tuple[int, ...]
    """Links and maps: when the last copy is closed, the kernel detaches."""
    hidden: tuple[str, ...] = ()
    """What of older sockets could not be seen, and what mends it."""

    @property
    def fds(self) -> list[int]:
        """All of them, in the order in which they cross over."""
        probes = (fd for probe in self.probes.values() for fd in probe.fds)
        return [self.gate_fd, *probes, *self.holding]


@attrs.frozen
class Refusal:
    """It cannot be done: a sentence, an exit code, and what the compiler or verifier said."""

    sentence: str
    exit_code: int
    log: str = ""


def send_answer(to: socket.socket, answer: Answer | Refusal) -> None:
    """From the loader to the session; fds go along in the order of the message."""
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
    """In the session. None where the loader died without an answer."""
    data, fds, _, _ = socket.recv_fds(source, 1 << 20, MAX_FDS)
    for fd in fds:
        # A program that a sink starts must not keep ours attached. (MSG_CMSG_CLOEXEC would
        # do, but recv_fds() forgets the flags it is given, up to Python 3.13 at least.)
        os.set_inheritable(fd, False)
    if not data:
        return None
    raw = _unpacked(data)
    if "refusal" in raw:
        return Refusal(**raw["refusal"])
    ours = iter(fds)
    gate_fd = next(ours)
    probes = {
        name: LoadedProbe(
            **{
                **probe,
                "ring_fd": next(ours),
                "books_fd": next(ours),
                "interfaces": tuple(
                    Attached(**{**one, "link_fd": next(ours)}) for one in probe["interfaces"]
                ),
                "program_fds": {name: next(ours) for name in probe["program_fds"]},
                "maps": {
                    name: LoadedMap(next(ours), one["entries"])
                    for name, one in probe["maps"].items()
                },
            }
        )
        for name, probe in raw["probes"].items()
    }
    return Answer(probes=probes, gate_fd=gate_fd, holding=tuple(ours), hidden=tuple(raw["hidden"]))
