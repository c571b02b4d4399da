"""Rows of all probes go to every sink in time order; failing sinks are switched off."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator, Sequence
from copy import copy

import attrs
import pytest

from tcplat_core.deliver.reorder import RowBuffer
from tcplat_core.deliver.router import Router
from tcplat_core.deliver.sequencer import Sequencer
from tcplat_core.errors import ReaderGoneError, TcplatError
from tcplat_core.event.fields import Event
from tcplat_core.plugin.aggregates import Aggregates
from tcplat_core.plugin.report import RunReport
from tcplat_core.plugin.specs import Loss, Merge, Sink, SinkLike
from tcplat_core.testing import RecordingSink, make_event

REPORT = RunReport(probes={}, duration_s=1)


def rows(*times: int, probe: str = "tcp_client") -> list[Event]:
    return [make_event(ts_ns=time, probe=probe) for time in times]


def times(batch: Sequence[Event]) -> list[int]:
    return [row.ts_ns for row in batch]


@pytest.fixture
def sink() -> RecordingSink:
    return RecordingSink()


@pytest.fixture
def router(sink: RecordingSink) -> Router:
    return Router({"it": sink})


@pytest.fixture
def sequencer(router: Router) -> Sequencer:
    return Sequencer(router, RowBuffer())


# --- order


def test_rows_are_sorted_across_probes(sequencer: Sequencer, sink: RecordingSink) -> None:
    sequencer.buffer.feed(rows(1, 4, 6))
    sequencer.buffer.feed(rows(2, 3, 5, probe="xdp_port"))
    sequencer.flush()
    assert times(sink.rows) == [1, 2, 3, 4, 5, 6]
    assert [row.probe for row in sink.rows[:3]] == ["tcp_client", "xdp_port", "xdp_port"]


def test_rows_of_one_instant_keep_arrival_order(sequencer: Sequencer, sink: RecordingSink) -> None:
    sequencer.buffer.feed([make_event(ts_ns=1, seq=number) for number in range(100)])
    sequencer.flush()
    assert [row.seq for row in sink.rows] == list(range(100))


def test_rows_at_or_beyond_the_horizon_are_held_back(
    router: Router, sequencer: Sequencer, sink: RecordingSink
) -> None:
    sequencer.buffer.feed(rows(10, 30, 20))
    sequencer.flush(20)
    assert times(sink.rows) == [10]
    sequencer.flush(20)
    assert times(sink.rows) == [10]
    sequencer.buffer.feed(rows(15, 25))  # one that took its time
    sequencer.flush(26)
    assert times(sink.rows) == [10, 15, 20, 25]
    sequencer.flush()
    assert times(sink.rows) == [10, 15, 20, 25, 30]
    assert router.late == 0


def test_flush_without_rows_delivers_no_batch(sequencer: Sequencer, sink: RecordingSink) -> None:
    sequencer.flush()
    sequencer.flush(100)
    sequencer.buffer.feed(rows(200))
    sequencer.flush(100)
    assert sink.batches == []


def test_late_row_is_delivered_and_counted(
    router: Router, sequencer: Sequencer, sink: RecordingSink
) -> None:
    sequencer.buffer.feed(rows(10, 20))
    sequencer.flush()
    sequencer.buffer.feed(rows(5, 15, 20, 21))
    sequencer.flush()
    assert times(sink.rows) == [10, 20, 5, 15, 20, 21]
    assert router.late == 2


def test_late_row_does_not_make_the_next_rows_late(router: Router, sequencer: Sequencer) -> None:
    sequencer.buffer.feed(rows(10, 20))
    sequencer.flush()
    sequencer.buffer.feed(rows(5))
    sequencer.flush()
    sequencer.buffer.feed(rows(20, 30))
    sequencer.flush()
    assert router.late == 1


def test_a_million_rows_with_bounded_disorder_come_out_sorted_and_complete() -> None:
    """Each row comes up to 1,000 rows late, in batches of any size; the horizon allows for it."""
    chance = random.Random(20_240_502)  # noqa: S311 - reproducible on purpose
    count, disorder = 1_000_000, 1000
    numbers = sorted(range(count), key=lambda number: number + chance.random() * disorder)
    row = make_event()

    @attrs.define(eq=False)
    class Checks:
        next_ns: int = 0

        def write(self, batch: Sequence[Event]) -> None:
            assert times(batch) == list(range(self.next_ns, self.next_ns + len(batch)))
            self.next_ns += len(batch)

        def lost(self, loss: Loss) -> None:
            raise AssertionError(loss)

        def close(self, report: RunReport) -> None:
            raise AssertionError(report)

    sink = Checks()
    router = Router({"it": sink})
    sequencer = Sequencer(router, RowBuffer())
    at = 0
    while at < count:
        size = chance.choice((1, 10, 500, 4000))
        sequencer.buffer.feed([_at(row, number) for number in numbers[at : at + size]])
        at += size
        sequencer.flush(at - disorder - 1)
        assert at - sink.next_ns <= 4000 + 2 * disorder  # nothing waits for longer than it must
    sequencer.flush()
    assert router.switched_off == {}
    assert sink.next_ns == count
    assert router.late == 0
    assert sequencer.undelivered == {}


def _at(row: Event, time: int) -> Event:
    row = copy(row)
    row.ts_ns = time
    return row


# --- books


def test_rows_that_reached_no_sink_are_counted_by_probe_point_and_func() -> None:
    sequencer = Sequencer(Router({}), RowBuffer())
    sequencer.buffer.feed([make_event(point="send", func="a")] * 2)
    sequencer.buffer.feed([make_event(point="send", func="b"), make_event(point="recv", func="b")])
    sequencer.buffer.feed([make_event(probe="xdp_port", point="send", func="a")])
    sequencer.flush()
    assert sequencer.undelivered == {
        ("tcp_client", "send", "a"): 2,
        ("tcp_client", "send", "b"): 1,
        ("tcp_client", "recv", "b"): 1,
        ("xdp_port", "send", "a"): 1,
    }


def test_rows_that_reached_a_sink_are_delivered(sequencer: Sequencer) -> None:
    sequencer.buffer.feed(rows(1, 2))
    sequencer.flush()
    assert sequencer.undelivered == {}


def test_rows_that_come_when_no_sink_is_left_are_undelivered() -> None:
    router = Router({})
    sequencer = Sequencer(router, RowBuffer())
    sequencer.buffer.feed([make_event()])
    sequencer.flush()
    assert sequencer.undelivered.total() == 1


# --- the limit


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 7])
def test_row_limit_is_exact(sink: RecordingSink, limit: int) -> None:
    router = Router({"it": sink}, limit)
    sequencer = Sequencer(router, RowBuffer())
    for time in range(0, 9, 3):
        sequencer.buffer.feed(rows(time + 2, time + 1, time))
        sequencer.flush()
    assert times(sink.rows) == list(range(limit))
    assert router.done
    assert sequencer.undelivered.total() == 9 - limit


def test_run_continues_below_the_limit(sink: RecordingSink) -> None:
    router = Router({"it": sink}, 3)
    sequencer = Sequencer(router, RowBuffer())
    sequencer.buffer.feed(rows(1, 2))
    sequencer.flush()
    assert not router.done


def test_run_continues_without_a_limit(router: Router, sequencer: Sequencer) -> None:
    sequencer.buffer.feed(rows(*range(100)))
    sequencer.flush()
    assert not router.done


# --- sinks that fail


def test_failing_sink_is_switched_off_and_others_continue() -> None:
    good, bad, last = RecordingSink(), RecordingSink(TcplatError("disk full")), RecordingSink()
    router = Router({"good": good, "bad": bad, "last": last})
    sequencer = Sequencer(router, RowBuffer())
    sequencer.buffer.feed(rows(1))
    sequencer.flush()
    bad.error = None  # too late
    sequencer.buffer.feed(rows(2))
    sequencer.flush()
    router.close(REPORT)
    assert times(good.rows) == times(last.rows) == [1, 2]
    assert bad.rows == []
    assert router.switched_off == {"bad": "disk full"}
    assert not router.done


def test_error_without_a_message_is_named_by_its_class() -> None:
    router = Router({"bad": RecordingSink(ZeroDivisionError())})
    sequencer = Sequencer(router, RowBuffer())
    sequencer.buffer.feed(rows(1))
    sequencer.flush()
    assert router.switched_off == {"bad": "ZeroDivisionError"}


def test_run_is_done_with_no_sink_left() -> None:
    router = Router({"bad": RecordingSink(OSError("gone"))})
    sequencer = Sequencer(router, RowBuffer())
    assert not router.done
    sequencer.buffer.feed(rows(1))
    sequencer.flush()
    assert router.done
    assert not router.reader_gone


def test_reader_that_went_away_ends_the_run_without_failure() -> None:
    gone, good = RecordingSink(ReaderGoneError()), RecordingSink()
    router = Router({"gone": gone, "good": good})
    sequencer = Sequencer(router, RowBuffer())
    sequencer.buffer.feed(rows(1))
    sequencer.flush()
    assert router.done
    assert router.reader_gone
    assert router.switched_off == {}
    assert times(good.rows) == [1]
    sequencer.buffer.feed(rows(2))
    sequencer.flush()
    assert times(good.rows) == [1]


@attrs.define(eq=False)
class Fragile(RecordingSink):
    """Fails in lost() or in close()."""

    fails_in: str = ""

    def lost(self, loss: Loss) -> None:
        if self.fails_in == "lost":
            raise TcplatError("cannot say so")
        super().lost(loss)

    def close(self, report: RunReport) -> None:
        super().close(report)
        if self.fails_in == "close":
            raise TcplatError("cannot end")


@pytest.mark.parametrize(("method", "said"), [("lost", "cannot say so"), ("close", "cannot end")])
def test_failure_in_any_method_switches_a_sink_off(method: str, said: str) -> None:
    bad, good = Fragile(fails_in=method), RecordingSink()
    router = Router({"bad": bad, "good": good})
    router.lost(Loss("tcp_client", "send", 1))
    router.close(REPORT)
    assert router.switched_off == {"bad": said}
    assert good.stream == [Loss("tcp_client", "send", 1)]
    assert good.reports == [REPORT]


# --- losses and the end


def test_loss_is_delivered_at_its_place(
    router: Router, sequencer: Sequencer, sink: RecordingSink
) -> None:
    first, loss, second = rows(1), Loss("tcp_client", "send", 3), rows(2)
    sequencer.buffer.feed(first)
    sequencer.flush()
    router.lost(loss)
    sequencer.buffer.feed(second)
    sequencer.flush()
    assert sink.stream == [*first, loss, *second]


def test_loss_is_delivered_before_the_first_younger_row(
    sequencer: Sequencer, sink: RecordingSink
) -> None:
    first, loss = Loss("tcp_client", "send", 3, 2, 4), Loss("tcp_client", "send", 1, 5, 6)
    sequencer.buffer.feed(rows(1, 3, 4))
    sequencer.lose(loss)
    sequencer.lose(first)
    sequencer.flush(2)
    assert sink.stream == rows(1)
    # One that is no later than the loss may still turn up.
    sequencer.buffer.feed(rows(2))
    sequencer.flush(3)
    assert sink.stream == [*rows(1, 2), first]
    sequencer.buffer.feed(rows(5, 6))
    sequencer.flush()
    assert sink.stream == [*rows(1, 2), first, *rows(3, 4, 5), loss, *rows(6)]
    assert not sequencer.waiting


def test_every_remaining_sink_is_closed_once() -> None:
    sinks = {name: RecordingSink() for name in ("a", "b")}
    off = RecordingSink(OSError("gone"))
    router = Router({**sinks, "off": off})
    sequencer = Sequencer(router, RowBuffer())
    sequencer.buffer.feed(rows(1))
    sequencer.flush()
    router.close(REPORT)
    assert [sink.reports for sink in sinks.values()] == [[REPORT], [REPORT]]
    assert off.reports == []


# --- between batches


@pytest.mark.parametrize("method", ["idle", "poll"])
def test_serving_sinks_are_called_between_batches(sink: RecordingSink, method: str) -> None:
    calls = []

    class Serving(RecordingSink):
        def idle(self) -> None:
            calls.append("idle")

        def poll(self) -> None:
            calls.append("poll")

    router = Router({"it": sink, "serving": Serving()})
    getattr(router, method)()
    assert calls == [method]
    assert router.sinks.keys() == {"it", "serving"}
    assert sink.batches == []


def test_sink_failing_between_batches_is_switched_off_alone(sink: RecordingSink) -> None:
    class Failing(RecordingSink):
        def poll(self) -> None:
            raise TcplatError("no more")

    router = Router({"failing": Failing(), "it": sink})
    router.poll()
    assert router.switched_off == {"failing": "no more"}
    assert router.sinks.keys() == {"it"}
    assert not router.done


# --- whatever a sink's code does


LOSS = Loss("tcp_client", "send", 1)


def everything(router: Router) -> None:
    """Call whatever a run calls."""
    sequencer = Sequencer(router, RowBuffer())
    router.begin()
    sequencer.buffer.feed(rows(1))
    sequencer.flush()
    router.lost(LOSS)
    router.merged(Merge(0, "a"))
    router.passed(1)
    router.poll()
    router.idle()
    router.aggregates(Aggregates(ts_ns=1, time_ns=1, elapsed_s=1.0, distributions=[], final=True))
    router.close(REPORT)
    router.cancel()


class SilentError(Exception):
    """Its str() raises, as a plugin's may."""

    def __str__(self) -> str:
        raise ValueError("in __str__")


RAISED = [
    (SystemExit(0), "SystemExit: 0"),
    (KeyboardInterrupt(), "KeyboardInterrupt"),
    (GeneratorExit(), "GeneratorExit"),
    (BaseExceptionGroup("two", [KeyboardInterrupt()]), "BaseExceptionGroup: two (1 sub-exception)"),
    (SilentError(), "SilentError"),
]


@pytest.fixture
def taken_over() -> Iterator[None]:
    """Handle SIGINT as `run` and `replay` do: no KeyboardInterrupt comes from the user."""
    before = signal.signal(signal.SIGINT, lambda _number, _frame: None)
    yield
    signal.signal(signal.SIGINT, before)


class Raises(RecordingSink):
    """In one method."""

    def __init__(self, method: str, error: BaseException) -> None:
        super().__init__()

        def fail(*_: object) -> None:
            raise error

        setattr(self, method, fail)


@pytest.mark.usefixtures("taken_over")
@pytest.mark.parametrize(("error", "said"), RAISED)
@pytest.mark.parametrize(
    "method", ["write", "lost", "close", "poll", "idle", "passed", "merged", "aggregates"]
)
def test_any_exception_switches_off_its_sink_alone(
    method: str, error: BaseException, said: str
) -> None:
    good, last = RecordingSink(), RecordingSink()
    router = Router({"good": good, "bad": Raises(method, error), "last": last})
    everything(router)
    assert router.switched_off == {"bad": said}
    for sink in (good, last):
        assert times(sink.rows) == [1]
        assert sink.stream[-1] == LOSS
        assert sink.reports == [REPORT]


@pytest.mark.usefixtures("taken_over")
@pytest.mark.parametrize(("error", "said"), RAISED)
def test_any_exception_of_begin_is_one_sentence(error: BaseException, said: str) -> None:
    with pytest.raises(TcplatError) as raised:
        Router({"bad": Raises("begin", error)}).begin()
    assert str(raised.value) == f"a sink cannot begin: {said}"


@pytest.mark.usefixtures("taken_over")
def test_every_sink_is_cancelled_despite_exceptions_of_another() -> None:
    calls = []

    class Cancelled(RecordingSink):
        def cancel(self) -> None:
            calls.append("cancel")

    Router({"bad": Raises("cancel", SystemExit(0)), "good": Cancelled()}).cancel()
    assert calls == ["cancel"]


class Bare:
    """A sink that has no more than it needs, and is not derived from Sink."""

    def __init__(self, **methods: Callable[..., None]) -> None:
        self.calls: list[str] = []
        vars(self).update(methods)

    def write(self, batch: Sequence[Event]) -> None:
        self.calls.append(f"write {len(batch)}")

    def lost(self, loss: Loss) -> None:
        self.calls.append(f"lost {loss.count}")

    def close(self, report: RunReport) -> None:
        self.calls.append(f"close {report.duration_s:g}")


def test_duck_typed_sink_needs_three_methods_alone() -> None:
    sink = Bare()
    router = Router({"it": sink})
    everything(router)
    assert sink.calls == ["write 1", "lost 1", "close 1"]
    assert router.switched_off == {}
    assert not router.serves
    assert not router.reports_time


@pytest.mark.parametrize(
    "method", ["begin", "merged", "passed", "poll", "idle", "aggregates", "cancel"]
)
def test_duck_typed_sink_is_called_for_methods_it_has(method: str) -> None:
    calls: list[object] = []
    router = Router({"it": Bare(**{method: lambda *_: calls.append(method)})})
    assert router.serves == (method == "poll")
    assert router.reports_time == (method == "passed")
    everything(router)
    assert calls == [method]


def test_sink_without_readers_lets_the_session_sleep() -> None:
    assert not Router({"it": RecordingSink()}).serves
    assert not Router({"it": RecordingSink()}).reports_time


@pytest.mark.parametrize("method", ["write", "lost", "close"])
def test_subclass_of_sink_must_define_write_lost_and_close(method: str) -> None:
    own = {name: lambda *_: None for name in ("write", "lost", "close") if name != method}
    with pytest.raises(TypeError, match=method):
        type("Lacks", (Sink,), own)()


@pytest.mark.usefixtures("taken_over")
@pytest.mark.parametrize("base", [Bare, RecordingSink])
def test_method_whose_lookup_raises_switches_the_sink_off(
    base: type[SinkLike], sink: RecordingSink
) -> None:
    def fail(_: object) -> None:
        raise SystemExit(3)

    odd = type("Odd", (base,), {"poll": property(fail)})
    router = Router({"odd": odd(), "it": sink})
    assert router.serves
    router.poll()
    assert router.switched_off == {"odd": "SystemExit: 3"}
    assert router.sinks.keys() == {"it"}


def test_keyboard_interrupt_does_not_switch_off_a_sink() -> None:
    """Where SIGINT has its default handler, as in commands other than run."""
    with pytest.raises(KeyboardInterrupt):
        Router({"it": Raises("poll", KeyboardInterrupt())}).poll()


def test_sink_cannot_change_the_batch_of_the_next() -> None:
    class Clears(RecordingSink):
        def write(self, batch: Sequence[Event]) -> None:
            batch.clear()  # type: ignore[attr-defined] # that is what it gets wrong

    good = RecordingSink()
    router = Router({"bad": Clears(), "good": good})
    sequencer = Sequencer(router, RowBuffer())
    sequencer.buffer.feed(rows(1, 2))
    sequencer.flush()
    assert times(good.rows) == [1, 2]
    assert router.switched_off.keys() == {"bad"}
