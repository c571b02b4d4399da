"""Hook points and descriptions of the accepting side of a TCP connection."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from typing import Annotated

from tcplat_core import (
    Event,
    Histogram,
    Hook,
    HookPoint,
    Moment,
    ProbeSpec,
    Wire,
    fenter,
    fentry,
    fexit,
    hookimpl,
    kentry,
    kprobe,
    kreturn,
    micros,
    stream_points,
    tracepoint,
    tracepoints,
)

_SOCK = "const struct sock *"
_CHILD = ("parent", "child", "skb")
_STATES = (_SOCK, "const int", "const int")
_SET_STATE = "sock:inet_sock_set_state"
_STREAM = stream_points(timed=True)
_STATE = HookPoint(
    "state",
    (
        fentry(
            fenter("tcp_set_state", "fe_tcp_set_state", "sk", "state"),
            fenter("tcp_rcv_state_process", "fe_tcp_rcv_state_process", "sk", "skb"),
            *tracepoint(_SET_STATE, "tp_listen", *_STATES).hooks,
        ),
        tracepoint(_SET_STATE, "tp_state", *_STATES),
        kprobe(
            kentry("tcp_set_state", "kp_tcp_set_state", "sk", "state"),
            kentry("tcp_rcv_state_process", "kp_tcp_rcv_state_process", "sk", "skb"),
            *tracepoint(_SET_STATE, "tp_state_skipped", *_STATES).hooks,
        ),
    ),
)
# No process uses a connection there.
_NO_USE = {"tp_listen", "fe_tcp_rcv_state_process", "kp_tcp_rcv_state_process"}
# The first use of a connection whose accept was not seen.
_FIRST_USE = tuple(
    dict.fromkeys(
        Hook(hook.func, f"accepted_{hook.program}", hook.mechanism, by=hook.program)
        for point in (_STATE, _STREAM["recv"], _STREAM["send"])
        for way in point.ways
        for hook in way.hooks
        if not hook.quiet and hook.program not in _NO_USE
    )
)
_UNSEEN = {hook.func for hook in _FIRST_USE}


class ServiceEvent(Event):
    """An event with the two times that only the accepting side has."""

    call_us: Annotated[
        float | None,
        Wire(
            "u64",
            "time inside recv, µs; null by tracepoint",
            "call_ns",
            to=micros,
            nullable=True,
            latency=True,
            column="",
        ),
    ]
    accept_us: Annotated[
        float | None,
        Wire(
            "u64",
            "time in the accept queue, µs; null if unknown",
            "accept_ns",
            to=micros,
            nullable=True,
            latency=True,
            column="",
        ),
    ]


POINTS = (
    HookPoint(
        "rx_ip",
        (
            fentry(
                fenter("tcp_v4_rcv", "fe_tcp_v4_rcv", "skb"),
                fenter("tcp_v6_rcv", "fe_tcp_v6_rcv", "skb"),
            ),
            tracepoint("net:netif_receive_skb", "tp_rx_ip", "struct sk_buff *"),
            kprobe(
                kentry("tcp_v4_rcv", "kp_tcp_v4_rcv", "skb"),
                kentry("tcp_v6_rcv", "kp_tcp_v6_rcv", "skb"),
            ),
        ),
    ),
    HookPoint(
        "rx_tcp",
        (
            fentry(
                fenter("tcp_v4_do_rcv", "fe_tcp_v4_do_rcv", "sk", "skb"),
                fenter("tcp_v6_do_rcv", "fe_tcp_v6_do_rcv", "sk", "skb"),
                fenter("tcp_child_process", "fe_tcp_child_process", *_CHILD),
            ),
            # In the established state only.
            tracepoint("tcp:tcp_probe", "tp_rx_tcp", "struct sock *", "const struct sk_buff *"),
            kprobe(
                kentry("tcp_v4_do_rcv", "kp_tcp_v4_do_rcv", "sk", "skb"),
                kentry("tcp_v6_do_rcv", "kp_tcp_v6_do_rcv", "sk", "skb"),
                kentry("tcp_child_process", "kp_tcp_child_process", *_CHILD),
            ),
        ),
    ),
    _STATE,
    HookPoint(
        "accept",
        (
            fentry(fexit("inet_csk_accept", "fx_accept2", "sk", "arg")),
            fentry(fexit("inet_csk_accept", "fx_accept4", "sk", "flags", "err", "kern")),
            kprobe(
                kentry("inet_csk_accept", "kp_accept", quiet=True),
                kreturn("inet_csk_accept", "kr_accept"),
            ),
            tracepoints(
                ("syscalls:sys_exit_accept", "tp_accept"),
                ("syscalls:sys_exit_accept4", "tp_accept4"),
            ),
        ),
        optional=True,
        also=_FIRST_USE,
    ),
    HookPoint(
        "ready",
        (
            fentry(fenter("sock_def_readable", "fe_ready", "sk")),
            # Came with 6.3 (40e0b0908142).
            tracepoint("sock:sk_data_ready", "tp_ready", _SOCK),
            kprobe(kentry("sock_def_readable", "kp_ready", "sk")),
        ),
    ),
    _STREAM["recv"],
    _STREAM["send"],
    _STREAM["send_short"],
    _STREAM["close"],
)

HISTOGRAMS = (
    Histogram("accept", "accept queue: handshake done to accept()", ("state", "accept")),
    Histogram(
        "rx_ready",
        "receive path: packet of the first new byte at rx_ip to reader woken",
        ("state", "rx_ip", "ready"),
    ),
    Histogram(
        "ready_recv",
        "socket queue: first byte read, reader woken to recv() done",
        ("state", "rx_ip", "ready", "recv"),
    ),
    Histogram(
        "in_recv",
        "inside recv(), blocked included",
        ("state", "recv"),
        mechanisms=("fentry", "kprobe"),
    ),
)

_REACHED = {
    "TCP_LISTEN": "listening",
    "TCP_ESTABLISHED": "handshake done",
    "TCP_FIN_WAIT1": "FIN sent",
    "TCP_FIN_WAIT2": "FIN acked",
    "TCP_CLOSE_WAIT": "client sent FIN",
    "TCP_LAST_ACK": "FIN sent last",
    "TCP_CLOSING": "both sent FIN",
    "TCP_CLOSE": "closed",
}
_WORDS = {
    "rx_ip": "packet arrives",
    "rx_tcp": "reaches socket",
    "accept": "accepted",
    "ready": "reader woken",
    "send": "reply sent",
    "send_short": "not all taken",
    "close": "socket gone",
}


def describe(moment: Moment) -> str:
    """Describe a row in at most 15 characters, the width of the table's column."""
    if moment.point == "state":
        if moment.old_state is None:
            return "segment handled"
        if moment.state == "TCP_CLOSE" and moment.err:
            return moment.failure
        return _REACHED.get(moment.state or "", "new state")
    if moment.point == "recv":
        return "end of stream" if moment.empty else "message read"
    if moment.point == "accept" and moment.func in _UNSEEN:
        return "accept not seen"
    return _WORDS[moment.point]


@hookimpl
def tcplat_register_probes() -> Iterator[ProbeSpec]:
    """Offer the probe."""
    yield ProbeSpec(
        name="tcp_service",
        summary="packets, states, accept, wake-up, recv and send of sockets that were accepted",
        source=files(__package__).joinpath("tcp_service.bpf.c").read_text(encoding="utf-8"),
        points=POINTS,
        types=(
            "tcp_sock",
            "msghdr",
            "sk_buff",
            "net_device:nd_net",
            "task_struct:files",
            "files_struct:fdt",
            "fdtable:fd",
            "file:private_data",
            "socket:sk",
        ),
        event=ServiceEvent,
        describe=describe,
        histograms=HISTOGRAMS,
    )
