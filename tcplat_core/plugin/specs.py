"""What plugins declare and what a run hands them. Values are frozen, things are not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Protocol

import attrs
import msgspec

from tcplat_core.event.check import checked_event
from tcplat_core.event.fields import Count, Event, Moment, Number, Positive, Real

from .histogram import Aggregates, Aggregation, Histogram
from .hookpoints import HookPoint, Interfaces, checked_name
from .maps import Maps, ReadableMap
from .options import Option, Options
from .report import RunReport


@attrs.frozen(kw_only=True)
class ProbeSpec:
    """A probe: declarations and one C file. It never calls bcc.

    Args:
        name: As in ``--probe NAME``.
        summary: One line.
        source: The C text.
        points: Where it listens.
        types: Kernel types that the C needs: ``"tcp_sock"``, ``"net:ns"`` for single members.
        event: The event's class, :class:`tcplat_core.Event` or a subclass.
        describe: Plain words for a row, from a :class:`tcplat_core.Moment`.
        options: What ``name:key=value`` may set.
        defines: C constants from the options.
        interfaces: Where its XDP programs go, from the options; needed if it has any.
        track: Have the core learn who owns each socket. For a probe whose handlers run
            in softirq alone, where no process calls: see include/tcplat/owner.bpf.h.
        maps: Arrays of its C that poll() reads.
        poll: Makes rows of them, with ``maps.row()``: called once a second while the probe
            is attached, and once after that. It runs without any privilege. When it raises,
            that is said, and it is not called again.
        histograms: What it can count in the kernel when a sink asks for it
            (include/tcplat/histogram.bpf.h).
    """

    name: str = attrs.field(validator=checked_name)
    summary: str
    source: str
    points: tuple[HookPoint, ...]
    types: tuple[str, ...] = ()
    event: type[Event] = attrs.field(default=Event, validator=checked_event)
    describe: Callable[[Moment], str] = lambda moment: moment.point
    options: tuple[Option, ...] = ()
    defines: Callable[[Options], Mapping[str, int | str]] = lambda _: {}
    interfaces: Callable[[Options], Interfaces] | None = None
    track: bool = False
    maps: tuple[ReadableMap, ...] = ()
    poll: Callable[[Maps], Iterable[Event] | None] | None = None
    histograms: tuple[Histogram, ...] = ()


class Sink(Protocol):
    """Consumes batches. A method that raises gets the sink switched off; the run goes on.

    A sink may also have ``idle()``: called once a second, so that it can raise
    ReaderGoneError while there is nothing to write. And ``poll()``: called whenever the
    rings have been looked at, every 3 to 20 ms, also when nothing came (in a replay at
    least every 100 ms); it must not block. And ``merged()``: it gets a :class:`Merge` for each
    host of a capture that was made of several, before the rows. And ``passed(ts_ns)``: no row
    that is older will come; called several times a second while nothing comes, and never in a
    replay, also of a live socket: its rows may still be on their way. What follows from it
    must be what the next row, or close(), would have it write anyhow: `RunReport.until_ns` is
    where it ended. One whose spec has `aggregate` has ``aggregates()``, see
    :class:`AggregateSink`.

    And ``begin()``: called once, before the first row, when everything is attached (in a
    replay, when something was read; ``poll()`` may have come before). What replaces a file is
    opened there and not in the factory, so that a start that is refused leaves the old one;
    :class:`Output` does so by itself. And ``cancel()`` instead of close(): there was no run, or
    it broke off with an error. What the factory has made for others to see, such as a socket,
    is to be taken away there.

    One that tells of many rows in one says so by ``joins = True``: the conformance kit
    does not expect each row in its output then.
    """

    def write(self, batch: Sequence[Event]) -> None:
        """Take a batch of rows, sorted by time. Output must be flushed when this returns.

        The batch cannot be changed, and the rows are to be left as they are: other sinks
        get them, too.

        Where a batch ends is chance: what is written follows from the rows alone.
        """

    def lost(self, loss: Loss) -> None:
        """Events were lost from this place in the stream on, until `loss.until_ns`."""

    def close(self, report: RunReport) -> None:
        """The run is over. Not called where a method has failed before; twice does no harm."""


class AggregateSink(Sink, Protocol):
    """A sink that shows what the kernel has counted."""

    def aggregates(self, them: Aggregates) -> None:
        """All that was counted since the run began; a last time, final, before close()."""


@attrs.frozen(kw_only=True)
class SinkSpec:
    """A sink.

    Args:
        name: As in ``--sink NAME``.
        summary: One line.
        factory: Makes the sink from its options, before anything is attached: says what cannot
            be, and leaves alone what is there already.
        options: What ``name:key=value`` may set.
        aggregate: What the kernel is to count for it, from the options. Such a sink wants
            no rows: where no other does, none are made. It gets aggregates().
    """

    name: str = attrs.field(validator=checked_name)
    summary: str
    factory: Callable[[Options, RunInfo], Sink]
    options: tuple[Option, ...] = ()
    aggregate: Callable[[Options], Aggregation] | None = None


@attrs.frozen
class RunInfo:
    """What a sink may know of the run before it begins.

    Args:
        probes: Names of the probes.
        stopping: Says whether the user asked to stop: a blocked write then gives up.
        events: Probe -> the class of its rows; :func:`tcplat_core.fields` says what is in them.
        live: False in a replay: whose rows there will be is not known, nor are host and clocks.
        say: Tells the user a sentence, on standard error; with ``--quiet`` it says nothing.
    """

    probes: tuple[str, ...]
    stopping: Callable[[], bool] = lambda: False
    events: Mapping[str, type[Event]] = attrs.field(factory=dict)
    live: bool = True
    say: Callable[[str], None] = lambda _: None


@attrs.frozen
class Loss:
    """So many events of a hook were lost since the last time this was said.

    Args:
        probe: Whose ring was full.
        point: The hook's.
        count: So many.
        since_ns: Where in the stream it stands: none of them was before this instant.
        until_ns: None of them was after this one. Both are 0 where it is not known.
    """

    probe: str
    point: str
    count: Count
    since_ns: Count = 0
    until_ns: Count = 0


HOST_BITS = 32
"""In a capture of several hosts, `netns` is the host's own number plus `host << HOST_BITS`."""


@attrs.frozen
class Merge:
    """A host of a capture that was made of several; stands before the rows.

    Args:
        host: Its number: 0 is the host by whose clock all rows are stamped.
        name: As the user called its capture.
        offset_ns: Its CLOCK_MONOTONIC minus that of host 0, at its first packet that both saw.
        drift_ppm: How much faster its clock runs, over the whole capture.
        drift_bound_ppm: So far that may be wrong.
        bound_ns: The offset that was taken off its rows is right within so much, wherever
            a packet between the two hosts was seen.
        packets: So many of those bound it.
    """

    host: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    name: str
    offset_ns: Number = 0
    drift_ppm: Real = 0.0
    drift_bound_ppm: Positive = 0.0
    bound_ns: Count = 0
    packets: Count = 0
