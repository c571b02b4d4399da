"""Reads a capture for a command: rows, a progress bar, and warnings."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence

import attrs

from tcplat_core.deliver.router import spare_the_collector
from tcplat_core.errors import TcplatError, UsageError
from tcplat_core.event.fields import Event
from tcplat_core.event.terminal import say as say_it
from tcplat_core.plugin.outfile import leads_to
from tcplat_core.plugin.progress import Bar
from tcplat_core.plugin.report import RunReport, add_reports
from tcplat_core.plugin.sampling import Sampled, Shares
from tcplat_core.plugin.specs import Item, Loss, Merge
from tcplat_core.registry.find import Plugins

from .replay import UNREAD, RowsByHook, compare, count_hooks
from .rows import Capture
from .source import Source


@attrs.define(eq=False)
class Reader:
    """Reads one capture from beginning to end, in bounded memory.

    Attributes:
        rows: Number of rows read so far.
        lost: Number of lost events recorded in the capture.
        merges: Hosts of a merged capture.
        shares: Of which connections it has rows.
    """

    _source: Source
    _capture: Capture
    _bar: Bar
    rows: int = attrs.field(default=0, init=False)
    lost: int = attrs.field(default=0, init=False)
    merges: list[Merge] = attrs.field(factory=list, init=False)
    shares: Shares = attrs.field(factory=Shares, init=False)
    _read: RowsByHook = attrs.field(factory=Counter, init=False)
    _whole: bool = attrs.field(default=False, init=False)
    """Whether it was read to its end."""

    @classmethod
    def open(cls, where: str, *, quiet: bool = False, again: bool = False) -> Reader:
        """Open a capture.

        Args:
            where: A path, ``-`` for standard input, ``unix:PATH`` or ``tcp:HOST:PORT``.
            quiet: Show no progress bar, and do not report what is left out.
            again: The capture was read before; do not report again what is left out.

        Raises:
            UsageError: It cannot be read.
        """
        spare_the_collector()
        source = Source.open(where)
        events = {name: spec.event for name, spec in Plugins.load().probes.items()}

        def say(sentence: str) -> None:
            if not quiet and not again:
                say_it(f"{source.name}: {sentence}")

        bar = Bar(source, shown=not quiet and sys.stderr.isatty())
        return cls(source, Capture(events, say), bar)

    @property
    def name(self) -> str:
        """The name that the user gave."""
        return self._source.name

    def check_output(self, path: str) -> None:
        """Check that a file to be written by whole_file() is not the capture.

        Raises:
            UsageError: It is, or it cannot be written.
        """
        if leads_to(path, os.fstat(self._source.fd)):
            raise UsageError(f"{self.name} is the input: write to another file")

    def items(self) -> Iterator[Item]:
        """Yield batches of rows, and the losses and hosts between them.

        Raises:
            TcplatError: It contains nothing readable.
        """
        try:
            for item in self._capture.items(self._source.chunks()):
                self._bar.update()
                if isinstance(item, Sequence):
                    self.rows += len(item)
                    self._read += count_hooks(item)
                elif isinstance(item, Loss):
                    self.lost += item.count
                elif isinstance(item, Merge):
                    self.merges.append(item)
                elif isinstance(item, Sampled):
                    self.shares.add(item)
                if item:
                    yield item
            self._whole = True
        finally:
            self._bar.close()
        if not self._capture.read:
            raise TcplatError(self._capture.refusal(self.name))

    def batches(self) -> Iterator[Sequence[Event]]:
        """Yield batches of rows only."""
        return (item for item in self.items() if isinstance(item, Sequence))

    @property
    def report(self) -> RunReport:
        """Return the report of the capture; if it has none, an empty one with the reason."""
        report = RunReport(probes={}, duration_s=0)
        for one in self._capture.reports:
            report = add_reports(report, one) if report.probes else one
        if not self._capture.ended:
            report = attrs.evolve(report, incomplete="the capture is truncated")
        one_in = self.shares.union(report.one_in if report.probes else None)
        return attrs.evolve(report, one_in=one_in)

    def remarks(self) -> Iterator[str]:
        """Yield warnings about losses and missing rows; call it when everything is read."""
        lost = max(self.lost, self.report.dropped)
        if lost:
            yield f"{self.name}: {lost} events were lost in the run: the figures lack them"
        if self._whole:
            unread, beyond = compare(self.report, self._read)
            for probe, count in unread.items():
                yield f"{self.name}: {probe}: {count} {UNREAD}"
            if beyond and self._capture.reports and self._capture.ended:
                yield (
                    f"{self.name}: {beyond} rows are not in its books: "
                    "a run did not end, or the capture lacks its beginning or end"
                )
        if sampled := self.report.sampled:
            yield f"{self.name}: {sampled} of the connections: counts are those of this sample"
        if self._capture.left_out:
            yield self._capture.skipped(self.name)
        if not self._capture.ended:
            yield f"{self.name} is truncated: its run was killed, or the file was cut off"
