"""Where the accepting side of a TCP connection is watched, and in which words."""

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
    Way,
    Wire,
    fenter,
    fentry,
    fexit,
    hookimpl,
    kentry,
    kprobe,
    kreturn,
    micros,
    tracepoint,
    tracepoints,
)

_SOCK = "const struct sock *"
# tcp_recvmsg() lost its `nonblock` in 5.19 (ec095263a965) and its `addr_len` in 7.1 (8341c989ac77).
_RECV4 = ("sk", "msg", "len", "flags")
_RECV5 = (*_RECV4, "addr_len")
_RECV6 = ("sk", "msg", "len", "nonblock", "flags", "addr_len")
_SEND = ("sk", "msg", "size")
# How splice(2) and sendfile(2) send before 6.5 (dc97391e6610).
_PAGE = ("sk", "page", "offset", "size", "flags")
_CHILD = ("parent", "child", "skb")
_SPLICE = ("sock", "ppos", "pipe", "len", "flags")
_SPLICED_FENTRY = (
    fenter("tcp_splice_read", "fe_tcp_splice_read", *_SPLICE, quiet=True),
    fexit("tcp_splice_read", "fx_tcp_splice_read", *_SPLICE),
)
_SPLICED_KPROBE = (
    kentry("tcp_splice_read", "kp_tcp_splice_read", *_SPLICE, quiet=True),
    kreturn("tcp_splice_read", "kr_tcp_splice_read"),
)
_STATES = (_SOCK, "const int", "const int")
_SET_STATE = "sock:inet_sock_set_state"
_DESTROY = "tcp:tcp_destroy_sock"
_RECEIVED = "sock:sock_recv_length"
_SENDS = "tcp:tcp_sendmsg_locked"
_LENGTH = ("struct sock *", "int", "int")
_SENT = (_SOCK, "const struct msghdr *")
_ACCEPT = tracepoints(
    ("syscalls:sys_exit_accept", "tp_accept"),
    ("syscalls:sys_exit_accept4", "tp_accept4"),
).hooks
# Where a socket is used first whose accept no tracepoint told of.
_ACCEPTED_STATE = Hook(_SET_STATE, "accepted_state", "tracepoint", _STATES, by="tp_state")
_ACCEPTED_RECV = Hook(_RECEIVED, "accepted_recv", "tracepoint", _LENGTH, by="tp_recv")
_ACCEPTED_SEND = Hook(_SENDS, "accepted_send", "tracepoint", _SENT, by="tp_send")
_UNSEEN = {_SET_STATE, _RECEIVED, _SENDS}


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
    HookPoint(
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
    ),
    HookPoint(
        "accept",
        (
            fentry(fexit("inet_csk_accept", "fx_accept2", "sk", "arg")),
            fentry(fexit("inet_csk_accept", "fx_accept4", "sk", "flags", "err", "kern")),
            kprobe(
                kentry("inet_csk_accept", "kp_accept", quiet=True),
                kreturn("inet_csk_accept", "kr_accept"),
            ),
            Way("tracepoint", (*_ACCEPT, _ACCEPTED_STATE, _ACCEPTED_RECV, _ACCEPTED_SEND)),
            Way("tracepoint", (*_ACCEPT, _ACCEPTED_STATE, _ACCEPTED_RECV)),
            Way("tracepoint", (*_ACCEPT, _ACCEPTED_STATE)),
        ),
        optional=True,
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
    HookPoint(
        "recv",
        (
            fentry(
                fenter("tcp_recvmsg", "fe_tcp_recvmsg4", *_RECV4, quiet=True),
                fexit("tcp_recvmsg", "fx_tcp_recvmsg4", *_RECV4),
                *_SPLICED_FENTRY,
            ),
            fentry(
                fenter("tcp_recvmsg", "fe_tcp_recvmsg5", *_RECV5, quiet=True),
                fexit("tcp_recvmsg", "fx_tcp_recvmsg5", *_RECV5),
                *_SPLICED_FENTRY,
            ),
            fentry(
                fenter("tcp_recvmsg", "fe_tcp_recvmsg6", *_RECV6, quiet=True),
                fexit("tcp_recvmsg", "fx_tcp_recvmsg6", *_RECV6),
                *_SPLICED_FENTRY,
            ),
            kprobe(
                kentry("tcp_recvmsg", "kp_tcp_recvmsg", *_RECV4, quiet=True),
                kreturn("tcp_recvmsg", "kr_tcp_recvmsg"),
                *_SPLICED_KPROBE,
            ),
            kprobe(
                kentry("tcp_recvmsg", "kp_tcp_recvmsg6", *_RECV6, quiet=True),
                kreturn("tcp_recvmsg", "kr_tcp_recvmsg"),
                *_SPLICED_KPROBE,
            ),
            # Came with 6.3 (6e6eda44b939).
            tracepoint(_RECEIVED, "tp_recv", *_LENGTH),
        ),
    ),
    HookPoint(
        "send",
        (
            fentry(
                fenter("tcp_sendmsg", "fe_tcp_sendmsg", *_SEND),
                fenter("tcp_sendpage", "fe_tcp_sendpage", *_PAGE),
            ),
            fentry(fenter("tcp_sendmsg", "fe_tcp_sendmsg", *_SEND)),
            kprobe(
                kentry("tcp_sendmsg", "kp_tcp_sendmsg", *_SEND),
                kentry("tcp_sendpage", "kp_tcp_sendpage", *_PAGE),
            ),
            kprobe(kentry("tcp_sendmsg", "kp_tcp_sendmsg", *_SEND)),
            # Came with 6.16 (0f08335ade71).
            tracepoint(_SENDS, "tp_send", *_SENT),
        ),
    ),
    HookPoint(
        "send_short",
        (
            fentry(
                fexit("tcp_sendmsg", "fx_tcp_sendmsg", *_SEND),
                fexit("tcp_sendpage", "fx_tcp_sendpage", *_PAGE),
            ),
            fentry(fexit("tcp_sendmsg", "fx_tcp_sendmsg", *_SEND)),
            kprobe(
                kentry("tcp_sendmsg", "kp_send_short", *_SEND, quiet=True),
                kreturn("tcp_sendmsg", "kr_tcp_sendmsg"),
                kentry("tcp_sendpage", "kp_page_short", *_PAGE, quiet=True),
                kreturn("tcp_sendpage", "kr_tcp_sendpage"),
            ),
            kprobe(
                kentry("tcp_sendmsg", "kp_send_short", *_SEND, quiet=True),
                kreturn("tcp_sendmsg", "kr_tcp_sendmsg"),
            ),
            tracepoint("sock:sock_send_length", "tp_send_short", *_LENGTH),
        ),
    ),
    HookPoint(
        "close",
        (
            fentry(fenter("tcp_v4_destroy_sock", "fe_tcp_v4_destroy_sock", "sk")),
            tracepoint(_DESTROY, "tp_close", "struct sock *"),
            kprobe(
                kentry("tcp_v4_destroy_sock", "kp_tcp_v4_destroy_sock", "sk"),
                *tracepoint(_DESTROY, "tp_close_skipped", "struct sock *").hooks,
            ),
        ),
    ),
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
    """Describe a row in 15 letters at most: the table's column is no wider."""
    if moment.point == "state":
        if moment.old_state is None:
            return "segment handled"
        if moment.state == "TCP_CLOSE" and moment.err:
            return moment.error
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
