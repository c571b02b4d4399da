"""Loads and attaches what was compiled. All it opens are file descriptors: closing detaches."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs

from tcplat_core import owners
from tcplat_core.errors import CannotRunError, PluginError, TcplatError
from tcplat_core.model import Hook, Way
from tcplat_core.ring import books_slots, possible_cpus

from . import kheaders
from .compile import CORE_TYPES, kernel_source, program_text, reporting
from .host import BTF_PATH, Choice, Host, choose
from .protocol import Answer, LoadedProbe, ProbeRequest, Request

_PAGE = os.sysconf("SC_PAGE_SIZE")


class WayClosedError(Exception):
    """The kernel refused at the last moment what looked possible."""

    def __init__(self, way: Way, reason: str) -> None:
        super().__init__(reason)
        self.way = way
        self.reason = reason


@attrs.define(eq=False)
class Loader:
    """One request, from C text to file descriptors.

    Args:
        bcc: The module.
        request: What to load.
        host: The running kernel.
    """

    bcc: Any
    request: Request
    host: Host
    _closed: dict[Way, str] = attrs.field(factory=dict, init=False)
    _links: list[int] = attrs.field(factory=list, init=False)

    def run(self) -> Answer:
        """Compile, load, attach, seed the owners, open the gate.

        Raises:
            CannotRunError: A point that a probe needs is not to be had here.
            PluginError: A probe's C does not compile, or the verifier refuses it.
        """
        while True:
            choices = [
                choose(probe.points, self.request.attach, self._why_not, probe.name)
                for probe in self.request.probes
            ]
            try:
                return self._attempt(choices)
            except WayClosedError as closed:
                self._closed[closed.way] = closed.reason
                self._detach()

    def _why_not(self, way: Way) -> str | None:
        return self._closed.get(way) or self.host.way(way)

    def _attempt(self, choices: Sequence[Choice]) -> Answer:
        types = sorted({*CORE_TYPES, *(t for probe in self.request.probes for t in probe.types)})
        modules: list[Any] = []
        with ExitStack() as stack:
            tree = stack.enter_context(kheaders.cached_tree(BTF_PATH, types)).folder
            stack.enter_context(kernel_source(tree))
            max_socks = _room_for_sockets()
            for probe, choice in zip(self.request.probes, choices, strict=True):
                modules.append(self._compile(probe, choice, not modules, max_socks))
        core = modules[0]
        if self.request.pids is not None:
            one = ctypes.c_uint(1)
            for pid in self.request.pids:
                core["tcplat_pids"][ctypes.c_uint(pid)] = one
            self._raw(core, "tcplat_on_exit", "sched_process_exit")
        if self.request.follow:
            self._raw(core, "tcplat_on_fork", "sched_process_fork")
        for module, choice in zip(modules, choices, strict=True):
            for way in choice.taken.values():
                for hook in way.hooks:
                    self._attach(module, way, hook)
        # Last, so that on one tracepoint it runs after the probes' own handlers.
        self._raw(core, "tcplat_on_destroy", "tcp_destroy_sock")
        # From here on new sockets are seen; now the older ones.
        seeds = owners.find(self.request.pids)
        _seed(self.bcc.lib, _fd(core, "tcplat_seeds"), seeds[:max_socks])
        core["tcplat_gate"][ctypes.c_uint(0)] = ctypes.c_uint(1)
        return Answer(
            probes={
                probe.name: LoadedProbe(
                    ring_fd=_fd(module, "events"),
                    books_fd=_fd(module, "books"),
                    taken={point: way.mechanism for point, way in choice.taken.items()},
                    missing=choice.missing,
                )
                for probe, module, choice in zip(self.request.probes, modules, choices, strict=True)
            },
            holding=tuple(self._links),
        )

    def _compile(self, probe: ProbeRequest, choice: Choice, first: bool, max_socks: int) -> Any:  # noqa: FBT001 - private
        hooks = len(reporting(probe))
        defines = {
            "TCPLAT_HOOKS": hooks,
            "TCPLAT_RING_PAGES": self.request.ring_bytes // _PAGE,
            "TCPLAT_BOOKS": books_slots(possible_cpus(), hooks),
            "TCPLAT_MAX_SOCKS": max_socks,
            "TCPLAT_CPU_BITS": possible_cpus().bit_length(),
        }
        if self.request.pids is not None:
            defines["TCPLAT_FILTER_PID"] = 1
        taken = {point: way.mechanism for point, way in choice.taken.items()}
        text = program_text(probe, first=first, taken=taken, defines=defines)
        try:
            return self.bcc.BPF(text=text.encode())
        except Exception as error:
            raise PluginError(
                f"the C of probe {probe.name} does not compile for this kernel; "
                "--debug shows the compiler's words"
            ) from error

    def _attach(self, module: Any, way: Way, hook: Hook) -> None:
        try:
            if hook.mechanism == "tracepoint":
                self._raw(module, hook.program, hook.func.rpartition(":")[2])
                return
            function = self._load(module, hook.program, self.bcc.BPF.KPROBE)
            kind = 1 if hook.mechanism == "kretprobe" else 0
            # The name is used only where the kernel is too old for nameless kprobes.
            name = f"tcplat_{os.getpid()}_{hook.program}".encode()
            fd = self.bcc.lib.bpf_attach_kprobe(function.fd, kind, name, hook.func.encode(), 0, 0)
            if fd < 0:
                raise TcplatError(os.strerror(ctypes.get_errno()))
            self._links.append(fd)
        except TcplatError as error:
            raise WayClosedError(way, f"{hook.mechanism}:{hook.func} refused: {error}") from error

    def _raw(self, module: Any, program: str, tracepoint: str) -> None:
        function = self._load(module, program, self.bcc.BPF.RAW_TRACEPOINT)
        fd = self.bcc.lib.bpf_attach_raw_tracepoint(function.fd, tracepoint.encode())
        if fd < 0:
            raise TcplatError(os.strerror(ctypes.get_errno()))
        self._links.append(fd)

    def _load(self, module: Any, program: str, kind: int) -> Any:
        try:
            return module.load_func(program.encode(), kind)
        except Exception as error:
            raise TcplatError("the kernel's verifier; --debug shows its words") from error

    def _detach(self) -> None:
        for fd in self._links:
            os.close(fd)
        self._links.clear()


def _fd(module: Any, table: str) -> int:
    return int(module[table].map_fd)


def _seed(lib: Any, map_fd: int, seeds: Iterable[owners.Seed]) -> None:
    """Fill tcplat_seeds: u64 cookie -> struct tcplat_seed (include/tcplat/owner.bpf.h)."""
    for seed in seeds:
        leaf = (
            seed.pid.to_bytes(4, "little")
            + bytes([seed.role, 0, 0, 0])
            + seed.comm[:15].ljust(16, b"\0")
        )
        lib.bpf_update_elem(map_fd, seed.cookie.to_bytes(8, "little"), leaf, 0)


def _room_for_sockets() -> int:
    """Entries for tcplat_socks: twice what is open, 65,536 at least."""
    in_use = 0
    for name in ("sockstat", "sockstat6"):
        path = Path("/proc/net") / name
        if path.exists():
            for line in path.read_text().splitlines():
                words = line.split()
                if words[0] in ("TCP:", "TCP6:"):
                    in_use += int(words[words.index("inuse") + 1])
    return 1 << max(16, (2 * in_use).bit_length())


def refuse_without_capabilities() -> None:
    """Say what is missing before libbcc says it in its own words.

    Raises:
        CannotRunError: Not allowed to load programs.
    """
    status = Path("/proc/self/status").read_text()
    effective = int(status.split("CapEff:")[1].split()[0], 16)
    sys_admin, perfmon, bpf = (1 << 21), (1 << 38), (1 << 39)
    if not effective & sys_admin and effective & (perfmon | bpf) != perfmon | bpf:
        raise CannotRunError("loading BPF programs needs root: run it with sudo")
