"""Where a probe listens: hook points, and the ways to listen there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import attrs

from tcplat_core.errors import PluginError

MECHANISMS = ("fentry", "kprobe", "tracepoint", "xdp")
"""fentry is the cheapest, and never skipped. The kernel skips a kprobe that hits while
another's handler runs on the same CPU: for what happens in softirq, a tracepoint is better."""


SKIPPED_FUNCS = frozenset(
    {
        *("tcp_v4_rcv", "tcp_v6_rcv", "tcp_v4_do_rcv", "tcp_v6_do_rcv"),
        *("tcp_child_process", "tcp_rcv_state_process", "sock_def_readable"),
    }
)
"""Functions that run in softirq, so that a kprobe may be skipped, without a tracepoint instead."""


def checked_name(_: object, attribute: attrs.Attribute[str], value: str) -> None:
    """Validate a name that users type and C identifiers are made of."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", value):
        raise PluginError(
            f"{attribute.name} {value!r} must be lower-case letters, digits and underscores"
        )


@attrs.frozen
class Hook:
    """One kernel function or tracepoint, and the program attached to it.

    Args:
        func: ``tcp_sendmsg``, or ``tcp:tcp_destroy_sock`` for a tracepoint.
        program: The C function. HOOK_<program> is its number in the record.
        mechanism: fentry, fexit, kprobe, kretprobe, tracepoint or xdp.
        args: The kernel's own argument names (functions) or types (tracepoints).
            If the running kernel has others, the hook counts as missing: no row is better
            than one read from the wrong argument. Empty: not checked.
        quiet: Helps another hook and makes no rows of its own.
        by: The program that makes the rows, for hooks of `HookPoint.also`.
        sampling: Attached only in a run with --sample.
    """

    func: str
    program: str
    mechanism: str
    args: tuple[str, ...] = ()
    quiet: bool = False
    by: str = ""
    sampling: bool = False


@attrs.frozen
class Way:
    """The hooks that serve a hook point by one mechanism: all of them, or none."""

    mechanism: str = attrs.field(validator=attrs.validators.in_(MECHANISMS))
    hooks: tuple[Hook, ...]


def tracepoint(func: str, program: str, *args: str) -> Way:
    """Return a way through one tracepoint: ``tracepoint("tcp:tcp_destroy_sock", "tp_close")``."""
    return Way("tracepoint", (Hook(func, program, "tracepoint", args),))


def tracepoints(*hooks: tuple[str, str]) -> Way:
    """Return a way through several tracepoints, given as pairs of name and program."""
    return Way("tracepoint", tuple(Hook(func, program, "tracepoint") for func, program in hooks))


def kprobe(*hooks: Hook) -> Way:
    """Return a way through kprobes and, for values known only at the return, kretprobes."""
    return Way("kprobe", hooks)


def xdp(program: str) -> Way:
    """Return a way through XDP, on the interfaces that the probe's spec names."""
    return Way("xdp", (Hook("xdp", program, "xdp"),))


def kentry(func: str, program: str, *args: str, quiet: bool = False) -> Hook:
    """Return a kprobe at the entry of a function."""
    return Hook(func, program, "kprobe", args, quiet)


def kreturn(func: str, program: str, *, quiet: bool = False) -> Hook:
    """Return a kretprobe. It costs several times as much as a kprobe; avoid it if possible."""
    return Hook(func, program, "kretprobe", quiet=quiet)


XDP_MODES = ("auto", "native", "generic")


@attrs.frozen(kw_only=True)
class Interfaces:
    """Where the XDP programs of a probe are attached. Only Ethernet is supported.

    Args:
        names: The interfaces; empty for all that are up.
        mode: native, generic, or auto: generic if the driver does not support XDP.
        netns: Their network namespace: a name of ``ip netns``, a path or a
            process id; empty for the one of ``--netns``, or tcplat's own.
    """

    names: tuple[str, ...] = ()
    mode: str = attrs.field(default="auto", validator=attrs.validators.in_(XDP_MODES))
    netns: str = ""


@attrs.frozen
class HookPoint:
    """One place where a probe listens, and the ways to listen there, best first.

    Args:
        point: The `point` of the rows, by every mechanism.
        ways: Alternatives. `--attach auto` takes the first that this host allows.
        optional: The probe works without it; the report says that it is missing.
        also: Hooks whose rows are made by programs of other points, each named by `by`, at the same
            function and by the same mechanism. Nothing more is attached: `program` is not a
            function, only HOOK_<program>. Where `by` is not attached, the hook has no rows.
    """

    point: str = attrs.field(validator=checked_name)
    ways: tuple[Way, ...]
    optional: bool = False
    also: tuple[Hook, ...] = ()


def fentry(*hooks: Hook) -> Way:
    """Return a way through fentry and fexit: as cheap as tracepoints, at any function."""
    return Way("fentry", hooks)


def fenter(func: str, program: str, *args: str, quiet: bool = False) -> Hook:
    """Return a fentry program: ``ctx->args[0]`` is the first argument of the function."""
    return Hook(func, program, "fentry", args, quiet)


def fexit(func: str, program: str, *args: str, quiet: bool = False) -> Hook:
    """Return a fexit program: in ``ctx->args`` the result follows the arguments."""
    return Hook(func, program, "fexit", args, quiet)


def reporting(points: Iterable[HookPoint]) -> list[tuple[str, Hook]]:
    """Return point and hook of each program that makes rows; the index is the record's `hook`."""
    found: dict[str, tuple[str, Hook]] = {}
    for point in points:
        for hook in (*(hook for way in point.ways for hook in way.hooks), *point.also):
            if not hook.quiet:
                found.setdefault(hook.program, (point.point, hook))
    return list(found.values())


def programs_of(points: Iterable[HookPoint], taken: Mapping[str, Way]) -> tuple[str, ...]:
    """Return the names of programs in the chosen ways, and of what these make rows for `also`.

    Args:
        points: The probe's hook points.
        taken: Point -> the chosen way; points without one have no rows.
    """
    programs = [hook.program for way in taken.values() for hook in way.hooks]
    also = [
        hook.program
        for point in points
        if point.point in taken
        for hook in point.also
        if hook.by in programs
    ]
    return (*programs, *also)
