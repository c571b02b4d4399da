"""What a probe promises."""

from __future__ import annotations

import errno
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from tcplat_core.deliver.ring import Ring
from tcplat_core.errors import PluginError, TcplatError, in_a_line, is_the_users
from tcplat_core.event.fields import Event, Moment, Wire, wires
from tcplat_core.event.record import Record
from tcplat_core.event.text import TCP_STATES
from tcplat_core.kernel.layout import possible_cpus
from tcplat_core.loader.filter import Filter
from tcplat_core.loader.protocol import ProbeRequest, Request
from tcplat_core.loader.source import CORE_TYPES, core_defines, program_text, with_headers
from tcplat_core.plugin.histogram import Aggregation
from tcplat_core.plugin.hookpoints import Hook, Interfaces, Way, reporting
from tcplat_core.plugin.specs import ProbeSpec
from tcplat_core.run.probe_run import fired_by, probe_request

from .check import Check, Fault, NotChecked, Subject, of_the_plugin
from .kernel import FakeRing
from .rows import make_record
from .trial_process import Trial

_WIDEST = 15
"""Letters of TCP_DESCRIPTION: the table's column is no wider."""
_MOST_HOOKS = 255
"""The record's `hook` is a byte."""
_BCCS_OWN = re.compile(
    r"(kprobe|kretprobe|tracepoint|raw_tracepoint|kfunc|kretfunc|kmod_ret|lsm|syscall|bpf_iter)__"
)
"""bcc attaches by itself what is named so."""


def checks_of(subject: Subject) -> dict[str, Check]:
    """All checks of a probe, by name."""
    compiled: dict[str, Check] = {
        f"compiles by {way}": functools.partial(_compiles, way) for way in _ways(subject)
    }
    if _probe(subject).histograms:
        compiled |= {"compiles with histograms": _compiles_counting}
    return {
        "hook points": _points,
        "constants": _constants,
        "descriptions": _descriptions,
        "round trip": _round_trip,
        **compiled,
        "programs": _programs,
        "attaches": _attaches,
        "lets packets pass": _lets_pass,
        "leaves nothing": _leaves_nothing,
    }


def _probe(subject: Subject) -> ProbeSpec:
    assert isinstance(subject.spec, ProbeSpec)  # noqa: S101 - checks() has looked
    return subject.spec


def _hooks(spec: ProbeSpec) -> Iterator[tuple[str, Hook]]:
    for point in spec.points:
        for way in point.ways:
            for hook in way.hooks:
                yield point.point, hook


def _ways(subject: Subject) -> list[str]:
    return sorted({way.mechanism for point in _probe(subject).points for way in point.ways})


_CORES_OWN = "tcplat_on_"
"""How the programs of include/tcplat/core.bpf.h begin."""
_OF_WAY = {
    "fentry": {"fentry", "fexit", "tracepoint"},
    "kprobe": {"kprobe", "kretprobe", "tracepoint"},
    "tracepoint": {"tracepoint"},
    "xdp": {"xdp"},
}


def _points(subject: Subject) -> None:
    """Points, programs and functions can be told apart, in a record and in the books."""
    spec = _probe(subject)
    names = [point.point for point in spec.points]
    for name in names:
        if names.count(name) > 1:
            raise Fault(f"two hook points are named {name!r}: rename one, or join their ways")
    if not names:
        raise Fault("it has no hook points: it would never see anything")
    for point in spec.points:
        if not point.ways:
            raise Fault(f"hook point {point.point!r} has no way to listen: give it one")
        for way in point.ways:
            _check_way(point.point, way, counts=_counts(spec, point.point))
    _check_names(spec)


def _counts(spec: ProbeSpec, point: str) -> bool:
    """Whether its programs need no records: poll() or a histogram tells what they count."""
    return spec.poll is not None or any(point in one.points for one in spec.histograms)


def _check_way(point: str, way: Way, *, counts: bool) -> None:
    where = f"the {way.mechanism} way of hook point {point!r}"
    funcs = [hook.func for hook in way.hooks if not hook.quiet]
    if not (funcs or counts):
        raise Fault(f"{where} has no hook that reports: one of them must not be quiet")
    for hook in way.hooks:
        if funcs.count(hook.func) > 1:
            raise Fault(
                f"{where} has two hooks at {hook.func}: the books cannot tell their rows "
                "apart; make one quiet, or give it a point of its own"
            )
        if hook.mechanism not in _OF_WAY[way.mechanism]:
            raise Fault(
                f"{where} has the program {hook.program}, which is a {hook.mechanism}: "
                "give it a way of its own"
            )


def _check_names(spec: ProbeSpec) -> None:
    seen: dict[str, str] = {}
    for _, hook in _hooks(spec):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", hook.program):
            raise Fault(f"program {hook.program!r} is no name of a C function: rename it")
        if _BCCS_OWN.match(hook.program):
            raise Fault(f"bcc attaches {hook.program} by itself, because of its name: rename it")
        place = f"{hook.mechanism}:{hook.func}"
        other = seen.setdefault(hook.program, place)
        if other != place:
            raise Fault(
                f"program {hook.program} is for {other} and for {place}: a row could not say "
                "which; write a program for each"
            )
    if len(reporting(spec.points)) > _MOST_HOOKS:
        raise Fault(f"it has more than {_MOST_HOOKS} programs that report: make it two probes")


def _constants(subject: Subject) -> None:
    """What the options become in C is C, and XDP programs know their interfaces."""
    request = _request(subject)
    for name, value in request.defines.items():
        if not re.fullmatch(r"[A-Za-z_]\w*(\([\w, ]*\))?", name):
            raise Fault(f"defines() gives {name!r}, which is no name in C")
        if not isinstance(value, int | str) or "\n" in str(value):
            raise Fault(
                f"defines() gives {name} = {value!r}: it has to be a number or one line of C"
            )
        if name.startswith(("TCPLAT_", "HOOK_")):
            raise Fault(f"defines() gives {name}, a name of the core's: rename it")
    has_xdp = "xdp" in _ways(subject)
    if has_xdp and not isinstance(request.interfaces, Interfaces):
        raise Fault("it has XDP programs and names no interfaces: give its spec interfaces=")
    if request.interfaces is not None and not has_xdp:
        raise Fault("it names interfaces and has no XDP program: leave interfaces= out")


def _request(subject: Subject) -> ProbeRequest:
    options = subject.options()
    with of_the_plugin():
        return probe_request(_probe(subject), options)


_ERRORS = (0, *sorted(errno.errorcode), 9999)
_FLAGS = (None, "", "SYN", "ACK", "SYN|ACK", "FIN|ACK", "RST", "FIN|SYN|RST|PSH|ACK|URG|ECE|CWR")
_STATES = (*TCP_STATES, "state 13")


def _descriptions(subject: Subject) -> None:
    """There are plain words for whatever the kernel may report, and the table has room for them."""
    spec = _probe(subject)
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
                "it has to have words for everything"
            ) from error
        if not isinstance(words, str) or not words.strip() or not words.isprintable():
            raise Fault(f"describe() gives {words!r} {where}: it has to be a text that prints")
        if len(words) > _WIDEST:
            raise Fault(
                f"describe() gives {words!r} {where}, {len(words)} letters: "
                f"the table has room for {_WIDEST}"
            )


def _round_trip(subject: Subject) -> None:
    """Whatever a record may hold becomes a row, JSON, and the same row again."""
    spec = _probe(subject)
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
                        "its to= has to take every value that the kernel may give"
                    ) from error
                try:
                    again = decoder.decode(line)
                except BaseException as error:
                    if is_the_users(error):
                        raise
                    raise Fault(
                        f"{what} becomes {line.decode()[:200]}, which does not fit the field's "
                        f"type ({in_a_line(error)}): to= gives something else than is declared"
                    ) from error
                if again != row:
                    raise Fault(f"{what} is another one after JSON: {row} became {again}")
                _check_kept(own, field, value, row, has)
    finally:
        reader.close()
        ring.close()


def _check_kept(
    own: Mapping[str, tuple[str, Wire]], member: str, value: Any, row: Event, has: int
) -> None:
    """A field that is the raw value still is that."""
    if member not in own:
        return
    field, wire = own[member]
    if wire.to is None and "[" not in wire.c_type and value and (has or not wire.has):
        found = getattr(row, field)
        if found != value:
            raise Fault(f"{member} = {value} in the record is {field} = {found!r} in the row")


def _extremes(record: Record) -> dict[str, list[Any]]:
    """Member -> the least, the largest and some odd values. What the core fills is left alone."""
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
        if member in ("ts_ns", "sock"):  # no clock goes further, nor do the numbers of sockets
            values = [value for value in values if value < 1 << 63]
        # A state beyond those that there are is a number; that of the CPU is one.
        extremes[member] = [bool(value) for value in values] if c_type == "bool" else values
    return extremes


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 40 else f"{value!r:.40}..."  # noqa: PLR2004 - a line


# --- what the compiler says


def _compiled(subject: Subject, mechanism: str, *, counting: bool = False) -> dict[str, Any]:
    """The answer of the trial where each point goes by this mechanism, as far as it can.

    Args:
        subject: The probe.
        mechanism: The way to listen.
        counting: As where a sink has the kernel count, and another wants rows.
    """
    key = f"{mechanism}, counting" if counting else mechanism
    if key not in subject.known:
        request = _request(subject)
        taken = {
            point.point: next(
                (way.mechanism for way in point.ways if way.mechanism == mechanism),
                point.ways[0].mechanism,
            )
            for point in request.points
            if point.ways
        }
        defines = core_defines(request.points, Filter())
        if request.track:
            defines["TCPLAT_TRACK"] = 1
        if counting:
            defines["TCPLAT_PROBE"] = 1
            defines |= _COUNTED.defines(possible_cpus(), len(request.histograms))
        try:
            text = program_text(request, taken=taken, defines=defines)
        except PluginError as error:
            raise Fault(f"{error}: look into include/tcplat") from error
        types = sorted({*CORE_TYPES, *request.types})
        subject.known[key] = _try(Trial.start("compile"), {"text": text, "types": types})
    answer: dict[str, Any] = subject.known[key]
    if "unable" in answer:
        raise NotChecked(answer["unable"])
    return answer


def _try(trial: Trial, request: Mapping[str, Any] | bytes) -> dict[str, Any]:
    try:
        return trial.ask(request)
    except TcplatError as error:
        raise NotChecked(str(error)) from error
    finally:
        trial.close()


_LAYOUT = re.compile(r'"(?P<what>\w+(?:\.\w+)?): record\.py has another (?P<how>offset|size)"')
_ERROR = re.compile(r"^(?P<where>[^\s:]+:\d+):\d+: (?:fatal )?error: (?P<words>.*)$", re.MULTILINE)


_COUNTED = Aggregation("process", groups=16, every_s=math.inf)


def _compiles_counting(subject: Subject) -> None:
    """The C compiles where a sink asks for its histograms."""
    _compiles(_ways(subject)[0], subject, counting=True)


def _compiles(mechanism: str, subject: Subject, *, counting: bool = False) -> None:
    """The C compiles, and lays the record out as Python reads it."""
    answer = _compiled(subject, mechanism, counting=counting)
    if "refusal" not in answer:
        return
    words = answer["refusal"]
    layout = _LAYOUT.search(words)
    if layout:
        raise Fault(
            f"the compiler gives {layout['what']} another {layout['how']} than the schema: "
            "leave struct tcplat_event to tcplat, and declare each member as a Wire"
        )
    error = _ERROR.search(words)
    what = f"{error['where']}: {error['words']}" if error else words.strip().splitlines()[-1]
    raise Fault(f"the C does not compile: {what}")


def _programs(subject: Subject) -> None:
    """Each hook has its program in the C, each program its hook, and says which one it is."""
    spec = _probe(subject)
    found: set[str] = set()
    for mechanism in _ways(subject):
        answer = _compiled(subject, mechanism)
        if "refusal" in answer:
            raise NotChecked(f"the C does not compile by {mechanism}")
        found.update(answer["programs"])
    wanted = {hook.program: point for point, hook in _hooks(spec) if not hook.by}
    for program, point in wanted.items():
        if program not in found:
            raise Fault(
                f"hook point {point!r} names the program {program}, and the C has no such "
                "function: write it, or mend its name"
            )
    for program in sorted(found - wanted.keys()):
        if not program.startswith(_CORES_OWN):
            raise Fault(
                f"the C has a program {program} that no hook point names: name it, or make "
                "the function static __always_inline if it is a helper"
            )
    used = set(re.findall(r"\bHOOK_(\w+)", with_headers(spec.source)))
    for point, hook in reporting(spec.points):
        if _counts(spec, point):
            continue
        # A macro may paste the name together; then only the compiler knows.
        if hook.program not in used and "HOOK_##" not in spec.source:
            raise Fault(
                f"nothing in the C is reported as HOOK_{hook.program}: reserve its record with "
                "that number, or declare the hook quiet"
            )


# --- with root


def _attached(subject: Subject) -> dict[str, Any]:
    """The answer of the process that may load programs."""
    if "attached" not in subject.known:
        request = _request(subject)
        if request.interfaces and request.interfaces.netns:
            raise NotChecked("its interfaces are in a network namespace of their own: leave it out")
        trial = subject.trial()
        if trial is None:
            raise NotChecked("it needs root: run it with sudo")
        # A small ring, so that it gets full.
        whole = Request(probes=(request,), ring_bytes=1 << 12)
        subject.known["attached"] = _try(trial, whole.pack())
    answer: dict[str, Any] = subject.known["attached"]
    return answer


def _attaches(subject: Subject) -> None:
    """The kernel takes its programs, on this host."""
    answer = _attached(subject)
    if "refusal" in answer:
        raise Fault(f"{answer['refusal']}")


def _lets_pass(subject: Subject) -> None:
    """XDP programs let every packet pass as it came, whole or damaged, the ring full or not."""
    if "xdp" not in _ways(subject):
        raise NotChecked("it has no XDP program")
    answer = _attached(subject)
    if "refusal" in answer:
        raise NotChecked("it could not be attached")
    for program, deed in answer["xdp"].items():
        if deed:
            raise Fault(
                f"XDP program {program}: {deed}; "
                "a probe that observes returns XDP_PASS on every path and writes to no packet"
            )


def _leaves_nothing(subject: Subject) -> None:
    """Once its file descriptors are closed, the kernel has none of its programs, maps and links."""
    answer = _attached(subject)
    if "refusal" in answer:
        raise NotChecked("it could not be attached")
    if answer["left"]:
        raise Fault(f"after it was taken off there is still {', '.join(answer['left'])}")
