"""The checks of a sink. Each creates a sink of its own, in a process of its own."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from tcplat_core.deliver.router import spare_the_collector
from tcplat_core.deliver.sinks import Adapted
from tcplat_core.errors import in_a_line, is_the_users
from tcplat_core.event.fields import Event, fields
from tcplat_core.plugin.report import RunReport
from tcplat_core.plugin.sampling import Sampled
from tcplat_core.plugin.specs import Loss, Merge, Sink, SinkSpec

from . import sink_output_checks as output_checks
from .check import Check, Fault, Subject
from .fake_rows import make_event
from .sink_rows import LOSS, REPLAYED, REPORT, OwnEvent, end_run, stream
from .sink_trial import silent_and_normal_reader, try_sink

MANY = 1_000_000
"""Events that a sink has to process in bounded memory."""
WARM = 200_000
"""After so many events the memory of a sink is measured; it may grow by GROWTH from there."""
GROWTH = 64 << 20
"""Bytes."""


def checks_of(_: Subject) -> dict[str, Check]:
    """All checks of a sink, by name."""
    return {
        "methods": _methods,
        "batches": _batches,
        "empty batch": _empty_batch,
        "nulls": _nulls,
        "every byte": output_checks.every_byte,
        "flushes": output_checks.flushes,
        "losses and report": _losses_and_report,
        "close twice": _close_twice,
        "full device": output_checks.full_device,
        "reader gone": output_checks.reader_gone,
        "bounded memory": _bounded_memory,
    }


def _methods(subject: Subject) -> None:
    """Check that write(), lost() and close() exist and accept the arguments of a run."""
    assert isinstance(subject.spec, SinkSpec)  # noqa: S101 - checks() has looked
    needed = ["write", "lost", *(["aggregates"] if subject.spec.aggregate else []), "close"]

    def play(sink: Sink) -> list[str]:
        faults = []
        assert isinstance(sink, Adapted)  # noqa: S101 - try_sink() has made it
        for name in needed:
            method = getattr(sink.sink, name, None)
            inherited = getattr(inspect.unwrap(method), "__func__", None) if method else None
            if not callable(method) or inherited is getattr(Sink, name):
                faults.append(f"it has no method {name}(): a run calls it")
                continue
            try:
                inspect.signature(method).bind(None)
            except TypeError:
                faults.append(f"{name}() does not take one argument, as a run gives it")
        sink.idle()
        sink.poll()
        return faults

    faults = try_sink(subject, play).fine().returned
    if faults:
        raise Fault(faults[0])


def _batches(subject: Subject) -> None:
    """Check that it accepts rows of several probes, with own fields, in batches of any size."""

    def play(sink: Sink) -> None:
        sink.write(stream(1))
        sink.write(stream(5000, 1))
        theirs = [make_event(OwnEvent, probe="theirs", rto_us=rto) for rto in (None, 204_000)]
        sink.write(theirs)
        sink.write((*theirs, *stream(3)))
        end_run(sink)

    try_sink(subject, play).fine()
    # A replay has other batches than the run had; the output must be the same.
    whole, single = (
        try_sink(subject, _in_batches_of(size), info=REPLAYED).fine().output for size in (100, 1)
    )
    if whole != single:
        raise Fault(
            "rows one by one give another output than the same rows at once: the output must "
            "not depend on where a batch ends"
        )


def _in_batches_of(size: int) -> Callable[[Sink], None]:
    def play(sink: Sink) -> None:
        rows = stream(100)
        for start in range(0, len(rows), size):
            sink.write(rows[start : start + size])
        end_run(sink)

    return play


def _empty_batch(subject: Subject) -> None:
    """Check that it accepts an empty batch."""

    def play(sink: Sink) -> None:
        sink.write([])
        sink.write(stream(10))
        sink.write([])
        end_run(sink)

    try_sink(subject, play).fine()


def _nulls(subject: Subject) -> None:
    """Check that it accepts null in each nullable field: in one alone, and in all of them."""
    nullable = [field.name for field in fields(Event) if field.type.endswith("null")]

    def play(sink: Sink) -> str:
        for names in (*([name] for name in nullable), nullable):
            for number, row in enumerate(stream(10)):
                known = {name: getattr(row, name) for name in row.__struct_fields__}
                try:
                    sink.write([make_event(**{**known, **dict.fromkeys(names)})])
                except BaseException as error:
                    if is_the_users(error):
                        raise
                    which = names[0] if len(names) == 1 else "every field that may be"
                    return f"{which} is null ({stream(10)[number].point}): {in_a_line(error)}"
        sink.close(REPORT)
        return ""

    fault = try_sink(subject, play).fine().returned
    if fault:
        raise Fault(f"it fails where {fault}; null means that the value is unknown")


def _losses_and_report(subject: Subject) -> None:
    """Check that it accepts losses anywhere, hosts and shares before rows, and the report."""

    def play(sink: Sink) -> None:
        for host in range(2):
            sink.merged(Merge(host, f"{host}.jsonl", bound_ns=host * 1000))
            sink.sampled(Sampled(8, host=host))
        sink.lost(LOSS)
        sink.write(stream(3))
        sink.lost(LOSS)
        sink.lost(Loss("theirs", "retransmit", 2**40))
        sink.close(REPORT)

    try_sink(subject, play).fine()
    try_sink(subject, lambda sink: sink.close(RunReport(probes={}, duration_s=0))).fine()


def _close_twice(subject: Subject) -> None:
    """Check that close() is idempotent."""

    def play(sink: Sink) -> str:
        sink.write(stream(3))
        end_run(sink)
        try:
            sink.close(REPORT)
        except BaseException as error:
            if is_the_users(error):
                raise
            return in_a_line(error)
        return ""

    error = try_sink(subject, play).fine().returned
    if error:
        raise Fault(f"a second close() raises {error}: let it do nothing")


def _bounded_memory(subject: Subject) -> None:
    """Check that memory does not grow over a million events, even without a reader."""

    def play(sink: Sink) -> int:
        spare_the_collector()  # as in a run
        settled = 0
        for batch in _many():
            sink.write(batch)
            if not settled and batch[-1].ts_ns >= 1_000_000_000 + (WARM - 1) * 1000:
                settled = _resident()
        return _resident() - settled

    ran = try_sink(subject, play, os.devnull, readers=silent_and_normal_reader)
    grown = ran.fine().returned
    if grown > GROWTH:
        raise Fault(
            f"its memory grows by {grown >> 20} MB over {MANY - WARM} events: "
            "let it drop what it has written, or keep sums instead of rows"
        )


def _many() -> Iterator[list[Event]]:
    for start in range(0, MANY, 1000):
        yield stream(1000, start)


def _resident() -> int:
    """Return the resident memory of this process, bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
