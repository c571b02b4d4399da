"""The conformance kit: built-in plugins pass it, and each fault is named."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import attrs
import pytest
from click.testing import CliRunner, Result
from tcplat_stages import directory, join

from tcplat_core import (
    Aggregates,
    Aggregation,
    Event,
    Histogram,
    Hook,
    HookPoint,
    Loss,
    Moment,
    Option,
    Options,
    Output,
    PluginError,
    ProbeSpec,
    ReadableMap,
    RunInfo,
    RunReport,
    Sink,
    SinkSpec,
    UsageError,
    Way,
    Wire,
    integer,
    tracepoint,
)
from tcplat_core import path as path_kind
from tcplat_core.cli.main import cli
from tcplat_core.registry.find import Found, Plugins
from tcplat_core.registry.new import create
from tcplat_core.testing import conformance, sink_checks, sink_trial
from tcplat_core.testing.check import Outcome, Subject
from tcplat_core.testing.conformance import checks, run
from tests.long import LONG

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _fewer_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough to tell apart what keeps rows; TCPLAT_LONG=1 for as many as `plugins check` takes."""
    if LONG:
        return
    # What joins rows remembers so many connections, and then no more: here after 15,000 events
    # instead of 180,000. All are bounded by the same code.
    monkeypatch.setattr(join, "MOST", 2048)
    monkeypatch.setattr(directory, "_MOST_OVER", 512)
    monkeypatch.setattr(directory, "_MOST_DONE", 4096)
    for name, value in (("MANY", 60_000), ("WARM", 20_000), ("GROWTH", 12 << 20)):
        monkeypatch.setattr(sink_checks, name, value)


COMPILED_BY_LIVE_TESTS = (
    *("compiles by kprobe]", "compiles by fentry]", "compiles with histograms]"),
    "programs]",
)
BUILT_IN = [found.name for found in Plugins.load().found if found.distribution == "tcplat"]


def test_built_in_plugins_are_found() -> None:
    assert {"tcp_client", "tcp_service", "xdp_port", "jsonl", "table"} <= set(BUILT_IN)


@pytest.mark.tcplat_plugin(*BUILT_IN, "histogram:format=json", root=False)
def test_built_in_plugins_conform(
    tcplat_check: Callable[[], None], request: pytest.FixtureRequest
) -> None:
    if not LONG and request.node.name.endswith(COMPILED_BY_LIVE_TESTS):
        pytest.skip("it compiles for seconds; tests/live/test_conformance.py makes this check, too")
    tcplat_check()


def not_checked(choice: str) -> dict[str, str]:
    return {
        one.check: one.why
        for _, one in conformance.check_plugin(choice)
        if one.verdict == "not checked"
    }


def test_sinks_at_a_socket_and_with_histograms_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink_checks, "MANY", 3 * 1000)  # how they do is above
    monkeypatch.setattr(sink_checks, "WARM", 1000)
    assert not_checked("msgpack") == {"full device": "it writes to a socket, not to a device"}
    assert not_checked("histogram") == {}


@pytest.mark.parametrize("kind", ["probe", "sink"])
def test_project_of_plugins_new_conforms(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, *_ = create(kind, f"fresh_{kind}", tmp_path)
    monkeypatch.syspath_prepend(str(project))
    entry = importlib.metadata.EntryPoint("fresh", f"tcplat_fresh_{kind}.plugin", "tcplat")
    found = [one for _, one in conformance.check_plugin(f"fresh_{kind}", Plugins.load([entry]))]
    assert "passed" in {one.verdict for one in found}
    assert [one for one in found if one.verdict == "failed"] == []


# --- planted faults: probes


class OwnEvent(Event, gc=False):
    rto_us: Annotated[int | None, Wire("u32", "a field of its own", nullable=True)]


SOURCE = """
int tp_gone(struct bpf_raw_tracepoint_args *ctx)
{
	struct tcplat_event *e = tcplat_reserve(HOOK_tp_gone, bpf_ktime_get_ns());

	if (!e)
		return 0;
	e->rto_us = 5;
	tcplat_submit(e);
	return 0;
}
"""
GONE = tracepoint("tcp:tcp_destroy_sock", "tp_gone", "struct sock *")

GOOD = ProbeSpec(
    name="gone",
    summary="each socket that goes",
    source=SOURCE,
    points=(HookPoint("close", (GONE,)),),
    event=OwnEvent,
    options=(Option(name="least", help="a number", convert=integer(0, 9), default=3),),
)


def without_root(spec: ProbeSpec | SinkSpec) -> Subject:
    return Subject(spec=spec, given={})


def outcome(spec: ProbeSpec | SinkSpec, check: str) -> Outcome:
    """Of one check."""
    subject = without_root(spec)
    return run(check, checks(subject)[check], subject)


def test_probe_used_for_fault_injection_conforms() -> None:
    subject = without_root(GOOD)
    verdicts = {name: run(name, check, subject) for name, check in checks(subject).items()}
    needs_root = {"attaches", "leaves nothing", "lets packets pass"}
    assert {one.check for one in verdicts.values() if one.verdict == "not checked"} == needs_root
    assert {one.verdict for one in verdicts.values()} == {"passed", "not checked"}
    assert verdicts["attaches"].why == "it needs root: run it with sudo"


def fails_on_listening(moment: Moment) -> str:
    if moment.state == "TCP_LISTEN":
        raise KeyError(moment.state)
    return "gone"


def an_option(**fields: Any) -> tuple[Option, ...]:
    return (Option(**{"name": "least", "help": "a number", **fields}),)


def in_points(*points: HookPoint) -> dict[str, Any]:
    return {"points": points}


def raises_type_error(text: str) -> int:
    return int(text) if text.isascii() else len(None)  # type: ignore[arg-type]  # the fault


class Narrow(Event, gc=False):
    rto_us: Annotated[int, Wire("u32", "ms, and it says µs", to=lambda raw: f"{raw} ms")]


class Picky(Event, gc=False):
    rto_us: Annotated[str, Wire("u32", "a word", to={0: "none", 1: "one"}.__getitem__)]


CLOSE = GOOD.points[0]


def also_from(hook: Hook) -> HookPoint:
    return attrs.evolve(CLOSE, also=(hook,))


PROBE_FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no summary": ({"summary": " "}, "help", "summary is empty: say in one line"),
    "a help of two lines": (
        {"options": an_option(help="a\nb")},
        "help",
        "the help of option least is unprintable, or has more than one line",
    ),
    "a default that does not convert": (
        {"options": an_option(convert=integer(1), default=0)},
        "options",
        "the default of option least, 0, does not convert (ValueError: it must be",
    ),
    "a default that is no valid value": (
        {"options": an_option(convert=integer(), default="5")},
        "options",
        "the default of option least is '5', and what a user writes as '5' becomes 5",
    ),
    "a converter that raises TypeError": (
        {"options": an_option(convert=raises_type_error, default=1)},
        "options",
        "has no len(): its converter has to raise ValueError, with a reason for the user",
    ),
    "two options of one name": (
        {"options": (*GOOD.options, *GOOD.options)},
        "options",
        "two options named 'least': rename one",
    ),
    "two points of one name": (
        in_points(CLOSE, CLOSE),
        "hook points",
        "two hook points are named 'close': rename one",
    ),
    "no points": (in_points(), "hook points", "it has no hook points"),
    "a point without a way": (
        in_points(HookPoint("close", ())),
        "hook points",
        "hook point 'close' has no mechanism",
    ),
    "a hook that nothing reports": (
        in_points(
            HookPoint("close", (Way("tracepoint", (attrs.evolve(GONE.hooks[0], quiet=True),)),))
        ),
        "hook points",
        "has no hook that reports: one of them must not be quiet",
    ),
    "a program for two functions": (
        in_points(CLOSE, HookPoint("reset", (tracepoint("tcp:tcp_send_reset", "tp_gone"),))),
        "hook points",
        "is for tracepoint:tcp:tcp_destroy_sock and for tracepoint:tcp:tcp_send_reset: its rows",
    ),
    "a kprobe among tracepoints": (
        in_points(HookPoint("close", (Way("tracepoint", (Hook("f", "tp_gone", "kprobe"),)),))),
        "hook points",
        "has the program tp_gone, which is a kprobe: give it a Way of its own",
    ),
    "a name that bcc attaches": (
        in_points(HookPoint("close", (tracepoint("tcp:tcp_destroy_sock", "kprobe__gone"),))),
        "hook points",
        "bcc attaches kprobe__gone by itself",
    ),
    "rows that no program makes": (
        in_points(also_from(Hook(GONE.hooks[0].func, "also_gone", "tracepoint", by="tp_went"))),
        "hook points",
        "also_gone is made by tp_went, which no hook point names",
    ),
    "rows of a program elsewhere": (
        in_points(also_from(Hook("tcp:tcp_probe", "also_gone", "tracepoint", by="tp_gone"))),
        "hook points",
        "also_gone is at tracepoint:tcp:tcp_probe, and tp_gone is for tracepoint:",
    ),
    "a constant of the core's": (
        {"defines": lambda _: {"TCPLAT_HOOKS": 1}},
        "constants",
        "defines() gives TCPLAT_HOOKS, and the core uses such names: rename it",
    ),
    "no words for a state": (
        {"describe": fails_on_listening},
        "descriptions",
        "describe() raises KeyError: 'TCP_LISTEN' for point 'close', state TCP_LISTEN",
    ),
    "too many words": (
        {"describe": lambda _: "a socket is gone"},
        "descriptions",
        "old_state None, err 0, 16 letters: the table's column has 15",
    ),
    "a conversion that gives another type": (
        {"event": Narrow},
        "round trip",
        "which does not fit the field's type (ValidationError: Expected `int`, got `str`",
    ),
    "a conversion that knows two values": (
        {"event": Picky},
        "round trip",
        "a record with rto_us = 2147483647 does not become a row (KeyError: 2147483647)",
    ),
    "a struct of its own": (
        {"source": "#pragma pack(1)\n" + SOURCE.replace("tp_gone(", "tp_went(")},
        "programs",
        "hook point 'close' names the program tp_gone, and the C has no such function",
    ),
    "a program without a hook": (
        {"source": SOURCE + "int tp_odd(void *ctx) { return 0; }\n"},
        "programs",
        "the C has a program tp_odd that no hook point names: name it, or make the function static",
    ),
    "a program that reports nothing": (
        {"source": "int tp_gone(void *ctx) { return 0; }\n"},
        "programs",
        "no record in the C is reserved with HOOK_tp_gone",
    ),
    "a misspelt member": (
        {"source": SOURCE.replace("e->rto_us", "e->rto_ms")},
        "compiles by tracepoint",
        "the C does not compile: gone.bpf.c:8: no member named 'rto_ms' in 'struct tcplat_event'",
    ),
    "a header that there is not": (
        {"source": "#include <tcplat/sockets.bpf.h>\n" + SOURCE},
        "compiles by tracepoint",
        "there is no header <tcplat/sockets.bpf.h>",
    ),
    "a kernel type that there is not": (
        {"types": ("tcp_socket",)},
        "compiles by tracepoint",
        "tcp_socket",
    ),
}


@pytest.mark.parametrize(("change", "check", "sentence"), PROBE_FAULTS.values(), ids=PROBE_FAULTS)
def test_fault_of_a_probe_is_named(change: dict[str, Any], check: str, sentence: str) -> None:
    found = outcome(attrs.evolve(GOOD, **change), check)
    assert found.verdict == "failed"
    assert sentence in found.why
    assert "\n" not in found.why


def test_record_laid_out_differently_by_the_compiler_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if tcplat itself were wrong: no declaration of a plugin causes it."""
    from tcplat_core.event.record import Record  # noqa: PLC0415 - this test alone plays with it

    right = Record.c_struct
    monkeypatch.setattr(
        Record, "c_struct", lambda record: right(record).replace("u32 rto_us", "u64 rto_us")
    )
    found = outcome(GOOD, "compiles by tracepoint")
    assert found.verdict == "failed"
    assert "tcplat_event" in found.why
    assert "in the compiled C than in the schema" in found.why


def test_check_that_cannot_run_is_not_passed() -> None:
    """All checks behind C that does not compile."""
    found = outcome(attrs.evolve(GOOD, source="int tp_gone("), "programs")
    assert found == Outcome("programs", "not checked", "the C does not compile by tracepoint")


# --- probes that count


COUNTING = """
#include <tcplat/owner.bpf.h>
#include <tcplat/histogram.bpf.h>
struct who { u32 pid, used; };
#define TCPLAT_KEY struct who
#define TCPLAT_KEYS 16
#include <tcplat/keyed.bpf.h>
#define TCPLAT_KEY_cpu struct who
#define TCPLAT_KEYS_cpu 8
#include <tcplat/keyed.bpf.h> /* as cpu */
BPF_F_TABLE("array", u32, u64, counts, TCPLAT_KEYS + 1, BPF_F_MMAPABLE);

int tp_count(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];
	struct who who = {.pid = bpf_get_current_pid_tgid() >> 32, .used = 1};
	struct who cpu = {.pid = bpf_get_smp_processor_id(), .used = 1};
	struct tcplat_sock *s = tcplat_lookup(sk);
	u32 number = tcplat_number(&who) + tcplat_cpu_number(&cpu);
	u64 *count = counts.lookup(&number);

	if (s && s->pid == who.pid)
		tcplat_sample(sk, s, HIST_wait, 5);
	if (count)
		lock_xadd(count, 1);
	return 0;
}
"""


def counts_in_the_kernel(*, quiet: bool) -> ProbeSpec:
    hook = Hook("tcp:tcp_sendmsg_locked", "tp_count", "tracepoint", quiet=quiet)
    return ProbeSpec(
        name="counting",
        summary="counts, and has no record",
        source=COUNTING,
        points=(HookPoint("counts", (Way("tracepoint", (hook,)),)),),
        event=OwnEvent,
        maps=(ReadableMap("keys", "=II"), ReadableMap("counts", "=Q")),
        poll=lambda _: (),
        histograms=(Histogram("wait", "a wait", ("counts",)),),
    )


@pytest.mark.parametrize("quiet", [True, False])
def test_probe_with_histograms_alone_needs_no_record(*, quiet: bool) -> None:
    subject = without_root(counts_in_the_kernel(quiet=quiet))
    found = {name: run(name, check, subject) for name, check in checks(subject).items()}
    assert "compiles with histograms" in found
    assert not [one for one in found.values() if one.verdict == "failed"]
    assert {name for name, one in found.items() if one.verdict == "not checked"} == {
        *("attaches", "leaves nothing", "lets packets pass"),
        *(["round trip"] if quiet else []),
    }


# --- the kit's own place, and its own faults


def in_a_file(**given: Any) -> SinkSpec:
    """Make a sink that replaces what is at its path, whatever that is."""

    class Replacing(Lines):
        pass

    def make(options: Options, run: RunInfo) -> Lines:
        Path(options["db"]).unlink(missing_ok=True)
        return Replacing(Output.open(str(options["db"]), run.stopping))

    option = Option(name="db", help="file to write", required=True, **given)
    return SinkSpec(name="lines", summary="lines", factory=make, options=(option,))


@pytest.mark.parametrize(
    "given",
    [
        {"example": "x.db", "metavar": "FILE"},
        {"example": "x.db", "convert": path_kind},
        {"example": "x.db"},  # nothing says that it is a path: but it lands in the kit's folder
        {"example": "{here}/x.db"},
        {"example": "{here}/x.db", "convert": Path},
    ],
    ids=["by its metavar", "by its kind", "not said", "absolute", "absolute, by its kind"],
)
def test_example_path_touches_no_file_of_the_user(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    users = tmp_path / "x.db"
    users.write_text("precious")
    spec = in_a_file(**{**given, "example": given["example"].format(here=tmp_path)})
    for check in ("methods", "batches", "close twice", "full device"):
        assert outcome(spec, check).verdict != "failed"
    assert users.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["x.db"]
    assert Path.cwd() == tmp_path


def test_given_path_is_tried_on_a_copy(tmp_path: Path) -> None:
    users = tmp_path / "x.db"
    users.write_text("precious")

    def make(options: Options, run: RunInfo) -> Lines:
        if Path(options["db"]).read_text(encoding="utf-8") != "precious":
            raise UsageError("that is not my database")
        Path(options["db"]).write_text("", encoding="utf-8")
        return Lines(Output.open(None, run.stopping))

    spec = attrs.evolve(in_a_file(example="x.db", metavar="FILE"), factory=make)
    subject = Subject(spec=spec, given={"db": str(users)})
    assert run("batches", checks(subject)["batches"], subject) == Outcome("batches", "passed")
    assert users.read_text() == "precious"


@pytest.mark.parametrize("error", [ZeroDivisionError, ValueError, OSError, AttributeError])
def test_failure_of_the_kit_is_not_blamed_on_the_plugin(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error("ours")

    found = run("one", fails, without_root(GOOD))
    assert (found.verdict, found.why.partition(":")[0]) == (
        "not checked",
        f"the kit itself failed ({error.__name__}",
    )
    # In the process of the sink as well, where exceptions of the sink are recognised.
    monkeypatch.setattr(sink_checks, "stream", fails)
    found = outcome(sink(Lines), "batches")
    assert (found.verdict, "the kit itself failed" in found.why) == ("not checked", True)


def test_exception_of_the_plugin_is_a_failed_check() -> None:
    class Divides(Lines):
        def write(self, batch: Sequence[Event]) -> None:
            raise ZeroDivisionError(len(batch))

    class Lacks:
        """A sink without methods."""

    assert "it raises ZeroDivisionError" in outcome(sink(Divides), "batches").why
    lacks = attrs.evolve(sink(Lines), factory=lambda *_: cast("Sink", Lacks()))
    assert outcome(lacks, "batches").verdict == "failed"
    spec = attrs.evolve(GOOD, defines=lambda _: {"A": 1 // 0})
    assert outcome(spec, "constants").why == (
        "it raises ZeroDivisionError: integer division or modulo by zero: it must not"
    )


class Unprintable(BaseException):
    """An exception whose str() fails."""

    def __str__(self) -> str:
        raise SystemExit(4)


ODD = {
    "SystemExit: 3": SystemExit(3),
    "GeneratorExit": GeneratorExit(),
    "BaseExceptionGroup: two (1 sub-exception)": BaseExceptionGroup("two", [SystemExit(3)]),
    "Unprintable": Unprintable(),
}


def raises(error: BaseException) -> Callable[..., Any]:
    def it(*_: object) -> Any:
        raise error

    return it


@pytest.mark.parametrize("said", ODD)
def test_any_exception_of_a_probe_fails_the_check(said: str) -> None:
    it = raises(ODD[said])
    odd = {"rto_us": Annotated[int, Wire("u32", "never", to=it)]}
    event = type("Odd", (Event,), {"__annotations__": odd}, gc=False)
    for changes, check, words in (
        ({"describe": it}, "descriptions", f"describe() raises {said} for point 'close'"),
        ({"defines": it}, "constants", f"it raises {said}: it must not"),
        ({"options": an_option(convert=it, default=3)}, "options", f"does not convert ({said})"),
        ({"options": an_option(convert=it)}, "options", f"option least='' raises {said}: "),
        ({"event": event}, "round trip", f"does not become a row ({said})"),
    ):
        done = outcome(attrs.evolve(GOOD, **changes), check)
        assert (done.verdict, words in done.why) == ("failed", True), done


@pytest.mark.parametrize("said", ODD)
def test_any_exception_inside_a_check_fails_it(said: str) -> None:
    done = run("it", raises(ODD[said]), without_root(GOOD))
    assert done == Outcome("it", "failed", f"it raises {said}: it must not")


# --- planted faults: sinks


@attrs.define(eq=False)
class Lines:
    """A sink without a fault: one line for each row."""

    output: Output

    def write(self, batch: Sequence[Event]) -> None:
        self.output.write("".join(f"{row.comm!r} {row.desc!a}\n" for row in batch).encode())

    def lost(self, loss: Loss) -> None:
        self.output.write(f"lost {loss.count}\n".encode())

    def close(self, report: RunReport) -> None:
        if not self.output.closed:
            self.output.write(f"{report.delivered} rows\n".encode())
        self.output.close()


def sink(cls: type[Lines]) -> SinkSpec:
    return SinkSpec(
        name="lines",
        summary="one line for each row",
        factory=lambda _, run: cls(Output.open(None, run.stopping)),
    )


@pytest.mark.parametrize("said", ODD)
def test_any_exception_of_a_sink_fails_the_check(said: str) -> None:
    class Odd(Lines):
        def write(self, batch: Sequence[Event]) -> None:
            if any(row.pid is None for row in batch):
                raise ODD[said]
            super().write(batch)

        def close(self, report: RunReport) -> None:
            if self.output.closed:
                raise ODD[said]
            super().close(report)

    done = outcome(sink(Odd), "close twice")
    assert done.why == f"a second close() raises {said}: let it do nothing"
    done = outcome(sink(Odd), "nulls")
    assert done.verdict == "failed"
    assert said in done.why


class SwallowsErrors(Lines):
    def write(self, batch: Sequence[Event]) -> None:
        try:
            super().write(batch)
        except Exception:  # noqa: BLE001 - the fault
            return

    def lost(self, loss: Loss) -> None: ...

    def close(self, report: RunReport) -> None: ...


class KeepsAll(Lines):
    kept: list[Event] = []  # noqa: RUF012 - in a process of its own

    def write(self, batch: Sequence[Event]) -> None:
        self.kept.extend(batch)


class WantsRows(Lines):
    def write(self, batch: Sequence[Event]) -> None:
        assert batch[0].ts_ns
        super().write(batch)


class BreaksLines(Lines):
    def write(self, batch: Sequence[Event]) -> None:
        self.output.write("".join(f"{row.comm}\n" for row in batch).encode())


class CommandsTerminal(Lines):
    def write(self, batch: Sequence[Event]) -> None:
        self.output.write(
            "".join(f"{' '.join((row.comm or '').split())}\n" for row in batch).encode()
        )


class CountsBatches(Lines):
    def write(self, batch: Sequence[Event]) -> None:
        super().write(batch)
        self.output.write(b"---\n")


class ClosesOnce(Lines):
    def close(self, report: RunReport) -> None:  # noqa: ARG002 - it does nothing with it
        self.output.write(b"end\n")
        os.close(self.output.fd)


class HoldsBack(Lines):
    kept = b""

    def write(self, batch: Sequence[Event]) -> None:
        self.kept += b"".join(b"row\n" for _ in batch)
        if len(self.kept) > 100:
            self.output.write(self.kept)
            self.kept = b""


class HalfLines(Lines):
    def write(self, batch: Sequence[Event]) -> None:
        self.output.write("".join(f"\n{row.comm!r}" for row in batch).encode())


class WantsPort(Lines):
    def write(self, batch: Sequence[Event]) -> None:
        self.output.write("".join(f"{row.sport:5}\n" for row in batch).encode())


class ExitsOnError(Lines):
    def write(self, batch: Sequence[Event]) -> None:
        try:
            super().write(batch)
        except Exception:  # noqa: BLE001 - the fault
            os._exit(1)


class MisunderstandsReader(Lines):
    def write(self, batch: Sequence[Event]) -> None:
        os.write(1, b"row\n" * len(batch))


class CountsProbes(Lines):
    def close(self, report: RunReport) -> None:
        next(iter(report.probes.values()))
        super().close(report)


class LosesArgument(Lines):
    def lost(self) -> None: ...  # type: ignore[override]  # the fault


class NoLost:
    write = Lines.write
    close = Lines.close

    def __init__(self, output: Output) -> None:
        self.output = output


SINK_FAULTS: dict[str, tuple[Any, str, str]] = {
    "it swallows a failing write": (
        SwallowsErrors,
        "full device",
        "its output is on a full device, and no error is raised",
    ),
    "it ends the process": (
        ExitsOnError,
        "full device",
        "it ends the whole process (status 256): let it raise instead",
    ),
    "it keeps all rows": (
        KeepsAll,
        "bounded memory",
        f"MB over {800_000 if LONG else 40_000} events: let it drop",
    ),
    "it shows where a batch ends": (
        CountsBatches,
        "batches",
        "rows one by one give another output than the same rows at once",
    ),
    "it wants a row": (WantsRows, "empty batch", "it raises IndexError: list index out of range"),
    "it breaks on a newline": (
        BreaksLines,
        "every byte",
        "a raw byte (0x0a in comm) breaks its lines: escape what is not printable",
    ),
    "it lets ESC through": (
        CommandsTerminal,
        "every byte",
        "a raw byte ('\\x00') gets through to the terminal: escape what is not printable",
    ),
    "it cannot be closed twice": (
        ClosesOnce,
        "close twice",
        "a second close() raises TcplatError: writing failed: Bad file descriptor",
    ),
    "it holds rows back": (
        HoldsBack,
        "flushes",
        "a row is not in its output when write() returns: it has a buffer",
    ),
    "it ends within a line": (HalfLines, "flushes", "its output ends within a line"),
    "it wants a port": (WantsPort, "nulls", "it fails where sport is null (connect): TypeError"),
    "it knows no ReaderGoneError": (
        MisunderstandsReader,
        "reader gone",
        "it raises BrokenPipeError: [Errno 32] Broken pipe: raise ReaderGoneError",
    ),
    "it wants a probe in the report": (
        CountsProbes,
        "losses and report",
        "it raises StopIteration",
    ),
    "lost() takes no argument": (LosesArgument, "methods", "lost() does not take one argument"),
    "it has no lost()": (NoLost, "methods", "it has no method lost(): a run calls it"),
}


def test_sink_used_for_fault_injection_conforms() -> None:
    subject = without_root(sink(Lines))
    found = [run(name, check, subject) for name, check in checks(subject).items()]
    assert [one for one in found if one.verdict != "passed"] == []


@pytest.mark.parametrize(("cls", "check", "sentence"), SINK_FAULTS.values(), ids=SINK_FAULTS)
def test_fault_of_a_sink_is_named(cls: Any, check: str, sentence: str) -> None:
    found = outcome(sink(cls), check)
    assert found.verdict == "failed", found
    assert sentence in found.why


def test_joining_sink_may_hold_rows_back() -> None:
    class Joins(Lines):
        joins = True
        rows = 0

        def write(self, batch: Sequence[Event]) -> None:
            self.rows += len(batch)
            if self.rows > 1500:
                self.output.write(b"many rows\n")

    found = outcome(sink(Joins), "flushes")
    assert found.verdict == "not checked"
    assert found.why == "it summarizes many rows at once, and has waited for more of them"


# --- planted faults: sinks at a socket


@attrs.define(eq=False)
class Served:
    """A sink without a fault: one line for each row to every reader with room for it."""

    listening: socket.socket
    readers: list[socket.socket] = attrs.field(factory=list)

    def write(self, batch: Sequence[Event]) -> None:
        self.poll()
        self.send("".join(f"{row.comm!a} {row.desc!a}\n" for row in batch).encode())

    def lost(self, loss: Loss) -> None:
        self.send(f"lost {loss.count}\n".encode())

    def poll(self) -> None:
        with contextlib.suppress(BlockingIOError):
            made, _ = self.listening.accept()
            self.readers.append(made)

    def close(self, report: RunReport) -> None:
        self.send(f"{report.delivered} rows\n".encode())
        while self.readers:
            self.readers.pop().close()

    def send(self, data: bytes) -> None:
        for reader in self.readers:
            with contextlib.suppress(OSError):
                reader.send(data, socket.MSG_DONTWAIT)


@attrs.define(eq=False)
class WaitsForReaders(Served):
    """It keeps for each reader what is unsent."""

    waiting: dict[socket.socket, deque[Sequence[Event]]] = attrs.field(factory=dict)

    def write(self, batch: Sequence[Event]) -> None:
        self.poll()
        for reader in self.readers:
            waiting = self.waiting.setdefault(reader, deque())
            waiting.append(batch)
            with contextlib.suppress(BlockingIOError):
                while waiting:
                    reader.send(b"row" * 9 * len(waiting[0]), socket.MSG_DONTWAIT)
                    waiting.popleft()


class CannotLetGo(Served):
    def send(self, data: bytes) -> None:
        for reader in self.readers:
            reader.sendall(data)


class SendsLater(Served):
    """It sends a greeting on connect, and buffers rows."""

    kept = b"hello\n"

    def write(self, batch: Sequence[Event]) -> None:
        self.poll()
        self.send(self.kept)
        self.kept = b"".join(b"row\n" for _ in batch)


class HangsUpTwice(Served):
    def close(self, report: RunReport) -> None:
        super().close(report)
        self.listening.listen()
        self.listening.close()


def served(cls: type[Served]) -> SinkSpec:
    def make(options: Options, _: RunInfo) -> Served:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(options["unix"])
        listening.listen()
        listening.setblocking(False)
        return cls(listening)

    return SinkSpec(
        name="served",
        summary="one line for each row",
        factory=make,
        options=(Option(name="unix", help="path of the socket"),),
    )


def test_socket_sink_used_for_fault_injection_conforms() -> None:
    subject = without_root(served(Served))
    found = [run(name, check, subject) for name, check in checks(subject).items()]
    assert [one.check for one in found if one.verdict != "passed"] == ["full device"]


@pytest.mark.parametrize(
    ("cls", "check", "sentence"),
    [
        (WaitsForReaders, "bounded memory", "its memory grows by"),
        (CannotLetGo, "reader gone", "closed its socket, and it raises BrokenPipeError"),
        (SendsLater, "flushes", "a row is not in its output when write() returns"),
        (HangsUpTwice, "close twice", "a second close() raises OSError"),
    ],
)
def test_fault_of_a_socket_sink_is_named(cls: type[Served], check: str, sentence: str) -> None:
    found = outcome(served(cls), check)
    assert found.verdict == "failed", found
    assert sentence in found.why


# --- planted faults: sinks of what the kernel counts


class Counts(Lines):
    """A sink without a fault."""

    def aggregates(self, them: Aggregates) -> None:
        self.output.write(
            "".join(f"{one.group.comm!a} {one.count}\n" for one in them.distributions).encode()
        )


class TrustsNames(Counts):
    def aggregates(self, them: Aggregates) -> None:
        self.output.write(
            "".join(f"{one.group.comm} {one.count}\n" for one in them.distributions).encode()
        )


class HasNoAggregates(Lines): ...


class HasSinksAggregates(Lines, Sink): ...


class Derived(Counts, Sink): ...


def counting(cls: type[Lines]) -> SinkSpec:
    return attrs.evolve(sink(cls), aggregate=lambda _: Aggregation("process", 16, 1))


@pytest.mark.parametrize("cls", [Counts, Derived])
def test_histogram_sink_used_for_fault_injection_conforms(cls: type[Lines]) -> None:
    subject = without_root(counting(cls))
    found = [run(name, check, subject) for name, check in checks(subject).items()]
    assert [one for one in found if one.verdict != "passed"] == []


@pytest.mark.parametrize(
    ("cls", "check", "sentence"),
    [
        (TrustsNames, "every byte", "gets through to the terminal: escape what is not printable"),
        (HasNoAggregates, "methods", "it has no method aggregates(): a run calls it"),
        (HasSinksAggregates, "methods", "it has no method aggregates(): a run calls it"),
    ],
)
def test_fault_of_a_histogram_sink_is_named(cls: type[Lines], check: str, sentence: str) -> None:
    found = outcome(counting(cls), check)
    assert found.verdict == "failed", found
    assert sentence in found.why


def test_sink_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hangs(Lines):
        def write(self, batch: Sequence[Event]) -> None:  # noqa: ARG002 - it does nothing with it
            time.sleep(60)

    monkeypatch.setattr(sink_trial, "_TIMEOUT_S", 0.5)
    assert outcome(sink(Hangs), "batches").why == "it did not return within 0 s"


def test_sink_that_writes_no_output_is_not_checked() -> None:
    class Silent(Lines):
        def write(self, batch: Sequence[Event]) -> None: ...

        def close(self, report: RunReport) -> None: ...

    for check in ("full device", "flushes", "reader gone", "every byte"):
        assert outcome(sink(Silent), check).verdict == "not checked"


# --- plugins that do not even load


PLUGIN = """
from tcplat_core import Event, HookPoint, ProbeSpec, Wire, hookimpl, tracepoint
from typing import Annotated
{extra}
class Own(Event, gc=False):
    {field}: Annotated[int, Wire({c_type!r}, "a field")]

@hookimpl
def {hook}():
    yield ProbeSpec(name="theirs", summary="s", source="", points=(), event=Own)
"""
UNLOADABLE = {
    "a misspelt hook": (
        {"hook": "tcplat_register_probe"},
        "there is no hook tcplat_register_probe; it is tcplat_register_probes",
    ),
    "a newer hook specification": (
        {"extra": "tcplat_hookspec = '99.0'"},
        "it was made for version 99.0 of the plugin hooks, and this tcplat has",
    ),
    "a field of the core's": ({"field": "pid"}, "Own.pid is already a field of every event"),
    "a member of the core's": ({"field": "err"}, "the record already has a member 'err'"),
    "a type that no record has": ({"c_type": "u32[4]"}, "a field cannot be of the C type 'u32[4]'"),
}


@pytest.mark.parametrize(("change", "sentence"), UNLOADABLE.values(), ids=UNLOADABLE)
def test_plugin_that_does_not_load_is_broken(
    change: dict[str, str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"extra": "", "field": "rto_us", "c_type": "u32", "hook": "tcplat_register_probes"}
    name = f"theirs_{abs(hash(sentence))}"
    (tmp_path / f"{name}.py").write_text(PLUGIN.format(**(parts | change)))
    monkeypatch.syspath_prepend(tmp_path)
    entry = importlib.metadata.EntryPoint("theirs", name, "tcplat")
    with pytest.raises(PluginError, match=r"plugin theirs .* is broken: ") as caught:
        conformance.subjects("theirs", Plugins.load([entry]))
    assert sentence in str(caught.value)


# --- the command


def check(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["plugins", "check", *arguments])


@pytest.fixture
def unprivileged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Act as without root: these tests load and attach nothing."""
    monkeypatch.setattr("tcplat_core.testing.trial_process.as_root", lambda: None)


@pytest.mark.usefixtures("unprivileged")
def test_plugins_check_prints_each_check_and_a_summary() -> None:
    done = check("xdp_port:iface=lo,port=9999")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0] == "probe xdp_port:iface=lo,port=9999"
    assert "  passed       round trip" in lines
    assert "  not checked  attaches: it needs root: run it with sudo" in lines
    assert lines[-1] == "8 passed, 0 failed, 3 not checked"


@pytest.mark.usefixtures("unprivileged")
def test_plugins_check_prints_json() -> None:
    done = check("xdp_port", "--json")
    (one,) = json.loads(done.stdout)
    assert (one["name"], one["kind"]) == ("xdp_port", "probe")
    # Its own examples, where nothing is given.
    assert one["options"] == {"iface": "eth0", "port": "80+443"}
    assert (one["passed"], one["failed"], one["not_checked"]) == (8, 0, 3)
    assert {
        "check": "attaches",
        "verdict": "not checked",
        "why": "it needs root: run it with sudo",
    } in one["checks"]


@pytest.mark.usefixtures("unprivileged")
def test_failed_check_exits_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = attrs.evolve(GOOD, summary="", source="int tp_gone(")
    found = Found("gone", "probe", "1.0", "theirs", "ok", faulty.summary)
    plugins = Plugins(probes={"gone": faulty}, found=[found])
    monkeypatch.setattr(Plugins, "load", lambda: plugins)
    done = check("gone")
    assert done.exit_code == 1
    assert "  FAILED       help: summary is empty: say in one line what it is for" in done.stdout


@pytest.mark.parametrize(
    ("choice", "status", "sentence"),
    [
        ("no_such_thing", 4, "there is no plugin named 'no_such_thing'"),
        ("jsonl:color=red", 2, "sink jsonl has no option 'color'"),
        ("xdp_port:port=none", 2, "is not a port"),
    ],
)
def test_unusable_choice_is_refused_in_one_sentence(
    choice: str, status: int, sentence: str
) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("tcplat"), "plugins", "check", choice],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (status, "")
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_c_is_compiled_without_any_capability() -> None:
    """Bcc needs privileges for creating maps alone, after it has compiled."""
    drop = ("setpriv", "--bounding-set=-all", "--inh-caps=-all") if os.geteuid() == 0 else ()
    tcplat = str(Path(sys.executable).with_name("tcplat"))
    port = secrets.randbelow(1 << 16) or 1
    done = subprocess.run(
        # A port of its own: what was compiled before would be in the cache.
        [*drop, tcplat, "plugins", "check", f"dev_xmit:port={port}", "--json"],
        capture_output=True,
        check=True,
    )
    verdicts = {one["check"]: one for one in json.loads(done.stdout)[0]["checks"]}
    for name in ("compiles by tracepoint", "programs"):
        assert verdicts[name]["verdict"] == "passed", verdicts[name]
    assert verdicts["attaches"]["verdict"] == "not checked"


# --- for pytest


def test_pytest_plugin_makes_a_test_of_each_check(tmp_path: Path) -> None:
    test = tmp_path / "test_theirs.py"
    test.write_text(
        "import pytest\n"
        '@pytest.mark.tcplat_plugin("jsonl")\n'
        "def test_plugin_conforms(tcplat_check): tcplat_check()\n"
    )
    run_it = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--strict-markers")
    done = subprocess.run(
        [*run_it, "-v", "-k", "methods or nulls", test],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert "test_plugin_conforms[methods] PASSED" in done.stdout
    assert "test_plugin_conforms[nulls] PASSED" in done.stdout
    assert "2 passed, 11 deselected" in done.stdout


@pytest.mark.parametrize(
    ("mark", "sentence"),
    [
        ("", 'uses tcplat_check, and no mark names the plugin: @pytest.mark.tcplat_plugin("NAME")'),
        ('@pytest.mark.tcplat_plugin("gone")', "there is no plugin named 'gone'; there is "),
        ('@pytest.mark.tcplat_plugin("jsonl:color=red")', "sink jsonl has no option 'color'"),
    ],
    ids=["no mark", "no such plugin", "no such option"],
)
def test_pytest_plugin_refuses_a_wrong_mark_in_one_sentence(
    mark: str, sentence: str, tmp_path: Path
) -> None:
    test = tmp_path / "test_theirs.py"
    test.write_text(f"import pytest\n{mark}\ndef test_it(tcplat_check): tcplat_check()\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", test],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == pytest.ExitCode.INTERRUPTED
    assert sentence in done.stdout
    assert "Traceback" not in done.stdout
