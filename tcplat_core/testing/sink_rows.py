"""The input of a sink in the kit: rows, losses, counts and books."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import attrs

from tcplat_core.event.fields import Event, Wire
from tcplat_core.plugin.aggregates import (
    BUCKETS,
    Aggregates,
    Distribution,
    Group,
    Histogram,
    bucket,
)
from tcplat_core.plugin.report import HookReport, ProbeReport, RunReport
from tcplat_core.plugin.specs import Loss, RunInfo, Sink

from .fake_rows import make_event


class OwnEvent(Event, gc=False):
    """A row of a third-party probe."""

    rto_us: Annotated[int | None, Wire("u32", "a field of its own", nullable=True)]


INFO = RunInfo(("tcp_client", "theirs"), events={"tcp_client": Event, "theirs": OwnEvent})
REPLAYED = attrs.evolve(INFO, live=False)
"""A replay: its output does not depend on the time of the run."""
REPORT = RunReport(
    probes={
        "tcp_client": ProbeReport(
            hooks=(HookReport("send", "tcp_sendmsg", "kprobe", 12, 2, 9),),
            missing={"recv": "this kernel has no function tcp_recvmsg"},
            untracked=3,
            interfaces={"eth0": "native"},
            skipped={"tcp_sendmsg": 1},
            silent={"eth1": "it is gone"},
        )
    },
    duration_s=1.5,
    late=1,
    switched_off={"other": "writing failed: No space left on device"},
)
LOSS = Loss("tcp_client", "send", 2)


def stream(count: int, start: int = 0) -> list[Event]:
    """Yield connections of ten rows each: opened, used, closed."""
    story = (
        *(("connect", "TCP_SYN_SENT", None), ("state", "TCP_ESTABLISHED", "TCP_SYN_SENT")),
        *(("send", "TCP_ESTABLISHED", None), ("recv", "TCP_ESTABLISHED", None)) * 2,
        *(("state", "TCP_FIN_WAIT1", "TCP_ESTABLISHED"), ("recv", "TCP_FIN_WAIT2", None)),
        *(("state", "TCP_CLOSE", "TCP_FIN_WAIT2"), ("close", "TCP_CLOSE", None)),
    )
    rows = []
    for number in range(start, start + count):
        connection, step = divmod(number, len(story))
        point, state, old_state = story[step]
        rows.append(
            make_event(
                ts_ns=1_000_000_000 + number * 1000,
                time_ns=1_700_000_000_000_000_000 + number * 1000,
                sock=connection + 1,
                sport=1024 + connection % 60_000,
                daddr=f"10.{connection >> 16 & 255}.{connection >> 8 & 255}.{connection & 255}",
                point=point,
                state=state,
                old_state=old_state,
                seq=number * 100 % 2**32,
            )
        )
    return rows


def counted(samples: int, comms: Sequence[str] = ("curl",), *, final: bool = True) -> Aggregates:
    """Return aggregates per process: this many durations of a millisecond."""
    counts = [0] * BUCKETS
    counts[bucket(1_000_000)] = samples
    return Aggregates(
        ts_ns=1_000_000_000,
        time_ns=1_700_000_000_000_000_000,
        elapsed_s=float(samples),
        distributions=[
            Distribution(
                probe="tcp_client",
                histogram=Histogram("connect", "SYN to established", ("connect",)),
                group=Group(pid=number, comm=comm),
                counts=counts,
                over=number % 2,
                unmeasured=number % 3,
            )
            for number, comm in enumerate(comms, 1)
        ],
        final=final,
    )


def end_run(sink: Sink) -> None:
    """End as a run does: pass what the kernel has counted, then the report."""
    sink.aggregates(counted(3))
    sink.close(REPORT)
