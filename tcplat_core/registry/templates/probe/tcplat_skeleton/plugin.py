"""Hooks, fields and options of the probe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Annotated

from tcplat_core import (
    Event,
    HookPoint,
    Moment,
    Option,
    Options,
    ProbeSpec,
    Wire,
    duration,
    hookimpl,
    tracepoint,
)

tcplat_hookspec = "1.0"
"""Version of tcplat's plugin hooks that this plugin is made for."""


class Row(Event):
    """The common fields, and two more: in the C, in JSON and in the table."""

    srtt_us: Annotated[
        int | None, Wire("u32", "smoothed round-trip time, µs; null before a sample", nullable=True)
    ]
    resent: Annotated[int, Wire("u32", "retransmitted segments")]


SOURCE = files(__package__).joinpath("skeleton.bpf.c")
POINTS = (HookPoint("end", (tracepoint("tcp:tcp_destroy_sock", "tp_end", "struct sock *"),)),)
OPTIONS = (
    Option(
        name="min_srtt",
        help="leave out connections with a shorter round-trip time",
        convert=duration,
        default=0.0,
    ),
)


def defines(options: Options) -> Mapping[str, int | str]:
    """Return the options as constants for the C."""
    return {"MIN_SRTT_US": round(options["min_srtt"] * 1e6)}


def describe(moment: Moment) -> str:
    """Return the description of a row, at most 15 letters."""
    return moment.error if moment.err else "connection over"


@hookimpl
def tcplat_register_probes() -> Iterator[ProbeSpec]:
    """Offer the probe."""
    yield ProbeSpec(
        name="skeleton",
        summary="each TCP connection when it ends: round-trip time, retransmits",
        source=SOURCE.read_text(encoding="utf-8"),
        points=POINTS,
        types=("tcp_sock",),
        event=Row,
        describe=describe,
        options=OPTIONS,
        defines=defines,
        # A connection may end in softirq, where the current task is unrelated.
        track=True,
    )
