"""The checks of what a probe declares: they need no compiler and no kernel."""

from __future__ import annotations

import errno
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from tcplat_core.deliver.ring import Ring
from tcplat_core.errors import in_a_line, is_the_users
from tcplat_core.event.fields import Event, Moment, Wire, wires
from tcplat_core.event.record import Record
from tcplat_core.event.text import TCP_STATES
from tcplat_core.loader.protocol import ProbeRequest
from tcplat_core.plugin.hookpoints import Hook, Interfaces, Way, reporting
from tcplat_core.plugin.specs import ProbeSpec
from tcplat_core.run.probe_run import fired_by, probe_request

from .check import Check, Fault, NotChecked, Subject, of_the_plugin
from .fake_rows import make_record
from .kernel import FakeRing

_WIDEST = 15
"""Letters of TCP_DESCRIPTION: the table's column is no wider."""
_MOST_HOOKS = 255
"""The record's `hook` is a byte."""
_BCCS_OWN = re.compile(
    r"(kprobe|kretprobe|tracepoint|raw_tracepoint|kfunc|kretfunc|kmod_ret|lsm|syscall|bpf_iter)__"
)
"""bcc attaches a program with such a name by itself."""


def checks_of(_: Subject) -> dict[str, Check]:
    """Return all checks of what a probe declares, by name."""
    return {
        "hook points": _points,
        "constants": _constants,
        "descriptions": _descriptions,
        "round trip": _round_trip,
    }


def probe_of(subject: Subject) -> ProbeSpec:
    """Return the spec of a subject that is a probe."""
    assert isinstance(subject.spec, ProbeSpec)  # noqa: S101 - checks() has looked
    return subject.spec


def hooks_of(spec: ProbeSpec) -> Iterator[tuple[str, Hook]]:
    """Yield each hook of all ways, with the name of its point."""
    for point in spec.points:
        for way in point.ways:
            for hook in way.hooks:
                yield point.point, hook


def ways_of(subject: Subject) -> list[str]:
    """Return the mechanisms that at least one point of the probe has."""
    return sorted({way.mechanism for point in probe_of(subject).points for way in point.ways})


_OF_WAY = {
    "fentry": {"fentry", "fexit", "tracepoint"},
    "kprobe": {"kprobe", "kretprobe", "tracepoint"},
    "tracepoint": {"tracepoint"},
    "xdp": {"xdp"},
}


def _points(subject: Subject) -> None:
    """Check that points, programs and functions are unique, in a record and in the books."""
    spec = probe_of(subject)
    names = [point.point for point in spec.points]
    for name in names:
        if names.count(name) > 1:
            raise Fault(f"two hook points are named {name!r}: rename one, or join their mechanisms")
    if not names:
        raise Fault("it has no hook points: it would produce no rows")
    for point in spec.points:
        if not point.ways:
            raise Fault(f"hook point {point.point!r} has no mechanism: give it at least one Way")
        for way in point.ways:
            _check_way(point.point, way, counts=only_counts(spec, point.point))
    _check_names(spec)


def only_counts(spec: ProbeSpec, point: str) -> bool:
    """Return whether its programs need no records: poll() or a histogram shows what they count."""
    return spec.poll is not None or any(point in one.points for one in spec.histograms)


def _check_way(point: str, way: Way, *, counts: bool) -> None:
    where = f"hook point {point!r} by {way.mechanism}"
    funcs = [hook.func for hook in way.hooks if not hook.quiet]
    if not (funcs or counts):
        raise Fault(f"{where} has no hook that reports: one of them must not be quiet")
    for hook in way.hooks:
        if funcs.count(hook.func) > 1:
            raise Fault(
                f"{where} has two hooks at {hook.func}: the books could not count their rows "
                "separately; make one quiet, or give it a point of its own"
            )
        if hook.mechanism not in _OF_WAY[way.mechanism]:
            raise Fault(
                f"{where} has the program {hook.program}, which is a {hook.mechanism}: "
                "give it a Way of its own"
            )


def _check_names(spec: ProbeSpec) -> None:
    seen: dict[str, str] = {}
    for _, hook in hooks_of(spec):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", hook.program):
            raise Fault(f"program {hook.program!r} is not a name for a C function: rename it")
        if _BCCS_OWN.match(hook.program):
            raise Fault(f"bcc attaches {hook.program} by itself, because of its name: rename it")
        place = f"{hook.mechanism}:{hook.func}"
        other = seen.setdefault(hook.program, place)
        if other != place:
            raise Fault(
                f"program {hook.program} is for {other} and for {place}: its rows could not name "
                "the function; write a program for each"
            )
    _check_also(spec, seen)
    if len(reporting(spec.points)) > _MOST_HOOKS:
        raise Fault(f"it has more than {_MOST_HOOKS} programs that report: make it two probes")


def _check_also(spec: ProbeSpec, places: Mapping[str, str]) -> None:
    """Check the hooks whose rows another point's program makes; `places`: where each program is."""
    for point in spec.points:
        for hook in point.also:
            if hook.program in places:
                raise Fault(f"{hook.program} is also the name of a program: rename one of the two")
            if hook.by not in places:
                raise Fault(
                    f"{hook.program} is made by {hook.by or 'no program'}, which no hook point "
                    "names: give it the program that makes its rows"
                )
            if f"{hook.mechanism}:{hook.func}" != places[hook.by]:
                raise Fault(
                    f"{hook.program} is at {hook.mechanism}:{hook.func}, and {hook.by} is for "
                    f"{places[hook.by]}: a row could not say which"
                )


def _constants(subject: Subject) -> None:
    """Check that options become valid C, and that XDP programs have interfaces."""
    request = request_of(subject)
    for name, value in request.defines.items():
        if not re.fullmatch(r"[A-Za-z_]\w*(\([\w, ]*\))?", name):
            raise Fault(f"defines() gives {name!r}, which is not a valid name in C: rename it")
        if not isinstance(value, int | str) or "\n" in str(value):
            raise Fault(
                f"defines() gives {name} = {value!r}: it has to be a number or one line of C"
            )
        if name.startswith(("TCPLAT_", "HOOK_")):
            raise Fault(f"defines() gives {name}, and the core uses such names: rename it")
    has_xdp = "xdp" in ways_of(subject)
    if has_xdp and not isinstance(request.interfaces, Interfaces):
        raise Fault("it has XDP programs and names no interfaces: give its spec interfaces=")
    if request.interfaces is not None and not has_xdp:
        raise Fault("it names interfaces and has no XDP program: leave interfaces= out")


def request_of(subject: Subject) -> ProbeRequest:
    """Return what a run would ask the loader for, with the options of the subject."""
    options = subject.options()
    with of_the_plugin():
        return probe_request(probe_of(subject), options)


_ERRORS = (0, *sorted(errno.errorcode), 9999)
_FLAGS = (None, "", "SYN", "ACK", "SYN|ACK", "FIN|ACK", "RST", "FIN|SYN|RST|PSH|ACK|URG|ECE|CWR")
_STATES = (*TCP_STATES, "state 13")


def _descriptions(subject: Subject) -> None:
    """Check that describe() has words for every event, and that they fit into the table."""
    spec = probe_of(subject)
    points = [point.point for point in spec.points]
    few = (0, errno.ECONNREFUSED, errno.EHOSTUNREACH, 9999)
    # Not every errno in every change of state: that would be two million.
    for point, state, old_state, err, empty, flags in itertools.chain(
        itertools.product(points, _STATES, _STATES, few, (None, False, True), _FLAGS),
        itertools.product(points, _STATES, (None,), _ERRORS, (None, False, True), (None, "ACK")),
    ):
        moment = Moment(point, state, old_state, err, empty, flags)
        where = f"for point {point!r}, state {state}, old_state {old_state}, err {err}"
        try:
            words = spec.describe(moment)
        except BaseException as error:
            if is_the_users(error):
                raise
            raise Fault(
                f"describe() raises {in_a_line(error)} {where}, empty {empty}, flags {flags}: "
                "it has to return a text for every event"
            ) from error
        if not isinstance(words, str) or not words.strip() or not words.isprintable():
            raise Fault(f"describe() gives {words!r} {where}: it has to be a printable text")
        if len(words) > _WIDEST:
            raise Fault(
                f"describe() gives {words!r} {where}, {len(words)} letters: "
                f"the table's column has {_WIDEST}"
            )


def _round_trip(subject: Subject) -> None:
    """Check that any record becomes a row, JSON, and the same row again."""
    spec = probe_of(subject)
    record, hooks = Record(spec.event), fired_by(spec)
    if not hooks:
        raise NotChecked("none of its programs makes records")
    decode = record.decoder(spec.name, hooks, lambda index: f"if{index}")
    encoder, decoder = msgspec.json.Encoder(), msgspec.json.Decoder(spec.event)
    own = wires(spec.event)
    ring = FakeRing(1 << 16)
    reader = Ring(ring.fd, ring.size, record.layout)
    try:
        for field, values in _extremes(record).items():
            for number, (value, has) in enumerate(itertools.product(values, (0, 255))):
                members = {"has": has, "hook": number % len(hooks), field: value}
                ring.feed([make_record(spec.event, **members)])
                what = f"a record with {field} = {_short(value)}"
                (raw,) = next(reader.drain())
                try:
                    (row,) = decode([raw], 0)
                    line = encoder.encode(row)
                except BaseException as error:
                    if is_the_users(error):
                        raise
                    raise Fault(
                        f"{what} does not become a row ({in_a_line(error)}): "
                        "its to= has to accept every value that the kernel may write"
                    ) from error
                try:
                    again = decoder.decode(line)
                except BaseException as error:
                    if is_the_users(error):
                        raise
                    raise Fault(
                        f"{what} becomes {line.decode()[:200]}, which does not fit the field's "
                        f"type ({in_a_line(error)}): to= returns another type than is declared"
                    ) from error
                if again != row:
                    raise Fault(f"{what} is another row after JSON: {row} became {again}")
                _check_kept(own, field, value, row, has)
    finally:
        reader.close()
        ring.close()


def _check_kept(
    own: Mapping[str, tuple[str, Wire]], member: str, value: Any, row: Event, has: int
) -> None:
    """Check that a field without a conversion has the raw value."""
    if member not in own:
        return
    field, wire = own[member]
    if wire.to is None and "[" not in wire.c_type and value and (has or not wire.has):
        found = getattr(row, field)
        if found != value:
            raise Fault(f"{member} = {value} in the record is {field} = {found!r} in the row")


def _extremes(record: Record) -> dict[str, list[Any]]:
    """Return least, largest and odd values of each member, except of those that the core fills."""
    extremes: dict[str, list[Any]] = {}
    for member, c_type in record.members:
        if member in ("hook", "has") or member.endswith("_pad"):
            continue
        if "[" in c_type:
            size = int(c_type[:-1].partition("[")[2])
            texts = (bytes(size), b"\xff" * size, bytes(range(1, size + 1)), b"\n\x1b\\\"'\x9b\xf0")
            extremes[member] = [text[:size].ljust(size, b"\0") for text in texts]
            continue
        bits = int(c_type.lstrip("us")) if c_type != "bool" else 1
        signed = c_type.startswith("s")
        values = [0, 1, (1 << bits - 1) - 1, (1 << bits - signed) - 1]
        values += [-1, -(1 << bits - 1)] if signed else [1 << bits - 1]
        if member in ("ts_ns", "sock"):  # neither the clock nor the numbers of sockets get there
            values = [value for value in values if value < 1 << 63]
        extremes[member] = [bool(value) for value in values] if c_type == "bool" else values
    return extremes


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 40 else f"{value!r:.40}..."  # noqa: PLR2004 - a line
