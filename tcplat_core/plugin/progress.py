"""A progress bar on stderr for reading a capture; it is erased at the end.

click formats the line, and this module draws it: click itself hides the cursor until it has
finished, and after Ctrl-C, SIGKILL or an error the cursor would stay hidden.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any, Protocol

import attrs
import click

_AFTER_S = 1.0
_EVERY_S = 0.1


class Measured(Protocol):
    """An input whose progress is shown.

    Attributes:
        name: The name that the user gave.
        size: Size in bytes; 0 if unknown.
        consumed: Bytes read so far.
    """

    name: str
    size: int
    consumed: int


_drawn: set[Bar] = set()
"""Bars that are on the terminal now."""


@attrs.define(eq=False)
class Bar:
    """A progress bar, drawn from _AFTER_S on.

    Args:
        source: The input; without a size nothing is drawn.
        shown: Whether stderr is a terminal, and the bar is wanted.
    """

    source: Measured
    shown: bool
    _next: float = attrs.field(init=False, factory=lambda: time.monotonic() + _AFTER_S)
    _bar: Any = attrs.field(init=False, default=None)
    _in_the_way: bool = attrs.field(init=False, default=False)
    """It is drawn, and standard output is a terminal too."""

    def update(self) -> None:
        """Draw it, at most every _EVERY_S."""
        now = time.monotonic()
        if not self.shown or not self.source.size or now < self._next:
            return
        self._next = now + _EVERY_S
        if self._bar is None:
            self._bar = click.progressbar(
                length=self.source.size, label=self.source.name, file=sys.stderr
            )
        self._bar.make_step(self.source.consumed - self._bar.pos)
        line = self._bar.format_progress_line()
        surplus = len(line) - (_terminal_width() - 1)
        if surplus > 0:  # a line wider than the terminal could not be erased
            line = line[min(surplus, len(self.source.name)) :][: _terminal_width() - 1]
        _drawn.add(self)  # before: Ctrl-C may come at any time
        click.echo(f"\r{line}\x1b[K", nl=False, err=True)
        self._in_the_way = sys.stdout is not None and sys.stdout.isatty()

    def hide(self) -> None:
        """Erase it before rows, if standard output is a terminal."""
        if self._in_the_way:
            self.close()

    def close(self) -> None:
        """Erase it. Idempotent."""
        if self in _drawn:
            click.echo("\r\x1b[K", nl=False, err=True)
            _drawn.discard(self)
        self._in_the_way = False


def wipe() -> None:
    """Erase all bars."""
    for bar in list(_drawn):
        bar.close()


def _terminal_width() -> int:
    try:
        return os.get_terminal_size(2).columns or 80
    except OSError:
        return 80
