"""What plugins declare and what a run hands them. Values are frozen, things are not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Protocol, Self

import attrs
import msgspec

from .errors import PluginError, UsageError, blaming, words
from .histogram import Aggregates, Aggregation, Histogram
from .hookpoints import HookPoint, Interfaces, checked_name
from .kinds import Kind
from .maps import Maps, ReadableMap
from .schema import Count, Event, Moment, Number, Positive, Real, checked_event, cleaned


@attrs.frozen(kw_only=True)
class Option:
    """An option of a probe or sink, given as ``name:key=value,...``.

    Args:
        name: The key.
        help: One line for ``tcplat plugins show``.
        convert: Turns the text into the value: :func:`integer`, :func:`choice`, :func:`ports`,
            `boolean`, `duration`, `size`, or a function of your own that raises ValueError with
            what it wants. A text stays as it is unless given.
        default: The value when it is not given.
        required: It has to be given.
        metavar: What to write for a value; follows from `convert` unless given.
        example: A value for the example in ``tcplat plugins show``; a required option needs
            it, and so does one of several of which one has to be given.
    """

    name: str = attrs.field(validator=checked_name)
    help: str
    convert: Callable[[str], Any] = str
    default: Any = None
    required: bool = False
    metavar: str = attrs.field()
    example: str = attrs.field(default="")

    @metavar.default
    def _metavar(self) -> str:
        return self.convert.metavar if isinstance(self.convert, Kind) else "TEXT"

    @example.validator
    def _check_example(self, _: object, example: str) -> None:
        if self.required and not example:
            raise PluginError(f"option {self.name} is required, and has no example")

    @property
    def choices(self) -> tuple[str, ...]:
        """The words to choose from; none where anything may stand."""
        return self.convert.choices if isinstance(self.convert, Kind) else ()


Options = Mapping[str, Any]
"""What a probe or sink is given: each of its options, converted, or its default."""


def example(name: str, options: Sequence[Option]) -> str:
    """A probe or sink as the command line names it, with each option that has an example."""
    given = ",".join(f"{option.name}={option.example}" for option in options if option.example)
    return f"{name}:{given}" if given else name


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


@attrs.frozen
class HookReport:
    """The books of one hook: produced = delivered + dropped + unread."""

    point: str
    func: str
    attach: str
    produced: Count
    dropped: Count
    delivered: Count

    @property
    def unread(self) -> int:
        """Left in the ring because the run ended (``--count``)."""
        return self.produced - self.dropped - self.delivered


@attrs.frozen(kw_only=True)
class Counted:
    """The books of one histogram, over all groups.

    Args:
        samples: Durations in it.
        unmeasured: Durations whose length could not be known.
        rest: Of both, those that came when all groups were taken.
    """

    samples: Count
    unmeasured: Count
    rest: Count


@attrs.frozen(kw_only=True)
class ProbeReport:
    """The books of one probe."""

    hooks: tuple[HookReport, ...]
    missing: Mapping[str, str] = attrs.field(factory=dict)
    """Point -> why this host does not have it."""
    untracked: Count = 0
    """Sockets that could not be remembered, because there were too many."""
    interfaces: Mapping[str, str] = attrs.field(factory=dict)
    """Interface with an XDP program of ours -> native or generic."""
    skipped: Mapping[str, Count] = attrs.field(factory=dict)
    """Function or tracepoint -> how often the kernel did not run our program there, because
    it was interrupted by itself: so many rows, at most, are missing. Kernels since 5.12 count
    it for fentry and tracepoints, since 6.7 for kprobes."""
    silent: Mapping[str, str] = attrs.field(factory=dict)
    """Interface -> why no rows come from it, or no more."""
    deaf: bool = False
    """It listened on interfaces alone, and all of them are gone."""
    counted: Mapping[str, Counted] | None = None
    """Histogram -> its books; None where no sink asked for any."""
    uncounted: Mapping[str, str] = attrs.field(factory=dict)
    """Histogram -> why this host does not have it."""
    poll_error: str = ""
    """Why its poll() is not called any more."""

    @property
    def delivered(self) -> int:
        """Rows that were handed to the sinks."""
        return sum(hook.delivered for hook in self.hooks)

    @property
    def dropped(self) -> int:
        """Events for which the ring had no room."""
        return sum(hook.dropped for hook in self.hooks)


@attrs.frozen(kw_only=True)
class RunReport:
    """How a run went."""

    probes: Mapping[str, ProbeReport]
    duration_s: Positive
    late: Count = 0
    """Rows that came after a younger one was delivered."""
    switched_off: Mapping[str, str] = attrs.field(factory=dict)
    """Sink -> why it was switched off."""
    until_ns: int = 0
    """Up to this instant (CLOCK_MONOTONIC) all rows are there; 0 where that is not known."""
    incomplete: str = ""
    """Why these are not the books of the whole run; empty where they are."""

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """The inverse of as_json().

        Raises:
            ValueError: It is no report.
        """
        report = msgspec.convert(_with_field_names(value), cls)
        for told, found in ((value, report), *_of_probes(value, report)):
            for name in ("delivered", "dropped"):
                if told.get(name, getattr(found, name)) != getattr(found, name):
                    raise ValueError(f"{name} is not the sum of what its hooks have")
        return report

    def as_json(self) -> dict[str, Any]:
        """What ends a capture: ``{"v":2,"report":...}``."""
        told: dict[str, Any] = cleaned(
            {
                "delivered": self.delivered,
                "dropped": self.dropped,
                "late": self.late,
                "duration_s": round(self.duration_s, 6),
                "probes": {
                    name: {
                        "delivered": probe.delivered,
                        "dropped": probe.dropped,
                        "untracked": probe.untracked,
                        "missing": dict(probe.missing),
                        "interfaces": dict(probe.interfaces),
                        "skipped": dict(probe.skipped),
                        "silent": dict(probe.silent),
                        **_extras(probe),
                        "hooks": [
                            {**attrs.asdict(hook), "unread": hook.unread} for hook in probe.hooks
                        ],
                    }
                    for name, probe in self.probes.items()
                },
                "switched_off": dict(self.switched_off),
                **({"until_ns": self.until_ns} if self.until_ns else {}),
                **({"incomplete": self.incomplete} if self.incomplete else {}),
            }
        )
        return told

    @property
    def deaf(self) -> bool:
        """The run ended because there was nothing left to listen to."""
        return bool(self.probes) and all(probe.deaf for probe in self.probes.values())

    @property
    def delivered(self) -> int:
        """Rows of all probes."""
        return sum(probe.delivered for probe in self.probes.values())

    @property
    def dropped(self) -> int:
        """Lost events of all probes."""
        return sum(probe.dropped for probe in self.probes.values())


def _of_probes(
    value: Mapping[str, Any], report: RunReport
) -> Iterator[tuple[Mapping[str, Any], ProbeReport]]:
    """What a report's JSON tells of each probe, and what was made of it."""
    for name, probe in report.probes.items():
        yield value["probes"][name], probe


_FIELDS = {"histograms": "counted", "no_histograms": "uncounted"}
"""How JSON calls a field of a probe's report, where it does not by the field's name."""


def _with_field_names(value: Any) -> Any:
    """A report's JSON with our names for what the probes have."""
    probes = value.get("probes") if isinstance(value, dict) else None
    if not isinstance(probes, dict):
        return value
    named = {
        name: {_FIELDS.get(key, key): one for key, one in probe.items() if key not in _OURS}
        if isinstance(probe, dict)
        else probe
        for name, probe in probes.items()
    }
    return {**value, "probes": named}


_OURS = frozenset(_FIELDS.values())


def _extras(probe: ProbeReport) -> dict[str, Any]:
    """What only few reports have."""
    extras: dict[str, Any] = {}
    if probe.counted is not None:
        extras["histograms"] = {name: attrs.asdict(one) for name, one in probe.counted.items()}
    if probe.counted is not None or probe.uncounted:
        extras["no_histograms"] = dict(probe.uncounted)
    if probe.poll_error:
        extras["poll_error"] = probe.poll_error
    if probe.deaf:
        extras["deaf"] = True
    return extras


def parse_choice(text: str) -> tuple[str, dict[str, str]]:
    """``name:key=value,key=value`` as name and raw options.

    Raises:
        UsageError: It is not of that form.
    """
    name, _, rest = text.partition(":")
    given: dict[str, str] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"{text!r}: {item!r} is not of the form key=value")
        if key in given:
            raise UsageError(f"{text!r}: {key}= is given twice")
        given[key] = value
    return name, given


def read_options(owner: str, declared: Sequence[Option], given: Mapping[str, str]) -> Options:
    """Check and convert what was given, and fill in defaults.

    Args:
        owner: ``probe NAME`` or ``sink NAME``.
        declared: Its options.
        given: As texts.

    Raises:
        UsageError: An option that is not declared or is missing, or a value that does not convert.
    """
    known = {option.name: option for option in declared}
    for key in given:
        if key not in known:
            has = ", ".join(sorted(known)) or "no options"
            raise UsageError(f"{owner} has no option {key!r}; it has {has}")
    values: dict[str, Any] = {}
    for option in declared:
        if option.name not in given:
            if option.required:
                whole = example(owner.rpartition(" ")[2], declared)
                raise UsageError(f"{owner} needs {option.name}=, as in {whole}")
            values[option.name] = option.default
            continue
        with blaming(f"{owner}: reading its option {option.name}"):
            try:
                values[option.name] = option.convert(given[option.name])
            except ValueError as error:
                raise UsageError(
                    f"{owner}: option {option.name}={given[option.name]!r}: {words(error)}"
                ) from error
    return values
