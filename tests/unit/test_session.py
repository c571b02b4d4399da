"""A whole run on a simulated kernel side: rings, counters and a loader in memory."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import attrs
import pytest

from tcplat_core.deliver.fast.library import FILE, library
from tcplat_core.deliver.ring import BATCH
from tcplat_core.errors import CannotRunError, PluginError, ReaderGoneError, TcplatError, UsageError
from tcplat_core.event.clock import kernel_ns
from tcplat_core.event.fields import Event
from tcplat_core.loader.filter import Filter
from tcplat_core.loader.protocol import Refusal, Request, send_answer
from tcplat_core.plugin.aggregates import Aggregation, Histogram
from tcplat_core.plugin.hookpoints import HookPoint, kentry, kprobe, kreturn, tracepoint
from tcplat_core.plugin.maps import Maps, ReadableMap
from tcplat_core.plugin.options import Option
from tcplat_core.plugin.output import Output, held_back
from tcplat_core.plugin.report import RunReport
from tcplat_core.plugin.specs import Chosen, Loss, ProbeSpec, Sink
from tcplat_core.registry.find import Plugins
from tcplat_core.run import drain, probe_run
from tcplat_core.run.loader_process import LoaderProcess
from tcplat_core.run.probe_run import probe_request
from tcplat_core.run.session import Session
from tcplat_core.run.signals import Signals
from tcplat_core.run.traced_command import TracedCommand
from tcplat_core.testing import FakeArray, FakeLoader, FakeProbe, RecordingSink, make_record

SEND_AND_CLOSE = (
    HookPoint(
        "send",
        (
            kprobe(
                kentry("tcp_sendmsg", "kp_enter", quiet=True), kreturn("tcp_sendmsg", "kr_send")
            ),
            tracepoint("tcp:tcp_sendmsg_locked", "tp_send"),
        ),
    ),
    HookPoint("close", (tracepoint("tcp:tcp_destroy_sock", "tp_close"),)),
)

Play = Callable[..., FakeProbe]


@pytest.fixture(params=["C", "Python"])
def play(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Play]:
    """Make probes whose handlers the test plays; C or Python reads them."""
    if request.param == "Python":
        monkeypatch.setenv("TCPLAT_PURE", "1")
    elif not FILE.exists():
        pytest.skip("there was no C compiler")
    with ExitStack() as stack:
        library.cache_clear()
        stack.callback(library.cache_clear)

        def make(name: str = "one", **given: Any) -> FakeProbe:
            spec = ProbeSpec(name=name, summary="s", source=f"/* {name} */", points=SEND_AND_CLOSE)
            probe = FakeProbe(spec, **given)
            stack.callback(probe.close)
            return probe

        yield make


def run(*probes: FakeProbe, holding: tuple[int, ...] = (), **given: Any) -> RunReport:
    """Run for ten milliseconds, or for what `given` says."""
    given.setdefault("duration_s", 0.01)
    sinks: dict[str, Sink] = given.pop("sinks")
    session = Session(
        loader=cast("LoaderProcess", FakeLoader(probes, holding)),
        probes=[Chosen(probe.spec, {}) for probe in probes],
        sinks=sinks,
        request=Request(probes=(), ring_bytes=probes[0].ring_bytes),
        **given,
    )
    return session.run()


def run_into_a_sink(*probes: FakeProbe, **given: Any) -> tuple[RecordingSink, RunReport]:
    sink = RecordingSink()
    return sink, run(*probes, sinks={"it": sink}, **given)


def losses(sink: RecordingSink) -> list[Loss]:
    return [one for one in sink.stream if isinstance(one, Loss)]


def times(rows: Sequence[Event]) -> list[int]:
    return [row.ts_ns for row in rows]


# --- rows


def test_rows_of_two_probes_arrive_in_order(play: Play) -> None:
    one, two = play("one"), play("two")
    for number in range(1, 100, 2):
        one.emit("tp_send", ts_ns=number)
        two.emit("tp_close", ts_ns=number + 1)
    sink, report = run_into_a_sink(one, two)
    assert times(sink.rows) == list(range(1, 101))
    assert [(row.probe, row.point) for row in sink.rows[:2]] == [("one", "send"), ("two", "close")]
    assert report.delivered == 100
    assert report.late == 0


def test_row_names_the_hook_that_fired(play: Play) -> None:
    probe = play(mechanism="kprobe")
    probe.emit("kr_send", ts_ns=1)
    probe.emit("tp_close", ts_ns=2)
    sink, _ = run_into_a_sink(probe)
    assert [(row.point, row.func, row.attach) for row in sink.rows] == [
        ("send", "tcp_sendmsg", "kprobe"),
        ("close", "tcp:tcp_destroy_sock", "tracepoint"),
    ]


def test_row_has_the_unix_time_of_its_event(play: Play) -> None:
    probe = play()
    before = time.time_ns()
    probe.emit("tp_send", ts_ns=time.clock_gettime_ns(time.CLOCK_MONOTONIC))
    after = time.time_ns()
    sink, _ = run_into_a_sink(probe)
    measured_within = 5_000_000
    assert before - measured_within < sink.rows[0].time_ns < after + measured_within


def test_rows_of_more_than_one_drain_turn_arrive(play: Play) -> None:
    probe = play(ring_bytes=1 << 22)
    count = 20_000
    assert all(probe.emit("tp_send", ts_ns=number + 1) for number in range(count))
    sink, report = run_into_a_sink(probe)
    assert times(sink.rows) == list(range(1, count + 1))
    assert report.dropped == report.late == 0


def test_drain_turn_of_discarded_records_is_not_an_error(play: Play) -> None:
    probe = play(ring_bytes=1 << 22)
    for _ in range((drain.HELPING + 1) * BATCH):
        position = probe.ring.reserve(make_record())
        assert position is not None
        probe.ring.discard(position)
    probe.emit("tp_send", ts_ns=1)
    sink, _ = run_into_a_sink(probe)
    assert times(sink.rows) == [1]


def test_rows_emitted_during_the_run_arrive(play: Play) -> None:
    probe = play()

    @attrs.define(eq=False)
    class Echo(RecordingSink):
        def write(self, batch: Sequence[Event]) -> None:
            super().write(batch)
            last = batch[-1].ts_ns
            if last < 20:
                probe.emit("tp_send", ts_ns=last + 1)

    sink = Echo()
    probe.emit("tp_send", ts_ns=1)
    run(probe, sinks={"it": sink}, count=20, duration_s=0)
    assert times(sink.rows) == list(range(1, 21))


# --- books


def test_produced_equals_delivered_plus_dropped(play: Play) -> None:
    probe = play(ring_bytes=4096)
    fitted = sum(probe.emit("tp_send", ts_ns=number + 1) for number in range(100))
    probe.emit("tp_close", ts_ns=1000)
    assert 0 < fitted < 100
    sink, report = run_into_a_sink(probe)
    assert [attrs.astuple(hook) for hook in report.probes["one"].hooks] == [
        ("send", "tcp:tcp_sendmsg_locked", "tracepoint", 100, 100 - fitted, fitted, 0),
        ("close", "tcp:tcp_destroy_sock", "tracepoint", 1, 1, 0, 0),
    ]
    assert [hook.unread for hook in report.probes["one"].hooks] == [0, 0]
    assert len(sink.rows) == fitted
    assert {(one.probe, one.point, one.count) for one in losses(sink)} == {
        ("one", "send", 100 - fitted),
        ("one", "close", 1),
    }


def test_loss_follows_the_rows_that_filled_the_ring(play: Play) -> None:
    probe = play(ring_bytes=4096)
    while probe.emit("tp_send", ts_ns=1):
        pass
    sink, _ = run_into_a_sink(probe)
    assert losses(sink) == sink.stream[-1:]
    assert (losses(sink)[0].count, losses(sink)[0].since_ns) == (1, 1)


def test_loss_precedes_younger_rows_of_other_rings(play: Play) -> None:
    one, two = play("one", ring_bytes=4096), play("two", ring_bytes=4096)
    last_ns = 0
    while one.emit("tp_send", ts_ns=last_ns + 10):
        last_ns += 10
    two.emit("tp_send", ts_ns=last_ns - 5)
    two.emit("tp_send", ts_ns=last_ns + 5)
    two.emit("tp_send", ts_ns=last_ns + 20)
    sink, _ = run_into_a_sink(one, two)
    (loss,) = losses(sink)
    place = sink.stream.index(loss)
    assert times(sink.rows[:place])[-2:] == [last_ns - 5, last_ns]
    assert times(sink.rows[place:]) == [last_ns + 5, last_ns + 20]
    assert loss.since_ns == last_ns


def test_loss_has_the_interval_it_happened_in(play: Play) -> None:
    probe, other = play("one", ring_bytes=4096), play("two", ring_bytes=1 << 16)
    signals = Signals()
    lost_ns: list[tuple[int, int]] = []

    @attrs.define(eq=False)
    class Overflows(RecordingSink):
        def write(self, batch: Sequence[Event]) -> None:
            super().write(batch)
            if len(lost_ns) == 3:
                signals.caught = 2
            elif batch[-1].probe == "two":
                fitted_ns = 0
                while probe.emit("tp_send", ts_ns=(now_ns := kernel_ns())):
                    fitted_ns = now_ns
                lost_ns.append((fitted_ns, now_ns))
                # It had space when the other ring was full.
                other.emit("tp_send", ts_ns=kernel_ns())

    sink = Overflows()
    other.emit("tp_send", ts_ns=kernel_ns())
    run(probe, other, sinks={"it": sink}, duration_s=0, signals=signals)
    assert len(losses(sink)) == 3
    for loss, (fitted_ns, now_ns) in zip(losses(sink), lost_ns, strict=True):
        assert fitted_ns <= loss.since_ns <= now_ns <= loss.until_ns <= kernel_ns()
        place = sink.stream.index(loss)
        before = times([row for row in sink.stream[:place] if isinstance(row, Event)])
        after = times([row for row in sink.stream[place:] if isinstance(row, Event)])
        assert max(before) <= loss.since_ns < min(after)


def test_each_lost_event_is_reported_once(play: Play) -> None:
    probe, signals = play(ring_bytes=4096), Signals()

    @attrs.define(eq=False)
    class Overflows(RecordingSink):
        def write(self, batch: Sequence[Event]) -> None:
            super().write(batch)
            if len(self.batches) > 3:
                signals.caught = 2
                return
            while probe.emit("tp_send", ts_ns=batch[-1].ts_ns + 1):
                pass

    sink = Overflows()
    probe.emit("tp_send", ts_ns=1)
    report = run(probe, sinks={"it": sink}, duration_s=0, signals=signals)
    assert [loss.count for loss in losses(sink)] == [1, 1, 1]
    assert report.dropped == 3
    assert report.delivered == len(sink.rows)


def test_report_contains_attached_hooks_alone(play: Play) -> None:
    by_kprobe = play("one", mechanism="kprobe")
    without = play("two", missing={"close": "this kernel has none"})
    _, report = run_into_a_sink(by_kprobe, without)
    assert [hook.func for hook in report.probes["one"].hooks] == [
        "tcp_sendmsg",
        "tcp:tcp_destroy_sock",
    ]
    assert [hook.point for hook in report.probes["two"].hooks] == ["send"]
    assert report.probes["two"].missing == {"close": "this kernel has none"}


def test_bare_acknowledgements_without_a_row_are_reported(play: Play) -> None:
    probe = play()
    probe.books.acknowledge(7)
    report = run_into_a_sink(probe)[1]
    assert report.probes["one"].bare_acks == 7
    assert report.as_json()["probes"]["one"]["bare_acks"] == 7
    assert RunReport.from_json(report.as_json()).probes == report.probes


def test_untracked_sockets_are_reported(play: Play) -> None:
    probe = play()
    probe.books.lose_track(3)
    _, report = run_into_a_sink(probe)
    assert report.probes["one"].untracked == 3


# --- the end


@pytest.mark.parametrize("count", [1, 7, 50])
def test_count_is_exact_and_the_rest_is_unread(play: Play, count: int) -> None:
    probe = play()
    for number in range(50):
        probe.emit("tp_send", ts_ns=number + 1)
    sink, report = run_into_a_sink(probe, count=count, duration_s=0)
    assert times(sink.rows) == list(range(1, count + 1))
    assert report.probes["one"].hooks[0].unread == 50 - count


def test_run_lasts_for_the_requested_duration(play: Play) -> None:
    began = time.monotonic()
    _, report = run_into_a_sink(play(), duration_s=0.15)
    assert 0.15 <= report.duration_s <= time.monotonic() - began
    assert report.duration_s < 2


def test_run_ends_with_its_traced_processes(play: Play) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    probe, sink = play(), RecordingSink()
    wanted = Filter(pids=(gone.pid,))
    request = Request(probes=(), filter=wanted, ring_bytes=probe.ring_bytes)
    loader = FakeLoader([probe])
    report = Session(
        cast("LoaderProcess", loader), [Chosen(probe.spec, {})], {"it": sink}, request
    ).run()
    assert report.duration_s < 2
    assert loader.requests[0].filter == wanted


def test_run_ends_with_its_command_and_keeps_its_status(play: Play, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    command = TracedCommand.fork(["sh", "-c", f"test -s {ready} && exit 5"])
    run_into_a_sink(play(), duration_s=0, ready_file=str(ready), command=command)
    assert command.status == 5  # and the ready file was there when it began


def test_run_delivers_pending_rows_after_a_signal(play: Play) -> None:
    probe, signals = play(), Signals()

    @attrs.define(eq=False)
    class Stops(RecordingSink):
        def write(self, batch: Sequence[Event]) -> None:
            super().write(batch)
            if not signals.caught:
                signals.caught = 2
                probe.emit("tp_send", ts_ns=2)

    sink = Stops()
    probe.emit("tp_send", ts_ns=1)
    run(probe, sinks={"it": sink}, duration_s=0, signals=signals)
    assert times(sink.rows) == [1, 2]


def test_run_stopped_before_attaching_reports_no_probes(play: Play) -> None:
    sink, report = run_into_a_sink(play(), signals=Signals(caught=2))
    assert report.probes == {}
    assert not sink.reports  # there was no run: what a sink would replace stays


def test_run_ends_when_the_reader_is_gone(play: Play) -> None:
    probe, other = play(), RecordingSink()
    probe.emit("tp_send", ts_ns=1)
    report = run(
        probe, sinks={"gone": RecordingSink(ReaderGoneError()), "other": other}, duration_s=0
    )
    assert report.switched_off == {}
    assert other.reports[0].delivered == 1


@pytest.mark.parametrize("counted", [True, False])
def test_busy_record_is_waited_for(
    counted: bool,  # noqa: FBT001 - a parameter of the test
    play: Play,
) -> None:
    """Its handler may have been interrupted before it counted it, or behind that."""
    probe = play()
    probe.emit("tp_send", ts_ns=1)
    number = probe.programs.index("tp_send")
    busy = probe.ring.reserve(make_record(ts_ns=2, hook=number))
    probe.books.count(number, produced=int(counted))

    @attrs.define(eq=False)
    class Submits(RecordingSink):
        def write(self, batch: Sequence[Event]) -> None:
            super().write(batch)
            if busy is not None and batch[-1].ts_ns == 1:
                probe.books.count(number, produced=int(not counted))
                probe.ring.submit(busy)

    sink = Submits()
    report = run(probe, sinks={"it": sink}, duration_s=1e-9)
    assert times(sink.rows) == [1, 2]
    assert report.delivered == 2


def losses_of(sink: RecordingSink) -> list[Loss]:
    return [one for one in sink.stream if isinstance(one, Loss)]


def test_record_that_stays_busy_is_lost(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "SETTLE_S", 0.05)
    probe = play()
    probe.emit("tp_send", ts_ns=1)
    probe.ring.reserve(make_record(ts_ns=2))
    probe.books.count(probe.programs.index("tp_send"), produced=1)
    sink, report = run_into_a_sink(probe)
    assert times(sink.rows) == [1]
    hook = report.probes["one"].hooks[0]
    assert (hook.delivered, hook.dropped, hook.unread) == (1, 1, 0)
    (loss,) = losses_of(sink)
    assert (loss.point, loss.count, loss.since_ns) == ("send", 1, 0)


def taken_by_tens(play: Play, monkeypatch: pytest.MonkeyPatch) -> FakeProbe:
    """Return a probe with 100 records, of which ten are taken at a time."""
    monkeypatch.setattr(drain, "HELPING", 1)
    monkeypatch.setattr(drain, "BATCH", 10)
    probe = play()
    for ts_ns in range(1, 101):
        probe.emit("tp_send", ts_ns=ts_ns)
    return probe


def test_records_that_are_not_taken_in_time_are_lost_from_the_oldest_on(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drain, "DRAIN_S", 0.0)
    probe = taken_by_tens(play, monkeypatch)
    sink, began_ns = RecordingSink(), kernel_ns()
    report = run(probe, sinks={"it": sink}, duration_s=1e-9)
    delivered = len(sink.rows)
    assert times(sink.rows) == list(range(1, delivered + 1))
    hook = report.probes["one"].hooks[0]
    assert hook.produced == 100 == delivered + hook.dropped
    (loss,) = losses_of(sink)
    assert loss.count == hook.dropped > 0
    assert loss.since_ns == delivered + 1
    assert began_ns < report.until_ns <= loss.until_ns


def test_full_ring_is_taken_whole_at_the_end_however_long_that_takes(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drain, "SETTLE_S", 0.05)
    probe = taken_by_tens(play, monkeypatch)

    class Slow(RecordingSink):
        def write(self, batch: Sequence[Event]) -> None:
            time.sleep(0.02)
            super().write(batch)

    sink = Slow()
    report = run(probe, sinks={"it": sink}, duration_s=1e-9)
    assert len(sink.rows) == report.delivered == 100
    assert not losses_of(sink)


def test_programs_are_detached_before_the_last_rows_are_read(play: Play) -> None:
    read, link = os.pipe()
    os.set_blocking(read, False)
    probe, signals = play(), Signals()
    held = []

    @attrs.define(eq=False)
    class Looks(RecordingSink):
        def write(self, batch: Sequence[Event]) -> None:
            super().write(batch)
            try:
                held.append(os.read(read, 1) != b"")
            except BlockingIOError:  # a writer exists: the link is still held
                held.append(True)
            if not signals.caught:
                signals.caught = 2
                probe.emit("tp_send", ts_ns=2)

    probe.emit("tp_send", ts_ns=1)
    run(probe, sinks={"it": Looks()}, holding=(link,), duration_s=0, signals=signals)
    assert held == [True, False]
    os.close(read)


def test_run_leaves_no_fd_open(play: Play) -> None:
    probe = play()
    before = sorted(os.listdir("/proc/self/fd"))
    probe.emit("tp_send", ts_ns=1)
    run_into_a_sink(probe, holding=(os.dup(0),))
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_failed_run_leaves_no_fd_open(play: Play, tmp_path: Path) -> None:
    probe = play()
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(UsageError, match=r"cannot write the ready file .*: No such file"):
        run_into_a_sink(probe, holding=(os.dup(0),), ready_file=str(tmp_path / "no" / "ready"))
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_ready_file_contains_the_pid(play: Play, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    run_into_a_sink(play(), ready_file=str(ready))
    assert int(ready.read_text()) == os.getpid()


def test_ready_pipe_without_a_reader_does_not_block(play: Play, tmp_path: Path) -> None:
    pipe = tmp_path / "ready"
    os.mkfifo(pipe)
    probe = play()
    probe.emit("tp_send", ts_ns=1)
    sink, _ = run_into_a_sink(probe, ready_file=str(pipe), duration_s=0.3)
    assert times(sink.rows) == [1]


def test_ready_pipe_is_written_once_a_reader_opens_it(play: Play, tmp_path: Path) -> None:
    pipe = tmp_path / "ready"
    os.mkfifo(pipe)
    signals = Signals()
    shown: list[str] = []

    def read() -> None:
        with pipe.open() as file:
            shown.append(file.read())
        signals.caught = 2

    reader = threading.Timer(0.3, read)
    reader.daemon = True  # where the run fails, the pipe never gets a writer
    reader.start()
    run_into_a_sink(play(), ready_file=str(pipe), duration_s=60, signals=signals)
    reader.join()
    assert shown == [f"{os.getpid()}\n"]


# --- sinks begin once everything is attached


@attrs.define(eq=False)
class Lifecycle(RecordingSink):
    """Records the calls that it gets, in order."""

    events: list[str] = attrs.field(factory=list)

    def begin(self) -> None:
        self.events.append("begin")

    def write(self, batch: Sequence[Event]) -> None:
        super().write(batch)
        self.events.append("write")

    def cancel(self) -> None:
        self.events.append("cancel")

    def close(self, report: RunReport) -> None:
        super().close(report)
        self.events.append("close")


def test_sink_begins_before_the_first_row(play: Play) -> None:
    probe, sink = play(), Lifecycle()
    probe.emit("tp_send", ts_ns=1)
    run(probe, sinks={"it": sink})
    assert sink.events == ["begin", "write", "close"]


def test_refused_or_dry_run_cancels_its_sinks(
    play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "old"
    old.write_text("yesterday's")

    def outputs() -> list[Output]:
        with held_back() as made:
            Output.open(str(old), lambda: False)
        return made

    for given in ({"dry": True}, {"signals": Signals(caught=2)}):
        sink = Lifecycle()
        run(play(), sinks={"it": sink}, outputs=outputs(), **given)
        assert sink.events == ["cancel"]

    def refuse(*_: object) -> None:
        raise CannotRunError("not here")

    monkeypatch.setattr(FakeLoader, "ask", refuse)
    sink = Lifecycle()
    with pytest.raises(CannotRunError):
        run(play(), sinks={"it": sink}, outputs=outputs())
    assert sink.events == ["cancel"]
    assert old.read_text() == "yesterday's"


def test_sink_that_cannot_begin_ends_the_run(play: Play) -> None:
    class Unable(Lifecycle):
        def begin(self) -> None:
            raise OSError("no such thing")

    one, other = Unable(), Lifecycle()
    with pytest.raises(TcplatError, match="a sink cannot begin: no such thing"):
        run(play(), sinks={"one": one, "other": other})
    assert (one.events, other.events) == (["cancel"], ["cancel"])


# --- the report


def test_every_sink_receives_the_report(play: Play) -> None:
    probe = play()
    probe.emit("tp_send", ts_ns=1)
    sink, report = run_into_a_sink(probe)
    (given,) = sink.reports
    assert given.delivered == report.delivered == 1
    assert given.duration_s == report.duration_s


def test_failed_sink_is_reported(play: Play) -> None:
    probe = play()
    probe.emit("tp_send", ts_ns=1)
    sinks = {"bad": RecordingSink(TcplatError("disk full")), "good": RecordingSink()}
    report = run(probe, sinks=sinks)
    assert report.switched_off == {"bad": "disk full"}
    assert report.delivered == 1


def test_failed_sink_is_in_the_report_of_the_others(play: Play) -> None:
    probe, good = play(), RecordingSink()
    probe.emit("tp_send", ts_ns=1)
    run(probe, sinks={"bad": RecordingSink(TcplatError("disk full")), "good": good})
    assert good.reports[0].switched_off == {"bad": "disk full"}


# --- what is asked of the loader


def test_loader_request_has_each_probe_with_its_constants() -> None:
    spec = ProbeSpec(
        name="port",
        summary="s",
        source="/* C */",
        points=SEND_AND_CLOSE,
        types=("tcp_sock",),
        options=(Option(name="port", help="h", convert=int),),
        defines=lambda options: {"PORT": options["port"]},
    )
    request = probe_run.probe_request(spec, {"port": 80})
    assert (request.name, request.source, request.points) == ("port", "/* C */", SEND_AND_CLOSE)
    assert request.types == ("tcp_sock",)
    assert request.defines == {"PORT": 80}
    assert request.struct.startswith("struct tcplat_event {")


COUNTED = ProbeSpec(
    name="counted",
    summary="s",
    source="",
    points=SEND_AND_CLOSE,
    maps=(ReadableMap("counts", "=QI"),),
    histograms=(Histogram("took", "from send to close", ("close",)),),
)


def test_histograms_alone_attach_only_the_points_they_need() -> None:
    wanted = Aggregation("all", 256, 1)
    request = probe_run.probe_request(COUNTED, {}, events=False, aggregation=wanted)
    assert request.points == SEND_AND_CLOSE  # the numbers of hooks stay what they are
    assert request.listen == ("close",)
    assert request.histograms == ("took",)
    assert request.maps == {"counts": 12, "group_keys": 40, "durations": 8}


def test_rows_alone_attach_everything_and_map_no_counters() -> None:
    request = probe_run.probe_request(COUNTED, {})
    assert request.listen is None
    assert request.maps == {"counts": 12}


@pytest.mark.parametrize(
    ("used", "aggregation", "listen"),
    [
        ({"send", "recv"}, None, ("send",)),
        ({"send"}, Aggregation("all", 256, 1), ("close", "send")),
        ({"recv"}, None, None),
    ],
)
def test_only_points_that_sinks_use_are_attached_unless_they_use_none(
    used: set[str], aggregation: Aggregation | None, listen: tuple[str, ...] | None
) -> None:
    request = probe_request(COUNTED, {}, used=frozenset(used), aggregation=aggregation)
    assert request.listen == listen


# --- maps that a probe's Python side reads


@pytest.fixture
def polled() -> Iterator[Callable[..., FakeProbe]]:
    """Make a probe with an array `counts` and this poll()."""
    with ExitStack() as stack:

        def make(poll: Callable[[Maps], Any]) -> FakeProbe:
            array = FakeArray("=QI", 8)
            probe = FakeProbe(attrs.evolve(COUNTED, poll=poll), arrays={"counts": array})
            stack.callback(probe.close)
            return probe

        yield make


def test_poll_emits_final_counts_at_the_end(
    polled: Callable[..., FakeProbe],
) -> None:
    probe = polled(
        lambda maps: [
            maps.row("count", bytes=count, pid=pid) for count, pid in maps["counts"] if pid
        ]
    )
    probe.arrays["counts"].set(3, 4711, 17)
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    sink, report = run_into_a_sink(probe)
    last = sink.rows[-1]
    assert (last.probe, last.point, last.func, last.attach) == ("counted", "count", "poll", "map")
    assert (last.bytes, last.pid, last.comm, last.sport, last.saddr) == (4711, 17, None, None, "::")
    assert last.ts_ns >= before
    (hook,) = (hook for hook in report.probes["counted"].hooks if hook.func == "poll")
    assert (hook.produced, hook.delivered, hook.dropped) == (len(sink.rows), len(sink.rows), 0)


def test_poll_rows_beyond_count_are_unread(polled: Callable[..., FakeProbe]) -> None:
    probe = polled(lambda maps: [maps.row("count") for _ in range(5)])
    sink, report = run_into_a_sink(probe, count=2)
    assert len(sink.rows) == 2
    (hook,) = (hook for hook in report.probes["counted"].hooks if hook.func == "poll")
    assert hook.delivered == 2
    assert hook.produced == hook.delivered + hook.unread


def test_poll_that_returns_none_emits_no_rows(polled: Callable[..., FakeProbe]) -> None:
    sink, report = run_into_a_sink(polled(lambda _: None))
    assert sink.rows == []
    assert report.probes["counted"].poll_error == ""


def test_poll_that_raises_is_not_called_again(polled: Callable[..., FakeProbe]) -> None:
    said: list[str] = []
    probe = polled(lambda maps: [maps.row("count", no_such_field=1)])
    sink, report = run_into_a_sink(probe, say=said.append)
    assert sink.rows == []
    assert len(said) == 1
    assert "its maps are no longer read: TypeError" in said[0]
    assert report.as_json()["probes"]["counted"]["poll_error"].startswith("TypeError")


@pytest.mark.parametrize(
    ("poll", "said"),
    [
        (lambda _: sys.exit(0), "SystemExit: 0"),
        (lambda _: [42], "TypeError: a int is no row: maps.row() makes them"),
    ],
)
def test_run_continues_after_any_failure_of_poll(
    polled: Callable[..., FakeProbe], poll: Callable[[Maps], Any], said: str
) -> None:
    probe = polled(poll)
    _, report = run_into_a_sink(probe)
    assert report.probes["counted"].poll_error == said


@pytest.mark.parametrize(
    ("describe", "said"),
    [
        (lambda _: sys.exit(0), "send (describe() failed: SystemExit: 0)"),
        (lambda _: 42, "send (describe() gave a int)"),
    ],
)
def test_row_with_a_failing_description_is_delivered(
    describe: Callable[[Any], str], said: str
) -> None:
    probe = FakeProbe(attrs.evolve(Plugins.load().probe("tcp_client"), describe=describe))
    try:
        probe.emit("tp_send", ts_ns=1)
        sink, report = run_into_a_sink(probe)
    finally:
        probe.close()
    assert [row.desc for row in sink.rows] == [said]
    assert report.delivered == 1


@pytest.mark.parametrize("what", ["defines", "interfaces"])
def test_exception_while_building_a_request_is_one_sentence(what: str) -> None:
    def fail(_: object) -> Any:
        sys.exit(0)

    changes: dict[str, Any] = {what: fail}
    spec = attrs.evolve(COUNTED, **changes)
    with pytest.raises(PluginError, match=rf"probe counted: {what}\(\) failed: SystemExit: 0"):
        probe_request(spec, {})


# --- the loader's process, played by others


@pytest.fixture
def loader() -> Iterator[Callable[..., tuple[LoaderProcess, socket.socket]]]:
    with ExitStack() as stack:

        def make(code: str) -> tuple[LoaderProcess, socket.socket]:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            log = tempfile.TemporaryFile()  # noqa: SIM115 - the loader's to close
            process = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=log, stderr=log
            )
            made = LoaderProcess(process, ours, log)
            stack.callback(made.close)
            stack.enter_context(theirs)
            return made, theirs

        yield make


Loaders = Callable[..., tuple[LoaderProcess, socket.socket]]
REQUEST = Request(probes=())


def never() -> bool:
    return False


def test_dead_loader_is_an_error_with_its_status(loader: Loaders) -> None:
    process, theirs = loader("import sys; sys.stdin.read(); sys.exit(7)")
    theirs.close()
    with pytest.raises(TcplatError, match=r"the loader died \(status 7\)"):
        process.ask(REQUEST, never)


def test_error_of_a_dead_loader_has_its_last_output(loader: Loaders) -> None:
    printed = "import sys; sys.stdin.read(); print('C text'); "
    process, theirs = loader(printed + "sys.stdout.flush(); sys.exit('LLVM ERROR: no more\\n')")
    theirs.close()
    with pytest.raises(TcplatError, match=r"the loader died \(status 1\): LLVM ERROR: no more$"):
        process.ask(REQUEST, never)


@pytest.mark.parametrize(
    "printed",
    [
        "terminate called after ...\n  what():  std::bad_alloc",
        "LLVM ERROR: out of memory\nAllocation failed",
        "MemoryError: Unable to allocate internal buffer.",
    ],
)
def test_loader_that_died_for_lack_of_memory_names_the_remedy(
    loader: Loaders, printed: str
) -> None:
    process, theirs = loader(f"import sys; sys.stdin.read(); sys.exit({printed!r})")
    theirs.close()
    with pytest.raises(TcplatError, match=r"^the loader ran out of memory: raise the limit \("):
        process.ask(REQUEST, never)


@pytest.mark.parametrize(
    ("exit_code", "error"),
    [(1, TcplatError), (2, UsageError), (3, CannotRunError), (4, PluginError), (77, TcplatError)],
)
def test_refusal_becomes_the_error_of_its_exit_code(
    loader: Loaders, exit_code: int, error: type[TcplatError]
) -> None:
    process, theirs = loader("import sys; sys.stdin.read()")
    send_answer(theirs, Refusal("no way", exit_code, "the verifier's words"))
    with pytest.raises(TcplatError, match="no way") as raised:
        process.ask(REQUEST, never)
    assert type(raised.value) is error
    assert raised.value.__notes__ == ["the verifier's words"]


def test_refusal_before_the_request_is_read_arrives(loader: Loaders) -> None:
    process, theirs = loader("")
    process.process.wait()
    send_answer(theirs, Refusal("no root", 3))
    with pytest.raises(CannotRunError, match="no root"):
        process.ask(Request(probes=(), attach="x" * (1 << 20)), never)


def test_stopping_does_not_wait_for_the_loader(loader: Loaders) -> None:
    process, _ = loader("import signal; signal.pause()")
    assert process.ask(REQUEST, lambda: True) is None
    process.close()
    assert process.process.returncode == -9


def test_loader_output_is_kept_for_debugging(loader: Loaders) -> None:
    process, _ = loader(r"import os; os.write(1, b'clang: \xff\n'); os.write(2, b'verifier\n')")
    process.process.wait()
    assert process.output() == "clang: \\xff\nverifier\n"
