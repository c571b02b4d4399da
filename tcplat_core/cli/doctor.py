"""``tcplat doctor``."""

from __future__ import annotations

import sys

import click

from tcplat_core.errors import CannotRunError
from tcplat_core.event import terminal

from .words import json_text


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(*, as_json: bool) -> None:
    """Show what this host can run, and how to fix what it cannot."""
    from . import host_checks  # noqa: PLC0415 - see __init__.py

    checks, probes = host_checks.examine()
    if as_json:
        click.echo(json_text(host_checks.as_json(checks, probes)))
    else:
        click.echo(terminal.lines(host_checks.as_text(checks, probes)))
    sys.exit(0 if host_checks.healthy(checks, probes) else CannotRunError.exit_code)
