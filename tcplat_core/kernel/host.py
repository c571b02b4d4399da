"""What this kernel offers to listen at, and which of a hook point's ways it allows."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import attrs

from tcplat_core.errors import CannotRunError
from tcplat_core.plugin.hookpoints import Hook, HookPoint, Way

from . import bpf
from .btf import Btf, BtfError, BtfKind
from .rights import may_load

KPROBE_PMU = Path("/sys/bus/event_source/devices/kprobe")
BTF_PATH = Path("/sys/kernel/btf/vmlinux")
SYSCALLS = "syscalls:"
"""Tracepoints of this group have no raw form: they are found in tracefs, not in the BTF."""
_A_TYPE = "struct sock"
ONLY_ROOT = "only root can test whether fentry works"


def _no_syscalls() -> str:
    if bpf.tracefs():
        return "this kernel has no CONFIG_FTRACE_SYSCALLS"
    what, mend = bpf.tracefs_missing()
    return f"{what}; {mend}"


@attrs.define(eq=False)
class Host:
    """The running kernel.

    Args:
        facts: What the BTF said before: hook -> its BTF id and the names (functions)
            or types (tracepoints) of its arguments, None for a hook that it does
            not have; see fact(). Grows; worth keeping per kernel.
    """

    facts: dict[str, tuple[int, list[str]] | None] = attrs.field(factory=dict)
    _btf: Btf | None = None
    _fentry: str | None = None
    """Why not, empty if it works; None before it was tried."""
    _cast: int | None = None
    """0 if it does not work; None before it was tried."""
    _syscalls: frozenset[str] | None = None
    """All tracepoints of that group; None before look()."""
    _no_syscalls: str = ""
    """Why one of that group is missing; empty before look()."""

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
                    f"this kernel has no BTF in {BTF_PATH} ({error}); "
                    "boot one with CONFIG_DEBUG_INFO_BTF=y, as every distribution's is since 2021"
                ) from error
        return self._btf

    def look(self) -> None:
        """Learn what only root can see, so that it can be asked for without."""
        folder = bpf.tracefs()
        events = folder / "events" / "syscalls" if folder else None
        names = os.listdir(events) if events and events.is_dir() else []
        self._syscalls = frozenset(f"{SYSCALLS}{name}" for name in names)
        self._no_syscalls = _no_syscalls()
        self.mechanism("fentry")

    def mechanism(self, name: str) -> str | None:
        """None if the mechanism works here, else why not."""
        if name == "kprobe" and not KPROBE_PMU.exists():
            return "this kernel has no kprobes (CONFIG_KPROBE_EVENTS)"
        if name == "fentry":
            if self._fentry is None:
                self._fentry = self._try_fentry()
            return self._fentry or None
        return None

    def _try_fentry(self) -> str:
        """Load, and throw away, a program that does nothing: no file tells whether that works."""
        found = self.fact("tcp_sendmsg", is_tracepoint=False)
        if found is None:
            return "this kernel has no function tcp_sendmsg"
        try:
            fd = bpf.program_load(
                "tcplat_try",
                bpf.ProgramType.TRACING,
                bpf.RETURN_0,
                bpf.AttachType.FENTRY,
                found[0],
            )
        except OSError as error:
            if error.errno == errno.EPERM and not may_load():
                return ONLY_ROOT
            return f"this kernel refuses fentry programs ({error.strerror})"
        except CannotRunError as error:  # an unsupported machine
            return str(error)
        os.close(fd)
        return ""

    def cast(self) -> int:
        """BTF id of bpf_rdonly_cast(); 0 before 6.2 (a35b9af4ec2c), and where nothing is jitted."""
        if self._cast is None:
            self._cast = self._try_cast()
        return self._cast

    def _try_cast(self) -> int:
        found = self.fact("bpf_rdonly_cast", is_tracepoint=False)
        type_ = self.fact(_A_TYPE, is_tracepoint=False)
        if not found or not type_:
            return 0
        pack = bpf.INSTRUCTION.pack
        arguments = pack(0xB7, 1, 0, 0) + pack(0xB7, 2, 0, type_[0])  # r1 = 0; r2 = the type
        call = arguments + pack(bpf.CALL, bpf.PSEUDO_KFUNC_CALL << 4, 0, found[0])
        try:
            kind = bpf.ProgramType.RAW_TRACEPOINT
            fd = bpf.program_load("tcplat_try", kind, call + bpf.RETURN_0)
        except OSError:
            return 0
        os.close(fd)
        return found[0]

    def hook(self, hook: Hook) -> str | None:
        """None if the kernel has what the hook wants, else what is different."""
        if hook.mechanism == "xdp":
            return None
        if hook.func.startswith(SYSCALLS):
            if self._syscalls is None:
                there = syscall_id(hook.func) is not None
            else:
                there = hook.func in self._syscalls
            return None if there else f"no {hook.func}: {self._no_syscalls or _no_syscalls()}"
        is_tracepoint = hook.mechanism == "tracepoint"
        found = self.fact(hook.func, is_tracepoint=is_tracepoint)
        if found is None:
            kind = "tracepoint" if is_tracepoint else "function"
            return f"this kernel has no {kind} {hook.func}"
        args = found[1]
        wanted = list(map(_unqualified, hook.args))
        # By fexit the result stands behind the last argument: there must be no other.
        looked_at = args if hook.mechanism == "fexit" else args[: len(wanted)]
        if wanted and wanted != list(map(_unqualified, looked_at)):
            return f"{hook.func} takes ({', '.join(args)}) here, not ({', '.join(hook.args)})"
        return None

    def fact(self, func: str, *, is_tracepoint: bool) -> tuple[int, list[str]] | None:
        """BTF id and arguments of a hook; None if the kernel does not have it.

        Also of ``struct sock``, and of ``struct sock.sk_err``, where a member is wanted.
        """
        if func not in self.facts:
            self.facts[func] = self._look_up(func, is_tracepoint)
        return self.facts[func]

    def btf_id(self, func: str) -> int:
        """Of a function that hook() has found."""
        found = self.fact(func, is_tracepoint=False)
        return found[0] if found else 0

    def _look_up(self, func: str, is_tracepoint: bool) -> tuple[int, list[str]] | None:  # noqa: FBT001 - private
        if is_tracepoint:
            types = self.btf.tracepoint_args(func.rpartition(":")[2])
            return None if types is None else (0, types)
        if func.startswith("struct "):
            name, _, member = func.removeprefix("struct ").partition(".")
            number = self.btf.find(name, BtfKind.STRUCT)
            if number is None or (member and not self.btf.has_member(name, member)):
                return None
            return number, []
        number = self.btf.find(func, BtfKind.FUNC)
        if number is None:
            return None
        return number, [name for name, _ in self.btf.func_args(func)]

    def way(self, way: Way) -> str | None:
        """None if the way is open, else why it is not."""
        return self.mechanism(way.mechanism) or next(filter(None, map(self.hook, way.hooks)), None)


def _unqualified(argument: str) -> str:
    """Return an argument's type without const: tcp:tcp_probe got one by 6.16."""
    return argument.replace("const ", "")


def syscall_id(func: str) -> int | None:
    """Return the number of a tracepoint like ``syscalls:sys_exit_accept4``."""
    folder = bpf.tracefs()
    if folder is None:
        return None
    try:
        return int((folder / "events" / func.replace(":", "/") / "id").read_text(encoding="ascii"))
    except OSError:
        return None


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
    """Take for each point the first way that is open, in the probe's own order.

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
        for way in point.ways:
            # Packets have no other way: --attach is about functions.
            if attach not in ("auto", way.mechanism) and way.mechanism != "xdp":
                continue
            reason = why_not(way)
            if reason is None:
                taken[point.point] = way
                break
            reasons.append(reason)
        else:
            reason = "; ".join(dict.fromkeys(reasons)) or f"it does not support {attach}"
            if not point.optional:
                other = "" if attach == "auto" else "; --attach auto uses what is available"
                raise CannotRunError(
                    f"probe {probe} cannot listen at {point.point!r}: {reason}{other}"
                )
            missing[point.point] = reason
    return Choice(taken, missing)
