"""tcplat's own commands and those of plugins; each is imported when it is called."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import click

from tcplat_core.errors import (
    REFUSED,
    TOO_MANY_FILES,
    InterruptedByUserError,
    PluginError,
    ReaderGoneError,
    TcplatError,
    TerminatedError,
    blaming,
    is_the_users,
    named,
    of_system_call,
)
from tcplat_core.event.terminal import lines
from tcplat_core.kernel.end_request import ENDING, EndRequest, Interrupts
from tcplat_core.plugin.progress import wipe

GROUP = "tcplat.commands"
"""Group of entry points: name of a command, and its click.Command."""


class CommandGroup(click.Group):
    """The command line: its own commands, and those of plugins.

    Args:
        own: Commands of tcplat's own: name -> ``module:attribute``, as an entry point has it.

    Of a plugin's command the entry point alone is read, until the command is called
    or --help wants its line. Before anything of a plugin is imported, root is given up.
    """

    def __init__(self, *args: Any, own: Mapping[str, str] | None = None, **more: Any) -> None:
        super().__init__(*args, **more)
        self.own = own or {}

    def make_context(self, *args: Any, **more: Any) -> click.Context:
        """Parse options; some of them, such as --help, print."""
        with _in_a_sentence():
            return super().make_context(*args, **more)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        with _in_a_sentence(), terminated_in_order():
            try:
                with self._blaming(ctx):
                    return super().invoke(ctx)
            finally:
                wipe()

    @contextlib.contextmanager
    def _blaming(self, ctx: click.Context) -> Iterator[None]:
        """Report exceptions of a plugin's command as the plugin's fault; pass exit statuses on."""
        try:
            yield
        except (click.ClickException, click.Abort, click.exceptions.Exit, SystemExit):
            raise
        except BaseException as error:
            name = ctx.invoked_subcommand
            if name is None or name in self.commands or _is_reported(error):
                raise
            with blaming(f"command {name}"):
                raise

    def get_help(self, ctx: click.Context) -> str:
        """Print the help, which has a line from each plugin's command."""
        return lines(super().get_help(ctx))

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all names."""
        return sorted({*super().list_commands(ctx), *self.own, *_entries()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of this name; one that says why it is broken; None if there is none.

        Ours come first: no plugin can take the place of one.
        """
        own = super().get_command(ctx, cmd_name)
        if own is None and cmd_name in self.own:
            own = importlib.metadata.EntryPoint(cmd_name, self.own[cmd_name], GROUP).load()
            self.add_command(own, cmd_name)
        if own is not None:
            return own
        entry = _entries().get(cmd_name)
        if entry is None:
            return None
        if callable(ctx.obj):
            ctx.obj()
        try:
            return load(entry)
        except PluginError as error:
            return _broken(cmd_name, error)


_AGAIN_S = 0.5


class _Termination:
    """Raises an error for signals, and once more where it was lost on the way.

    C code that looks something up in a dictionary clears what is raised meanwhile: msgspec's
    decoders do, for keys whose __hash__ is Python.
    """

    def __init__(self, numbers: Iterable[int]) -> None:
        self.request = EndRequest()
        self.error: TerminatedError | InterruptedByUserError | None = None
        self.before: dict[int, Interrupts | signal.Handlers] = {}
        for number in numbers:
            handler = signal.getsignal(number)
            if isinstance(handler, Interrupts):  # a request that came already counts, too
                self.request = handler.request
            if isinstance(handler, Interrupts) or handler is signal.SIG_DFL:
                self.before[number] = handler
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: object) -> None:
        if not self.request.is_first(number):
            return
        interrupted = number == signal.SIGINT
        self.error = InterruptedByUserError() if interrupted else TerminatedError(number)
        signal.signal(signal.SIGALRM, self._again)
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S, _AGAIN_S)
        raise self.error

    def _again(self, _number: int, _frame: object) -> None:
        error = sys.exc_info()[1]
        while error is not None and error is not self.error:
            error = error.__context__
        if self.error and error is None:  # otherwise it is being handled already
            raise self.error

    def close(self) -> None:
        """Restore the handlers."""
        if self.error:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.before.items():
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, handler)


@contextlib.contextmanager
def terminated_in_order() -> Iterator[None]:
    """Have signals undo what is half done; SIGTERM and SIGHUP then end the process as they do.

    What a command has begun to write, or has drawn on the terminal, would stay. `run` and
    `replay` have ends of their own for these signals, and take them over.
    """
    is_main = threading.current_thread() is threading.main_thread()
    termination = _Termination(ENDING if is_main else ())
    try:
        yield
    except TerminatedError as error:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        signal.signal(error.number, signal.SIG_DFL)
        os.kill(os.getpid(), error.number)
    finally:
        termination.close()


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextlib.contextmanager
def _in_a_sentence() -> Iterator[None]:
    """End a command if its reader is gone; report a full disk and the like in a sentence."""
    status: SystemExit | click.exceptions.Exit | None = None
    try:
        try:
            yield
        except (SystemExit, click.exceptions.Exit) as error:
            status = error
        if sys.stdout is not None:
            sys.stdout.flush()
    except (BrokenPipeError, ReaderGoneError):
        _let_go_of_stdout()
        status = status or SystemExit(0)
    except OSError as error:
        if error.errno in TOO_MANY_FILES:
            raise TcplatError(TOO_MANY_FILES[error.errno]) from error
        if not _is_reported(error):
            raise
        if error.errno not in _FULL:
            raise of_system_call(error) from error
        _let_go_of_stdout()
        raise TcplatError(f"writing failed: {os.strerror(error.errno)}") from error
    if status is not None:
        raise status


def _is_reported(error: BaseException) -> bool:
    """Return whether it is a system call error that tcplat reports in a sentence."""
    return isinstance(error, OSError) and (
        error.errno in (*TOO_MANY_FILES, *_FULL, *REFUSED, errno.EPIPE)
        or error.filename is not None  # a file that the user named
    )


def _let_go_of_stdout() -> None:
    """Discard buffered output: Python would try to write it again at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())


def found(own: Iterable[str]) -> Iterator[tuple[importlib.metadata.EntryPoint, str, str]]:
    """Each plugin's command: entry point, status and summary, as `tcplat plugins list` has it.

    Args:
        own: Names that are tcplat's.
    """
    taken = set(own)
    for entry in _sorted():
        if entry.name in taken:
            yield entry, "broken", "a command of this name exists already"
            continue
        taken.add(entry.name)
        try:
            yield entry, "ok", load(entry).get_short_help_str(80)
        except PluginError as error:
            yield entry, "broken", str(error)


def load(entry: importlib.metadata.EntryPoint) -> click.Command:
    """Import the command.

    Raises:
        PluginError: It cannot be imported, or is none.
    """
    try:
        command = entry.load()
        if isinstance(command, click.Command):
            command.get_short_help_str()  # --help calls it, and would end with a traceback
    except BaseException as error:
        if is_the_users(error):
            raise
        raise PluginError(named(error)) from error
    if not isinstance(command, click.Command):
        raise PluginError(f"it offers a {type(command).__name__} as a command")
    return command


def _sorted() -> list[importlib.metadata.EntryPoint]:
    # A plugin may be installed twice: in tcplat's wheel and separately.
    entries = importlib.metadata.entry_points(group=GROUP)
    return [one for _, one in sorted({(one.name, one.value): one for one in entries}.items())]


def _entries() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in reversed(_sorted())}


def _broken(name: str, error: PluginError) -> click.Command:
    def fail(_: tuple[str, ...]) -> None:
        raise PluginError(f"command {name} is broken: {error}")

    return click.Command(
        name,
        callback=fail,
        params=[click.Argument(["_"], nargs=-1, type=click.UNPROCESSED)],
        context_settings={"ignore_unknown_options": True},
        help=f"Broken: {error}",
        add_help_option=False,
    )
