"""Where the connecting side of a TCP connection is watched, and in which words."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files

from tcplat_core import (
    Histogram,
    HookPoint,
    Moment,
    ProbeSpec,
    fenter,
    fentry,
    fexit,
    hookimpl,
    kentry,
    kprobe,
    kreturn,
    tracepoint,
)

_SOCK = "const struct sock *"
_CONNECT = ("sk", "uaddr", "addr_len")
# tcp_recvmsg() lost its `nonblock` in 5.19 (ec095263a965) and its `addr_len` in 7.1 (8341c989ac77).
_RECV4 = ("sk", "msg", "len", "flags")
_RECV5 = (*_RECV4, "addr_len")
_RECV6 = ("sk", "msg", "len", "nonblock", "flags", "addr_len")
_SEND = ("sk", "msg", "size")
# How splice(2) and sendfile(2) send before 6.5 (dc97391e6610).
_PAGE = ("sk", "page", "offset", "size", "flags")
_SPLICE = ("sock", "ppos", "pipe", "len", "flags")
_SPLICED_FENTRY = (fexit("tcp_splice_read", "fx_tcp_splice_read", *_SPLICE),)
_SPLICED_KPROBE = (
    kentry("tcp_splice_read", "kp_tcp_splice_read", *_SPLICE, quiet=True),
    kreturn("tcp_splice_read", "kr_tcp_splice_read"),
)
_STATES = (_SOCK, "const int", "const int")
_SET_STATE = "sock:inet_sock_set_state"
_DESTROY = "tcp:tcp_destroy_sock"

POINTS = (
    HookPoint(
        "connect",
        (
            fentry(
                fenter("tcp_v4_connect", "fe_tcp_v4_connect", *_CONNECT),
                fenter("tcp_v6_connect", "fe_tcp_v6_connect", *_CONNECT),
                fenter("tcp_set_state", "fe_send_syn", "sk", "state", quiet=True),
                fexit("tcp_v4_connect", "fx_tcp_v4_connect", *_CONNECT, quiet=True),
                fexit("tcp_v6_connect", "fx_tcp_v6_connect", *_CONNECT, quiet=True),
            ),
            kprobe(
                kentry("tcp_v4_connect", "kp_tcp_v4_connect", *_CONNECT),
                kentry("tcp_v6_connect", "kp_tcp_v6_connect", *_CONNECT),
                kentry("tcp_set_state", "kp_send_syn", "sk", "state", quiet=True),
                kreturn("tcp_v4_connect", "kr_tcp_v4_connect", quiet=True),
                kreturn("tcp_v6_connect", "kr_tcp_v6_connect", quiet=True),
            ),
            tracepoint(_SET_STATE, "tp_connect", *_STATES),
        ),
    ),
    HookPoint(
        "state",
        (
            fentry(fenter("tcp_set_state", "fe_tcp_set_state", "sk", "state")),
            tracepoint(_SET_STATE, "tp_state", *_STATES),
            kprobe(
                kentry("tcp_set_state", "kp_tcp_set_state", "sk", "state"),
                *tracepoint(_SET_STATE, "tp_state_skipped", *_STATES).hooks,
            ),
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
            tracepoint("tcp:tcp_sendmsg_locked", "tp_send", _SOCK, "const struct msghdr *"),
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
            tracepoint("sock:sock_send_length", "tp_send_short", "struct sock *", "int", "int"),
        ),
    ),
    HookPoint(
        "recv",
        (
            fentry(
                fexit("tcp_recvmsg", "fx_tcp_recvmsg4", *_RECV4),
                *_SPLICED_FENTRY,
            ),
            fentry(
                fexit("tcp_recvmsg", "fx_tcp_recvmsg5", *_RECV5),
                *_SPLICED_FENTRY,
            ),
            fentry(
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
            tracepoint("sock:sock_recv_length", "tp_recv", "struct sock *", "int", "int"),
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
    Histogram("connect", "connect(): SYN to established", ("connect", "state")),
    Histogram("connect_failed", "connect(): SYN to failure", ("connect", "state")),
)

_FAILED = {"ECONNREFUSED": "refused", "ETIMEDOUT": "timed out"}

_REACHED = {
    "TCP_SYN_SENT": "sending SYN",
    "TCP_ESTABLISHED": "connected",
    "TCP_FIN_WAIT1": "FIN sent",
    "TCP_FIN_WAIT2": "FIN acked",
    "TCP_CLOSE_WAIT": "peer sent FIN",
    "TCP_LAST_ACK": "FIN sent last",
    "TCP_CLOSING": "both sent FIN",
    "TCP_CLOSE": "closed",
}


def describe(moment: Moment) -> str:
    """Describe a row in 15 letters at most: the table's column is no wider."""
    if moment.point == "connect":
        return _failure(moment) if moment.err else "SYN goes out"
    if moment.point == "state":
        if moment.state == "TCP_CLOSE" and moment.err:
            return _failure(moment)
        if moment.state == "TCP_CLOSE" and moment.old_state == "TCP_SYN_SENT":
            return "given up"
        return _REACHED.get(moment.state or "", "new state")
    if moment.point == "recv":
        return "end of stream" if moment.empty else "message read"
    return {
        "send": "message sent",
        "send_short": "not all taken",
        "close": "socket gone",
    }[moment.point]


def _failure(moment: Moment) -> str:
    return _FAILED.get(moment.error, moment.error)


@hookimpl
def tcplat_register_probes() -> Iterator[ProbeSpec]:
    """Offer the probe."""
    yield ProbeSpec(
        name="tcp_client",
        summary="connect, states, send, recv and close of sockets that called connect()",
        source=files(__package__).joinpath("tcp_client.bpf.c").read_text(encoding="utf-8"),
        points=POINTS,
        types=("tcp_sock", "msghdr", "socket:sk"),
        describe=describe,
        histograms=HISTOGRAMS,
    )
