"""``tcplat plugins``: list, check, show, new."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import click

from tcplat_core.cli import OWN
from tcplat_core.errors import TcplatError, UsageError
from tcplat_core.event import terminal

from .words import json_text


@click.group()
def plugins() -> None:
    """List, check, show and create probes and sinks."""


@plugins.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def plugins_list(give_up_root: Callable[[], None] | None, *, as_json: bool) -> None:
    """List all probes, sinks and plugins' commands, broken ones included."""
    from tcplat_core.event.text import columns  # noqa: PLC0415 - see __init__.py
    from tcplat_core.registry import command_group  # noqa: PLC0415
    from tcplat_core.registry.find import Found, Plugins  # noqa: PLC0415

    if give_up_root:
        give_up_root()
    found = Plugins.load().found
    for entry, status, summary in command_group.found(OWN):
        dist = entry.dist
        version, distribution = (dist.version, dist.name) if dist else ("?", "?")
        found.append(Found(entry.name, "command", version, distribution, status, summary))
    found.sort(key=lambda one: (one.kind, one.name))
    names = ("name", "kind", "version", "distribution", "status", "summary")
    rows = [[getattr(one, name) for name in names] for one in found]
    if as_json:
        click.echo(json_text([dict(zip(names, row, strict=True)) for row in rows]))
        return
    for line in columns([[name.upper() for name in names], *rows], gap=1):
        click.echo(terminal.printable(line))


@plugins.command("check")
@click.argument("choice", metavar="NAME[:k=v,...]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def plugins_check(give_up_root: Callable[[], None] | None, choice: str, *, as_json: bool) -> None:
    """Check that a probe or sink keeps the rules for plugins.

    Most checks need no root. As root, a probe is also loaded and attached, in a
    network namespace of its own. Exits with status 1 if a check failed.
    """
    from tcplat_core.testing import conformance, trial_process  # noqa: PLC0415 - see __init__.py

    with contextlib.ExitStack() as stack:
        privileged = trial_process.as_root()
        if privileged:
            stack.callback(privileged.close)
        if give_up_root:
            give_up_root()
        outcomes = list(conformance.check_plugin(choice, trial=lambda: privileged))
    if as_json:
        click.echo(json_text(conformance.as_json(outcomes)))
    else:
        click.echo(terminal.lines(conformance.as_text(outcomes)))
    failed = any(outcome.verdict == "failed" for _, outcome in outcomes)
    sys.exit(TcplatError.exit_code if failed else 0)


@plugins.command("show")
@click.argument("name")
@click.option(
    "--kind",
    type=click.Choice(["probe", "sink"]),
    help="Needed if a probe and a sink have the same name.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def plugins_show(
    give_up_root: Callable[[], None] | None, *, name: str, kind: str | None, as_json: bool
) -> None:
    """Show a probe or sink, and how this host would run it."""
    from tcplat_core.registry import show  # noqa: PLC0415 - see __init__.py
    from tcplat_core.registry.find import Plugins  # noqa: PLC0415

    view = show.HostView.now()
    if give_up_root:
        give_up_root()
    several = Plugins.load().named(name, kind)
    if len(several) > 1:
        raise UsageError(f"there are a probe and a sink named {name!r}: --kind says which")
    shown = show.as_json(*several[0], view)
    click.echo(json_text(shown) if as_json else terminal.lines(show.as_text(shown)))


@plugins.command("new")
@click.argument("kind", type=click.Choice(["probe", "sink"]))
@click.argument("name")
@click.option("--dir", "folder", default=".", metavar="DIR", help="Parent folder.  [default: .]")
@click.pass_obj
def plugins_new(
    give_up_root: Callable[[], None] | None, *, kind: str, name: str, folder: str
) -> None:
    """Create the project tcplat-NAME, with a probe or sink that works."""
    from tcplat_core.registry import new  # noqa: PLC0415 - see __init__.py

    if give_up_root:
        give_up_root()
    project, *files = new.create(kind, name, Path(folder))
    shown = terminal.printable(str(project))
    click.echo(f"{shown}: {len(files)} files. Next:")
    click.echo(f"  pip install {shown if project.is_absolute() else f'./{shown}'}")
    click.echo(f"  tcplat plugins check {name}")
    run = f"--probe {name}" if kind == "probe" else f"--probe tcp_client --sink {name}"
    click.echo(f"  sudo tcplat run {run}")
