"""Rows of a history as a sink gets them from a ring or a file of lines: without objects."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from tcplat_core import SLIM_NUMBERS, SlimRows
from tcplat_core.deliver.fast.slim import PIECES, UNKNOWN, SlimBatch, SlimTexts

from .history import Row


class SlimHistory(SlimBatch):
    """A batch of rows that has slim rows.

    Args:
        rows: In order of time.
        texts: What their texts are numbered by; shared by the batches of a capture.
    """

    def __init__(self, rows: Sequence[Row], texts: SlimTexts) -> None:
        self._rows: Any = rows
        numbers = array("q")
        for row in rows:
            values = [getattr(row, name) for name in SLIM_NUMBERS[: -len(PIECES)]]
            numbers.extend(UNKNOWN if value is None else value for value in values)
            for column, names in enumerate(PIECES.values()):
                own = tuple(getattr(row, name, None) for name in names)
                numbers.append(texts.number(column, own))
        hooks, users, ends, states, flags, ifnames = texts.columns
        self._slim = SlimRows(
            *(memoryview(numbers), len(SLIM_NUMBERS)),
            *(hooks, users, ends, states, flags, ifnames),
            row=lambda index: self._rows[index],
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)

    @property
    def first_ns(self) -> int:
        return int(self._rows[0].ts_ns)

    @property
    def last_ns(self) -> int:
        return int(self._rows[-1].ts_ns)

    def slim(self) -> SlimRows:
        return self._slim
