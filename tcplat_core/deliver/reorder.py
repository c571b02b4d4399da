"""Where rows wait for older ones that may still come: in Python here, in C in fast/records.py.

A handler stamps its record before it submits it, and may be interrupted in between. So a row
leaves in order of time, and only when no older one can follow.
"""

from __future__ import annotations

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
"""No instant is as late, ns."""
BY_TIME = operator.attrgetter("ts_ns")


@attrs.frozen
class RingSource:
    """A ring, and how its records become rows.

    Args:
        name: Of the probe.
        ring: It stays the caller's, and must be there until the buffer is closed.
        decode: Makes rows of unpacked records and of Unix time minus CLOCK_MONOTONIC, ns.
        codec: The same for deliver/fast/records.c; None without it.
    """

    name: str
    ring: Ring
    decode: Callable[[Any, int], list[Event]]
    codec: Codec | None = None


class ReorderBuffer(Protocol):
    """Takes rows as they come, and lets them go in order of time."""

    def take(self, source: int, most: int, offset_ns: int) -> int:
        """Take at most `most` records out of the ring of a source.

        Args:
            source: Index of the ring.
            most: Number of records.
            offset_ns: Unix time minus CLOCK_MONOTONIC.

        Returns:
            The time of the last one if there were `most`; else 0.

        Raises:
            ForeignRecordError: A record of another size.
        """

    def feed(self, rows: Sequence[Event]) -> None:
        """Take rows that come from no ring: those of poll()."""

    @property
    def waiting(self) -> bool:
        """Whether a row is in here."""

    def leave(self, before_ns: int) -> Sequence[Event]:
        """Return the rows that are older, in order of time; they are in here no more."""

    def close(self) -> None:
        """Release memory. Idempotent."""


@attrs.define(eq=False)
class RowBuffer:
    """The one in Python: records become rows as soon as they are taken.

    Args:
        sources: The rings to take from.
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

    def leave(self, before_ns: int) -> Sequence[Event]:
        """See :meth:`ReorderBuffer.leave`."""
        rows = self._rows
        rows.sort(key=BY_TIME)
        cut = len(rows)
        while cut and rows[cut - 1].ts_ns >= before_ns:
            cut -= 1
        self._rows = rows[cut:]
        return rows[:cut]

    def close(self) -> None:
        """See :meth:`ReorderBuffer.close`."""
        self._rows.clear()
