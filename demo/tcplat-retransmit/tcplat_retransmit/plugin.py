"""Where segments that are sent again are watched, with which fields, and in which words."""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib.resources import files
from typing import Annotated

from tcplat_core import (
    CannotRunError,
    Event,
    HookPoint,
    Moment,
    Option,
    Options,
    ProbeSpec,
    Wire,
    hookimpl,
    tracepoint,
)

_CLOCK_MONOTONIC_COARSE = 6
"""include/uapi/linux/time.h; Python has no name for it."""
_USUAL_HZ = range(24, 10_001)


class RetransmitEvent(Event, gc=False):
    """A row of tcp_retransmit."""

    rto_us: Annotated[
        int | None,
        Wire(
            "u32",
            "retransmission timeout (RFC 6298) in effect",
            nullable=True,
        ),
    ]
    srtt_us: Annotated[
        int | None, Wire("u32", "smoothed round-trip time; null before a sample", nullable=True)
    ]
    segments: Annotated[int, Wire("u16", "number of segments on the wire (GSO sends them as one)")]
    retransmits: Annotated[
        int, Wire("u32", "segments retransmitted by this socket so far, including these")
    ]


def kernel_hz() -> int | None:
    """CONFIG_HZ of the running kernel; None where its clock is not of that kind.

    The coarse clocks advance with the timer interrupt: their resolution is TICK_NSEC,
    10^9 / HZ rounded (include/linux/jiffies.h), and needs neither root nor a config file.
    """
    tick_ns = round(time.clock_getres(_CLOCK_MONOTONIC_COARSE) * 1e9)
    hz = round(1e9 / tick_ns) if tick_ns > 0 else 0
    if hz not in _USUAL_HZ or (10**9 + hz // 2) // hz != tick_ns:
        return None
    return hz


def _micros(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise ValueError("it must be a number of microseconds")
    return min(int(text), 2**32 - 1)


OPTIONS = (
    Option(
        name="min_rto_us",
        help="leave out rows while the RTO is shorter than so many µs",
        convert=_micros,
        default=0,
    ),
)


def defines(options: Options) -> dict[str, int | str]:
    """Return the constants that the C is compiled with.

    Raises:
        CannotRunError: min_rto_us= is given, and the kernel's HZ is not known.
    """
    hz = kernel_hz()
    if hz is None and options["min_rto_us"]:
        raise CannotRunError(
            "probe tcp_retransmit cannot compute RTOs on this host, because the kernel's "
            "clocks do not show its HZ: leave min_rto_us out"
        )
    constants: dict[str, int | str] = {"RETRANSMIT_MIN_RTO_US": options["min_rto_us"]}
    if hz:
        constants["RETRANSMIT_HZ"] = hz
    return constants


def describe(moment: Moment) -> str:
    """Return a row in words, 15 letters at most: the table's column is no wider."""
    if moment.point == "not_sent":
        return moment.error if moment.err else "dropped by host"
    flags = (moment.flags or "").split("|")
    if "SYN" in flags:
        return "SYN again"
    if "FIN" in flags:
        return "FIN again" if moment.empty else "data, FIN again"
    return "data again"


_SOCK, _SKB = "const struct sock *", "const struct sk_buff *"
_RETRANSMIT = "tcp:tcp_retransmit_skb"

POINTS = (
    HookPoint(
        "retransmit",
        (
            # The third argument came with 6.17: the tracepoint fires for failures, too.
            tracepoint(_RETRANSMIT, "tp_sent_again", _SOCK, _SKB, "int"),
            tracepoint(_RETRANSMIT, "tp_sent_again_before_6_17", _SOCK, _SKB),
        ),
    ),
    HookPoint(
        "not_sent", (tracepoint(_RETRANSMIT, "tp_not_sent", _SOCK, _SKB, "int"),), optional=True
    ),
)


@hookimpl
def tcplat_register_probes() -> Iterator[ProbeSpec]:
    """Offer the probe."""
    yield ProbeSpec(
        name="tcp_retransmit",
        summary="each TCP segment that is sent again, with the RTO at that moment",
        source=files(__package__).joinpath("tcp_retransmit.bpf.c").read_text(encoding="utf-8"),
        points=POINTS,
        types=("tcp_sock", "inet_connection_sock:icsk_rto", "sk_buff:cb", "tcp_skb_cb"),
        event=RetransmitEvent,
        describe=describe,
        options=OPTIONS,
        defines=defines,
        track=True,
    )
