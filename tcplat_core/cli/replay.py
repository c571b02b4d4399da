"""``tcplat replay``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import attrs
import click

from tcplat_core.errors import TcplatError
from tcplat_core.event import terminal
from tcplat_core.plugin.progress import Bar
from tcplat_core.run.signals import NOTHING_REPLAYED, Signals

from .chosen import chosen_sinks, made_sinks
from .root import give_up_root
from .shared_options import COUNT, QUIET, SINKS, filter_of, filter_options
from .words import failures, nothing, removals, summary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tcplat_core.loader.filter import Filter


@click.command()
@click.argument("capture", metavar="FILE|unix:PATH|tcp:HOST:PORT|-")
@SINKS
@click.option(
    "--probe", "probes", multiple=True, metavar="NAME", help="Only rows of this probe; repeatable."
)
@click.option(
    "--point", "points", multiple=True, metavar="NAME", help="Only rows of this point; repeatable."
)
@filter_options
@click.option(
    "--netns",
    default="",
    metavar="NS",
    help="Only this network namespace: inode number or name.",
)
@COUNT
@QUIET
def replay(capture: str, **arguments: Any) -> None:
    """Send the rows of a capture to sinks.

    A capture is JSON lines or msgpack, from a file, pipe or socket. Needs no root and no
    BPF. Damaged lines are skipped and counted; the first three are listed.
    """
    from tcplat_core.kernel.netns import netns_recorded  # noqa: PLC0415 - see __init__.py

    netns = arguments.pop("netns")
    wanted = attrs.evolve(filter_of(arguments), netns=netns_recorded(netns) if netns else 0)
    sys.exit(_replay(capture, wanted, **arguments))


def _replay(
    where: str,
    wanted: Filter,
    *,
    sinks: Sequence[str],
    probes: Sequence[str],
    points: Sequence[str],
    count: int | None,
    quiet: bool,
) -> int:
    from tcplat_core.capture.replay import UNREAD, Replay  # noqa: PLC0415
    from tcplat_core.capture.rows import Capture  # noqa: PLC0415
    from tcplat_core.capture.source import Source  # noqa: PLC0415
    from tcplat_core.deliver.router import spare_the_collector  # noqa: PLC0415
    from tcplat_core.plugin.specs import RunInfo  # noqa: PLC0415
    from tcplat_core.registry.find import Plugins  # noqa: PLC0415

    spare_the_collector()
    signals = Signals()
    signals.install()
    # Opened before rights are dropped: it may be root's capture, or another user's socket.
    try:
        source = Source.open(where, signals.stopping)
    except InterruptedError:
        if not quiet:
            terminal.say(NOTHING_REPLAYED)
        return 0
    give_up_root(say=nothing if quiet else terminal.say)
    plugins = Plugins.load()
    events = {name: spec.event for name, spec in plugins.probes.items()}
    say = nothing if quiet else terminal.say
    chosen = chosen_sinks(plugins, sinks, live=False)
    made, outputs = made_sinks(chosen, RunInfo((), signals.stopping, live=False, say=say))
    one = Replay(
        source=source,
        capture=Capture(events, say),
        sinks=made,
        outputs=outputs,
        wanted=wanted,
        probes=probes,
        points=points,
        count=count or 0,
        stopping=signals.stopping,
        bar=Bar(source, shown=not quiet and sys.stderr.isatty()),
    )
    report = one.run()
    if not quiet:
        summary(report, UNREAD, one.left())
        for sentence in one.summary(report):
            terminal.say(sentence)
        if signals.caught and not one.capture.read:
            terminal.say(NOTHING_REPLAYED)
    failures(one.router.switched_off)
    failed = removals(outputs) or one.router.switched_off
    return TcplatError.exit_code if failed else 0
