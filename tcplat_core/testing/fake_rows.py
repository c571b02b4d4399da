"""Rows and records as input of tests, and a sink that keeps what it was given."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Sequence
from typing import Any, TypeVar, overload

import attrs

from tcplat_core.event.fields import SCHEMA_VERSION, Event
from tcplat_core.event.record import Record
from tcplat_core.plugin.report import RunReport
from tcplat_core.plugin.sampling import Sampled
from tcplat_core.plugin.specs import Loss, ProbeSpec, Sink
from tcplat_core.run.probe_run import fired_by

_AnyEvent = TypeVar("_AnyEvent", bound=Event)

_A_SEND: dict[str, Any] = {
    "v": SCHEMA_VERSION,
    "ts_ns": 1_000_000_000,
    "time_ns": 1_700_000_000_000_000_000,
    "probe": "tcp_client",
    "point": "send",
    "func": "tcp_sendmsg",
    "attach": "kprobe",
    "pid": 4711,
    "tid": 4711,
    "comm": "curl",
    "thread": None,
    "cpu": 0,
    "netns": 4_026_531_840,
    "ip": 4,
    "saddr": "127.0.0.1",
    "sport": 40_000,
    "daddr": "127.0.0.1",
    "dport": 9999,
    "state": "TCP_ESTABLISHED",
    "old_state": None,
    "desc": "message sent",
    "seq": 1,
    "bytes": 100,
    "flags": None,
    "connect_us": None,
    "ifname": None,
    "sock": 1,
}


@overload
def make_event(**fields: Any) -> Event: ...
@overload
def make_event(event: type[_AnyEvent], /, **fields: Any) -> _AnyEvent: ...
def make_event(event: type[Event] = Event, /, **fields: Any) -> Event:
    """Return a row: curl sends to 127.0.0.1:9999, changed by `fields`.

    Args:
        event: The row's class; the fields that it adds must all be given.
        fields: By name.
    """
    return event(**{**_A_SEND, **fields})


def make_record(event: type[Event] = Event, /, **members: int | bytes | str) -> bytes:
    """Return a record as the kernel side fills it: zeros, but for `members`.

    Args:
        event: The class that describes the record.
        members: By their names in C, raw. A str is an address, or a process's name.
    """
    record = _layout(event)
    values = []
    for member, c_type in record.members:
        value = members.pop(member, b"" if "[" in c_type else 0)
        values.append(_raw(value, c_type) if isinstance(value, str) else value)
    if members:
        raise TypeError(f"a record of {event.__name__} has no {', '.join(members)}")
    return record.packing.pack(*values)


def make_row(spec: ProbeSpec, program: str, /, **members: int | bytes | str) -> Any:
    """Return the row that a run makes of a record of one of the probe's programs.

    Args:
        spec: The probe.
        program: The C function that filled the record.
        members: As for :func:`make_record`.
    """
    hooks = fired_by(spec)
    number = [hook.program for hook in hooks].index(program)
    record = _layout(spec.event)
    decode = record.decoder(spec.name, hooks, lambda index: f"if{index}")
    raw = make_record(spec.event, hook=number, **members)
    (row,) = decode(record.layout.iter_unpack(raw), 0)
    return row


_layout = functools.cache(Record)


def _raw(value: str, c_type: str) -> bytes:
    if c_type.startswith("char"):
        return value.encode()
    address = ipaddress.ip_address(value)
    if address.version == 4:  # noqa: PLR2004 - as in IPv4
        return b"\0" * 10 + b"\xff\xff" + address.packed
    return address.packed


@attrs.define(eq=False)
class RecordingSink(Sink):
    """Keeps everything that it is given.

    Args:
        error: Raised by each write(), unless None.
    """

    error: Exception | None = None
    batches: list[list[Event]] = attrs.field(factory=list, init=False)
    stream: list[Event | Loss | Sampled] = attrs.field(factory=list, init=False)
    """Rows, losses and shares of the connections, in order."""
    reports: list[RunReport] = attrs.field(factory=list, init=False)
    """The arguments of close(): one, after a run."""

    @property
    def rows(self) -> list[Event]:
        """The rows of all batches."""
        return [row for batch in self.batches for row in batch]

    def write(self, batch: Sequence[Event]) -> None:
        """Keep the batch, or raise `error`."""
        if self.error is not None:
            raise self.error
        self.batches.append(list(batch))
        self.stream += batch

    def lost(self, loss: Loss) -> None:
        """Keep the loss."""
        self.stream.append(loss)

    def sampled(self, share: Sampled) -> None:
        """Keep the share."""
        self.stream.append(share)

    def close(self, report: RunReport) -> None:
        """Keep the report."""
        self.reports.append(report)
