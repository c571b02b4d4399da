"""JSON lines: rows, losses at their place, and the report at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tcplat_sinks.jsonl import Jsonl

from tcplat_core import SCHEMA_VERSION, Event, Loss, Output, RunReport, Sampled, TcplatError
from tcplat_core.plugin.report import HookReport, ProbeReport
from tcplat_core.testing import make_event

REPORT = RunReport(
    probes={"tcp_client": ProbeReport(hooks=(HookReport("send", "f", "kprobe", 3, 1, 2),))},
    duration_s=1.5,
    switched_off={"table": "disk full"},
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def sink(path: Path) -> Jsonl:
    return Jsonl(Output.open(str(path), lambda: True))


def lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def test_each_row_is_a_line_with_all_its_fields(sink: Jsonl, path: Path) -> None:
    rows = [make_event(ts_ns=1), make_event(ts_ns=2, pid=None, comm=None, connect_us=0.5)]
    sink.write(rows)
    assert lines(path) == [msgspec.structs.asdict(row) for row in rows]


def test_line_is_in_the_file_when_write_returns(sink: Jsonl, path: Path) -> None:
    for count in range(1, 4):
        sink.write([make_event()])
        assert len(lines(path)) == count


def test_control_characters_do_not_break_a_line(sink: Jsonl, path: Path) -> None:
    nasty = 'a"b\\c\n\r\u2028\x00\x1b{"v":1}'
    sink.write([make_event(comm=nasty, desc=nasty)])
    (line,) = lines(path)
    assert line["comm"] == line["desc"] == nasty


def test_loss_is_written_at_its_place(sink: Jsonl, path: Path) -> None:
    sink.write([make_event(ts_ns=1)])
    sink.lost(Loss("tcp_client", "send", 3, 5, 7))
    sink.write([make_event(ts_ns=2)])
    before, loss, after = lines(path)
    assert (before["ts_ns"], after["ts_ns"]) == (1, 2)
    assert loss == {
        "v": SCHEMA_VERSION,
        "lost": {"probe": "tcp_client", "point": "send", "count": 3, "since_ns": 5, "until_ns": 7},
    }


def test_share_of_the_connections_is_a_line_of_its_own(sink: Jsonl, path: Path) -> None:
    sink.sampled(Sampled(64))
    sink.write([make_event(ts_ns=1)])
    share, row = lines(path)
    assert share == {"v": SCHEMA_VERSION, "sampled": {"one_in": 64, "since_ns": 0, "host": 0}}
    assert row["ts_ns"] == 1


def test_last_line_is_the_report(sink: Jsonl, path: Path) -> None:
    sink.write([make_event()])
    sink.close(REPORT)
    *_, last = lines(path)
    assert last == {"v": SCHEMA_VERSION, "report": json.loads(json.dumps(REPORT.as_json()))}
    assert last["report"]["delivered"] == 2
    assert last["report"]["dropped"] == 1
    assert last["report"]["switched_off"] == {"table": "disk full"}


def test_kinds_of_lines_differ_in_their_keys(sink: Jsonl, path: Path) -> None:
    sink.write([make_event()])
    sink.lost(Loss("tcp_client", "send", 1))
    sink.close(REPORT)
    row, loss, report = lines(path)
    assert [line["v"] for line in (row, loss, report)] == [SCHEMA_VERSION] * 3
    assert "ts_ns" in row
    assert "lost" in loss.keys() - row.keys()
    assert "report" in report.keys() - row.keys()


def test_third_party_fields_follow_the_common_ones(sink: Jsonl, path: Path) -> None:
    class Retransmit(Event):
        tries: int

    sink.write([make_event(Retransmit, tries=3)])
    (line,) = lines(path)
    assert list(line) == [*Event.__struct_fields__, "tries"]
    assert line["tries"] == 3


def test_full_disk_is_a_named_error() -> None:
    sink = Jsonl(Output.open("/dev/full", lambda: True))
    with pytest.raises(TcplatError, match="No space left on device"):
        sink.write([make_event()])
