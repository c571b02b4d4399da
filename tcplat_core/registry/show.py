"""``tcplat plugins show``: everything about a plugin, and how this host would run it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from tcplat_core.errors import CannotRunError
from tcplat_core.event.fields import fields
from tcplat_core.event.text import columns
from tcplat_core.kernel.bpf import tracefs
from tcplat_core.kernel.host import ONLY_ROOT, SYSCALLS, Host, choose
from tcplat_core.kernel.rights import refuse_without_capabilities
from tcplat_core.plugin.hookpoints import HookPoint, Way
from tcplat_core.plugin.options import Option, example
from tcplat_core.plugin.specs import ProbeSpec, SinkSpec

from .find import Found


@attrs.define(eq=False)
class HostView:
    """The facts about this host that the current rights allow to read.

    Args:
        host: The running kernel.
        as_root: The facts were read by root, who can load test programs.
    """

    host: Host = attrs.field(factory=Host)
    as_root: bool = False

    @classmethod
    def now(cls) -> HostView:
        """Read the facts; call it before root is dropped."""
        view = cls()
        try:
            refuse_without_capabilities()
        except CannotRunError:
            return view
        view.as_root = True
        view.host.read_as_root()
        return view

    def point(self, point: HookPoint) -> dict[str, Any]:
        """How ``--attach auto`` listens at a point.

        Returns:
            `takes`: the way, None if there is none. `perhaps`: the way that it takes
            instead if that works, which only root can find out. `why_not`: why there is
            no way that is sure to work.
        """
        sure, reason = _choice(point, self.why_not)
        best, _ = _choice(point, self._why_not_at_best)
        return {
            "point": point.point,
            "optional": point.optional,
            "takes": sure and described(sure),
            "perhaps": described(best) if best and best != sure else None,
            "why_not": reason,
        }

    def _hidden(self, way: Way) -> str | None:
        if self.as_root:
            return None
        if way.mechanism == "fentry":
            return ONLY_ROOT
        if tracefs() is None and any(hook.func.startswith(SYSCALLS) for hook in way.hooks):
            return "only root can list the tracepoints of system calls"
        return None

    def why_not(self, way: Way) -> str | None:
        """Return why a way cannot be used, or may not be usable; None if it can."""
        return self._hidden(way) or self.host.way(way)

    def _why_not_at_best(self, way: Way) -> str | None:
        if not self._hidden(way):
            return self.host.way(way)
        checkable = (hook for hook in way.hooks if not hook.func.startswith(SYSCALLS))
        return next(filter(None, map(self.host.hook, checkable)), None)


def _choice(
    point: HookPoint, why_not: Callable[[Way], str | None]
) -> tuple[Way | None, str | None]:
    try:
        choice = choose([attrs.evolve(point, optional=True)], "auto", why_not, "")
    except CannotRunError as error:  # the kernel has no BTF
        return None, str(error)
    return choice.taken.get(point.point), choice.missing.get(point.point)


def described(way: Way) -> str:
    """Return a way as one word: ``fentry:tcp_v4_rcv+tcp_v6_rcv``."""
    names = dict.fromkeys(hook.func for hook in way.hooks)
    return f"{way.mechanism}:{'+'.join(names)}"


def as_json(found: Found, spec: ProbeSpec | SinkSpec, view: HostView) -> dict[str, Any]:
    """Return the value for ``--json``; a sink has neither points nor fields."""
    shown = {
        **{key: value for key, value in attrs.asdict(found).items() if key != "status"},
        "options": [_option(option) for option in spec.options],
        "example": f"sudo tcplat run --probe {example(spec.name, spec.options)}",
    }
    if isinstance(spec, SinkSpec):
        sink = example(spec.name, spec.options)
        return {**shown, "example": f"sudo tcplat run --probe tcp_client --sink {sink}"}
    return {
        **shown,
        "points": [view.point(point) for point in spec.points],
        "fields": [attrs.asdict(field) for field in fields(spec.event)],
    }


def _option(option: Option) -> dict[str, Any]:
    default = option.default
    if isinstance(default, tuple):  # several values, as on the command line
        default = "+".join(map(str, default))
    elif not isinstance(default, str | int | float | None):
        default = str(default)
    return {
        "name": option.name,
        "type": option.metavar,
        "choices": list(option.choices),
        "default": default,
        "required": option.required,
        "help": option.help,
    }


def as_text(shown: Mapping[str, Any]) -> str:
    """Return the same as text."""
    lines = [
        f"{shown['name']}: {shown['summary']}",
        f"{shown['kind']}, from {shown['distribution']} {shown['version']}",
    ]
    if "points" in shown:
        lines += ["", "points, and how --attach auto listens there on this host"]
        lines += _indented([_point_cells(point) for point in shown["points"]])
        if any(point["perhaps"] for point in shown["points"]):
            lines.append(f"  to be sure, run as root: sudo tcplat plugins show {shown['name']}")
        lines += ["", "fields of a row (* its own)"]
        lines += _indented([_field_cells(field) for field in shown["fields"]])
    lines += ["", "options" if shown["options"] else "no options"]
    lines += _indented([_option_cells(option) for option in shown["options"]])
    return "\n".join([*lines, "", "example", f"  {shown['example']}"])


def _point_cells(point: Mapping[str, Any]) -> tuple[str, str]:
    takes, perhaps, why_not = point["takes"], point["perhaps"], point["why_not"]
    if perhaps:
        return point["point"], f"{perhaps} if that works here, else {takes or 'not at all'}"
    without = "" if point["optional"] else "; required"
    return point["point"], takes or f"no: {why_not}{without}"


def _field_cells(field: Mapping[str, Any]) -> tuple[str, ...]:
    return "*" if field["own"] else "", *(field[key] for key in ("name", "type", "unit", "doc"))


def _option_cells(option: Mapping[str, Any]) -> tuple[str, str]:
    default = option["default"]
    note = "  [required]" if option["required"] else ""
    note = note or ("" if default in (None, "") else f"  [default: {_shown(default)}]")
    return f"{option['name']}={option['type']}", f"{option['help']}{note}"


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return f"{default:g}" if isinstance(default, float) else str(default)


def _indented(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    return (f"  {line}" for line in columns(rows))
