"""The command line. Thin: it turns words into values and errors into exit codes."""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from tcplat_core.cli import OWN
from tcplat_core.errors import OUT_OF_MEMORY, TcplatError, UsageError
from tcplat_core.event import terminal
from tcplat_core.registry.command_group import CommandGroup
from tcplat_core.run.signals import ignore_at_exit, stopped_early, unblock

from .root import give_up_root


@click.group(cls=CommandGroup, own=OWN, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tcplat")
def cli() -> None:
    """Where does the time go in a TCP connection?

    \b
    sudo tcplat run --probe tcp_client -p PID
    sudo tcplat run --probe tcp_client --sink jsonl --duration 5 > out.jsonl
    sudo tcplat run --probe tcp_client -- curl -s http://127.0.0.1:9999/
    tcplat replay out.jsonl --port 443
    tcplat plugins list
    """  # noqa: D301 - \b is click's own


def main() -> NoReturn:
    """Run the command line; every error that a user can cause is one sentence."""
    try:
        ignore_at_exit()
        unblock()
        # Passed here: a program that calls a command in its own process keeps its rights.
        cli.main(prog_name="tcplat", standalone_mode=False, obj=give_up_root)
    except TcplatError as error:
        terminal.say(str(error))
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        terminal.write(error.format_message())
        sys.exit(UsageError.exit_code)
    except click.ClickException as error:
        command = (
            error.ctx.command_path
            if isinstance(error, click.UsageError) and error.ctx
            else "tcplat"
        )
        terminal.say(f"{error.format_message()} ({command} --help)")
        sys.exit(UsageError.exit_code)
    except MemoryError:
        terminal.say(OUT_OF_MEMORY)
        sys.exit(TcplatError.exit_code)
    except (click.Abort, KeyboardInterrupt):  # the latter: it had been blocked, and was pending
        sys.exit(stopped_early(sys.argv[1:]))
    sys.exit(0)
