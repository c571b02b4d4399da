"""Rows as numbers and shared texts, for sinks to which an object for each row is too slow."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from tcplat_core.event.fields import Event

UNKNOWN = -(1 << 63)
"""A null."""
MISSING = UNKNOWN + 1
"""Rows of this probe have no such field."""

OWN = ("ack", "window")
"""Numbers of packets, which not every probe's rows have."""
SLIM_NUMBERS = (
    *("ts_ns", "time_ns", "seq", "bytes", "sock", *OWN),
    *("hook", "user", "ends", "states", "flags", "ifname"),
)
"""Places in a row: its own numbers, then indices of lists of texts."""
TEXTS = SLIM_NUMBERS[SLIM_NUMBERS.index("hook") :]
HOOK, USER, ENDS, STATES, FLAGS, IFNAME = range(len(SLIM_NUMBERS) - len(TEXTS), len(SLIM_NUMBERS))
PIECES = {
    "probe": ("probe", "point", "func", "attach"),
    "pid": ("pid", "tid", "comm", "thread"),
    "netns": ("netns", "ip", "saddr", "sport", "daddr", "dport"),
    "state": ("state", "old_state", "desc"),
    "flags": ("flags",),
    "ifname": ("ifname",),
}
"""First field of each text -> its fields, in the order of TEXTS."""


class SlimRows(NamedTuple):
    """The rows of a batch: what most of them differ in as numbers, all else as shared objects.

    Args:
        numbers: One row after the other: 64-bit integers. UNKNOWN is a null, MISSING a field that
            the probe's rows do not have.
        width: Numbers of a row; the first ones are those of SLIM_NUMBERS.
        hooks: ``(probe, point, func, attach)``, by `hook`.
        users: ``(pid, tid, comm, thread)``, by `user`.
        ends: ``(netns, ip, saddr, sport, daddr, dport)``, by `ends`.
        states: ``(state, old_state, desc)``, by `states`.
        flags: By `flags`.
        ifnames: By `ifname`.
        row: Returns the row of an index, with all of its fields.

    The lists may grow later; numbers of this batch stay what they are.
    """

    numbers: memoryview
    width: int
    hooks: Sequence[Any]
    users: Sequence[Any]
    ends: Sequence[Any]
    states: Sequence[Any]
    flags: Sequence[Any]
    ifnames: Sequence[Any]
    row: Callable[[int], Event]


class SlimBatch(Sequence[Event]):
    """A batch that has slim rows, and its limits without making a row."""

    @property
    @abstractmethod
    def first_ns(self) -> int:
        """Time of the first row."""

    @property
    @abstractmethod
    def last_ns(self) -> int:
        """Time of the last row."""

    @abstractmethod
    def slim(self) -> SlimRows | None:
        """Return the slim rows; None if they cannot be made."""


def interned(values: Iterable[Any]) -> tuple[Any, ...]:
    """Return values with their texts interned.

    Sinks compare these with constants of the same texts: then they are the same objects.
    """
    return tuple(sys.intern(one) if type(one) is str else one for one in values)


class SlimTexts:
    """The values that texts of slim rows stand for, each stored once.

    Attributes:
        columns: Values by their number, for each of TEXTS.
    """

    def __init__(self) -> None:
        self.columns: list[list[Any]] = [[] for _ in TEXTS]
        self._numbers: list[dict[Any, int]] = [{} for _ in TEXTS]

    def number(self, column: int, values: tuple[Any, ...]) -> int:
        """Return the number of some values: a tuple of them, or the value if there is but one."""
        values = interned(values)
        numbers = self._numbers[column]
        found = numbers.get(values)
        if found is None:
            found = numbers[values] = len(numbers)
            self.columns[column].append(values if len(values) > 1 else values[0])
        return found

    @property
    def longest(self) -> int:
        """Values of the column that has most."""
        return max(map(len, self.columns))


def slim_rows(batch: Sequence[Event]) -> SlimRows | None:
    """Return the rows of a batch without making an object for each; None where it has objects.

    The numbers and lists are valid until the sink returns.
    """
    return batch.slim() if isinstance(batch, SlimBatch) else None


def ends_ns(batch: Sequence[Event]) -> tuple[int, int]:
    """Return the times of the first and the last row of a batch, ns, without making its rows."""
    if isinstance(batch, SlimBatch):
        return batch.first_ns, batch.last_ns
    return batch[0].ts_ns, batch[-1].ts_ns
