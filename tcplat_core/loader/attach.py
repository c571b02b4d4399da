"""Loads and attaches compiled programs. Everything is held by fds: closing them detaches."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import attrs

from tcplat_core.errors import TOO_MANY_FILES, CannotRunError, PluginError
from tcplat_core.kernel import bpf, owners, pidns
from tcplat_core.kernel.btf import BtfError
from tcplat_core.kernel.core_hooks import DESTROY, EXIT, FORK, QUEUE, RENAME, STATE, USE
from tcplat_core.kernel.host import SYSCALLS, Choice, Host, choose, syscall_id
from tcplat_core.kernel.layout import possible_cpus
from tcplat_core.plugin.hookpoints import Hook, HookPoint, Way, programs_of

from . import isolation, seeding, xdp
from .cache import Cache, digest, identity
from .compile import KFUNC, SHARED_PREFIX, Compiled, compile_text, compiler_identity
from .kernel_tree import kernel_tree
from .program_text import CGROUP_TYPES, CORE_TYPES, PIDNS_TYPES, core_defines, program_text
from .protocol import Answer, LoadedMap, LoadedProbe, ProbeRequest, Request
from .refusal import refusal
from .sequence import in_sequence

_PROGRAM_TYPES = {
    "fentry": bpf.ProgramType.TRACING,
    "fexit": bpf.ProgramType.TRACING,
    "kprobe": bpf.ProgramType.KPROBE,
    "kretprobe": bpf.ProgramType.KPROBE,
    "tracepoint": bpf.ProgramType.RAW_TRACEPOINT,
}


class WayClosedError(Exception):
    """The kernel refused a way that Host had reported as usable."""

    def __init__(self, way: Way, reason: str) -> None:
        super().__init__(reason)
        self.way = way
        self.reason = reason


@attrs.define(eq=False)
class Loader:
    """One request, from C text to file descriptors.

    Args:
        request: What to load.
        cache: Cached programs and kernel facts.
    """

    request: Request
    cache: Cache
    _host: Host = attrs.field(init=False)
    _closed: dict[Way, str] = attrs.field(factory=dict, init=False)
    _fds: list[int] = attrs.field(factory=list, init=False)
    """All open fds, which are closed before another way is tried."""
    _shared: dict[str, int] = attrs.field(factory=dict, init=False)
    """Maps shared by all probes: name -> fd."""

    def __attrs_post_init__(self) -> None:
        known = self.cache.read(f"{identity()}.facts")
        self._host = Host(facts=dict(known or {}))

    def run(self) -> Answer:
        """Compile, load, attach, seed the owners, open the gate.

        Raises:
            CannotRunError: A point that a probe needs has no usable way.
            PluginError: A probe's C does not compile.
        """
        known = len(self._host.facts)
        while True:
            choices = [
                choose(_listened(probe), self.request.attach, self._why_not, probe.name)
                for probe in self.request.probes
            ]
            try:
                return self._attempt(choices)
            except WayClosedError as closed:
                self._closed[closed.way] = closed.reason
                self._undo()
            finally:
                if len(self._host.facts) > known:
                    self.cache.write(f"{identity()}.facts", self._host.facts)

    @property
    def _follows_packets(self) -> bool:
        """Whether packets must be filtered by process."""
        has_xdp = any(probe.interfaces is not None for probe in self.request.probes)
        return has_xdp and self.request.filter.by_task

    @property
    def _reads_cgroups(self) -> bool:
        """Whether a cgroup's ancestors are read from its struct: see filter.bpf.h."""
        return bool(self.request.filter.cgroup) and bool(
            self._host.fact("struct cgroup.ancestor_ids", is_tracepoint=False)
        )

    @functools.cached_property
    def _pidns(self) -> tuple[int, int] | None:
        """Inode and device of the PID namespace that /proc shows; None for the initial one."""
        return pidns.shown()

    @property
    def _tracks(self) -> bool:
        """Whether the core's own programs must track socket owners."""
        return self._follows_packets or any(probe.track for probe in self.request.probes)

    def _why_not(self, way: Way) -> str | None:
        return self._closed.get(way) or self._host.way(way)

    def _attempt(self, choices: Sequence[Choice]) -> Answer:
        capacity = _socket_capacity()
        modules = [
            self._open(probe, choice, capacity)
            for probe, choice in zip(self.request.probes, choices, strict=True)
        ]
        core = modules[0]
        isolation.refuse_orphan()
        if self.request.max_overhead:
            self._fds.append(bpf.time_programs())
        self._attach_core(core)
        # Attached early: a socket that ends while probes are attached must not leave its entry
        # to the next socket at its address. The gate is still closed, so no row is missed.
        before = len(self._fds)
        self._core(core, DESTROY)
        early = self._fds[before:]
        programs = self._attach_probes(modules, choices)
        # Attached last, so that it runs after the probes' handlers of the same tracepoint.
        self._core(core, DESTROY)
        for fd in early:
            self._fds.remove(fd)
            os.close(fd)
        # New sockets are tracked from here on; now seed the older ones.
        hidden = owners.Hidden()
        seeding.fill(self._shared, owners.find(hidden), self.request.filter, capacity)
        # Last, because some network cards lose their link for a moment: it must happen only once.
        listening = [
            xdp.listen(
                probe, _xdp_programs(module, choice), self.request.filter.netns_at, self._fds
            )
            for probe, module, choice in zip(self.request.probes, modules, choices, strict=True)
        ]
        bpf.map_update(self._shared["tcplat_gate"], _u32(0), _u32(1))
        probes = {
            probe.name: LoadedProbe(
                ring_fd=module.fd("events"),
                books_fd=module.fd("books"),
                taken={point: way.mechanism for point, way in choice.taken.items()},
                programs=programs_of(_listened(probe), choice.taken),
                missing=choice.missing,
                interfaces=tuple(attached),
                skipped=skipped,
                program_fds=program_fds,
                maps=_readable(probe, module),
            )
            for probe, module, choice, program_fds, (attached, skipped) in zip(
                self.request.probes, modules, choices, programs, listening, strict=True
            )
        }
        gate, share = self._shared["tcplat_gate"], self._shared.get("tcplat_thinning")
        passed = {gate, share, *(fd for probe in probes.values() for fd in probe.fds)}
        holding = tuple(fd for fd in self._fds if fd not in passed)
        # What the host refuses to root as well is reported by doctor only.
        sentences = tuple(hidden.sentences(mendable=True))
        return Answer(
            probes=probes, gate_fd=gate, share_fd=share, holding=holding, hidden=sentences
        )

    def _attach_core(self, core: _Module) -> None:
        """Fill the filter maps, and attach the core's own programs except the last."""
        filter_ = self.request.filter
        for index, word in filter_.port_words().items():
            bpf.map_update(self._shared["tcplat_ports"], index, word)
        for network in filter_.network_keys():
            bpf.map_update(self._shared["tcplat_networks"], network, b"\1")
        # Before the names of running processes are read.
        self._core(core, RENAME)
        pids = filter_.pids
        if pids is not None:
            for pid in pids:
                bpf.map_update(self._shared["tcplat_pids"], _u32(pid), _u32(1))
        # Before the listeners are read.
        self._core(core, EXIT)
        if self._tracks:
            self._core(core, STATE)
            if self._follows_packets:
                self._core(core, QUEUE)
            self._core(core, USE)
        if self.request.follow:
            self._core(core, FORK)

    def _open(self, probe: ProbeRequest, choice: Choice, capacity: int) -> _Module:
        """Compile a probe, or take it from the cache, and create its maps."""
        taken = {point: way.mechanism for point, way in choice.taken.items()}
        text = program_text(probe, taken=taken, defines=self._defines(probe))
        if self.request.debug:
            sys.stderr.write(text)
        more = (
            *(CGROUP_TYPES if self._reads_cgroups else ()),
            *(PIDNS_TYPES if self._pidns else ()),
        )
        types = sorted({*CORE_TYPES, *more, *probe.types})
        name = digest(
            identity().encode(), compiler_identity(), text.encode(), *map(str.encode, types)
        )
        known = self.cache.read(f"{name}.program")
        if known is None:
            compiled = self._compile(probe, text, types)
            self.cache.write(f"{name}.program", compiled.pack())
        else:
            compiled = Compiled.unpack(known)
        sizes = dict.fromkeys(("tcplat_socks", "tcplat_seeds", "tcplat_flows"), capacity)
        sizes["tcplat_listeners"] = sizes["tcplat_listening"] = capacity // 2
        sizes["tcplat_networks"] = len(self.request.filter.networks)
        sizes["events"] = self.request.ring_bytes
        fds = []
        for one in compiled.maps:
            fd = self._shared.get(one.name)
            if fd is None:
                entries = sizes.get(one.name, one.entries)
                fd = bpf.map_create(one.name, one.kind, one.key, one.value, entries, one.flags)
                self._fds.append(fd)
                if one.name.startswith(SHARED_PREFIX):
                    self._shared[one.name] = fd
            fds.append(fd)
        return _Module(compiled, fds)

    def _defines(self, probe: ProbeRequest) -> dict[str, int | str]:
        """Return the constants of this run and this host for the C of a probe."""
        defines = core_defines(
            *(probe.points, self.request.filter, self.request.sample),
            adapts=self.request.max_overhead > 0,
        )
        if self.request.debug:
            defines["TCPLAT_DEBUG"] = 1
        if self._tracks:
            defines["TCPLAT_TRACK"] = 1
        if self._reads_cgroups:
            defines["TCPLAT_READ_CGROUPS"] = 1
        if self._pidns:
            inode, device = self._pidns
            defines |= {"TCPLAT_PIDNS": f"{inode}U", "TCPLAT_PIDNS_DEVICE": device}
        if cast := self._host.cast():
            defines["TCPLAT_CAST"] = KFUNC + cast
        if not self.request.events:
            defines["TCPLAT_NO_EVENTS"] = 1
        if not self.request.acks:
            defines["TCPLAT_NO_BARE_ACKS"] = 1
        if self.request.aggregation:
            defines |= self.request.aggregation.defines(possible_cpus(), len(probe.histograms))
            defines["TCPLAT_PROBE"] = 1 + self.request.probes.index(probe)
        return defines

    def _compile(self, probe: ProbeRequest, text: str, types: Sequence[str]) -> Compiled:
        try:
            with kernel_tree(types, self.cache, lambda: self._host.btf) as tree:
                return compile_text(text, tree)
        except (BtfError, PluginError) as error:
            raise PluginError(f"the C of probe {probe.name}: {error}") from error

    def _attach_probes(
        self, modules: Sequence[_Module], choices: Sequence[Choice]
    ) -> list[dict[str, int]]:
        """Attach the probes' programs; return those of each probe, program -> fd."""
        groups: dict[tuple[str, str], list[_Program]] = {}
        for number, (module, choice) in enumerate(zip(modules, choices, strict=True)):
            for way in choice.taken.values():
                for hook in _attached(way, samples=self.request.samples):
                    if hook.mechanism != "xdp":
                        program = _Program(number, way, hook, module.code(hook.program))
                        groups.setdefault((hook.mechanism, hook.func), []).append(program)
        fds: list[dict[str, int]] = [{} for _ in modules]
        for programs in groups.values():
            for one, fd in zip(programs, self._attach_group(programs), strict=True):
                fds[one.probe][one.hook.program] = fd
        return fds

    def _attach_group(self, programs: Sequence[_Program]) -> list[int]:
        """Attach programs of one function or tracepoint, as one if the kernel takes that."""
        first = programs[0]
        if len(programs) > 1 and not first.hook.func.startswith(SYSCALLS):
            # Else each by itself: together they may be too complex, or need too much stack.
            with contextlib.suppress(WayClosedError):
                code = in_sequence([one.code for one in programs])
                return [self._attach(first.way, first.hook, code)] * len(programs)
        return [self._attach(one.way, one.hook, one.code) for one in programs]

    def _attach(self, way: Way, hook: Hook, code: bytes) -> int:
        """Load a program and return its fd."""
        try:
            kind = _PROGRAM_TYPES[hook.mechanism]
            syscall = syscall_id(hook.func) if hook.func.startswith(SYSCALLS) else None
            if syscall:
                kind = bpf.ProgramType.TRACEPOINT
            target = (bpf.AttachType.NONE, 0)
            if kind is bpf.ProgramType.TRACING:
                target = (bpf.AttachType[hook.mechanism.upper()], self._host.btf_id(hook.func))
            program = bpf.program_load(hook.program, kind, code, *target)
            self._fds.append(program)
            if syscall:
                link = bpf.attach_tracepoint(program, syscall)
            elif kind is bpf.ProgramType.TRACING:
                link = bpf.attach_raw_tracepoint(program, None)
            elif hook.mechanism == "tracepoint":
                link = bpf.attach_raw_tracepoint(program, hook.func.rpartition(":")[2])
            else:
                at_return = hook.mechanism == "kretprobe"
                link = bpf.attach_kprobe(program, hook.func, at_return=at_return)
            self._fds.append(link)
        except bpf.RefusedError as error:
            raise WayClosedError(way, refusal(hook.program, error)) from error
        except OSError as error:
            if error.errno in TOO_MANY_FILES:
                raise
            reason = f"{hook.mechanism}:{hook.func}: {error.strerror}"
            raise WayClosedError(way, reason) from error
        return program

    def _core(self, module: _Module, point: HookPoint) -> None:
        """Attach one of the core's own hook points, by a tracepoint or as --attach allows."""
        reasons = []
        for way in point.ways:
            if self.request.attach not in ("auto", way.mechanism) and way.mechanism != "tracepoint":
                continue
            reason = self._why_not(way)
            if reason is None:
                for hook in way.hooks:
                    self._attach(way, hook, module.code(hook.program))
                return
            reasons.append(reason)
        if not point.optional:
            raise CannotRunError(
                f"this kernel lacks what tcplat itself needs: {'; '.join(reasons)}"
            )

    def _undo(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        self._shared.clear()


@attrs.frozen
class _Module:
    """A compiled probe and the fds of its maps."""

    compiled: Compiled
    fds: Sequence[int]

    def code(self, function: str) -> bytes:
        return self.compiled.code(function, self.fds)

    def fd(self, name: str) -> int:
        return self.fds[[one.name for one in self.compiled.maps].index(name)]


@attrs.frozen
class _Program:
    """A program of the probe with this number, and its instructions."""

    probe: int
    way: Way
    hook: Hook
    code: bytes


def _readable(probe: ProbeRequest, module: _Module) -> dict[str, LoadedMap]:
    """Return the maps that the session will map: only arrays can be mapped.

    Raises:
        PluginError: There is no such map, or it is of another kind or size.
    """
    maps = {one.name: (one, fd) for one, fd in zip(module.compiled.maps, module.fds, strict=True)}
    found = {}
    for name, size in probe.maps.items():
        if name not in maps:
            raise PluginError(f"the C of probe {probe.name} has no map {name}")
        one, fd = maps[name]
        if one.kind != bpf.ARRAY or not one.flags & bpf.MMAPABLE:
            raise PluginError(
                f"the map {name} of probe {probe.name} cannot be read from outside: it must be "
                f'BPF_F_TABLE("array", u32, ..., {name}, ..., BPF_F_MMAPABLE); '
                "<tcplat/keyed.bpf.h> counts by key in such arrays"
            )
        if one.value != size:
            raise PluginError(
                f"an entry of the map {name} of probe {probe.name} has {one.value} bytes in C "
                f"and {size} in Python"
            )
        found[name] = LoadedMap(fd, one.entries)
    return found


def _attached(way: Way, *, samples: bool) -> list[Hook]:
    """Return the hooks of a way that this run needs."""
    return [hook for hook in way.hooks if samples or not hook.sampling]


def _xdp_programs(module: _Module, choice: Choice) -> dict[str, bytes]:
    """Return name -> code of the XDP programs to attach."""
    hooks = [hook for way in choice.taken.values() for hook in way.hooks]
    return {one.program: module.code(one.program) for one in hooks if one.mechanism == "xdp"}


def _listened(probe: ProbeRequest) -> tuple[HookPoint, ...]:
    """Return the hook points to attach."""
    if probe.listen is None:
        return probe.points
    return tuple(point for point in probe.points if point.point in probe.listen)


def _u32(value: int) -> bytes:
    return value.to_bytes(4, sys.byteorder)


def _socket_capacity() -> int:
    """Return the entries for tcplat_socks: over twice the host's open sockets, at least 65,536."""
    words = Path("/proc/net/sockstat").read_text(encoding="ascii").split()
    # "TCP: inuse 4 orphan 0 tw 0 alloc 6 mem 1": alloc alone counts every namespace, and IPv6.
    allocated = int(words[words.index("alloc", words.index("TCP:")) + 1])
    return 1 << max(16, (2 * allocated).bit_length())
