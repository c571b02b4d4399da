"""Aligned columns, one line per row, as wide as they need to be and no wider than the terminal."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence

import attrs

from tcplat_core import (
    Event,
    Loss,
    Output,
    RunReport,
    Sampled,
    Sink,
    fields,
    printable,
    share_text,
)


@attrs.frozen
class Column:
    """One column.

    Args:
        head: Its name, as the first line shows it.
        value: The cell of a row.
        width: To begin with; it grows with what it has to show.
        least: What it may be cut down to where the terminal is narrow; 0 for never.
    """

    head: str
    value: Callable[[Event], str]
    width: int
    least: int = 0


def _text(value: object) -> str:
    return "-" if value is None else printable(str(value))


COLUMNS: tuple[Column, ...] = (
    Column("PID", lambda row: _text(row.pid), 6),
    Column("COMM", lambda row: _text(row.comm), 7, 7),
    Column("IP", lambda row: _text(row.ip), 2),
    Column("SADDR", lambda row: _text(row.saddr), 9, 14),
    Column("SPORT", lambda row: _text(row.sport), 5),
    Column("DADDR", lambda row: _text(row.daddr), 9, 14),
    Column("DPORT", lambda row: _text(row.dport), 5),
    Column("TIMESTAMP(us)", lambda row: str(row.ts_ns // 1000), 13),
    # Only the name after the colon; the event keeps the tracepoint's group.
    Column("FUNC", lambda row: _text(row.func.rpartition(":")[2]), 19, 11),
    Column("TCP_STATE", lambda row: _text(row.state), 15),
    Column("TCP_DESCRIPTION", lambda row: _text(row.desc), 15, 8),
    Column(
        "TCP_CONNECT_TIME(us)",
        lambda row: "" if row.connect_us is None else f"{row.connect_us:.0f}",
        4,
    ),
)
_SOCKET, _KIND = slice(0, 7), slice(8, 11)
"""Columns that are equal in all rows of a socket, and in all rows of one kind."""
_OF_SOCKET = operator.attrgetter("pid", "comm", "ip", "saddr", "sport", "daddr", "dport")
_OF_KIND = operator.attrgetter("func", "state", "desc")
_MOST = 16_384
"""Most cached texts of each."""
_SHRINK = ("TCP_DESCRIPTION", "FUNC", "COMM", "SADDR", "DADDR")
"""Columns to shrink, in this order."""


def _own(name: str, row: Event) -> str:
    value = getattr(row, name, None)  # rows of other probes do not have it
    return _text(round(value, 3) if isinstance(value, float) else value)


@attrs.define(eq=False)
class Table(Sink):
    """Rows as a table.

    Args:
        output: The output.
        limit: Columns of the terminal, 0 for no limit. Texts give way to it; a
            number that does not fit is left out whole.
    """

    output: Output
    limit: int
    _columns: tuple[Column, ...] = attrs.field(init=False, default=COLUMNS)
    _extra: tuple[Column, ...] = attrs.field(init=False, default=())
    """Columns of the probes' own fields, before the last common column."""
    _known: set[type[Event]] = attrs.field(init=False, factory=lambda: {Event})
    """Event classes whose fields have columns."""
    _widths: list[int] = attrs.field(init=False, factory=lambda: [c.width for c in COLUMNS])
    _fitted: list[int] = attrs.field(init=False, factory=list)
    _headed: bool = attrs.field(init=False, default=False)
    _sockets: dict[tuple[object, ...], str] = attrs.field(init=False, factory=dict)
    _kinds: dict[tuple[object, ...], str] = attrs.field(init=False, factory=dict)

    def write(self, batch: Sequence[Event]) -> None:
        """Write one line per row; repeat the heading when a column grows.

        The output depends on the rows alone, not on where batches end.
        """
        lines = []
        as_line = self._fitting if self.limit else self._whole
        for row in batch:
            if type(row) not in self._known:
                self._add_columns(type(row))
            line = as_line(row)
            if not self._headed:
                lines.append(self._head())
                self._headed = True
            lines.append(line)
        if lines:
            lines.append("")
            self.output.write("\n".join(lines).encode())

    def _add_columns(self, event: type[Event]) -> None:
        """Repeat the heading, with columns for the fields that this event class adds."""
        self._known.add(event)
        heads = [column.head for column in self._columns]
        for field in fields(event):
            if field.own and field.column and field.column not in heads:
                value = functools.partial(_own, field.name)
                self._extra += (Column(field.column, value, len(field.column)),)
                self._widths.insert(-1, len(field.column))
                self._headed = False
        self._columns = (*COLUMNS[:-1], *self._extra, COLUMNS[-1])

    def _fitting(self, row: Event) -> str:
        cells = [column.value(row) for column in self._columns]
        needed = list(map(max, map(len, cells), self._widths))
        if needed != self._widths:
            self._widths, self._headed = needed, False
        if not self._headed:
            self._fitted = self._fit()
        return self._line(cells, self._fitted)

    def _whole(self, row: Event) -> str:
        """Format a row without cutting cells: ten times as fast as _fitting()."""
        of_socket, of_kind = _OF_SOCKET(row), _OF_KIND(row)
        left = self._sockets.get(of_socket) or self._padded(self._sockets, of_socket, row, _SOCKET)
        right = self._kinds.get(of_kind) or self._padded(self._kinds, of_kind, row, _KIND)
        time = str(row.ts_ns // 1000)
        if len(time) > self._widths[7]:
            self._widths[7], self._headed = len(time), False
        line = f"{left} {time.ljust(self._widths[7])} {right}"
        for at, column in enumerate(self._extra, _KIND.stop):
            cell = column.value(row)
            if len(cell) > self._widths[at]:
                self._widths[at], self._headed = len(cell), False
            line = f"{line} {cell.ljust(self._widths[at])}"
        if row.connect_us is None:
            return line.rstrip()
        return f"{line} {COLUMNS[11].value(row)}"

    def _padded(
        self, known: dict[tuple[object, ...], str], key: tuple[object, ...], row: Event, part: slice
    ) -> str:
        cells = [column.value(row) for column in COLUMNS[part]]
        needed = list(map(max, map(len, cells), self._widths[part]))
        if needed != self._widths[part]:
            self._widths[part], self._headed = needed, False
            known.clear()
        elif len(known) >= _MOST:
            known.clear()
        known[key] = " ".join(map(str.ljust, cells, self._widths[part]))
        return known[key]

    def lost(self, loss: Loss) -> None:
        """Write a line at the place of the gap."""
        text = f"-- {loss.count} events lost here ({loss.probe}, {loss.point}) --\n"
        self.output.write(text.encode())

    def sampled(self, share: Sampled) -> None:
        """Write a line: the rows below are those of a part of the connections."""
        self.output.write(f"-- {share_text(share.one_in)} of the connections --\n".encode())

    def idle(self) -> None:
        """Check whether the reader is gone."""
        self.output.look()

    def close(self, report: RunReport) -> None:  # noqa: ARG002 - the summary is on stderr
        """Close the output: nothing follows the last row."""
        self.output.close()

    def _head(self) -> str:
        widths = self._fitted if self.limit else self._widths
        heads = [
            _cut(column.head, width) for column, width in zip(self._columns, widths, strict=True)
        ]
        return self._line([*heads[:-1], self._last_head(widths)], widths)

    def _fit(self) -> list[int]:
        """Return the widths that fit into a line."""
        widths = list(self._widths)
        over = sum(widths) + len(widths) - 1 - self.limit
        for head in _SHRINK:
            index = next(i for i, column in enumerate(COLUMNS) if column.head == head)
            give = max(0, min(over, widths[index] - COLUMNS[index].least))
            widths[index] -= give
            over -= give
        return widths

    def _last_head(self, widths: Sequence[int]) -> str:
        head = COLUMNS[-1].head
        return (
            head[: max(0, self.limit - sum(widths[:-1]) - len(widths) + 1)] if self.limit else head
        )

    def _line(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        line = ""
        for cell, width in zip(cells, widths, strict=True):
            # The last one is as long as it is; its head is only a text.
            shown = _cut(cell, width) if cell is not cells[-1] else cell
            longer = f"{line} {shown}" if line else shown
            # Half a number would be a wrong one: a column is there, or it is not.
            if self.limit and len(longer.rstrip()) > self.limit:
                break
            line = longer.ljust(len(line) + bool(line) + width)
        return line.rstrip()


def _cut(cell: str, width: int) -> str:
    """Return the cell, or its beginning and end around an ellipsis."""
    if len(cell) <= width:
        return cell
    tail = (width - 1) // 2
    return f"{cell[: width - 1 - tail]}…{cell[len(cell) - tail :]}"
