"""tcplat report: the page has the figures of the capture, within its size limits."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from tcplat_report import courses, report
from tcplat_report.commands import report as command
from tcplat_report.courses import FIELDS

from tcplat_core import Event

from .captures import STAGES_US, Traffic, joint, write


def made(folder: Path, rows: Iterator[Event], *arguments: str, **more: Any) -> tuple[Result, str]:
    capture = write(folder / "capture.jsonl", rows, **more)
    out = folder / "report.html"
    result = CliRunner().invoke(
        command, [str(capture), "-o", str(out), *arguments], catch_exceptions=False
    )
    assert result.exit_code == 0
    return result, out.read_text(encoding="utf-8")


def data(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    value: dict[str, Any] = json.loads(found[1])
    return value


def test_report_figures_match_the_requests(tmp_path: Path) -> None:
    slow = {(7, 3): 50_000, (11, 0): 40_000}
    shown = data(made(tmp_path, joint(Traffic(connections=50, slow=slow)))[1])
    assert (shown["exchanges"], shown["connections"], shown["retransmits"]) == (500, 50, 0)
    stages = {stage[0]: stage for stage in shown["stages"]}
    assert list(stages) == ["connect", *STAGES_US, "total"]
    assert stages["queue"][1] == 500
    assert stages["queue"][2] == pytest.approx(STAGES_US["queue"], rel=0.1)
    first, second = shown["slowest"][:2]
    assert (first["sport"], first["number"]) == (10_007, 4)
    assert (second["sport"], second["number"]) == (10_011, 1)
    assert dict(first["stages"])["server"] > 50_000
    assert sum(us for _, us in first["stages"]) == pytest.approx(first["total_us"])
    assert second["connect"]["total_us"] == pytest.approx(90)
    assert len(shown["slowest"]) == 50
    assert shown["remarks"] == []


@pytest.mark.parametrize("form", ["html", "perfetto"])
def test_report_of_a_sample_says_that_its_counts_are(tmp_path: Path, form: str) -> None:
    traffic = joint(Traffic(connections=5))
    result, page = made(tmp_path, traffic, "--format", form, one_in=64)
    words = "1/64 of the connections: counts are those of this sample"
    assert words in result.stderr
    if form == "html":
        assert any(words in remark for remark in data(page)["remarks"])


def test_unanswered_requests_come_first_and_are_counted_separately(tmp_path: Path) -> None:
    traffic = Traffic(connections=50, slow={(7, 3): 50_000}, hung={3: 9_000, 9: 8_000})
    shown = data(made(tmp_path, joint(traffic), "--connections", "3")[1])
    assert (shown["exchanges"], shown["outcomes"]["unanswered"]) == (500, 2)
    stages = {stage[0]: stage for stage in shown["stages"]}
    assert list(stages)[-2:] == ["total", "unanswered"]
    assert (stages["total"][1], stages["unanswered"][1]) == (500, 2)
    first, second, third = shown["slowest"][:3]
    assert [(one["sport"], one["outcome"]) for one in (first, second, third)] == [
        (10_003, "unanswered"),
        (10_009, "unanswered"),
        (10_007, "answered"),
    ]
    assert (first["total_us"], first["waited_us"]) == (None, first["lasted_us"])
    assert first["waited_us"] > 9_000_000 / 1000
    # They are no points of the latency over time, and their connections stand first in the table.
    assert sum(point[1] for point in shown["timeline"]["series"]) == 500
    assert [(row["sport"], row["unanswered"]) for row in shown["table"]] == [
        (10_003, 1),
        (10_009, 1),
        (10_007, 0),
    ]


@pytest.mark.parametrize("other", [{"dev": "br0"}, {"dev": "br0", "netns": 7}])
def test_packet_at_a_second_device_is_no_retransmission(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    rows = []
    for row in joint(Traffic(connections=1, exchanges=5)):
        rows.append(row)
        if row.point == "nic_tx":
            values = {name: getattr(row, name) for name in row.__struct_fields__}
            rows.append(type(row)(**values | {"ts_ns": row.ts_ns + 1} | other))
    shown = data(made(tmp_path, iter(rows))[1])
    (course,) = shown["courses"].values()
    kinds = [shown["kinds"][code >> 1] for code in course["points"][1::FIELDS]]
    assert (kinds.count("nic_tx"), kinds.count("again")) == (10, 0)


def test_unanswered_request_waits_until_the_run_ends(tmp_path: Path) -> None:
    rows = [row for row in joint(Traffic(connections=2, hung={1: 0})) if row.point != "close"]
    until_ns = rows[-1].ts_ns + 60_000_000_000
    shown = data(made(tmp_path, iter(rows), until_ns=until_ns)[1])
    first = shown["slowest"][0]
    assert (first["sport"], first["outcome"], first["over_by"]) == (
        10_001,
        "unanswered",
        "end of run",
    )
    assert first["waited_us"] == (until_ns - first["ts_ns"]) / 1000
    # The reply of the other connection was read long before.
    assert {one["ended"] for one in shown["slowest"][1:]} == {"turn", "idle"}


def test_timeline_windows_cover_every_request(tmp_path: Path) -> None:
    traffic = Traffic(connections=300, exchanges=3, gap_us=20_000)
    timeline = data(made(tmp_path, joint(traffic))[1])["timeline"]
    assert timeline["windows"] <= 240
    assert sum(point[1] for point in timeline["series"]) == 900
    assert sum(count for _, _, count in timeline["cells"]) == 900
    assert timeline["windows"] * timeline["window_us"] >= 300 * 20_000
    assert all(0 <= column < timeline["windows"] for column, _, _ in timeline["cells"])
    medians = [point[2] for point in timeline["series"]]
    assert statistics.median(medians) == pytest.approx(sum(STAGES_US.values()), rel=0.15)


def test_connection_graph_has_the_bytes_sent(tmp_path: Path) -> None:
    shown = data(made(tmp_path, joint(Traffic(connections=3, exchanges=5)))[1])
    assert len(shown["courses"]) == 3
    for row in shown["table"]:
        course = shown["courses"][str(row["n"])]
        points = [course["points"][n : n + FIELDS] for n in range(0, len(course["points"]), FIELDS)]
        assert course["every"] == 1
        assert len(points) == 5 * 12
        for direction, count in ((0, row["sent"]), (1, row["received"])):
            one_way = [point for point in points if point[1] % 2 == direction]
            assert len(one_way) == 5 * 6
            assert min(point[2] for point in one_way) == 0
            assert max(point[2] + point[3] for point in one_way) == count
            kinds = [shown["kinds"][point[1] >> 1] for point in one_way[:6]]
            assert kinds == ["send", "nic_tx", "nic_rx", "rx_ip", "ready", "recv"]


def test_omitted_items_are_remarked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_MOST_POINTS_SHOWN", 500)
    slow = {(7, 3): 50_000}
    shown = data(
        made(tmp_path, joint(Traffic(connections=50, slow=slow)), "--connections", "20")[1]
    )
    assert len(shown["table"]) == 20
    assert shown["table"][0]["sport"] == 10_007
    assert sum(len(one["points"]) // FIELDS for one in shown["courses"].values()) <= 500
    assert any("20 of 50 connections" in words for words in shown["remarks"])
    assert any("packets are kept for 4 connections" in words for words in shown["remarks"])


def test_only_the_table_row_of_an_ended_connection_is_kept() -> None:
    story = report.Story(slow=5, most_connections=10)
    rows = list(joint(Traffic(connections=200)))
    for at in range(0, len(rows), 500):
        story.write(rows[at : at + 500])
    story.close()
    shown = story.as_json("capture", [])
    assert (shown["connections"], len(shown["table"]), len(shown["slowest"])) == (200, 10, 5)
    assert len(story._slowest) == 5
    assert len(story._kept) == 10
    assert story._busy == {}
    assert story._courses._count == 0
    assert not story._courses._courses


def test_points_beyond_the_limit_are_refused_and_remarked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(courses, "_MOST_OPEN", 100)
    story, most = report.Story(), 0
    rows = list(joint(Traffic(connections=50, gap_us=1)))
    for at in range(0, len(rows), 100):
        story.write(rows[at : at + 100])
        most = max(most, story._courses._count)
    story.close()
    shown = story.as_json("capture", [])
    assert shown["exchanges"] == 500
    assert most == 100
    assert any(course["short"] for course in shown["courses"].values())
    assert any("there was no room" in words for words in shown["remarks"])


def test_long_connection_is_thinned_and_marked(tmp_path: Path) -> None:
    shown = data(made(tmp_path, joint(Traffic(connections=1, exchanges=200)))[1])
    (course,) = shown["courses"].values()
    assert course["every"] == 8  # of 2,400 events
    assert len(course["points"]) // FIELDS < courses.MOST_POINTS
    times = course["points"][::FIELDS]
    assert times == sorted(times)
    assert times[-1] > 0.9 * shown["span_us"]


def test_reused_port_has_a_graph_of_its_own(tmp_path: Path) -> None:
    rows = [
        *joint(Traffic(connections=1, exchanges=2)),
        *joint(Traffic(connections=1, exchanges=3, seed=9, began_ns=1_000_100_000_000)),
    ]
    shown = data(made(tmp_path, iter(rows))[1])
    lengths = {
        row["exchanges"]: len(shown["courses"][str(row["n"])]["points"]) // FIELDS
        for row in shown["table"]
    }
    assert lengths == {2: 24, 3: 36}
    for row in shown["table"]:
        points = shown["courses"][str(row["n"])]["points"]
        assert max(points[2::FIELDS]) < 3 * 1400


@pytest.mark.parametrize(
    ("desc", "words"),
    [
        ("timed out", "timed out"),
        ("EHOSTUNREACH", "no route to host (EHOSTUNREACH)"),
        ("ECONNRESET", "it aborted"),
    ],
)
def test_table_has_the_error_of_a_connection_in_words(
    tmp_path: Path, desc: str, words: str
) -> None:
    rows = [row for row in joint(Traffic(connections=1)) if row.point != "state"]
    close = next(row for row in rows if (row.probe, row.point) == ("tcp_client", "close"))
    failed = {"point": "state", "old_state": "TCP_ESTABLISHED", "desc": desc}
    rows.insert(rows.index(close), msgspec.structs.replace(close, **failed))
    (row,) = data(made(tmp_path, iter(rows))[1])["table"]
    assert row["ended"] == words


def test_process_name_never_becomes_markup(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>\u2028<!--<script>"
    page = made(tmp_path, joint(Traffic(connections=2, comm=evil)))[1]
    assert page.count("</script>") == 2
    assert "<img" not in page
    assert "\u2028" not in page
    assert data(page)["table"][0]["comm"].startswith("</script><img src=x onerror=alert(1)>")


def test_page_contains_no_external_reference(tmp_path: Path) -> None:
    page = made(tmp_path, joint(Traffic(connections=2)))[1]
    without_data = re.sub(r'id="data">.*?</script>', "", page, flags=re.DOTALL)
    assert "default-src 'none'" in page
    urls = set(re.findall(r"[a-z]+://[^\s\"']+", without_data))
    assert urls == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.findall(r"<(?:link|img|iframe|script src)", without_data)


def test_rows_missing_from_the_report_are_remarked(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.jsonl", joint(Traffic(connections=2)))
    lines = whole.read_bytes().splitlines(keepends=True)
    rows, report = list(joint(Traffic(connections=2))), lines[-1]
    head = [json.loads(report)]
    result, page = made(tmp_path, iter(rows[:-7]), head=head, end=False)
    words = " ".join(data(page)["remarks"])
    assert words.count("of the run's rows are not in what was read") > 0
    assert "of the run's rows are not in what was read" in result.stderr


def test_faults_of_the_capture_are_remarked_on_the_page(tmp_path: Path) -> None:
    head = [{"lost": {"probe": "tcp_client", "point": "send", "count": 5}}]
    result, page = made(tmp_path, joint(Traffic(connections=2)), end=False, head=head)
    remarks = data(page)["remarks"]
    assert any("5 events were lost" in words for words in remarks)
    assert any("is truncated" in words for words in remarks)
    assert "5 events were lost" in result.stderr


def test_wire_time_between_hosts_is_marked(tmp_path: Path) -> None:
    hosts = [{"merge": {"host": n, "name": f"host{n}", "bound_ns": 5000 * n}} for n in (0, 1)]
    shown = data(made(tmp_path, joint(Traffic(connections=2)), head=hosts)[1])
    assert {stage[0] for stage in shown["stages"] if stage[7]} == {"wire", "wire_back"}
    assert {one["wire_bound_us"] for one in shown["slowest"]} == {5}
    assert any("± 5.0 µs" in words for words in shown["remarks"])


def test_capture_without_connections_gives_a_page(tmp_path: Path) -> None:
    shown = data(made(tmp_path, iter(()))[1])
    assert (shown["exchanges"], shown["table"], shown["timeline"]["series"]) == (0, [], [])


@pytest.mark.parametrize(
    ("out", "status", "said"),
    [
        ("/", 2, "cannot write /: Is a directory; use another path"),
        ("/dev/full", 1, "No space left on device"),
    ],
)
def test_unwritable_report_path_is_refused_in_one_sentence(
    tmp_path: Path, out: str, status: int, said: str
) -> None:
    capture = write(tmp_path / "capture.jsonl", joint(Traffic(connections=50)))
    ended = subprocess.run(
        [sys.executable, "-I", "-m", "tcplat_core", "report", str(capture), "-o", out],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (status, "")
    assert said in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_failed_report_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "capture").write_text("no capture\n", encoding="utf-8")
    arguments = [str(tmp_path / "capture"), "-o", str(tmp_path / "out")]
    assert CliRunner().invoke(command, arguments).exit_code != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["capture"]
