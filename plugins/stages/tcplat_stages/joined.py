"""What the sinks that join rows have in common."""

from __future__ import annotations

import attrs
import msgspec

from tcplat_core import Loss, Merge, Output, RunReport

from .hosts import Hosts
from .join import Joiner, Told


@attrs.define(eq=False)
class Joined:
    """A sink of what many rows have told together.

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
    _closed: bool = attrs.field(default=False, init=False)

    def lost(self, loss: Loss) -> None:
        """A line at the place of the gap."""
        if self.as_json:
            self.output.write(self.encoder.encode({"v": 1, "lost": attrs.asdict(loss)}) + b"\n")
        else:
            text = f"-- {loss.count} events lost here ({loss.probe}, {loss.point}) --\n\n"
            self.output.write(text.encode())

    def merged(self, merge: Merge) -> None:
        """The rows are of several hosts: times between these are right within a bound."""
        self.hosts.learn(merge)

    def idle(self) -> None:
        """Notice a reader that has gone."""
        self.output.look()

    def close(self, report: RunReport) -> None:  # noqa: ARG002 - the summary is on stderr
        """Tell of what was still open. Again it does nothing."""
        if self._closed:
            return
        self._closed = True
        self.finish(self.joiner.finish())
        self.output.close()

    def finish(self, told: list[Told]) -> None:
        """Write what is left."""
        raise NotImplementedError
