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

from .chosen import chosen_aggregation, chosen_probes, chosen_sinks
from .options import COUNT, QUIET, SINKS, Duration, Size, filter_of, filter_options
from .root import give_up_root
from .words import nothing, tell

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tcplat_core.loader.filter import Filter
    from tcplat_core.plugin.report import RunReport
    from tcplat_core.run.command import Command


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
@click.option("-d", "--duration", type=Duration(), default=0.0, help="End after this time.")
@COUNT
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
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def run(**arguments: Any) -> None:
    """Attach probes and send their rows to sinks.

    A command after -- is traced with its children. The run ends when the command
    ends, with its exit status.
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
        # Now: only root can open the namespace of another user's process.
        netns=inode(netns) if netns else 0,
        netns_at=netns,
    )
    sys.exit(_run(wanted, **arguments))


def _run(
    wanted: Filter,
    *,
    probes: Sequence[str],
    sinks: Sequence[str],
    attach: str,
    duration: float,
    count: int | None,
    ready_file: str | None,
    hold: float,
    ring_size: int,
    fail_on_loss: bool,
    quiet: bool,
    dry_run: bool,
    debug: bool,
    command: Sequence[str],
) -> int:
    from tcplat_core.run.command import Command  # noqa: PLC0415 - see __init__.py
    from tcplat_core.run.loader import LoaderProcess  # noqa: PLC0415

    signals = Signals()
    signals.install()
    child = Command.fork(command) if command else None
    loader = None
    try:
        loader = LoaderProcess.start()
        # While it starts.
        from tcplat_core.deliver.router import spare_the_collector  # noqa: PLC0415
        from tcplat_core.loader.protocol import Request  # noqa: PLC0415
        from tcplat_core.plugin.specs import RunInfo  # noqa: PLC0415
        from tcplat_core.registry.find import Plugins  # noqa: PLC0415
        from tcplat_core.run.ready import ReadyFile  # noqa: PLC0415
        from tcplat_core.run.session import Session  # noqa: PLC0415
        from tcplat_core.run.trace import TracePipe  # noqa: PLC0415

        spare_the_collector()
        trace = TracePipe.open() if debug else None
        give_up_root(say=nothing if quiet else terminal.say)
        # Third-party Python runs from here on, and root is gone.
        plugins = Plugins.load()
        chosen = chosen_probes(plugins, probes)
        aggregation, events = chosen_aggregation(plugins, sinks, chosen)
        if count and not events:
            raise UsageError("--count needs a sink that takes rows")
        info = RunInfo(
            probes=tuple(spec.name for spec, _ in chosen),
            stopping=signals.stopping,
            events={spec.name: spec.event for spec, _ in chosen},
            say=nothing if quiet else terminal.say,
        )
        if ready_file:
            ReadyFile(ready_file).check()
        made, outputs = chosen_sinks(plugins, sinks, info)
        session = Session(
            loader=loader,
            probes=chosen,
            sinks=made,
            outputs=outputs,
            request=Request(
                events=events,
                aggregation=aggregation,
                probes=(),
                attach=attach,
                filter=wanted if child is None else wanted.and_pid(child.pid),
                follow=child is not None,
                debug=debug,
                ring_bytes=ring_size,
            ),
            duration_s=duration,
            count=count or 0,
            ready_file=ready_file,
            hold_s=hold,
            dry=dry_run,
            trace=trace,
            command=child,
            signals=signals,
            say=terminal.say,
        )
        report = session.run()
    except TcplatError as error:
        if debug:
            terminal.write("\n".join(getattr(error, "__notes__", [])))
        raise
    finally:
        if loader:
            if debug:
                terminal.write(loader.output())
            loader.close()
        if child:
            child.stop()
    tell(report, dry_run=dry_run, quiet=quiet)
    # Of a command that did not end by itself, the status says no more than that.
    ended = child.status if child and not (child.stopped or signals.caught) else 0
    return _status(report, child, ended or 0, fail_on_loss=fail_on_loss)


def _status(report: RunReport, child: Command | None, ended: int, *, fail_on_loss: bool) -> int:
    if report.switched_off or (report.deaf and not child):
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
