"""The hooks that this kernel offers, and the choice of a way for each hook point."""

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
        facts: Cached BTF lookups: hook -> its BTF id and the names (functions) or types
            (tracepoints) of its arguments, None for a hook that the kernel does not have; see
            fact(). Lookups add to it; the loader caches it per kernel.
    """

    facts: dict[str, tuple[int, list[str]] | None] = attrs.field(factory=dict)
    _btf: Btf | None = None
    _fentry: str | None = None
    """Why fentry does not work; empty if it does, None if not tested yet."""
    _cast: int | None = None
    """See cast(); None if not tested yet."""
    _syscalls: frozenset[str] | None = None
    """All tracepoints of the group `syscalls`; None before read_as_root()."""
    _no_syscalls: str = ""
    """Why a tracepoint of that group is missing; empty before read_as_root()."""

    @property
    def btf(self) -> Btf:
        """Types, functions and tracepoints; read when first asked for, which takes 80 ms.

        Raises:
            CannotRunError: The kernel has no BTF.
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

    def read_as_root(self) -> None:
        """Read and keep the facts that only root can read, before root is dropped."""
        folder = bpf.tracefs()
        events = folder / "events" / "syscalls" if folder else None
        names = os.listdir(events) if events and events.is_dir() else []
        self._syscalls = frozenset(f"{SYSCALLS}{name}" for name in names)
        self._no_syscalls = _no_syscalls()
        self.mechanism("fentry")

    def mechanism(self, name: str) -> str | None:
        """Return why the mechanism does not work here; None if it works."""
        if name == "kprobe" and not KPROBE_PMU.exists():
            return "this kernel has no kprobes (CONFIG_KPROBE_EVENTS)"
        if name == "fentry":
            if self._fentry is None:
                self._fentry = self._try_fentry()
            return self._fentry or None
        return None

    def _try_fentry(self) -> str:
        """Test fentry by loading an empty program: no file shows whether it works."""
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
        """Return the BTF id of bpf_rdonly_cast(); 0 before 6.2 (a35b9af4ec2c) or without JIT."""
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
        """Return why the kernel cannot serve the hook; None if it can."""
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
        expected = list(map(_unqualified, hook.args))
        # In a fexit program the result follows the last argument: the count must match.
        compared = args if hook.mechanism == "fexit" else args[: len(expected)]
        if expected and expected != list(map(_unqualified, compared)):
            return f"{hook.func} takes ({', '.join(args)}) here, not ({', '.join(hook.args)})"
        return None

    def fact(self, func: str, *, is_tracepoint: bool) -> tuple[int, list[str]] | None:
        """Return BTF id and arguments of a hook; None if the kernel does not have it.

        `func` may also be a struct, ``struct sock``, or a member of one, ``struct sock.sk_err``.
        """
        if func not in self.facts:
            self.facts[func] = self._look_up(func, is_tracepoint)
        return self.facts[func]

    def btf_id(self, func: str) -> int:
        """Return the BTF id of a function; 0 if there is none."""
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
        """Return why the way cannot be used; None if it can."""
        return self.mechanism(way.mechanism) or next(filter(None, map(self.hook, way.hooks)), None)


def _unqualified(argument: str) -> str:
    """Return an argument's type without const: tcp:tcp_probe has one since 6.16 or earlier."""
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
    """The way chosen for each hook point.

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
    """Choose for each hook point the first way that can be used, in the probe's order.

    Args:
        points: The probe's hook points.
        attach: auto, or the mechanism that is mandatory.
        why_not: Returns why a way cannot be used; None if it can.
        probe: Its name, for the error.

    Raises:
        CannotRunError: A point that the probe needs has no usable way.
    """
    taken: dict[str, Way] = {}
    missing: dict[str, str] = {}
    for point in points:
        reasons = []
        for way in point.ways:
            # XDP has no alternative: --attach applies to functions only.
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
