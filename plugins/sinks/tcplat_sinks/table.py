"""Aligned columns, one line per row, as wide as they need to be and no wider than the terminal."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence

import attrs

from tcplat_core import Event, Field, Loss, Output, RunReport


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
    """A cell. What the core has escaped stays as it is; a capture may be anybody's work."""
    shown = "-" if value is None else str(value)
    if shown.isprintable():
        return shown
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in shown
    )


COLUMNS: tuple[Column, ...] = (
    Column("PID", lambda row: _text(row.pid), 6),
    Column("COMM", lambda row: _text(row.comm), 7, 7),
    Column("IP", lambda row: _text(row.ip), 2),
    Column("SADDR", lambda row: _text(row.saddr), 9, 14),
    Column("SPORT", lambda row: _text(row.sport), 5),
    Column("DADDR", lambda row: _text(row.daddr), 9, 14),
    Column("DPORT", lambda row: _text(row.dport), 5),
    Column("TIMESTAMP(us)", lambda row: str(row.ts_ns // 1000), 13),
    # The name after the colon says it all; the event keeps the tracepoint's group.
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
"""Which columns are the same for all rows of a socket, which for all of one kind."""
_OF_SOCKET = operator.attrgetter("pid", "comm", "ip", "saddr", "sport", "daddr", "dport")
_OF_KIND = operator.attrgetter("func", "state", "desc")
_MOST = 16_384
"""Texts that are remembered of each."""
_SHRINK = ("TCP_DESCRIPTION", "FUNC", "COMM", "SADDR", "DADDR")
"""Which columns give way first."""


def extra_columns(fields: Iterable[Field]) -> tuple[Column, ...]:
    """A column for each field that probes add; two of one head and name share it."""
    return tuple(
        Column(head, functools.partial(_own, name), len(head))
        for head, name in dict.fromkeys((field.column, field.name) for field in fields)
        if head
    )


def _own(name: str, row: Event) -> str:
    value = getattr(row, name, None)  # rows of other probes do not have it
    return _text(round(value, 3) if isinstance(value, float) else value)


@attrs.define(eq=False)
class Table:
    """Rows as a table.

    Args:
        output: Where to.
        limit: Columns of the terminal, 0 for no limit. Texts give way to it; a
            number that does not fit is left out whole.
        extra: Columns of the probes' own, in front of the last one of all.
    """

    output: Output
    limit: int
    extra: Sequence[Column] = ()
    _columns: tuple[Column, ...] = attrs.field(init=False)
    _widths: list[int] = attrs.field(init=False)
    _headed: bool = attrs.field(init=False, default=False)
    _sockets: dict[tuple[object, ...], str] = attrs.field(init=False, factory=dict)
    _kinds: dict[tuple[object, ...], str] = attrs.field(init=False, factory=dict)

    @_columns.default
    def _all_columns(self) -> tuple[Column, ...]:
        return (*COLUMNS[:-1], *self.extra, COLUMNS[-1])

    @_widths.default
    def _first_widths(self) -> list[int]:
        return [column.width for column in self._columns]

    def write(self, batch: Sequence[Event]) -> None:
        """One line per row; the head again where a column had to grow."""
        if not batch:
            return
        if not self.limit:
            self._write_all(batch)
            return
        cells = [[column.value(row) for column in self._columns] for row in batch]
        lines = []
        needed = [max(map(len, column)) for column in zip(*cells, strict=True)]
        if any(need > width for need, width in zip(needed, self._widths, strict=True)):
            self._widths = list(map(max, needed, self._widths))
            self._headed = False
        widths = self._fitted()
        if not self._headed:
            heads = [
                _cut(column.head, width)
                for column, width in zip(self._columns, widths, strict=True)
            ]
            lines.append(self._line([*heads[:-1], self._last_head(widths)], widths))
            self._headed = True
        lines += [self._line(row, widths) for row in cells]
        self.output.write("".join(f"{line}\n" for line in lines).encode())

    def _write_all(self, batch: Sequence[Event]) -> None:
        """The same where nothing has to be left out: ten times as fast."""
        widths: list[int] = []
        while widths != self._widths:  # again, if a cell was wider than its column
            widths = list(self._widths)
            lines = [self._whole(row) for row in batch]
            if widths != self._widths:
                self._headed = False
                self._sockets.clear()
                self._kinds.clear()
        if not self._headed:
            heads = [
                _cut(column.head, width)
                for column, width in zip(self._columns, widths, strict=True)
            ]
            lines.insert(0, self._line([*heads[:-1], COLUMNS[-1].head], widths))
            self._headed = True
        lines.append("")
        self.output.write("\n".join(lines).encode())

    def _whole(self, row: Event) -> str:
        of_socket, of_kind = _OF_SOCKET(row), _OF_KIND(row)
        left = self._sockets.get(of_socket) or self._padded(self._sockets, of_socket, row, _SOCKET)
        right = self._kinds.get(of_kind) or self._padded(self._kinds, of_kind, row, _KIND)
        time = COLUMNS[7].value(row)
        self._widths[7] = max(self._widths[7], len(time))
        line = f"{left} {time.ljust(self._widths[7])} {right}"
        for at, column in enumerate(self.extra, _KIND.stop):
            cell = column.value(row)
            self._widths[at] = max(self._widths[at], len(cell))
            line = f"{line} {cell.ljust(self._widths[at])}"
        if row.connect_us is None:
            return line.rstrip()
        return f"{line} {COLUMNS[11].value(row)}"

    def _padded(
        self, known: dict[tuple[object, ...], str], key: tuple[object, ...], row: Event, part: slice
    ) -> str:
        cells = [column.value(row) for column in COLUMNS[part]]
        self._widths[part] = map(max, map(len, cells), self._widths[part])
        if len(known) >= _MOST:
            known.clear()
        known[key] = " ".join(map(str.ljust, cells, self._widths[part]))
        return known[key]

    def lost(self, loss: Loss) -> None:
        """A line at the place of the gap."""
        text = f"-- {loss.count} events lost here ({loss.probe}, {loss.point}) --\n"
        self.output.write(text.encode())

    def idle(self) -> None:
        """Notice a reader that has gone."""
        self.output.look()

    def close(self, report: RunReport) -> None:  # noqa: ARG002 - the summary is on stderr
        """Nothing follows the last row."""
        self.output.close()

    def _fitted(self) -> list[int]:
        if not self.limit:
            return self._widths
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
    """The cell, or its beginning and end around an ellipsis."""
    if len(cell) <= width:
        return cell
    tail = (width - 1) // 2
    return f"{cell[: width - 1 - tail]}…{cell[len(cell) - tail :]}"
