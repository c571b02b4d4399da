"""Adapts sinks to the router: each gets all methods, derived from Sink or not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tcplat_core.errors import ReaderGoneError, is_the_users
from tcplat_core.event.fields import Event
from tcplat_core.plugin.output import Output
from tcplat_core.plugin.report import RunReport
from tcplat_core.plugin.specs import Loss, Sink, SinkLike

OPTIONAL = ("begin", "merged", "sampled", "aggregates", "idle", "poll", "passed", "cancel")
"""Methods that do nothing unless a sink overrides them."""


class Adapted(Sink):
    """Wraps a sink whose class is not derived from Sink; missing methods do nothing."""

    def __init__(self, sink: SinkLike) -> None:
        """Look up the methods that it has."""
        self.sink = sink
        for name in (*OPTIONAL, "joins"):
            found = _looked_up(sink, name)
            if found is not None:
                setattr(self, name, found)

    def write(self, batch: Sequence[Event]) -> None:
        """Call the sink's method."""
        self.sink.write(batch)

    def lost(self, loss: Loss) -> None:
        """Call the sink's method."""
        self.sink.lost(loss)

    def close(self, report: RunReport) -> None:
        """Call the sink's method."""
        self.sink.close(report)


def _looked_up(sink: SinkLike, name: str) -> Any:
    """Return a sink's attribute, or None; if access raises, a method that raises the same."""
    try:
        return getattr(sink, name, None)
    except BaseException as error:
        if is_the_users(error):
            raise
        failure = error

        def fail(*_: object) -> None:
            raise failure

        return fail


def as_sink(sink: SinkLike) -> Sink:
    """Return a sink with all methods: itself if its class is derived from Sink."""
    return sink if isinstance(sink, Sink) else Adapted(sink)


def as_sinks(sinks: Mapping[str, SinkLike]) -> dict[str, Sink]:
    """Return the sinks with all methods, by name."""
    return {name: as_sink(sink) for name, sink in sinks.items()}


def has_its_own(sink: Sink, method: str) -> bool:
    """Return whether a sink overrides a method, so that it must be called."""
    inherited = getattr(type(sink), method) is getattr(Sink, method)
    return not inherited or method in getattr(sink, "__dict__", ())


def cancel(sinks: Iterable[Sink], outputs: Iterable[Output]) -> None:
    """Cancel sinks and close outputs: there was no run, or it ended with an error."""
    for sink in sinks:
        # Suppressed: the user must see the error that ended the run.
        try:
            sink.cancel()
        except BaseException as error:
            if is_the_users(error):
                raise
    for output in outputs:
        output.close()


class ReaderGoneSink(Sink):
    """A sink whose reader was gone before the run began: ends the run like a later EPIPE."""

    def begin(self) -> None:
        """End the run."""
        raise ReaderGoneError

    def write(self, _batch: Sequence[Event]) -> None:
        """End the run."""
        raise ReaderGoneError

    def lost(self, _loss: Loss) -> None:
        """End the run."""
        raise ReaderGoneError

    def close(self, report: RunReport) -> None:
        """Write no report: there is no reader."""
