"""Fields and hook point of tcp_stats: counters of a socket that closes."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from typing import Annotated

from tcplat_core import (
    Event,
    HookPoint,
    Moment,
    ProbeSpec,
    Wire,
    fenter,
    fentry,
    hookimpl,
    kentry,
    kprobe,
    tracepoint,
)

_ROLES = {1: "client", 2: "service"}


class StatsEvent(Event, gc=False):
    """A row of tcp_stats. A probe of its own, so that no other's rows grow by it."""

    role: Annotated[
        str | None,
        Wire("u8", "client: the socket called connect(); service: it was accepted", to=_ROLES.get),
    ]
    srtt_us: Annotated[
        int | None, Wire("u32", "smoothed round-trip time, µs (RFC 6298)", nullable=True)
    ]
    min_rtt_us: Annotated[
        int | None,
        Wire("u32", "minimum round-trip time of the last five minutes, µs", nullable=True),
    ]
    rto_us: Annotated[int | None, Wire("u32", "retransmission timeout, µs", nullable=True)]
    retransmits: Annotated[int, Wire("u32", "retransmitted segments, including SYNs")]
    bytes_acked: Annotated[int, Wire("u64", "bytes that the peer acknowledged; SYN and FIN count")]
    bytes_received: Annotated[int, Wire("u64", "bytes received in order; a FIN counts")]


def describe(moment: Moment) -> str:
    """Describe a row."""
    return moment.failure if moment.err else "closed"


@hookimpl
def tcplat_register_probes() -> Iterator[ProbeSpec]:
    """Offer the probe."""
    yield ProbeSpec(
        name="tcp_stats",
        summary="RTT, RTO, retransmits and bytes of a connection, when it closes",
        source=files(__package__).joinpath("tcp_stats.bpf.c").read_text(encoding="utf-8"),
        points=(
            HookPoint(
                "stats",
                (
                    fentry(fenter("tcp_set_state", "fe_stats", "sk", "state")),
                    tracepoint(
                        "sock:inet_sock_set_state",
                        "tp_stats",
                        *("const struct sock *", "const int", "const int"),
                    ),
                    kprobe(kentry("tcp_set_state", "kp_stats", "sk", "state")),
                ),
            ),
        ),
        types=("tcp_sock",),
        event=StatsEvent,
        describe=describe,
        track=True,
    )
