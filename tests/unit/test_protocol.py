"""Requests and answers pass between session and loader complete, file descriptors included."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator

import attrs
import pytest

from tcplat_core.errors import CannotRunError
from tcplat_core.loader.filter import Filter
from tcplat_core.loader.protocol import (
    MAX_FDS,
    Answer,
    Attached,
    LoadedMap,
    LoadedProbe,
    ProbeRequest,
    Refusal,
    Request,
    receive_answer,
    send_answer,
)
from tcplat_core.plugin.aggregates import Aggregation
from tcplat_core.plugin.hookpoints import (
    Hook,
    HookPoint,
    Interfaces,
    kentry,
    kprobe,
    kreturn,
    tracepoint,
)

Ends = tuple[socket.socket, socket.socket]

PROBE = ProbeRequest(
    name="tcp_client",
    source='/* "ü" \\ \n */',
    struct="struct tcplat_event {};",
    points=(
        HookPoint(
            "send",
            (
                kprobe(kentry("tcp_sendmsg", "kp", "sk", quiet=True), kreturn("tcp_sendmsg", "kr")),
                tracepoint("tcp:tcp_sendmsg_locked", "tp", "const struct sock *"),
            ),
            optional=True,
            also=(Hook("tcp_close", "sent_kp", "kprobe", by="kp_close"),),
        ),
        HookPoint("close", ()),
    ),
    types=("tcp_sock", "net:ns"),
    defines={"PORT": 9999},
)


@pytest.fixture
def ends() -> Iterator[Ends]:
    """As LoaderProcess.start() makes them: the session's, the loader's."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield pair
    for end in pair:
        end.close()


@pytest.mark.parametrize(
    "request_",
    [
        Request(probes=()),
        Request(probes=(PROBE,), attach="kprobe", follow=True, ring_bytes=4096),
        Request(probes=(PROBE,), filter=Filter(pids=(1, 2**22), comm="curl*", ports=(80, 443))),
        Request(probes=(PROBE,), filter=Filter(pids=())),
        Request(
            probes=(
                attrs.evolve(PROBE, listen=("send",), maps={"counts": 16}, histograms=("a", "b")),
            ),
            events=False,
            aggregation=Aggregation("remote", 256, math.inf),
        ),
        Request(
            probes=(
                PROBE,
                ProbeRequest(
                    name="xdp_port",
                    source="",
                    struct="",
                    points=(),
                    types=(),
                    defines={},
                    interfaces=Interfaces(names=("lo", "eth0"), mode="native", netns="blue"),
                ),
            )
        ),
    ],
)
def test_request_survives_packing(request_: Request) -> None:
    assert Request.unpack(request_.pack()) == request_


def test_refusal_survives_packing(ends: Ends) -> None:
    session, loader = ends
    send_answer(loader, Refusal("no BTF; boot another kernel", 3, "a log\nof lines"))
    assert receive_answer(session) == Refusal("no BTF; boot another kernel", 3, "a log\nof lines")


def test_dead_loader_gives_no_answer(ends: Ends) -> None:
    session, loader = ends
    loader.close()
    assert receive_answer(session) is None


def test_every_fd_arrives_at_its_place(ends: Ends) -> None:
    """Each is a pipe: what is written into the received fd identifies it."""
    session, loader = ends
    pipes = [os.pipe() for _ in range(13)]
    gate, share, ring, books, link, program, counts, more, ring2, books2, *held = (
        write for _, write in pipes
    )
    send_answer(
        loader,
        Answer(
            probes={
                "one": LoadedProbe(
                    ring_fd=ring,
                    books_fd=books,
                    taken={"nic_rx": "xdp"},
                    programs=("on_packet", "on_tx"),
                    missing={"nic_tx": "no way"},
                    interfaces=(Attached(name="lo", index=1, mode="generic", link_fd=link),),
                    skipped={"eth0": "busy"},
                    program_fds={"on_packet": program},
                    maps={"counts": LoadedMap(counts, 64), "more": LoadedMap(more, 1)},
                ),
                "a_two": LoadedProbe(
                    ring_fd=ring2, books_fd=books2, taken={}, programs=(), missing={}
                ),
            },
            gate_fd=gate,
            share_fd=share,
            holding=tuple(held),
        ),
    )
    for _, write in pipes:
        os.close(write)  # the loader ends; only the session's copies are left
    answer = receive_answer(session)
    assert isinstance(answer, Answer)
    assert list(answer.probes) == ["one", "a_two"]
    one, two = answer.probes.values()
    assert (one.taken, list(one.programs), one.missing, one.skipped) == (
        {"nic_rx": "xdp"},
        ["on_packet", "on_tx"],
        {"nic_tx": "no way"},
        {"eth0": "busy"},
    )
    assert [(face.name, face.index, face.mode) for face in one.interfaces] == [("lo", 1, "generic")]
    assert answer.share_fd is not None
    received = [answer.gate_fd, answer.share_fd, *one.fds, *two.fds, *answer.holding]
    assert answer.fds == received
    assert len(received) == 13
    assert {name: found.entries for name, found in one.maps.items()} == {"counts": 64, "more": 1}
    for number, fd in enumerate(received):
        os.write(fd, bytes([number]))
        os.close(fd)
    for number, (read, _) in enumerate(pipes):
        assert os.read(read, 2) == bytes([number])
        assert os.read(read, 1) == b""  # no other fd holds it
        os.close(read)


def test_received_fds_are_not_inherited_by_child_processes(ends: Ends) -> None:
    """A link that outlives the session would leave its program attached."""
    session, loader = ends
    send_answer(loader, _holding(3))
    answer = receive_answer(session)
    assert isinstance(answer, Answer)
    fds = answer.fds
    inherited = [fd for fd in fds if os.get_inheritable(fd)]
    for fd in fds:
        os.close(fd)
    assert inherited == []


def _holding(fds: int) -> Answer:
    """Return an answer with so many fds in all."""
    probe = LoadedProbe(ring_fd=0, books_fd=0, taken={}, programs=(), missing={})
    return Answer(probes={"one": probe}, gate_fd=0, holding=(0,) * (fds - 3))


def test_maximum_number_of_fds_is_passed(ends: Ends) -> None:
    session, loader = ends
    send_answer(loader, _holding(MAX_FDS))
    answer = receive_answer(session)
    assert isinstance(answer, Answer)
    fds = answer.fds
    for fd in fds:
        os.close(fd)
    assert len(set(fds)) == MAX_FDS == 253


def test_fds_beyond_the_maximum_are_refused_with_their_number(ends: Ends) -> None:
    with pytest.raises(CannotRunError, match="254 programs, links and maps are more than the 253"):
        send_answer(ends[1], _holding(MAX_FDS + 1))
