"""How far the reading of a capture is: a line on stderr that leaves nothing behind.

The line is click's; it is drawn here, because click hides the cursor until its own end, and a
terminal stays so where that does not come: Ctrl-C, SIGKILL, an error.
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
    """What is read.

    Attributes:
        name: As the user calls it.
        size: Bytes in all; 0 where that is not known.
        consumed: Bytes so far.
    """

    name: str
    size: int
    consumed: int


_drawn: set[Bar] = set()
"""Those that stand on the terminal."""


@attrs.define(eq=False)
class Bar:
    """How far it is, once a second has passed.

    Args:
        source: Its size must be known.
        shown: Whether stderr is a terminal, and the user wants to see it.
    """

    source: Measured
    shown: bool
    _next: float = attrs.field(init=False, factory=lambda: time.monotonic() + _AFTER_S)
    _bar: Any = attrs.field(init=False, default=None)
    _in_the_way: bool = attrs.field(init=False, default=False)
    """It is drawn on the terminal that standard output is, too."""

    def update(self) -> None:
        """Draw it, not too often."""
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
        if surplus > 0:  # a line that is wider than the terminal could not be wiped away
            line = line[min(surplus, len(self.source.name)) :][: _terminal_width() - 1]
        _drawn.add(self)  # before: Ctrl-C may come at any time
        click.echo(f"\r{line}\x1b[K", nl=False, err=True)
        self._in_the_way = sys.stdout is not None and sys.stdout.isatty()

    def hide(self) -> None:
        """Make room for rows, if they come to the same terminal."""
        if self._in_the_way:
            self.close()

    def close(self) -> None:
        """Wipe it away. Again it does nothing."""
        if self in _drawn:
            click.echo("\r\x1b[K", nl=False, err=True)
            _drawn.discard(self)
        self._in_the_way = False


def wipe() -> None:
    """Wipe away what is drawn, however its reading has ended."""
    for bar in list(_drawn):
        bar.close()


def _terminal_width() -> int:
    try:
        return os.get_terminal_size(2).columns or 80
    except OSError:
        return 80
