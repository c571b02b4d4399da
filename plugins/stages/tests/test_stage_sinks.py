"""Output of the sinks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
from tcplat_stages.plugin import tcplat_register_sinks
from tcplat_stages.stages import Stages
from tcplat_stages.waterfall import parse_at_least

from tcplat_core import Loss, Reader, RunInfo, RunReport, TcplatError, UsageError
from tcplat_core.plugin.options import read_options

from .history import CLIENT, SERVICE, History, Row

SPECS = {spec.name: spec for spec in tcplat_register_sinks()}
REPORT = RunReport(probes={}, duration_s=1.0)
CORPUS = Path(__file__).parents[3] / "tests" / "fuzz" / "corpus"


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Return what a sink writes of rows."""

    def write(name: str, rows: Sequence[Row], *, size: int = 10**6, **options: str) -> str:
        path = tmp_path / "out"
        given = read_options(name, SPECS[name].options, {"path": str(path), **options})
        sink: Any = SPECS[name].factory(given, RunInfo(("tcp_client",)))
        for first in range(0, len(rows), size):
            sink.write(rows[first : first + size])
        sink.close(REPORT)
        return path.read_text(encoding="utf-8")

    before = os.environ.pop("COLUMNS", None)
    yield write
    if before is not None:
        os.environ["COLUMNS"] = before


def exchanges(*totals_us: int) -> list[Row]:
    """One connection, requests that take so long: half of it the server's."""
    history = History()
    now = history.shake_hands() + 1_000
    for total in totals_us:
        step = total * 1_000 // 20
        at = [now + step * number for number in range(6)]
        history.message(CLIENT, 100, at)
        at = [now + step * (15 + number) for number in range(6)]
        history.message(SERVICE, 200, at)
        now = at[-1] + 1_000
    history.close(now + 1_000)
    return history.rows()


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_waterfall_object_has_stages_in_microseconds(written: Callable[..., str]) -> None:
    one, other = objects(written("waterfall", exchanges(1_000, 400), format="json"))
    assert one["total_us"] == 1_000
    assert one["stages"]["server"] == 500
    assert list(one["stages"])[:5] == ["client_send", "wire", "softirq", "tcp", "queue"]
    assert one["unexplained_us"] == 0
    assert (one["pid"], one["comm"], one["service_pid"]) == (100, "curl", 101)
    assert (one["saddr"], one["sport"], one["daddr"], one["dport"]) == (
        *("10.0.0.1", 40_000),
        *("10.0.0.2", 80),
    )
    assert (one["request_bytes"], one["reply_bytes"]) == (100, 200)
    # The handshake stands with the first one.
    assert one["connect"]["stages"]["synack"] == 1
    assert one["connect"]["total_us"] == 5
    assert other["connect"] is None
    assert (one["number"], other["number"]) == (1, 2)


def test_waterfall_draws_a_bar_for_each_stage(
    written: Callable[..., str],
) -> None:
    for width in (60, 100, 180):
        text = written("waterfall", exchanges(1_000, 400), width=str(width))
        bars = [line for line in text.splitlines() if line.startswith("    ")]
        assert len(bars) == 5 + 2 * 11
        # Half of the bars' room is the server's.
        bars = bars[5:16]
        longest = max(map(len, bars))
        assert width - 3 <= longest <= width
        begin = bars[0].index("µs ") + 3
        server = next(line for line in bars if " server " in line)
        assert abs(server.count("█") - (longest - begin) / 2) <= 1
        assert "10.0.0.1:40000 (curl 100) → 10.0.0.2:80 (nginx 101)" in text
        assert "100 B, reply 200 B  1.00 ms" in text


def test_end_of_an_interrupted_run_takes_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Row] = []
    for number in range(1_000):
        one = History(ends=(("10.0.0.1", 1 + number), ("10.0.0.2", 80)), by_sock=(3 + number, 0))
        one.socket(1_000 + number, CLIENT, "connect")
        rows += one.rows()
    finished, said = [], []
    for ended, patience_s in ((False, -1), (True, 60), (True, -1)):
        monkeypatch.setattr("tcplat_stages.joined._PATIENCE_S", patience_s)
        path = tmp_path / "out"
        given = read_options("summary", SPECS["summary"].options, {"path": str(path)})
        sink: Any = SPECS["summary"].factory(
            given, RunInfo((), [lambda: False, lambda: True][ended])
        )
        sink.write(rows)
        try:
            sink.close(REPORT)
        except TcplatError as error:
            said.append(str(error))
        finished.append(path.read_text().count("→ 10.0.0.2:80"))
    assert finished == [1_000, 1_000, 0]
    assert [words.split(" that ")[0] for words in said] == ["1000 of 1000"]


def test_slowest_exchanges_come_at_the_end_in_order(written: Callable[..., str]) -> None:
    rows = exchanges(200, 900, 100, 900, 500)
    slowest = objects(written("waterfall", rows, format="json", slow="3"))
    assert [(one["total_us"], one["number"]) for one in slowest] == [(900, 2), (900, 4), (500, 5)]


def test_limit_selects_exchanges_with_a_long_stage(written: Callable[..., str]) -> None:
    rows = exchanges(200, 900, 100)
    for limit, numbers in (
        ("server:100us", [1, 2]),
        ("server:451us", []),
        ("total:0.5ms", [2]),
        ("total=0.5ms", [2]),
        ("server:451us+total:900us", [2]),
        ("queue_back:1ns", [1, 2, 3]),
    ):
        found = objects(written("waterfall", rows, format="json", min_stage=limit))
        assert [one["number"] for one in found] == numbers, limit


@pytest.mark.parametrize("text", ["", "queue", "kitchen:1ms", "queue:soon", "queue:1"])
def test_invalid_limit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"there is no stage|not a time|has no (unit|time)"):
        parse_at_least(text)


def test_retransmits_and_zero_windows_are_marked(written: Callable[..., str]) -> None:
    history = History()
    now = history.shake_hands() + 1_000
    history.message(CLIENT, 100, [now + 10 * step for step in range(6)])
    history.packet(now + 15, "nic_tx", CLIENT, 0, 100)
    history.packet(now + 16, "nic_tx", CLIENT, 100, window=0)
    history.message(SERVICE, 100, [now + 100 + 10 * step for step in range(6)])
    history.close(now + 1_000)
    text = written("waterfall", history.rows())
    assert "! 1 retransmitted  ! window closed 1 times" in text
    text = written("summary", history.rows())
    assert "trouble  client retransmitted 1 · client closed its window 1 times" in text


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("refused", "refused"),
        ("EHOSTUNREACH", "no route to host (EHOSTUNREACH)"),
        ("EADDRNOTAVAIL", "cannot assign requested address (EADDRNOTAVAIL)"),
        ("ERRORCODE", "ERRORCODE"),
    ],
)
def test_summary_has_the_error_in_words(
    written: Callable[..., str], error: str, words: str
) -> None:
    history = History()
    history.socket(0, CLIENT, "connect", sport=None, state="TCP_SYN_SENT")
    failed = {"old_state": "TCP_SYN_SENT", "state": "TCP_CLOSE", "desc": error}
    history.socket(1_000, CLIENT, "state", **failed, connect_us=1.0)
    history.socket(2_000, CLIENT, "close", state="TCP_CLOSE")
    assert written("summary", history.rows()).splitlines()[0].endswith(f"  {words}")
    (conn,) = objects(written("summary", history.rows(), format="json"))
    assert conn["error"] == error


def stats(history: History, ts_ns: int, end: int, **figures: int) -> None:
    history.socket(ts_ns, end, "stats", role=("client", "service")[end], **figures)


def test_summary_has_handshake_bytes_and_kernel_counters(
    written: Callable[..., str],
) -> None:
    history = History()
    now = history.shake_hands() + 1_000
    for _ in range(2):
        history.message(CLIENT, 100, [now + 1_000 * step for step in range(6)])
        history.message(SERVICE, 200, [now + 6_000 + 1_000 * step for step in range(6)])
        now += 50_000
    figures = {"srtt_us": 1_200, "min_rtt_us": 900, "rto_us": 201_000, "retransmits": 3}
    stats(history, now + 55, CLIENT, **figures, bytes_acked=201, bytes_received=401)
    history.close(now)
    (conn,) = objects(written("summary", history.rows(), format="json"))
    assert (conn["syn_us"], conn["synack_us"], conn["ack_us"]) == (2, 3, 1)
    assert (conn["connect_us"], conn["accept_us"]) == (5, 1)
    assert (conn["bytes_to_service"], conn["bytes_to_client"], conn["exchanges"]) == (200, 400, 2)
    assert {name: conn[name] for name in figures} == figures
    assert conn["client"]["bytes_acked"] == 201
    assert conn["service"]["srtt_us"] is None
    # From the reading of the first reply to the second request.
    assert conn["think_us"] == 39
    assert (conn["closed_first"], conn["ended"], conn["reset_by"]) == ("client", "closed", None)
    text = written("summary", history.rows())
    assert (
        "connect  5.0 µs · SYN 2.0 µs · SYN-ACK 3.0 µs · ACK 1.0 µs · accepted after 1.0 µs" in text
    )
    assert "200 to the service · 400 to the client · 2 exchanges · client thought 39.0 µs" in text
    assert "client   srtt 1.20 ms · min RTT 900.0 µs · RTO 201.00 ms" in text
    assert "closed by the client" in text


def test_stages_are_percentiles_by_group(written: Callable[..., str]) -> None:
    rows = exchanges(*range(100, 1_100, 10))
    found = {one["stage"]: one for one in objects(written("stages", rows, format="json"))}
    assert list(found)[-1] == "total"
    total = found["total"]
    assert (total["process"], total["port"], total["remote"]) == ("curl", 80, None)
    assert total["count"] == 100
    assert total["p50_us"] == pytest.approx(590, rel=0.01)
    assert total["p90_us"] == pytest.approx(990, rel=0.01)
    assert total["p99_us"] == pytest.approx(1_080, rel=0.01)
    assert total["max_us"] == 1_090
    assert found["server"]["p50_us"] == pytest.approx(295, rel=0.01)
    by_remote = objects(written("stages", rows, format="json", group_by="remote"))
    assert {(one["remote"], one["port"]) for one in by_remote} == {("10.0.0.2", None)}
    table = written("stages", rows, group_by="none").splitlines()
    assert table[0].split() == ["STAGE", "COUNT", "P50", "P90", "P99", "P99.9", "MAX"]
    assert table[-1].split()[:2] == ["total", "100"]


def test_stages_without_exchanges_print_the_header_alone(written: Callable[..., str]) -> None:
    assert written("stages", []).split()[0] == "PROCESS"
    assert written("stages", [], format="json") == ""


def test_intervals_end_by_row_time(written: Callable[..., str]) -> None:
    rows = exchanges(*[900] * 10)
    found = objects(written("stages", rows, format="json", every="2ms"))
    whole = [one for one in found if "until_ns" not in one and one["stage"] == "total"]
    parts = [one for one in found if "until_ns" in one and one["stage"] == "total"]
    assert [one["count"] for one in whole] == [10]
    assert len(parts) > 2
    assert sum(one["count"] for one in parts) < 10  # the last interval did not end


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("waterfall", {}),
        ("waterfall", {"format": "json", "slow": "2"}),
        ("summary", {}),
        ("stages", {"every": "1ms"}),
        ("stages", {"format": "json", "every": "500us"}),
    ],
)
def test_batch_boundaries_do_not_change_the_output(
    written: Callable[..., str], name: str, options: dict[str, str]
) -> None:
    rows = exchanges(200, 900, 100, 4_000, 500)
    at_once = written(name, rows, **options)
    assert {written(name, rows, size=size, **options) for size in (1, 7, 50)} == {at_once}


def test_batch_boundaries_do_not_change_intervals_with_late_rows(
    written: Callable[..., str],
) -> None:
    # Intervals without a complete exchange print nothing.
    rows = exchanges(200, 900, 100, 300, 400)
    for first in range(0, len(rows) - 1, 2):
        rows[first], rows[first + 1] = rows[first + 1], rows[first]
    finished = {written("stages", rows, size=size, every="1us") for size in (1, 2, 7, 1000)}
    assert len(finished) == 1
    assert finished.pop().count("-- until") > 2


@pytest.mark.parametrize("name", ["waterfall", "summary", "stages"])
def test_loss_is_written_at_its_place(tmp_path: Path, name: str) -> None:
    for form in ("text", "json"):
        path = tmp_path / form
        options = read_options(name, SPECS[name].options, {"path": str(path), "format": form})
        sink: Any = SPECS[name].factory(options, RunInfo(()))
        loss = Loss("tcp_client", "send", 7, 5, 9)
        sink.lost(loss)
        sink.close(REPORT)
        text = path.read_text(encoding="utf-8")
        if name == "stages" and form == "text":
            assert text.startswith("-- 7 events were lost: figures of what was seen\n")
        elif form == "json":
            assert json.loads(text)["lost"] == attrs.asdict(loss)
        else:
            assert text.startswith("-- 7 events lost here (tcp_client, send) --\n")


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("waterfall", {"format": "xml"}),
        ("waterfall", {"slow": "-1"}),
        ("waterfall", {"min_stage": "queue"}),
        ("stages", {"group_by": "colour"}),
        ("stages", {"every": "now"}),
        ("summary", {"slow": "1"}),
    ],
)
def test_invalid_options_are_refused(name: str, given: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        read_options(name, SPECS[name].options, given)


def test_number_of_groups_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tcplat_stages.stages._MOST_GROUPS", 3)
    sink = Stages(None, ("remote",))  # type: ignore[arg-type] # nothing is written
    for number in range(10):
        history = History(
            ends=(("10.0.0.1", 1_000), (f"10.0.1.{number}", 80)), by_sock=(number + 1, number + 99)
        )
        now = history.shake_hands(number * 1_000_000) + 1_000
        history.message(CLIENT, 1, [now + step for step in range(6)])
        history.message(SERVICE, 1, [now + 6 + step for step in range(6)])
        history.close(now + 100)
        sink.write(history.rows())  # type: ignore[arg-type] # as good as an event
    assert len(sink._now) == 4
    assert sink._now[("(others)",)]["total"].count == 7


def test_each_sink_names_the_current_program_after_exec(written: Callable[..., str]) -> None:
    rows = exchanges(1_000, 400)
    sends = [row for row in rows if row.point == "send" and row.probe == "tcp_client"]
    for row in rows:
        if row.probe == "tcp_client" and row.ts_ns >= sends[-1].ts_ns:
            row.comm = "python3"
    shown = objects(written("waterfall", rows, format="json"))
    assert [one["comm"] for one in shown] == ["curl", "python3"]
    # At the end of the run, too, each by its own.
    shown = objects(written("waterfall", rows, format="json", slow="2"))
    assert [one["comm"] for one in shown] == ["curl", "python3"]
    assert "(python3 100)" in written("waterfall", rows).split("\n\n")[1]
    totals = [
        one for one in objects(written("stages", rows, format="json")) if one["stage"] == "total"
    ]
    assert [(one["process"], one["count"]) for one in totals] == [("curl", 1), ("python3", 1)]
    (conn,) = objects(written("summary", rows, format="json"))
    assert (conn["comm"], conn["client"]["comm"]) == ("python3", "python3")


def test_unmeasured_kernel_figure_is_not_shown(
    written: Callable[..., str],
) -> None:
    history = History()
    now = history.shake_hands()
    stats(history, now + 5, CLIENT, srtt_us=1_200, rto_us=201_000)
    history.packet(now + 6, "nic_tx", CLIENT, 0, 10)
    history.packet(now + 7, "nic_tx", CLIENT, 0, 10)
    text = written("summary", history.rows())
    assert "client   srtt 1.20 ms · RTO 201.00 ms\n" in text
    # The kernel's count is unknown as well: packets show it.
    assert "client retransmitted 1" in text


@pytest.mark.parametrize("capture", ["ipv4", "ipv6"])
@pytest.mark.parametrize("name", sorted(SPECS))
def test_rows_of_other_points_change_nothing(
    written: Callable[..., str], name: str, capture: str
) -> None:
    reader = Reader.open(str(CORPUS / f"{capture}.jsonl"))
    rows: list[Any] = [one for batch in reader.batches() for one in batch]
    used = [one for one in rows if one.point in SPECS[name].points]
    assert {one.point for one in rows} - set(SPECS[name].points) == {"rx_tcp"}
    text = written(name, rows, format="json")
    assert text
    assert written(name, used, format="json") == text
