"""The checks of a probe's C: it compiles, has its programs, attaches, and leaves nothing."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

from tcplat_core.errors import PluginError, TcplatError
from tcplat_core.kernel.layout import possible_cpus
from tcplat_core.loader.filter import Filter
from tcplat_core.loader.program_text import CORE_TYPES, core_defines, program_text, with_headers
from tcplat_core.loader.protocol import Request
from tcplat_core.plugin.aggregates import Aggregation
from tcplat_core.plugin.hookpoints import reporting

from .check import Check, Fault, NotChecked, Subject
from .probe_checks import hooks_of, only_counts, probe_of, request_of, ways_of
from .trial_process import Trial

_CORES_OWN = "tcplat_on_"
"""Prefix of the programs of include/tcplat/core.bpf.h."""


def checks_of(subject: Subject) -> dict[str, Check]:
    """Return all checks of a probe's C, by name; some need root."""
    compiled: dict[str, Check] = {
        f"compiles by {way}": functools.partial(_compiles, way) for way in ways_of(subject)
    }
    if probe_of(subject).histograms:
        compiled |= {"compiles with histograms": _compiles_counting}
    return {
        **compiled,
        "programs": _programs,
        "attaches": _attaches,
        "lets packets pass": _lets_pass,
        "leaves nothing": _leaves_nothing,
    }


# --- what the compiler says


def _compiled(subject: Subject, mechanism: str, *, counting: bool = False) -> dict[str, Any]:
    """Return the trial's answer with this mechanism for each point that has it.

    Args:
        subject: The probe.
        mechanism: The mechanism.
        counting: As in a run with a sink for histograms, and another one for rows.
    """
    key = f"{mechanism}, counting" if counting else mechanism
    if key not in subject.known:
        request = request_of(subject)
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
            raise Fault(f"{error}: the headers are in include/tcplat") from error
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
    """Check that the C compiles with its histograms."""
    _compiles(ways_of(subject)[0], subject, counting=True)


def _compiles(mechanism: str, subject: Subject, *, counting: bool = False) -> None:
    """Check that the C compiles, and lays the record out as Python reads it."""
    answer = _compiled(subject, mechanism, counting=counting)
    if "refusal" not in answer:
        return
    words = answer["refusal"]
    layout = _LAYOUT.search(words)
    if layout:
        raise Fault(
            f"{layout['what']} has another {layout['how']} in the compiled C than in the schema: "
            "let tcplat declare struct tcplat_event, and declare each member as a Wire"
        )
    error = _ERROR.search(words)
    what = f"{error['where']}: {error['words']}" if error else words.strip().splitlines()[-1]
    raise Fault(f"the C does not compile: {what}")


def _programs(subject: Subject) -> None:
    """Check that each hook has a program in the C, each program a hook, and reports its number."""
    spec = probe_of(subject)
    found: set[str] = set()
    for mechanism in ways_of(subject):
        answer = _compiled(subject, mechanism)
        if "refusal" in answer:
            raise NotChecked(f"the C does not compile by {mechanism}")
        found.update(answer["programs"])
    wanted = {hook.program: point for point, hook in hooks_of(spec)}
    for program, point in wanted.items():
        if program not in found:
            raise Fault(
                f"hook point {point!r} names the program {program}, and the C has no such "
                "function: write it, or correct its name"
            )
    for program in sorted(found - wanted.keys()):
        if not program.startswith(_CORES_OWN):
            raise Fault(
                f"the C has a program {program} that no hook point names: name it, or make "
                "the function static __always_inline if it is a helper"
            )
    used = set(re.findall(r"\bHOOK_(\w+)", with_headers(spec.source)))
    for point, hook in reporting(spec.points):
        if only_counts(spec, point):
            continue
        # A macro may paste the name together; it cannot be found in the text then.
        if hook.program not in used and "HOOK_##" not in spec.source:
            raise Fault(
                f"no record in the C is reserved with HOOK_{hook.program}: reserve its record with "
                "that number, or declare the hook quiet"
            )


# --- with root


def _attached(subject: Subject) -> dict[str, Any]:
    """Return the answer of the process that may load programs."""
    if "attached" not in subject.known:
        request = request_of(subject)
        if request.interfaces and request.interfaces.netns:
            raise NotChecked("its interfaces are in another network namespace: omit that option")
        trial = subject.trial()
        if trial is None:
            raise NotChecked("it needs root: run it with sudo")
        # A small ring, so that it becomes full.
        whole = Request(probes=(request,), ring_bytes=1 << 12)
        subject.known["attached"] = _try(trial, whole.pack())
    answer: dict[str, Any] = subject.known["attached"]
    return answer


def _attaches(subject: Subject) -> None:
    """Check that this host's kernel accepts its programs."""
    answer = _attached(subject)
    if "refusal" in answer:
        raise Fault(f"{answer['refusal']}")


def _lets_pass(subject: Subject) -> None:
    """Check that XDP programs pass every packet unchanged, damaged or not, ring full or not."""
    if "xdp" not in ways_of(subject):
        raise NotChecked("it has no XDP program")
    answer = _attached(subject)
    if "refusal" in answer:
        raise NotChecked("it could not be attached")
    for program, fault in answer["xdp"].items():
        if fault:
            raise Fault(
                f"XDP program {program}: {fault}; "
                "a probe has to return XDP_PASS on every path, and must not write to packets"
            )


def _leaves_nothing(subject: Subject) -> None:
    """Check that no program, map or link remains once its file descriptors are closed."""
    answer = _attached(subject)
    if "refusal" in answer:
        raise NotChecked("it could not be attached")
    if answer["left"]:
        raise Fault(f"after it was detached there is still {', '.join(answer['left'])}")
