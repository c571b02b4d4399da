"""Hook points and descriptions of the connecting side of a TCP connection."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files

from tcplat_core import (
    Histogram,
    Hook,
    HookPoint,
    Moment,
    ProbeSpec,
    Way,
    fenter,
    fentry,
    fexit,
    hookimpl,
    kentry,
    kprobe,
    kreturn,
    stream_points,
    tracepoint,
)

_SOCK = "const struct sock *"
_CONNECT = ("sk", "uaddr", "addr_len")
_STATES = (_SOCK, "const int", "const int")
_SET_STATE = "sock:inet_sock_set_state"
_STREAM = stream_points()

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
            Way(
                "tracepoint",
                (
                    *tracepoint(_SET_STATE, "tp_connect", *_STATES).hooks,
                    Hook(
                        *("net:net_dev_queue", "tp_connect_port", "tracepoint"),
                        ("struct sk_buff *",),
                        quiet=True,
                        sampling=True,
                    ),
                ),
            ),
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
    _STREAM["send"],
    _STREAM["send_short"],
    _STREAM["recv"],
    _STREAM["close"],
)

HISTOGRAMS = (
    Histogram("connect", "connect(): SYN to established", ("connect", "state")),
    Histogram("connect_failed", "connect(): SYN to failure", ("connect", "state")),
)

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
    """Describe a row in at most 15 characters, the width of the table's column."""
    if moment.point == "connect":
        return moment.failure if moment.err else "SYN goes out"
    if moment.point == "state":
        if moment.state == "TCP_CLOSE" and moment.err:
            return moment.failure
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
