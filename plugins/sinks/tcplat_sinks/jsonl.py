"""One JSON object per line, in the schema of docs and README."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import msgspec

from tcplat_core import (
    SCHEMA_VERSION,
    Event,
    Loss,
    Merge,
    Output,
    RunReport,
    Sampled,
    Sink,
    json_lines,
)


@attrs.define(eq=False)
class Jsonl(Sink):
    """Rows as JSON lines; losses and the report as lines of their own."""

    output: Output
    _encoder: msgspec.json.Encoder = attrs.field(factory=msgspec.json.Encoder)

    def write(self, batch: Sequence[Event]) -> None:
        """Write one line per row."""
        json_lines(batch, self.output.write)

    def lost(self, loss: Loss) -> None:
        """Write a line at the place of the gap."""
        self._line({"v": SCHEMA_VERSION, "lost": attrs.asdict(loss)})

    def merged(self, merge: Merge) -> None:
        """Write a line for each host, before the rows."""
        self._line({"v": SCHEMA_VERSION, "merge": attrs.asdict(merge)})

    def sampled(self, share: Sampled) -> None:
        """Write a line where the share of the connections changes."""
        self._line({"v": SCHEMA_VERSION, "sampled": attrs.asdict(share)})

    def idle(self) -> None:
        """Check whether the reader is gone."""
        self.output.look()

    def close(self, report: RunReport) -> None:
        """Write the report as the last line."""
        if self.output.closed:
            return
        self._line({"v": SCHEMA_VERSION, "report": report.as_json()})
        self.output.close()

    def _line(self, value: object) -> None:
        self.output.write(self._encoder.encode(value) + b"\n")
