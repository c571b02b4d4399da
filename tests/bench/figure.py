"""A figure of the bench: what was measured, its target, and how the table shows it."""

from __future__ import annotations

from collections.abc import Sequence

import attrs


@attrs.frozen
class Figure:
    """One line of the table."""

    name: str
    what: str
    base: str
    """Of the peer, of empty programs, or without tcplat."""
    ours: str
    value: float
    """What is compared with the target."""
    target: float | None
    """None for a figure that only explains others."""
    at_least: bool = True
    unit: str = ""

    @property
    def missed(self) -> bool:
        """Whether it is worse than promised."""
        if self.target is None:
            return False
        return self.value < self.target if self.at_least else self.value > self.target

    def cells(self) -> list[str]:
        """As printed."""
        value = f"{self.value:,.3g}" if abs(self.value) < 1000 else f"{self.value:,.0f}"
        cells = [self.name, self.what, self.base, self.ours, f"{value}{self.unit}"]
        if self.target is None:
            return [*cells, "", ""]
        sign = ">=" if self.at_least else "<="
        return [*cells, f"{sign} {self.target:,g}{self.unit}", "MISS" if self.missed else "ok"]


HEAD = ("", "figure", "base or peer", "ours", "value", "target", "")


def table(figures: Sequence[Figure]) -> str:
    """Return all figures in columns."""
    lines = [HEAD, *(figure.cells() for figure in figures)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


@attrs.frozen
class Length:
    """How often and how long a bench measures."""

    repeats: int = 13
    """Blocks of each kind, of B1, B1s, B2, B3, B11 and B12."""
    starts: int = 5
    """Of B5."""
    trial_s: float = 4.0
    """Each step of B4's ladder."""
    lossless_s: float = 30.0
    """What B4 promises."""
    idle_s: float = 20.0
    """Of B9."""
    turns: int = 5
    """Blocks of each kind, of the servers."""
    block_s: int = 2
    """One block of a server's load; wrk takes whole seconds."""
    rows: int = 1_000_000
    """Of the capture that B13 reads."""
    scans: int = 3
    """How often each command of B13 reads it."""
    limit_s: int = 10
    """How long a server runs at its limit while lost rows are counted."""


FULL = Length()
QUICK = Length(
    repeats=3,
    starts=1,
    trial_s=1.0,
    lossless_s=5.0,
    idle_s=5.0,
    turns=1,
    block_s=1,
    rows=200_000,
    scans=1,
    limit_s=3,
)
"""Each row in less than a minute, with more noise."""
