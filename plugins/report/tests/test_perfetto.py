"""The trace keeps to Chrome's Trace Event Format, and says what the stages say."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tcplat_report.commands import report

from .captures import STAGES_US, Traffic, joint, write

Slice = dict[str, Any]


def ns(us: float) -> int:
    return round(us * 1000)


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> list[Slice]:
    folder = tmp_path_factory.mktemp("trace")
    hosts = [{"merge": {"host": n, "name": f"host{n}", "bound_ns": 5000 * n}} for n in (0, 1)]
    capture = write(folder / "capture", joint(Traffic(connections=30)), head=hosts)
    out = folder / "trace.json"
    arguments = [str(capture), "-o", str(out), "--format", "perfetto", "-q"]
    assert CliRunner().invoke(report, arguments, catch_exceptions=False).exit_code == 0
    trace = json.loads(out.read_text(encoding="utf-8"))
    assert trace["displayTimeUnit"] == "ns"
    found: list[Slice] = trace["traceEvents"]
    return found


def slices(events: list[Slice]) -> dict[tuple[int, int], list[Slice]]:
    tracks = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            tracks[event["pid"], event["tid"]].append(event)
    return tracks


def test_every_event_has_the_fields_of_its_kind(events: list[Slice]) -> None:
    needs = {
        "X": {"name", "cat", "pid", "tid", "ts", "dur"},
        "M": {"name", "pid", "tid", "args"},
        "s": {"name", "cat", "pid", "tid", "ts", "id"},
        "f": {"name", "cat", "pid", "tid", "ts", "id", "bp"},
    }
    for event in events:
        assert needs[event["ph"]] <= event.keys()
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert event.get("dur", 0) >= 0
    assert {event["ph"] for event in events} == set(needs)


def test_slices_of_a_track_nest_or_follow_each_other(events: list[Slice]) -> None:
    tracks = slices(events)
    assert len(tracks) == 2 * 30
    for track in tracks.values():
        begins = [ns(event["ts"]) for event in track]
        assert begins == sorted(begins)
        open_until: list[int] = []
        for event in track:
            begin, end = ns(event["ts"]), ns(event["ts"]) + ns(event["dur"])
            while open_until and open_until[-1] <= begin:
                open_until.pop()
            assert not open_until or end <= open_until[-1]
            open_until.append(end)


def test_stages_fill_their_request(events: list[Slice]) -> None:
    whole = 0
    for track in slices(events).values():
        for place, event in enumerate(track):
            if event["name"].startswith("exchange"):
                parts = track[place + 1 : place + 1 + len(STAGES_US)]
                assert [part["name"] for part in parts] == list(STAGES_US)
                assert sum(ns(part["dur"]) for part in parts) == ns(event["dur"])
                assert event["args"]["wire_bound_us"] == 5
                whole += 1
    assert whole == 30 * 10


def test_flows_connect_slices_of_client_and_service(
    events: list[Slice],
) -> None:
    starts = {event["id"]: event for event in events if event["ph"] == "s"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    assert starts.keys() == ends.keys()
    assert len(starts) == sum(event["ph"] == "s" for event in events) == 2 * 30 * 10
    tracks = slices(events)
    for number, start in starts.items():
        end = ends[number]
        assert start["pid"] != end["pid"]
        assert ns(start["ts"]) <= ns(end["ts"])
        for one in (start, end):
            assert any(
                ns(event["ts"]) <= ns(one["ts"]) <= ns(event["ts"]) + ns(event["dur"])
                for event in tracks[one["pid"], one["tid"]]
            )


def test_processes_and_tracks_have_names(events: list[Slice]) -> None:
    names = {
        (event["name"], event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event["ph"] == "M"
    }
    processes = {name for (what, _, _), name in names.items() if what == "process_name"}
    # The two hosts have a process of one number.
    assert processes == {"curl 100 on host0", "nginx 100 on host1"}
    pids = [pid for what, pid, _ in names if what == "process_name"]
    assert len(set(pids)) == len(pids) == 2
    for pid, tid in slices(events):
        assert "10.0.0.2:80" in names["thread_name", pid, tid]


def test_overlapping_requests_get_separate_tracks(tmp_path: Path) -> None:
    """Pipelining: the next request is sent before the last one's reply is read."""
    traffic = Traffic(connections=1, exchanges=2)
    rows = list(joint(traffic))
    asked = [row for row in rows if row.probe == "tcp_client" and row.point == "send"]
    first = next(row for row in rows if row.point == "recv" and row.probe == "tcp_client")
    asked[1].ts_ns = first.ts_ns - 1000
    rows.sort(key=lambda row: row.ts_ns)
    capture = write(tmp_path / "capture", iter(rows))
    out = tmp_path / "trace.json"
    CliRunner().invoke(report, [str(capture), "-o", str(out), "--format", "perfetto", "-q"])
    found = json.loads(out.read_text(encoding="utf-8"))["traceEvents"]
    requests = [event for event in found if event["name"].startswith("exchange")]
    assert len({event["tid"] for event in requests}) == 2
    test_slices = slices(found)
    for track in test_slices.values():
        ends = [ns(event["ts"]) + ns(event["dur"]) for event in track if "args" in event]
        begins = [ns(event["ts"]) for event in track if "args" in event]
        assert all(end <= begin for end, begin in zip(ends, begins[1:], strict=False))


def test_empty_capture_is_an_empty_trace(tmp_path: Path) -> None:
    capture = write(tmp_path / "capture", iter(()))
    out = tmp_path / "trace.json"
    CliRunner().invoke(report, [str(capture), "-o", str(out), "--format", "perfetto", "-q"])
    assert json.loads(out.read_text(encoding="utf-8"))["traceEvents"] == []


def test_unanswered_request_lasts_as_long_as_it_waited(tmp_path: Path) -> None:
    traffic = Traffic(connections=1, exchanges=2, hung={0: 9_000})
    out = tmp_path / "trace.json"
    arguments = [str(write(tmp_path / "capture", joint(traffic))), "-o", str(out)]
    CliRunner().invoke(report, [*arguments, "--format", "perfetto", "-q"], catch_exceptions=False)
    events = json.loads(out.read_text(encoding="utf-8"))["traceEvents"]
    (track,) = [
        track
        for track in slices(events).values()
        if any(event["name"] == "request 3 (unanswered)" for event in track)
    ]
    whole, *parts = track[-7:]
    assert whole["args"]["outcome"] == "unanswered"
    assert [part["name"] for part in parts] == [*list(STAGES_US)[:5], "waiting"]
    assert sum(ns(part["dur"]) for part in parts) == ns(whole["dur"]) > 9_000_000


def test_request_belongs_to_the_program_that_sent_it_after_exec(tmp_path: Path) -> None:
    rows = list(joint(Traffic(connections=1, exchanges=2)))
    calls = [row for row in rows if row.probe == "tcp_client" and row.sock]
    asked = [row.ts_ns for row in calls if row.point == "send"]
    for row in calls:
        if row.ts_ns >= asked[-1]:
            row.comm = "execed"
    capture = write(tmp_path / "capture", iter(rows))
    arguments = [str(capture), "-o", str(tmp_path / "out"), "--format", "perfetto", "-q"]
    assert CliRunner().invoke(report, arguments, catch_exceptions=False).exit_code == 0
    trace = json.loads((tmp_path / "out").read_text(encoding="utf-8"))["traceEvents"]
    names = {one["pid"]: one["args"]["name"] for one in trace if one["name"] == "process_name"}
    where = [names[one["pid"]] for one in trace if one["name"] in {"exchange 1", "exchange 2"}]
    assert [name.split()[0] for name in where] == ["curl", "execed"]
