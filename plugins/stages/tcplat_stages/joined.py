"""What the sinks that join rows have in common."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

import attrs
import msgspec

from tcplat_core import (
    Event,
    Loss,
    Merge,
    Output,
    RunReport,
    Sampled,
    Shares,
    Sink,
    TcplatError,
    ends_ns,
    share_text,
)

from .connection import Finished
from .hosts import Hosts
from .join import Joiner

T = TypeVar("T")
_PIECE = 256
"""So many are formatted between two looks at whether the user wants to end."""
_PATIENCE_S = 1.5
"""So long the end of a run may take once the user has ended it."""


@attrs.define(eq=False)
class Joined(Sink):
    """A sink of what many rows show together.

    Args:
        output: Where to.
        as_json: One JSON object a line, instead of text.
    """

    joins = True
    """What it writes is of many rows: it comes when all of them are there."""

    output: Output
    as_json: bool = attrs.field(default=False, kw_only=True)
    joiner: Joiner = attrs.field(factory=Joiner, init=False)
    hosts: Hosts = attrs.field(factory=Hosts, init=False)
    encoder: msgspec.json.Encoder = attrs.field(factory=msgspec.json.Encoder, init=False)
    shares: Shares = attrs.field(factory=Shares, init=False)
    _gaps: list[Loss] = attrs.field(factory=list, init=False)
    _patient_until_s: float = attrs.field(default=0.0, init=False)
    _closed: bool = attrs.field(default=False, init=False)

    def write(self, batch: Sequence[Event]) -> None:
        """Take rows; write what they complete."""
        if self._gaps and batch:
            self._write_losses(ends_ns(batch)[0])
        self.feed(batch)

    def lost(self, loss: Loss) -> None:
        """Keep a loss for its place: before the next row, after what is over by then."""
        # It may have no time: reported at once it would stand before or behind what silence ends.
        self._gaps.append(loss)

    def passed(self, ts_ns: int) -> None:
        """Write what has been silent for long: no row before `ts_ns` comes any more."""
        self.write_finished(self.joiner.pass_time(ts_ns))

    def _write_losses(self, ts_ns: int) -> None:
        self.passed(ts_ns)
        for loss in self._gaps:
            self.joiner.lost(loss)
            self.write_loss(loss)
        self._gaps.clear()

    def write_loss(self, loss: Loss) -> None:
        """Say that so many events were lost here."""
        if self.as_json:
            self.output.write(self.encoder.encode({"v": 1, "lost": attrs.asdict(loss)}) + b"\n")
        else:
            text = f"-- {loss.count} events lost here ({loss.probe}, {loss.point}) --\n\n"
            self.output.write(text.encode())

    def sampled(self, share: Sampled) -> None:
        """Note of which connections the rows are, and say so: counts are those of the sample."""
        if self._gaps:
            self._write_losses(share.since_ns)
        self.passed(share.since_ns)
        self.write_finished(self.joiner.sampled(share))
        self.shares.add(share)
        self.write_share(share)

    def write_share(self, share: Sampled) -> None:
        """Say that from here on a part of the connections is seen."""
        if self.as_json:
            self.output.write(self.encoder.encode({"v": 1, "sampled": attrs.asdict(share)}) + b"\n")
        else:
            text = f"-- {share_text(share.one_in)} of the connections from here on --\n\n"
            self.output.write(text.encode())

    def merged(self, merge: Merge) -> None:
        """Note a host of a merged capture, and how wrong its times may be."""
        self.hosts.learn(merge)

    def idle(self) -> None:
        """Notice a reader that has gone."""
        self.output.look()

    def close(self, report: RunReport) -> None:
        """Write what was still open. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._patient_until_s = time.monotonic() + _PATIENCE_S
        self._write_losses(report.until_ns)
        try:
            self.finish(self.joiner.finish(report.until_ns))
        finally:
            self.output.close()

    def pieces(self, found: Sequence[T]) -> Iterator[Sequence[T]]:
        """Yield a few at a time of what is to be written.

        Raises:
            TcplatError: At the end of a run that the user wants to end, it takes too long.
        """
        for at in range(0, len(found), _PIECE):
            if self._closed and self.output.stopping() and time.monotonic() > self._patient_until_s:
                raise TcplatError(
                    f"{len(found) - at} of {len(found)} that were open when it was ended are not "
                    f"reported: it would have taken more than {_PATIENCE_S} s"
                )
            yield found[at : at + _PIECE]

    def spans_loss(self) -> bytes:
        """Return how many messages span lost events, as a line of JSON; empty for none."""
        count = self.joiner.missed
        return self.encoder.encode({"v": 1, "spans_loss": count}) + b"\n" if count else b""

    def feed(self, batch: Sequence[Event]) -> None:
        """Take rows."""
        self.write_finished(self.joiner.feed(batch))

    def write_finished(self, finished: list[Finished]) -> None:
        """Write what is over."""
        raise NotImplementedError

    def finish(self, finished: list[Finished]) -> None:
        """Write what is left."""
        raise NotImplementedError
