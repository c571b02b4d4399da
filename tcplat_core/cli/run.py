"""``tcplat run``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click

from tcplat_core.errors import EventsLostError, TcplatError, UsageError
from tcplat_core.event import terminal
from tcplat_core.run.signals import Signals

from .chosen import aggregation_of, chosen_probes, chosen_sinks, made_sinks, used_points
from .root import give_up_root
from .shared_options import (
    COUNT,
    QUIET,
    SINKS,
    Duration,
    Percent,
    Share,
    Size,
    filter_of,
    filter_options,
)
from .words import nothing, print_report, removals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tcplat_core.loader.filter import Filter
    from tcplat_core.loader.protocol import Request
    from tcplat_core.plugin.aggregates import Aggregation
    from tcplat_core.plugin.report import RunReport
    from tcplat_core.run.loader_process import LoaderProcess
    from tcplat_core.run.session import Session
    from tcplat_core.run.traced_command import TracedCommand

    from .chosen import ChosenSinks


@click.command()
@click.option(
    "--probe",
    "probes",
    multiple=True,
    required=True,
    metavar="NAME[:k=v,...]",
    help="Probe to attach; repeatable.",
)
@SINKS
@filter_options
@click.option(
    "--cgroup",
    default="",
    metavar="PATH",
    help="Only sockets of processes in this cgroup (v2) or below it.",
)
@click.option(
    "--netns",
    default="",
    metavar="NS",
    help="Only sockets and interfaces of this network namespace: a name, a pid or a path.",
)
@click.option(
    "--attach",
    type=click.Choice(["auto", "fentry", "kprobe", "tracepoint"]),
    default="auto",
    show_default=True,
    help="Mechanism to use. auto: the first that works, for each hook point.",
)
@click.option(
    "-d",
    "--duration",
    type=Duration(),
    default=0.0,
    help="End after this time: 30 (seconds), 500ms, 2m.",
)
@COUNT
@click.option(
    "--sample",
    type=Share(),
    default=1,
    metavar="1/N",
    help="Rows of one connection in N, whole at all probes and on both hosts.  [default: 1/1]",
)
@click.option(
    "--max-overhead",
    type=Percent(),
    default=0.0,
    metavar="PCT",
    help="Rows of fewer connections while the run costs more than this of the host's CPU time: 2%.",
)
@click.option("--ready-file", metavar="PATH", help="Create PATH when all probes are attached.")
@click.option(
    "--hold",
    type=Duration(),
    default=0.003,
    help="How long a row is held back so that an older one, delayed by an interrupt, comes "
    "first; default 3ms, more on a slow virtual machine.",
)
@click.option(
    "--ring-size",
    type=Size(),
    default=1 << 23,
    metavar="BYTES",
    help="Size of each probe's ring buffer, a power of two: 4K to 1G.  [default: 8M]",
)
@click.option("--fail-on-loss", is_flag=True, help="Exit with status 5 if an event was lost.")
@QUIET
@click.option(
    "--dry-run",
    is_flag=True,
    help="Attach and detach, print the mechanism of each hook point, and exit.",
)
@click.option(
    "--debug",
    is_flag=True,
    help="Show the C code, the output of compiler and verifier, and what the programs print.",
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND [ARGUMENT]...]")
def run(**arguments: Any) -> None:
    """Attach probes and send their rows to sinks.

    A command after -- is traced with its children, in addition to -p. The run ends when
    the command ends, with its exit status; if the run ends first, the command gets SIGTERM.
    """
    from tcplat_core.kernel.netns import inode  # noqa: PLC0415
    from tcplat_core.loader.filter import cgroup_path  # noqa: PLC0415 - see __init__.py

    cgroup, netns = arguments.pop("cgroup"), arguments.pop("netns")
    wanted = filter_of(arguments)
    if wanted.pids or arguments["command"]:
        from tcplat_core.kernel.pidns import require_ours  # noqa: PLC0415 - see __init__.py

        require_ours()
    _check_pids(wanted.pids or ())
    wanted = attrs.evolve(
        wanted,
        cgroup=cgroup and cgroup_path(cgroup),
        cgroup_id=Path(cgroup).stat().st_ino if cgroup else 0,
        # Before root is dropped: only root can open the namespace of another user's process.
        netns=inode(netns) if netns else 0,
        netns_at=netns,
    )
    sys.exit(_Run(wanted=wanted, **arguments).carry_out())


@attrs.define(eq=False, kw_only=True)
class _Run:
    """One run, from the command line to its exit status."""

    wanted: Filter
    probes: Sequence[str]
    sinks: Sequence[str]
    attach: str
    duration: float
    count: int | None
    sample: int
    max_overhead: float
    ready_file: str | None
    hold: float
    ring_size: int
    fail_on_loss: bool
    quiet: bool
    dry_run: bool
    debug: bool
    command: Sequence[str]
    signals: Signals = attrs.field(factory=Signals, init=False)

    def carry_out(self) -> int:
        """Run, report the result, and return the exit status."""
        from tcplat_core.run.loader_process import LoaderProcess  # noqa: PLC0415
        from tcplat_core.run.traced_command import TracedCommand  # noqa: PLC0415 - see __init__.py

        self.signals.install()
        child = TracedCommand.fork(self.command) if self.command else None
        loader = None
        try:
            loader = LoaderProcess.start()
            session = self._session(loader, child)
            report = session.run()
        except TcplatError as error:
            if self.debug:
                terminal.write("\n".join(getattr(error, "__notes__", [])))
            raise
        finally:
            if loader:
                if self.debug:
                    terminal.write(loader.output())
                loader.close()
            if child:
                child.stop()
        print_report(report, dry_run=self.dry_run, quiet=self.quiet)
        # The status of a command that tcplat ended is meaningless.
        ended = child.status if child and not (child.stopped or self.signals.caught) else 0
        if removals(session.outputs):
            ended = TcplatError.exit_code
        return _status(report, child, ended or 0, fail_on_loss=self.fail_on_loss)

    def _session(self, loader: LoaderProcess, child: TracedCommand | None) -> Session:
        """Drop root and find the plugins, while the loader starts."""
        from tcplat_core.deliver.router import spare_the_collector  # noqa: PLC0415
        from tcplat_core.plugin.specs import RunInfo  # noqa: PLC0415
        from tcplat_core.registry.find import Plugins  # noqa: PLC0415
        from tcplat_core.run.ready import ReadyFile  # noqa: PLC0415
        from tcplat_core.run.session import Session  # noqa: PLC0415
        from tcplat_core.run.trace import TracePipe  # noqa: PLC0415

        spare_the_collector()
        trace = TracePipe.open() if self.debug else None
        say = nothing if self.quiet else terminal.say
        give_up_root(say=say)
        # Root is dropped, so third-party Python may run from here on.
        plugins = Plugins.load()
        probes = chosen_probes(plugins, self.probes)
        sinks = chosen_sinks(plugins, self.sinks, live=True)
        request = self._request(sinks, aggregation_of(plugins, sinks, probes), child)
        if self.count and not request.events:
            raise UsageError("--count needs a sink that takes rows")
        if request.samples and not request.events:
            option = "--sample" if self.sample > 1 else "--max-overhead"
            raise UsageError(
                f"{option} needs a sink that takes rows; --sink histogram counts every connection"
            )
        if self.ready_file:
            ReadyFile(self.ready_file).check()
        info = RunInfo(
            probes=tuple(one.spec.name for one in probes),
            stopping=self.signals.stopping,
            events={one.spec.name: one.spec.event for one in probes},
            say=say,
        )
        made, outputs = made_sinks(sinks, info)
        return Session(
            loader=loader,
            probes=probes,
            sinks=made,
            outputs=outputs,
            request=request,
            used=used_points(sinks),
            duration_s=self.duration,
            count=self.count or 0,
            ready_file=self.ready_file,
            hold_s=self.hold,
            dry=self.dry_run,
            trace=trace,
            command=child,
            signals=self.signals,
            say=terminal.say,
        )

    def _request(
        self, sinks: ChosenSinks, aggregation: Aggregation | None, child: TracedCommand | None
    ) -> Request:
        """Return the request to the loader, without the probes."""
        from tcplat_core.loader.protocol import Request  # noqa: PLC0415 - see __init__.py

        return Request(
            events=any(one.spec.aggregate is None for one in sinks.values()),
            acks=any(one.spec.acks for one in sinks.values() if one.spec.aggregate is None),
            aggregation=aggregation,
            probes=(),
            attach=self.attach,
            filter=self.wanted if child is None else self.wanted.and_pid(child.pid),
            follow=child is not None,
            debug=self.debug,
            ring_bytes=self.ring_size,
            sample=self.sample,
            max_overhead=self.max_overhead,
        )


def _status(
    report: RunReport, child: TracedCommand | None, ended: int, *, fail_on_loss: bool
) -> int:
    if report.switched_off or (report.interfaces_gone and not child):
        return TcplatError.exit_code
    if fail_on_loss and report.dropped:
        raise EventsLostError(f"{report.dropped} events were lost; a larger --ring-size may help")
    return ended


def _check_pids(pids: Sequence[int]) -> None:
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise UsageError(f"there is no process {pid}") from error
        process = int(status.split("Tgid:")[1].split()[0])
        if process != pid:
            raise UsageError(f"{pid} is a thread of process {process}: -p {process}")
