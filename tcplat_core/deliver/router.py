"""Delivers rows to the sinks in batches; switches off a sink that fails."""

from __future__ import annotations

import bisect
import gc
from collections.abc import Mapping, Sequence

import attrs

from tcplat_core.errors import ReaderGoneError, TcplatError, is_the_users, message
from tcplat_core.event.fields import Event
from tcplat_core.event.terminal import printable
from tcplat_core.plugin.aggregates import Aggregates
from tcplat_core.plugin.output import Output
from tcplat_core.plugin.report import RunReport
from tcplat_core.plugin.sampling import Sampled
from tcplat_core.plugin.specs import Loss, Merge, Sink

from .fast.slim import SlimBatch, ends_ns
from .reorder import BY_TIME
from .sinks import OPTIONAL, as_sinks, cancel, has_its_own


def spare_the_collector() -> None:
    """Make Python's cyclic garbage collection rare, for runs with millions of rows.

    Rows are in no cycles, and a collection would traverse every batch. A sink's own cyclic
    objects may stay in memory for long, so a sink should avoid them.
    """
    gc.set_threshold(100_000, 50, 50)


@attrs.define(eq=False)
class Router:
    """Everything downstream of the rings; needs no kernel and no root.

    Args:
        sinks: By the name that the user gave them.
        limit: End after so many rows; 0 for no limit.
        outputs: Files of the sinks that begin() creates or truncates.
    """

    sinks: dict[str, Sink] = attrs.field(converter=as_sinks)
    limit: int = 0
    outputs: Sequence[Output] = ()
    late: int = 0
    """Rows that were older than one delivered before them."""
    total: int = 0
    """Rows that were delivered."""
    switched_off: dict[str, str] = attrs.field(factory=dict)
    reader_gone: bool = False
    _last_ns: int = attrs.field(default=0, init=False)
    _those_with: Mapping[str, Sequence[str]] = attrs.field(init=False)
    """Method -> the sinks that override it."""

    @_those_with.default
    def _sorted(self) -> Mapping[str, Sequence[str]]:
        return {
            method: [name for name, sink in self.sinks.items() if has_its_own(sink, method)]
            for method in OPTIONAL
        }

    @property
    def done(self) -> bool:
        """Whether the limit is reached, or no sink is left."""
        return self.reader_gone or not self.sinks or (0 < self.limit <= self.total)

    @property
    def serves(self) -> bool:
        """Whether some sink has readers that it serves in poll()."""
        return any(name in self.sinks for name in self._those_with["poll"])

    def begin(self) -> None:
        """Have the sinks create their files and sockets, before the first rows.

        Raises:
            TcplatError: A sink failed.
        """
        both: tuple[Output | Sink, ...] = (*self.outputs, *self.sinks.values())
        for one in both:
            try:
                one.begin()
            except ReaderGoneError:
                self.reader_gone = True
            except TcplatError:
                raise
            except BaseException as error:
                if is_the_users(error):
                    raise
                raise TcplatError(f"a sink cannot begin: {message(error)}") from error

    def cancel(self) -> None:
        """Have the sinks remove their files and sockets: there was no run, or it failed."""
        cancel(self.sinks.values(), self.outputs)

    def deliver(self, ready: Sequence[Event]) -> None:
        """Deliver rows, which must be in order of time."""
        first_ns, last_ns = ends_ns(ready)
        if first_ns < self._last_ns:
            self.late += bisect.bisect_left(ready, self._last_ns, key=BY_TIME)
        self._last_ns = max(self._last_ns, last_ns)
        self.total += len(ready)
        # Not a list: one sink could change it before the next sink gets it.
        self._each("write", ready if isinstance(ready, SlimBatch) else tuple(ready))

    def lost(self, loss: Loss) -> None:
        """Report lost events, after the rows delivered so far."""
        self._each("lost", loss)

    def merged(self, merge: Merge) -> None:
        """Tell the sinks that the rows come from several hosts."""
        self._call_own("merged", merge)

    def sampled(self, share: Sampled) -> None:
        """Tell the sinks of which connections rows follow."""
        self._call_own("sampled", share)

    def idle(self) -> None:
        """Let sinks check whether their reader is gone, while no rows come."""
        self._call_own("idle")

    @property
    def reports_time(self) -> bool:
        """Whether some sink receives the time while no rows come."""
        return any(name in self.sinks for name in self._those_with["passed"])

    def passed(self, ts_ns: int) -> None:
        """Tell sinks that no row older than `ts_ns` follows. No row may be held back."""
        self._call_own("passed", ts_ns)

    def poll(self) -> None:
        """Let sinks serve their readers, also while no rows come."""
        self._call_own("poll")

    def aggregates(self, them: Aggregates) -> None:
        """Pass the kernel's histograms to the sinks that use them."""
        self._call_own("aggregates", them)

    def close(self, report: RunReport) -> None:
        """Close every sink that was not switched off."""
        self._each("close", report)

    def _call_own(self, method: str, *arguments: object) -> None:
        for name in self._those_with[method]:
            if name in self.sinks:
                self._call(name, method, *arguments)

    def _each(self, method: str, argument: object) -> None:
        for name in list(self.sinks):
            self._call(name, method, argument)

    def _call(self, name: str, method: str, *arguments: object) -> None:
        try:
            getattr(self.sinks[name], method)(*arguments)
        except ReaderGoneError:
            self.reader_gone = True
            del self.sinks[name]
        except BaseException as error:
            # Also SystemExit: one sink must not stop the others.
            if is_the_users(error):
                raise
            self.switched_off[printable(name)] = printable(message(error))
            del self.sinks[name]
