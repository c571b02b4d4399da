"""What this kernel offers to listen at, and which of a hook point's ways it allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import attrs

from tcplat_core.errors import CannotRunError
from tcplat_core.hookpoints import MECHANISMS, Hook, HookPoint, Way

from .btf import Btf, BtfError

KPROBE_PMU = Path("/sys/bus/event_source/devices/kprobe")
BTF_PATH = Path("/sys/kernel/btf/vmlinux")


@attrs.define(eq=False)
class Host:
    """The running kernel.

    Args:
        kprobes: Whether it takes kprobes (CONFIG_KPROBE_EVENTS).
        fentry: Whether it takes fentry programs: tried, not guessed.
        facts: What the BTF said before: hook -> its arguments, None for a hook
            that it does not have. Grows; worth keeping per kernel.
    """

    kprobes: bool
    fentry: bool = False
    facts: dict[str, list[str] | None] = attrs.field(factory=dict)
    _btf: Btf | None = None

    @property
    def btf(self) -> Btf:
        """Types, functions and tracepoints; read when first asked for, which takes 80 ms.

        Raises:
            CannotRunError: The kernel has none.
        """
        if self._btf is None:
            try:
                self._btf = Btf.from_file(str(BTF_PATH))
            except (OSError, BtfError) as error:
                raise CannotRunError(
                    f"this kernel does not describe its types in {BTF_PATH} ({error}); "
                    "boot one with CONFIG_DEBUG_INFO_BTF=y, as every distribution's is since 2021"
                ) from error
        return self._btf

    def mechanism(self, name: str) -> str | None:
        """None if the mechanism works here, else why not."""
        if name == "kprobe" and not self.kprobes:
            return "this kernel has no kprobes (CONFIG_KPROBE_EVENTS)"
        if name == "fentry" and not self.fentry:
            return "this kernel takes no fentry programs"
        return None

    def hook(self, hook: Hook) -> str | None:
        """None if the kernel has what the hook wants, else what is different."""
        have = self._arguments(hook)
        if have is None:
            kind = "tracepoint" if hook.mechanism == "tracepoint" else "function"
            return f"this kernel has no {kind} {hook.func}"
        if hook.args and list(hook.args) != have[: len(hook.args)]:
            return f"{hook.func} takes ({', '.join(have)}) here, not ({', '.join(hook.args)})"
        return None

    def _arguments(self, hook: Hook) -> list[str] | None:
        if hook.func not in self.facts:
            if hook.mechanism == "tracepoint":
                found = self.btf.tracepoint_args(hook.func.rpartition(":")[2])
            elif self.btf.has_func(hook.func):
                found = [name for name, _ in self.btf.func_args(hook.func)]
            else:
                found = None
            self.facts[hook.func] = found
        return self.facts[hook.func]

    def way(self, way: Way) -> str | None:
        """None if the way is open, else why it is not."""
        return self.mechanism(way.mechanism) or next(filter(None, map(self.hook, way.hooks)), None)


@attrs.frozen
class Choice:
    """Which way each point takes.

    Args:
        taken: Point -> way.
        missing: Point -> why it has none; optional points only.
    """

    taken: Mapping[str, Way]
    missing: Mapping[str, str]


def choose(
    points: Iterable[HookPoint],
    attach: str,
    why_not: Callable[[Way], str | None],
    probe: str,
) -> Choice:
    """Take for each point the first way that is open, in the order of MECHANISMS.

    Args:
        points: The probe's.
        attach: auto, or the mechanism that is mandatory.
        why_not: Says what closes a way; None for an open one.
        probe: For the error.

    Raises:
        CannotRunError: A point that the probe needs has no open way.
    """
    taken: dict[str, Way] = {}
    missing: dict[str, str] = {}
    for point in points:
        reasons = []
        # Stable: among ways of one mechanism the probe's own order holds.
        for way in sorted(point.ways, key=lambda way: MECHANISMS.index(way.mechanism)):
            if attach not in ("auto", way.mechanism):
                continue
            reason = why_not(way)
            if reason is None:
                taken[point.point] = way
                break
            reasons.append(reason)
        else:
            reason = "; ".join(dict.fromkeys(reasons)) or f"it has no way by {attach}"
            if not point.optional:
                other = "" if attach == "auto" else "; --attach auto takes what there is"
                raise CannotRunError(
                    f"probe {probe} cannot listen at {point.point!r}: {reason}{other}"
                )
            missing[point.point] = reason
    return Choice(taken, missing)
