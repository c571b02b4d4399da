"""Captures: recorded rows are replayed unchanged; damaged ones are skipped and reported."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, get_args, get_origin, get_type_hints

import attrs
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcplat_core import SCHEMA_VERSION, Event, Loss, RunInfo, RunReport
from tcplat_core.capture.replay import Replay
from tcplat_core.capture.rows import Capture
from tcplat_core.capture.source import Source
from tcplat_core.errors import TcplatError, UsageError
from tcplat_core.loader.filter import Filter
from tcplat_core.plugin.connecting import connect
from tcplat_core.plugin.options import parse_choice, read_options
from tcplat_core.plugin.report import Counted, HookReport, ProbeReport, add_reports
from tcplat_core.registry.find import Plugins
from tcplat_core.run.signals import NOTHING_REPLAYED
from tcplat_core.testing import RecordingSink, make_event
from tests.long import LONG

PLUGINS = Plugins.load()
DATA = Path(__file__).with_name("data")
EVENTS = {name: spec.event for name, spec in PLUGINS.probes.items()}


class Retransmit(Event):
    """A row of a probe that is not installed."""

    rto: float
    why: str


def rows_of_all_probes(count: int) -> list[Event]:
    """In turns of tcp_client, tcp_service, xdp_port and a probe that is not installed."""
    rows: list[Event] = []
    for number in range(1, count + 1):
        fields: dict[str, Any] = {"ts_ns": number, "comm": r"a\x1bb"}
        if number % 4 == 0:
            rows.append(make_event(Retransmit, probe="retransmit", rto=204e3, why="É", **fields))
        elif number % 4 == 1:
            rows.append(make_event(EVENTS["tcp_client"], connect_us=0.1, **fields))
        elif number % 4 == 2:
            fields |= {"call_us": 1.234, "accept_us": None}
            rows.append(make_event(EVENTS["tcp_service"], probe="tcp_service", **fields))
        else:
            fields |= {"ack": 2**32 - 1, "window": 0, "sock": 0, "pid": None, "point": "nic_rx"}
            rows.append(make_event(EVENTS["xdp_port"], probe="xdp_port", **fields))
    return rows


def report_of(rows: Sequence[Event], losses: Sequence[Loss] = ()) -> RunReport:
    """Return the books of a run that delivered these rows."""
    probes = {}
    for row in {row.probe: row for row in rows}.values():
        count = sum(other.probe == row.probe for other in rows)
        lost = sum(loss.count for loss in losses if loss.probe == row.probe)
        hook = HookReport(row.point, row.func, row.attach, count + lost, lost, count)
        probes[row.probe] = ProbeReport(hooks=(hook,), missing={"accept": "no such"}, untracked=2)
    return RunReport(probes=probes, duration_s=1.25, switched_off={"table": "disk full"})


def encoded(item: object, form: str = "jsonl") -> bytes:
    """Return a row, a loss or a report, as sinks write them."""
    if isinstance(item, Loss):
        item = {"v": SCHEMA_VERSION, "lost": attrs.asdict(item)}
    elif isinstance(item, RunReport):
        item = {"v": SCHEMA_VERSION, "report": item.as_json()}
    return msgspec.json.encode(item) + b"\n" if form == "jsonl" else msgspec.msgpack.encode(item)


@attrs.define
class Played:
    """The result of a replay."""

    sink: RecordingSink
    said: list[str]

    @property
    def report(self) -> RunReport:
        (report,) = self.sink.reports
        return report

    @property
    def times(self) -> list[int]:
        return [row.ts_ns for row in self.sink.rows]


@pytest.fixture
def replay(tmp_path: Path) -> Callable[..., Played]:
    """Replay these bytes to a recording sink."""

    def call(data: bytes, **how: Any) -> Played:
        path = tmp_path / "capture"
        path.write_bytes(data)
        return played(Source.open(str(path)), **how)

    return call


def played(source: Source, **how: Any) -> Played:
    sink, said = RecordingSink(), list[str]()
    one = Replay(source, Capture(EVENTS, said.append), {"it": sink}, **how)
    try:
        said += one.summary(one.run())
    finally:
        os.close(source.fd)
    return Played(sink, said)


Replayed = Callable[..., Played]
ROWS = rows_of_all_probes(8)
GOOD = b"".join(map(encoded, [*ROWS, report_of(ROWS)]))

# --- nothing changes on the way


@pytest.mark.parametrize("form", ["jsonl", "msgpack"])
def test_rows_losses_and_report_survive_a_replay(replay: Replayed, form: str) -> None:
    rows = rows_of_all_probes(5000)  # more than a chunk
    losses = [Loss("tcp_client", "send", 3), Loss("xdp_port", "nic_rx", 1)]
    stream: list[Event | Loss] = [*rows[:10], losses[0], *rows[10:4000], losses[1], *rows[4000:]]
    report = report_of(rows, losses)
    found = replay(b"".join(encoded(item, form) for item in [*stream, report]))
    assert [encoded(item) for item in found.sink.stream] == [encoded(item) for item in stream]
    assert encoded(found.report) == encoded(report)
    assert found.said == []
    for probe, event in EVENTS.items():
        assert {type(row) for row in found.sink.rows if row.probe == probe} <= {event}


def test_report_survives_json() -> None:
    report = report_of(ROWS, [Loss("tcp_client", "send", 3)])
    again = RunReport.from_json(json.loads(json.dumps(report.as_json())))
    assert again == report
    assert again.as_json() == report.as_json()


def made_of(kind: Any, number: int) -> Any:
    """Draw a value of a type; no field of a class has its default."""
    if attrs.has(kind):
        kinds = enumerate(get_type_hints(kind, include_extras=True).items(), number)
        values = {name: made_of(one, place) for place, (name, one) in kinds}
        return kind(**values)
    of = get_args(kind)
    if get_origin(kind) is tuple:
        return (made_of(of[0], number), made_of(of[0], number + 10))
    if get_origin(kind) is Mapping:
        return {f"key {number}": made_of(of[1], number)}
    if of:  # Annotated, or a union with None
        return made_of(of[0], number)
    return {bool: True, int: number + 1, float: number + 0.25, str: f"text {number}"}[kind]


def test_report_with_every_field_survives_json() -> None:
    report = made_of(RunReport, 1)
    assert isinstance(report, RunReport)
    again = RunReport.from_json(json.loads(json.dumps(report.as_json())))
    assert again == report
    assert again.as_json() == report.as_json()


def test_json_key_of_a_probe_without_interfaces_is_deaf() -> None:
    report = RunReport(probes={"x": ProbeReport(hooks=(), interfaces_gone=True)}, duration_s=1)
    written = report.as_json()["probes"]["x"]
    assert written["deaf"] is True
    assert "interfaces_gone" not in written
    kept = RunReport(probes={"x": ProbeReport(hooks=())}, duration_s=1)
    assert "deaf" not in kept.as_json()["probes"]["x"]


@pytest.mark.parametrize("form", ["jsonl", "msgpack"])
def test_hooks_beyond_1024_are_skipped(replay: Replayed, form: str) -> None:
    made = [make_event(ts_ns=n, point=f"point {n}") for n in range(1, 3001)]
    stream: list[Any] = [*made, *(Loss("a", f"point {n}", 1) for n in range(3000)), *made]
    found = replay(b"".join(encoded(one, form) for one in stream))
    books = [hook for probe in found.report.probes.values() for hook in probe.hooks]
    assert len(books) == 1024
    assert len(found.sink.rows) == 2 * 1024  # what is known already is read
    assert f"{9000 - 2 * 1024} {'lines' if form == 'jsonl' else 'maps'}" in " ".join(found.said)
    assert any("the capture then has too many hooks" in words for words in found.said)


def test_histogram_counts_of_the_capture_are_kept(replay: Replayed) -> None:
    counted = {"ready_recv": Counted(samples=7, unmeasured=1, rest=0)}
    probe = ProbeReport(hooks=(), counted=counted, uncounted={"queue": "no such function"})
    report = RunReport(probes={"tcp_service": probe}, duration_s=1)
    assert replay(encoded(report)).report == report


@pytest.mark.parametrize("sink", ["jsonl", "table", "table:width=120"])
@pytest.mark.parametrize("form", ["jsonl", "msgpack"])
def test_every_sink_writes_the_same_live_and_replayed(tmp_path: Path, form: str, sink: str) -> None:
    rows = rows_of_all_probes(100)
    path, live = tmp_path / "in", tmp_path / "live"
    path.write_bytes(b"".join(encoded(item, form) for item in [*rows, report_of(rows)]))
    name, given = parse_choice(sink)
    spec = PLUGINS.sink(name)
    one = spec.factory(read_options("", spec.options, {**given, "path": str(live)}), RunInfo(()))
    for start in range(0, 100, 7):
        one.write(rows[start : start + 7])
    one.close(report_of(rows))
    assert tcplat("replay", str(path), "--sink", sink).stdout == live.read_bytes()


def tcplat(*arguments: str, **how: Any) -> subprocess.CompletedProcess[bytes]:
    """Run the whole program."""
    return subprocess.run(
        [sys.executable, "-I", "-m", "tcplat_core", *arguments],
        capture_output=True,
        check=False,
        timeout=120,
        env={**os.environ, "COLUMNS": ""},
        **how,
    )


def test_standard_input_is_read_as_a_capture() -> None:
    done = tcplat("replay", "-", "--sink", "jsonl", "-q", input=GOOD)
    assert (done.returncode, done.stdout, done.stderr) == (0, GOOD, b"")


@pytest.mark.parametrize(
    "arguments",
    [
        ("replay", "{path}", "-q", "--sink", "jsonl"),
        ("replay", "{path}", "-q", "--sink", "jsonl:path={path}"),
        ("replay", "{path}", "-q", "--sink", "table:path=/dev/null", "--sink", "jsonl:path={link}"),
        ("report", "{path}", "-q", "-o", "{link}"),
        ("report", "{link}", "-q", "-o", "{path}"),
        ("report", "{path}", "-q", "-o", "-"),
        ("report", "{path}", "-q", "--format", "perfetto", "-o", "{path}"),
        ("merge", "{path}", "{other}", "-q", "-o", "{path}"),
        ("merge", "{other}", "{path}", "-q", "-o", "{hard}"),
    ],
    ids=" ".join,
)
def test_capture_is_never_written_to_while_it_is_read(
    tmp_path: Path, arguments: Sequence[str]
) -> None:
    places = {name: tmp_path / name for name in ("path", "other", "link", "hard")}
    for name in ("path", "other"):
        places[name].write_bytes(GOOD)
    places["link"].symlink_to("path")
    places["hard"].hardlink_to(places["path"])
    with places["path"].open("ab") as stdout:  # as by >> in the shell
        done = subprocess.run(
            [
                *(sys.executable, "-I", "-m", "tcplat_core"),
                *(argument.format(**places) for argument in arguments),
            ],
            stdout=stdout,
            stderr=subprocess.PIPE,
            check=False,
            timeout=60,
            text=True,
        )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert " is the input: " in done.stderr
    assert places["path"].read_bytes() == places["other"].read_bytes() == GOOD


def test_rows_with_fields_unlike_the_installed_probes_are_kept(replay: Replayed) -> None:
    class Older(Event):
        gone: int

    rows = [make_event(Older, gone=7), make_event(EVENTS["tcp_client"]), make_event(Older, gone=8)]
    data = b"".join(map(encoded, [*rows, report_of(rows)]))
    found = replay(data)
    assert b"".join(map(encoded, [*found.sink.stream, found.report])) == data


# --- another version


@pytest.mark.parametrize("name", ["v1.jsonl", "v1.msgpack"])
def test_version_1_capture_is_read_without_threads(replay: Replayed, name: str) -> None:
    """It was written by the last release with that schema; `comm` was a thread's name there."""
    found = replay((DATA / name).read_bytes())
    assert found.said == []
    lines = list(map(json.loads, (DATA / "v1.jsonl").read_bytes().splitlines()))
    *then, _ = lines
    now = [json.loads(msgspec.json.encode(row)) for row in found.sink.rows]
    assert now == [{**row, "v": SCHEMA_VERSION, "thread": None} for row in then]
    assert [type(row) for row in found.sink.rows] == [EVENTS[row["probe"]] for row in then]
    assert found.report.delivered == len(then)


@pytest.mark.parametrize("form", ["jsonl", "msgpack"])
def test_missing_fields_become_null_and_unknown_ones_stay(replay: Replayed, form: str) -> None:
    encode = msgspec.json.encode if form == "jsonl" else msgspec.msgpack.encode
    end = b"\n" if form == "jsonl" else b""
    row = msgspec.structs.asdict(ROWS[0])
    more = {**row, "cgroup": 4711, "sock": 2}
    less = {key: value for key, value in row.items() if key != "thread"}
    found = replay(b"".join(encode(one) + end for one in (row, more, less)))
    one, two, three = map(msgspec.structs.asdict, found.sink.rows)
    assert (one, two, three) == (row, more, row)


# --- what is damaged


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"hello", "it is damaged, or not part of a capture"),
        (b'{"v":2', "it is damaged"),
        (b"\x00\x00\x00", "it is damaged"),
        (bytes(set(range(256)) - {10}), "it is damaged"),
        (b'{"a":1}', "it is not part of a capture"),
        (b"[1,2]", "it is not part of a capture"),
        (b'"v"', "it is not part of a capture"),
        (b"1e999", "it is damaged"),
        (b"[" * 100_000, "it is damaged"),
        (encoded(ROWS[0])[:-1].replace(b'"v":2', b'"v":3'), "its schema is '3'"),
        (encoded(ROWS[0])[:-1].replace(b'"v":2', b'"v":true'), "its schema is 'True'"),
        (encoded(ROWS[0])[:-1].replace(b'"pid":4711', b'"pid":"x"'), "Expected `int | null`"),
        (encoded(ROWS[0])[:-1].replace(b'"seq":1,', b""), "missing required field `seq`"),
        (encoded(ROWS[0])[:-1].replace(b'"seq"', b'"not a name":1,"seq"'), "no probe has"),
        (b'{"v":2,"lost":{"probe":"x"}}', "missing required field `point`"),
        (b'{"v":2,"report":[]}', "Expected `object`"),
        (b'{"v":2,"gap":-0.5}', "Expected `int`"),
        (b'{"v":2,"probe":3}', "Expected `str`"),
        (b"x" * 3_000_000, ""),
    ],
)
@pytest.mark.parametrize("at", [0, 3, 8])
def test_damaged_line_is_skipped_and_reported(
    replay: Replayed, bad: bytes, reason: str, at: int
) -> None:
    lines = GOOD.splitlines(keepends=True)
    found = replay(b"".join([*lines[:at], bad + b"\n", *lines[at:]]))
    assert found.times == [row.ts_ns for row in ROWS]
    assert encoded(found.report) == encoded(report_of(ROWS))
    assert len(found.said) == 2
    assert found.said[0].startswith(f"line {at + 1} was skipped: ")
    assert reason in found.said[0]
    assert found.said[1].startswith("1 line of ")
    assert found.said[1].endswith(" was skipped")


def test_first_damaged_lines_are_reported_and_all_are_counted(replay: Replayed) -> None:
    found = replay(b"x\n" * 1000 + GOOD)
    assert len(found.sink.rows) == 8
    assert [words.split(":")[0] for words in found.said[:-1]] == [
        f"line {number} was skipped" for number in (1, 2, 3)
    ]
    assert found.said[-1].startswith("1000 lines of ")


def test_skipped_line_is_counted_as_unread(replay: Replayed) -> None:
    lines = GOOD.splitlines(keepends=True)
    found = replay(b"".join([b"x\n", *lines[1:]]))
    (hook,) = found.report.probes["tcp_client"].hooks
    assert (hook.produced, hook.delivered, hook.unread) == (2, 1, 1)
    assert found.report.delivered == len(found.sink.rows) == 7


def test_carriage_returns_and_empty_lines_are_ignored(replay: Replayed) -> None:
    found = replay(b"\n\r\n" + GOOD.replace(b"\n", b"\r\n\n"))
    assert found.times == [row.ts_ns for row in ROWS]
    assert found.said == []


def test_truncated_last_line_is_reported_and_the_rest_replayed(replay: Replayed) -> None:
    found = replay(GOOD[:-30])
    assert len(found.sink.rows) == 8
    assert found.said[0] == "line 9 was skipped: it is cut off"
    assert found.said[-1].endswith("is truncated: its run was killed, or the file was cut off")
    assert found.report.incomplete.startswith("counted from the rows: ")


def test_damaged_last_line_with_a_newline_is_not_cut_off(replay: Replayed) -> None:
    found = replay(GOOD + b"junk\n")
    assert found.said[0] == "line 10 was skipped: it is damaged, or not part of a capture"


def test_capture_of_a_newer_schema_says_so(replay: Replayed) -> None:
    with pytest.raises(TcplatError, match="has schema 99; this tcplat reads 1 and 2: upgrade"):
        replay(b'{"v":99,"ts_ns":1}\n')


def test_filter_that_nothing_passes_is_reported(replay: Replayed) -> None:
    found = replay(GOOD, wanted=Filter(comm="nosuch"))
    assert "no row passed the filters (8 read)" in found.said


@pytest.mark.parametrize("bad", [b"", b"x", b"hello\nworld\n", bytes(1000), b"\xff" * 2_000_000])
def test_file_that_is_not_a_capture_is_one_sentence(replay: Replayed, bad: bytes) -> None:
    with pytest.raises(TcplatError, match=r"is not a tcplat capture|is empty"):
        replay(bad)


def test_no_control_character_of_a_capture_reaches_a_sink(replay: Replayed) -> None:
    row = encoded(make_event(comm="\x1b]0;x\x07", desc="a\u202eb"))
    (shown,) = replay(row).sink.rows
    assert shown.comm == r"\x1b]0;x\x07"
    assert shown.desc == r"a\u202eb"


@settings(max_examples=500 if LONG else 100)
@given(st.data())
@pytest.mark.parametrize("form", ["jsonl", "msgpack"])
def test_damaged_capture_is_read_to_its_end(form: str, data: st.DataObject) -> None:
    whole = b"".join(encoded(item, form) for item in [*ROWS, report_of(ROWS)])
    at = data.draw(st.integers(0, len(whole)))
    until = data.draw(st.integers(at, min(len(whole), at + 50)))
    broken = whole[:at] + data.draw(st.binary(max_size=50)) + whole[until:]
    capture = Capture(EVENTS)
    rows = [item for item in capture.items(iter([broken])) if isinstance(item, Sequence)]
    sound = sum(map(len, rows))
    # A piece of at most 50 bytes spoils two rows, or makes of one two.
    assert 8 - 2 <= sound <= 8 + 1
    assert capture.left_out or sound >= 7


@pytest.mark.parametrize("form", ["jsonl", "msgpack"])
@pytest.mark.parametrize("size", [1, 7, 100, 1000])
def test_chunk_boundaries_do_not_change_the_rows(form: str, size: int) -> None:
    whole = b"".join(encoded(item, form) for item in [*ROWS, report_of(ROWS)])
    capture = Capture(EVENTS)
    chunks = (whole[at : at + size] for at in range(0, len(whole), size))
    found = [item for item in capture.items(chunks) if isinstance(item, Sequence)]
    assert b"".join(encoded(row, form) for batch in found for row in batch) in whole
    assert sum(map(len, found)) == 8
    assert (capture.left_out, capture.ended) == (0, True)


def test_garbage_between_msgpack_maps_is_skipped(replay: Replayed) -> None:
    rubbish = bytes(range(256)) * 3
    parts = [encoded(item, "msgpack") for item in [*ROWS, report_of(ROWS)]]
    found = replay(b"".join([*parts[:4], rubbish, *parts[4:]]))
    assert found.times == [row.ts_ns for row in ROWS]
    assert found.said[0].startswith("map 5 was skipped: ")


# --- the books


def test_report_of_a_truncated_capture_is_marked_incomplete(replay: Replayed) -> None:
    rows = rows_of_all_probes(8)
    loss = Loss("tcp_client", "send", 5)
    found = replay(b"".join(map(encoded, [*rows[:4], loss, *rows[4:]])))
    assert found.said[-1].endswith("is truncated: its run was killed, or the file was cut off")
    assert found.report.incomplete
    assert found.report.as_json()["incomplete"] == found.report.incomplete
    assert (found.report.delivered, found.report.dropped) == (8, 5)
    (hook,) = found.report.probes["tcp_client"].hooks
    assert hook == HookReport("send", "tcp_sendmsg", "kprobe", 7, 5, 2)
    assert found.report.duration_s == 7e-9


def test_concatenated_captures_have_summed_reports(replay: Replayed) -> None:
    found = replay(GOOD + GOOD)
    assert found.said == []
    assert found.report.delivered == len(found.sink.rows) == 16
    assert found.report.duration_s == 2.5
    assert not found.report.incomplete


def test_merged_reports_keep_every_field() -> None:
    counted = {"connect": Counted(samples=3, unmeasured=1, rest=0)}
    one = ProbeReport(hooks=(), counted=counted, poll_error="no more", interfaces_gone=True)
    two = ProbeReport(
        hooks=(), counted=counted, uncounted={"in_recv": "no recv"}, interfaces_gone=True
    )
    three = ProbeReport(hooks=())
    books = [RunReport(probes={"tcp_client": each}, duration_s=1) for each in (one, two, three)]
    both = add_reports(*books[:2]).probes["tcp_client"]
    assert both.counted == {"connect": Counted(samples=6, unmeasured=2, rest=0)}
    assert (both.uncounted, both.poll_error) == ({"in_recv": "no recv"}, "no more")
    assert both.interfaces_gone
    either = add_reports(*books[1:]).probes["tcp_client"]
    assert (either.counted, either.interfaces_gone) == (counted, False)


def test_rows_behind_the_report_are_added_to_it(replay: Replayed) -> None:
    found = replay(GOOD + encoded(ROWS[0]))
    assert found.report.delivered == len(found.sink.rows) == 9
    assert found.report.incomplete


def test_late_rows_of_a_truncated_capture_are_counted(replay: Replayed) -> None:
    found = replay(b"".join(encoded(make_event(ts_ns=ns)) for ns in (1, 5, 3, 4, 6)))
    assert found.times == [1, 5, 3, 4, 6]
    assert found.report.late == 2


# --- which rows


def test_probe_and_point_options_select_rows_losses_and_report(replay: Replayed) -> None:
    losses = [Loss("tcp_client", "send", 3), Loss("xdp_port", "nic_rx", 1)]
    data = b"".join(map(encoded, [*ROWS, *losses, report_of(ROWS, losses)]))
    found = replay(data, probes=["tcp_client", "tcp_service"])
    assert {row.probe for row in found.sink.rows} == {"tcp_client", "tcp_service"}
    assert (found.report.delivered, found.report.dropped) == (4, 3)
    found = replay(data, points=["nic_rx"])
    assert {row.point for row in found.sink.rows} == {"nic_rx"}
    assert (found.report.delivered, found.report.dropped) == (2, 1)
    assert found.sink.stream[-1] == losses[1]


def test_filtered_rows_are_not_counted_as_produced(replay: Replayed) -> None:
    rows = [make_event(ts_ns=ns, dport=80 + ns % 3) for ns in range(9)]
    losses = [Loss("tcp_client", "send", 2)]
    data = b"".join(map(encoded, [*rows, *losses, report_of(rows, losses)]))
    found = replay(data, wanted=Filter(rports=(80,)))
    (hook,) = found.report.probes["tcp_client"].hooks
    assert (hook.delivered, hook.dropped, hook.produced, hook.unread) == (3, 2, 5, 0)
    assert len(found.sink.rows) == 3
    assert not found.report.incomplete


def test_count_limits_the_replayed_rows(replay: Replayed) -> None:
    found = replay(GOOD, count=3)
    assert found.times == [1, 2, 3]
    assert found.report.delivered == 3
    assert found.report.incomplete == (
        "counted from the rows: the replay ended before the capture did"
    )
    assert replay(GOOD, count=2, probes=["xdp_port"]).times == [3, 7]


# --- the program


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ("no-such-file", 2, "cannot read no-such-file: No such file or directory"),
        ("/", 2, "cannot read /: Is a directory"),
        ("unix:/no/where", 2, "cannot read unix:/no/where: No such file"),
        ("tcp:nowhere", 2, "tcp:nowhere is not of the form tcp:HOST:PORT"),
        ("tcp:a..b:80", 2, "cannot read tcp:a..b:80: "),
        ("tcp:127.0.0.1:99999", 2, "is not of the form tcp:HOST:PORT"),
        ("/proc/self/mem", 1, "reading /proc/self/mem failed: Input/output error"),
        ("tcp:127.0.0.1:1", 2, "cannot read tcp:127.0.0.1:1: Connection refused"),
        ("/dev/null", 1, "/dev/null is empty"),
        ("/dev/null --sink tabel", 4, "there is no sink named 'tabel'"),
        ("/dev/null --sink histogram", 2, "--sink stages has percentiles of a capture"),
        ("/dev/null --port 0", 2, "port '0' is not a number from 1 to 65535"),
        ("/dev/null --netns no-such", 2, "there is no network namespace 'no-such'"),
        ("/dev/null --netns /etc/passwd", 2, "'/etc/passwd' is not a network namespace"),
        ("/dev/null --cgroup /", 2, "No such option '--cgroup'"),
    ],
)
def test_usage_error_of_replay_is_one_sentence(arguments: str, status: int, said: str) -> None:
    done = tcplat("replay", *arguments.split())
    assert done.returncode == status
    assert done.stdout == b""
    assert said in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1


def test_pid_filter_accepts_an_ended_process() -> None:
    done = tcplat("replay", "-", "-p", "4194303", "--netns", "4026531840", input=GOOD)
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"tcp_client: 0 rows" in done.stderr


def test_skipped_lines_are_reported_and_exit_code_stays_0() -> None:
    done = tcplat("replay", "-", input=b"rubbish\n" + GOOD)
    assert done.returncode == 0
    assert b"tcplat: line 1 was skipped: " in done.stderr
    assert b"tcplat: 1 line of standard input was skipped\n" in done.stderr
    assert tcplat("replay", "-", "-q", input=b"rubbish\n" + GOOD).stderr == b""


def test_probe_name_without_rows_is_reported() -> None:
    done = tcplat("replay", "-", "--probe", "tcp_cleint", "--point", "nic_rx", input=GOOD)
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"standard input has no row of probe tcp_cleint; it has tcp_client, " in done.stderr
    assert b"nic_rx in" not in done.stderr


def test_reader_that_goes_away_ends_a_replay_cleanly(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(encoded(make_event()) * 50_000)
    done = subprocess.run(
        [
            *("bash", "-c", '"$@" | head -1; exit ${PIPESTATUS[0]}', "bash"),
            *(sys.executable, "-I", "-m", "tcplat_core", "replay", str(path), "-q"),
        ],
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"PID ")


def test_ctrl_c_ends_a_replay_cleanly() -> None:
    with subprocess.Popen(
        [sys.executable, "-I", "-m", "tcplat_core", "replay", "-", "--sink", "jsonl"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(encoded(ROWS[0]))
        process.stdin.flush()
        assert process.stdout.readline() == encoded(ROWS[0])
        process.send_signal(signal.SIGINT)
        end = json.loads(process.stdout.read())
        assert process.wait(20) == 0
    assert end["report"]["delivered"] == 1
    assert "ended before the capture" in end["report"]["incomplete"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("head", "block"),
    [
        (b"", b"\0"),
        (b"", b"\n"),
        (b'{"v":2,"comm":"', b"a"),
        (b"\x81\xa1v\x02", b"\xc1"),
        (b"\x81\xa1v\xdb\xff\xff\xff\xff", b"a"),
    ],
    ids=["zeros", "empty lines", "a long line", "no maps", "a long map"],
)
def test_signal_ends_a_replay_of_bytes_without_rows(
    head: bytes, block: bytes, number: signal.Signals
) -> None:
    with subprocess.Popen(
        [sys.executable, "-I", "-m", "tcplat_core", "replay", "-", "--sink", "jsonl"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        bufsize=0,
    ) as process:
        assert process.stdin
        assert process.stderr
        process.stdin.write(head + block * (4 << 20))  # more than a pipe holds: it reads
        feeder = threading.Thread(target=_feed, args=(process.stdin, block * (1 << 16)))
        feeder.start()
        process.send_signal(number)
        try:
            assert process.wait(20) == 0
        finally:
            process.kill()
            feeder.join()
        said = process.stderr.read().decode()
        assert said.endswith(f"tcplat: {NOTHING_REPLAYED}\n")
        assert "before anything was read" not in said  # it was, and was no row


def _feed(to: IO[bytes], block: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):
        while True:
            to.write(block)


def test_file_removed_during_a_replay_is_named_and_exits_with_1(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-I", "-m", "tcplat_core", "replay", "-", "--sink", f"jsonl:path={path}"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin
        process.stdin.write(GOOD)
        process.stdin.flush()
        until = time.monotonic() + 60
        while not path.exists() and time.monotonic() < until:
            time.sleep(0.01)
        path.unlink()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"tcplat: {path} is gone: it was removed or replaced".encode() in err


def test_failure_of_the_only_sink_exits_with_1() -> None:
    done = tcplat("replay", "-", "--sink", "jsonl:path=/dev/full", input=GOOD)
    assert done.returncode == 1
    assert b"was switched off: writing failed: No space left on device" in done.stderr


def test_socket_is_read_while_written(tmp_path: Path) -> None:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "s"))
    listening.listen()

    def serve() -> None:
        peer, _ = listening.accept()
        with peer:
            peer.sendall(b"".join(encoded(item, "msgpack") for item in [*ROWS, report_of(ROWS)]))

    server = threading.Thread(target=serve)
    server.start()
    found = played(Source.open(f"unix:{tmp_path / 's'}"))
    server.join()
    listening.close()
    assert found.times == [row.ts_ns for row in ROWS]
    assert encoded(found.report) == encoded(report_of(ROWS))


def test_pipe_without_a_writer_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    source = Source.open(str(path))  # returns without a writer
    writer = threading.Thread(target=path.write_bytes, args=(GOOD,))
    chunks = source.chunks()
    assert next(chunks) == b""
    writer.start()
    assert b"".join(chunks) == GOOD
    writer.join()
    os.close(source.fd)


def test_long_replay_shows_its_progress(tmp_path: Path) -> None:
    path = tmp_path / "in"
    # With spaces, as other programs write JSON: such lines are read one by one, and take longer.
    line = json.dumps(msgspec.to_builtins(make_event())) + "\n"
    path.write_text(line * 400_000)
    main, terminal = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-I", "-m", "tcplat_core", "replay", str(path), "--sink", "jsonl"],
        stdout=subprocess.DEVNULL,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm"},
    ) as process:
        os.close(terminal)
        shown = b""
        while process.poll() is None or select.select([main], [], [], 0)[0]:
            try:
                shown += os.read(main, 4096)
            except OSError:
                break
    os.close(main)
    assert b"%" in shown
    assert shown.rstrip().endswith(b"its run was killed, or the file was cut off")


def test_memory_does_not_grow_with_the_capture() -> None:
    row = encoded(make_event())
    capture = Capture(EVENTS)

    def most(chunks: int) -> int:
        tracemalloc.start()
        try:
            rows = sum(
                len(item)
                for item in capture.items(row * 100 for _ in range(chunks))
                if isinstance(item, Sequence)
            )
            assert rows == 100 * chunks
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert most(300) < most(30) * 1.5


def test_overlong_line_is_not_kept_in_memory() -> None:
    capture = Capture(EVENTS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    items = list(capture.items(b"x" * (1 << 20) for _ in range(200)))
    assert items == []
    assert capture.left_out == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def full(path: str, stack: ExitStack) -> None:
    """Return a unix socket that accepts no more connections."""
    listening = stack.enter_context(socket.socket(socket.AF_UNIX))
    listening.bind(path)
    listening.listen(0)
    while True:
        made = stack.enter_context(socket.socket(socket.AF_UNIX))
        made.setblocking(False)
        if made.connect_ex(path):
            return


def test_socket_with_a_full_backlog_is_waited_for(tmp_path: Path) -> None:
    with ExitStack() as stack:
        full(str(tmp_path / "s"), stack)
        with pytest.raises(TimeoutError, match=r"it took no connection for 0\.2 s"):
            connect(str(tmp_path / "s"), lambda: False, 0.2)
        with pytest.raises(InterruptedError):
            connect(str(tmp_path / "s"), lambda: True)


def test_socket_with_room_in_its_backlog_again_is_connected(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with ExitStack() as stack:
        listening = stack.enter_context(socket.socket(socket.AF_UNIX))
        listening.bind(path)
        listening.listen(0)
        first = stack.enter_context(socket.socket(socket.AF_UNIX))
        first.connect(path)
        asked: list[bool] = []

        def stopping() -> bool:
            if not asked:  # it had no room
                asked.append(True)
                stack.enter_context(listening.accept()[0])
            return False

        made = stack.enter_context(connect(path, stopping))
        assert asked
        assert made.getblocking()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("what", ["source", "sink"])
def test_signal_while_connecting_ends_a_replay_cleanly(
    tmp_path: Path, what: str, number: signal.Signals
) -> None:
    path = str(tmp_path / "s")
    (tmp_path / "capture").write_bytes(encoded(make_event()))
    arguments = (
        [f"unix:{path}"]
        if what == "source"
        else [str(tmp_path / "capture"), "--sink", f"msgpack:unix={path},connect=yes"]
    )
    with ExitStack() as stack:
        full(path, stack)
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-I", "-m", "tcplat_core", "replay", *arguments],
                stderr=subprocess.PIPE,
            )
        )
        while not any(link.startswith("socket:") for link in _links(process.pid)):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"Traceback" not in err
    assert b"Invalid argument" not in err


def _links(pid: int) -> list[str]:
    """Return the targets of a process's file descriptors."""
    links = []
    with contextlib.suppress(OSError):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            links.append(str(fd.readlink()))  # noqa: PERF401 - what was found stays where one goes
    return links


def test_empty_source_is_a_usage_error() -> None:
    with pytest.raises(UsageError):
        Source.open("unix:")
