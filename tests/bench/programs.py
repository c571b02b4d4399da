"""The BPF programs of a run: where they are attached, how long they ran, and empty ones there."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import attrs

from tcplat_core.kernel import bpf
from tcplat_core.loader import xdp
from tests.bench.running import Run

PASS = bytes.fromhex("b7000000020000009500000000000000")
"""r0 = XDP_PASS; exit."""


@attrs.frozen(order=True)
class Hook:
    """A place to which a program is attached."""

    kind: str
    """raw_tracepoint, tracepoint (which costs more: a perf event) or xdp."""
    where: str
    """Name of the tracepoint, or index of the interface."""

    def attach(self, stack: ExitStack) -> None:
        """Attach an empty program until `stack` ends."""

        def held(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        if self.kind == "xdp":
            held(bpf.attach_xdp(held(xdp.load("empty", PASS)), int(self.where), 0))
        elif self.kind == "tracepoint":
            program = held(bpf.program_load("empty", bpf.ProgramType.TRACEPOINT, bpf.RETURN_0))
            held(bpf.attach_tracepoint(program, tracepoint_id(self.where)))
        else:
            program = held(bpf.program_load("empty", bpf.ProgramType.RAW_TRACEPOINT, bpf.RETURN_0))
            held(bpf.attach_raw_tracepoint(program, self.where))


def event_folder(tracepoint: str) -> Path | None:
    """Return the folder of a tracepoint in tracefs; a few have none."""
    return next((bpf.tracefs() or Path()).glob(f"events/*/{tracepoint}"), None)


def tracepoint_id(tracepoint: str) -> int:
    """Return its number in tracefs."""
    folder = event_folder(tracepoint)
    if folder is None:
        raise SystemExit(f"tracefs has no tracepoint {tracepoint}: {bpf.TRACEFS_MOUNT}")
    return int((folder / "id").read_text())


def attached(pid: int) -> dict[Hook, list[int]]:
    """Return each hook of a process and the ids of the programs there."""
    found: dict[Hook, list[int]] = {}
    for lines in descriptors(pid):
        kind = lines.get("link_type")
        if kind is None:
            continue
        where = lines.get("tp_name") or lines.get("ifindex")
        if where is None:
            raise SystemExit(f"the bench needs tracepoints: a program is attached by {kind}")
        found.setdefault(Hook(kind, where), []).append(int(lines["prog_id"]))
    # fdinfo of a perf event does not have its tracepoint.
    shown = subprocess.run(
        ["bpftool", "--json", "perf", "show"], check=True, capture_output=True, text=True
    ).stdout
    for one in json.loads(shown or "[]"):
        # It lists raw tracepoints, too.
        if one["pid"] != pid or one["fd_type"] == "raw_tracepoint":
            continue
        if one["fd_type"] != "tracepoint":
            raise SystemExit(
                f"the bench needs tracepoints: a program is attached by {one['fd_type']}"
            )
        found.setdefault(Hook("tracepoint", one["tracepoint"]), []).append(int(one["prog_id"]))
    return found


def descriptors(pid: int) -> Iterator[dict[str, str]]:
    """Yield the lines of fdinfo of each file descriptor."""
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            text = info.read_text()
        except FileNotFoundError:  # of this process: the folder that was just read
            continue
        yield {
            key: value.strip()
            for key, _, value in (line.partition(":") for line in text.splitlines())
        }


def hooks_of(started: AbstractContextManager[Run]) -> tuple[Hook, ...]:
    """Start a run, and return its hooks: each as often as it has programs there."""
    with started as run:
        found = attached(run.process.pid)
    return tuple(sorted(hook for hook, programs in found.items() for _ in programs))


@contextmanager
def empty_programs(hooks: Sequence[Hook]) -> Iterator[None]:
    """Attach to each a program that returns at once: the lower limit of any tracer's cost."""
    with ExitStack() as stack:
        for hook in hooks:
            hook.attach(stack)
        yield


@attrs.frozen
class Ran:
    """What the kernel counted for one program."""

    name: str
    runs: int
    ns: int
    """In all; the kernel's reading of the clock included."""

    def since(self, before: Ran | None) -> Ran:
        """Return what came after `before`."""
        return Ran(self.name, self.runs - before.runs, self.ns - before.ns) if before else self


@contextmanager
def kernel_statistics() -> Iterator[Callable[[int], dict[int, Ran]]]:
    """Enable the kernel's BPF statistics; yield a function: pid -> program id -> what it ran."""
    knob = Path("/proc/sys/kernel/bpf_stats_enabled")
    before = knob.read_text()
    knob.write_text("1")

    def programs(pid: int) -> dict[int, Ran]:
        return {
            int(lines["prog_id"]): Ran(
                bpf.program_name(int(lines["prog_id"])),
                int(lines["run_cnt"]),
                int(lines["run_time_ns"]),
            )
            for lines in descriptors(pid)
            if "run_cnt" in lines
        }

    try:
        yield programs
    finally:
        knob.write_text(before)
