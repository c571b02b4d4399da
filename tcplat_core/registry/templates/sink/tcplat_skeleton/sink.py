"""The sink: counts rows, and writes one table at the end of the run."""

from __future__ import annotations

from collections.abc import Sequence

from tcplat_core import Event, Loss, Output, RunReport, Sink, printable

MOST = 10_000
"""Maximum number of groups: keeps memory bounded."""
OTHERS = "(others)"


class Totals(Sink):
    """Number of rows, bytes sent and bytes received per group."""

    def __init__(self, output: Output, by: str) -> None:
        """Group by this field of a row."""
        self.output = output
        self.by = by
        self.lost_events = 0
        self.totals: dict[object, list[int]] = {}

    def write(self, batch: Sequence[Event]) -> None:
        """Count a batch of rows, sorted by time; it may be empty."""
        for row in batch:
            total = self._total(getattr(row, self.by))
            total[0] += 1
            if row.point == "send":
                total[1] += row.bytes or 0
            elif row.point == "send_short":  # bytes that the kernel did not take
                total[1] -= row.bytes or 0
            elif row.point == "recv":
                total[2] += row.bytes or 0

    def _total(self, group: object) -> list[int]:
        if group not in self.totals and len(self.totals) >= MOST:
            group = OTHERS
        return self.totals.setdefault(group, [0, 0, 0])

    def lost(self, loss: Loss) -> None:
        """Note that the figures are too low."""
        self.lost_events += loss.count

    def idle(self) -> None:
        """Check once a second whether the reader has closed the output."""
        self.output.look()

    def close(self, report: RunReport) -> None:
        """Write the table. Idempotent."""
        if self.output.closed:
            return
        lines = [f"{'ROWS':>10} {'SENT':>14} {'RECEIVED':>14} {self.by.upper()}"]
        for group, (rows, sent, received) in sorted(
            self.totals.items(), key=lambda item: (-item[1][0], str(item[0]))
        ):
            name = "-" if group is None else printable(str(group))
            lines.append(f"{rows:>10} {sent:>14} {received:>14} {name}")
        lines.append(f"in {report.duration_s:.1f} s")
        if self.lost_events:
            lines.append(f"{self.lost_events} events were lost: these figures are too low")
        self.output.write("".join(f"{line}\n" for line in lines).encode())
        self.output.close()
