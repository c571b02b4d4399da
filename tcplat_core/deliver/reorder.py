"""Reorder buffers, which order rows by time: in Python here, in C in fast/records.py.

A handler reads the clock before it submits its record, and may be interrupted in between. So
rows are held until no older one can follow, and are returned in order of time.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import attrs

from tcplat_core.errors import blaming
from tcplat_core.event.fields import Event

from .ring import Ring

if TYPE_CHECKING:
    from .fast.codec import Codec

FOREVER = 1 << 63
"""Later than any timestamp, ns."""
BY_TIME = operator.attrgetter("ts_ns")


@attrs.frozen
class RingSource:
    """A ring, and the functions that turn its records into rows.

    Args:
        name: Name of the probe.
        ring: The caller closes it, after the buffer.
        decode: Turns unpacked records and Unix time minus CLOCK_MONOTONIC, ns, into rows.
        codec: The same for deliver/fast/records.c; None without it.
    """

    name: str
    ring: Ring
    decode: Callable[[Any, int], list[Event]]
    codec: Codec | None = None


class ReorderBuffer(Protocol):
    """Takes rows in any order, and returns them in order of time."""

    def take(self, source: int, most: int, offset_ns: int) -> int:
        """Take at most `most` records out of the ring of a source.

        Args:
            source: Index of the ring.
            most: Number of records.
            offset_ns: Unix time minus CLOCK_MONOTONIC, ns.

        Returns:
            The time of the last record, ns, if there were `most`; else 0.

        Raises:
            RecordSizeError: A record of another size.
        """

    def feed(self, rows: Sequence[Event]) -> None:
        """Take rows that come from no ring, but from poll()."""

    @property
    def waiting(self) -> bool:
        """Whether the buffer holds a row."""

    def pop(self, before_ns: int) -> Sequence[Event]:
        """Remove and return the rows older than `before_ns`, in order of time."""

    def close(self) -> None:
        """Release memory. Idempotent."""


@attrs.define(eq=False)
class RowBuffer:
    """The implementation in Python: records become rows as soon as they are taken.

    Args:
        sources: The rings.
    """

    sources: Sequence[RingSource] = ()
    _rows: list[Event] = attrs.field(factory=list, init=False)

    def take(self, source: int, most: int, offset_ns: int) -> int:
        """See :meth:`ReorderBuffer.take`."""
        one = self.sources[source]
        came = 0
        for records in one.ring.drain(most):
            with blaming(f"probe {one.name}: making a row of a record"):
                self._rows += one.decode(records, offset_ns)
            came += len(records)
        return self._rows[-1].ts_ns if came == most else 0

    def feed(self, rows: Sequence[Event]) -> None:
        """See :meth:`ReorderBuffer.feed`."""
        self._rows += rows

    @property
    def waiting(self) -> bool:
        """See :attr:`ReorderBuffer.waiting`."""
        return bool(self._rows)

    def pop(self, before_ns: int) -> Sequence[Event]:
        """See :meth:`ReorderBuffer.pop`."""
        rows = self._rows
        rows.sort(key=BY_TIME)
        cut = bisect.bisect_left(rows, before_ns, key=BY_TIME)
        self._rows = rows[cut:]
        return rows[:cut]

    def close(self) -> None:
        """See :meth:`ReorderBuffer.close`."""
        self._rows.clear()
