"""Hook points of both ends of a connection. <tcplat/handlers.bpf.h> has their handlers."""

from __future__ import annotations

from .hookpoints import (
    Hook,
    HookPoint,
    Way,
    fenter,
    fentry,
    fexit,
    kentry,
    kprobe,
    kreturn,
    tracepoint,
)

# tcp_recvmsg() lost its `nonblock` in 5.19 (ec095263a965) and its `addr_len` in 7.1 (8341c989ac77).
_RECV4 = ("sk", "msg", "len", "flags")
_RECV5 = (*_RECV4, "addr_len")
_RECV6 = ("sk", "msg", "len", "nonblock", "flags", "addr_len")
_SEND = ("sk", "msg", "size")
# How splice(2) and sendfile(2) send before 6.5 (dc97391e6610).
_PAGE = ("sk", "page", "offset", "size", "flags")
_SPLICE = ("sock", "ppos", "pipe", "len", "flags")
_LENGTH = ("struct sock *", "int", "int")
_DESTROY = "tcp:tcp_destroy_sock"

_SEND_POINT = HookPoint(
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
        tracepoint(
            "tcp:tcp_sendmsg_locked", "tp_send", "const struct sock *", "const struct msghdr *"
        ),
    ),
)
_SEND_SHORT = HookPoint(
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
)
_CLOSE = HookPoint(
    "close",
    (
        fentry(fenter("tcp_v4_destroy_sock", "fe_tcp_v4_destroy_sock", "sk")),
        tracepoint(_DESTROY, "tp_close", "struct sock *"),
        kprobe(
            kentry("tcp_v4_destroy_sock", "kp_tcp_v4_destroy_sock", "sk"),
            *tracepoint(_DESTROY, "tp_close_skipped", "struct sock *").hooks,
        ),
    ),
)


def _returns(name: str, args: tuple[str, ...], version: str = "", *, timed: bool) -> list[Hook]:
    """Return fentry hooks at the return of a function, and at its entry if it is timed."""
    entry = [fenter(name, f"fe_{name}{version}", *args, quiet=True)] if timed else []
    return [*entry, fexit(name, f"fx_{name}{version}", *args)]


def _by_kprobe(entry: str, args: tuple[str, ...]) -> Way:
    return kprobe(
        kentry("tcp_recvmsg", entry, *args, quiet=True),
        kreturn("tcp_recvmsg", "kr_tcp_recvmsg"),
        kentry("tcp_splice_read", "kp_tcp_splice_read", *_SPLICE, quiet=True),
        kreturn("tcp_splice_read", "kr_tcp_splice_read"),
    )


def stream_points(*, timed: bool = False) -> dict[str, HookPoint]:
    """Return the hook points ``send``, ``send_short``, ``recv`` and ``close``, by name.

    ``<tcplat/handlers.bpf.h>`` has their handlers, and documents what must be defined.

    Args:
        timed: Also enter ``recv`` by fentry, to know how long it took. The probe has the handlers
            ``fe_tcp_recvmsg4``, ``5`` and ``6``, by the number of arguments, and
            ``fe_tcp_splice_read``.
    """
    versions = (("4", _RECV4), ("5", _RECV5), ("6", _RECV6))
    spliced = _returns("tcp_splice_read", _SPLICE, timed=timed)
    recv = HookPoint(
        "recv",
        (
            *(
                fentry(*_returns("tcp_recvmsg", args, version, timed=timed), *spliced)
                for version, args in versions
            ),
            _by_kprobe("kp_tcp_recvmsg", _RECV4),
            _by_kprobe("kp_tcp_recvmsg6", _RECV6),
            # Came with 6.3 (6e6eda44b939).
            tracepoint("sock:sock_recv_length", "tp_recv", *_LENGTH),
        ),
    )
    return {point.point: point for point in (_SEND_POINT, _SEND_SHORT, recv, _CLOSE)}
