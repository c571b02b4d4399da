"""Output of the sink `histogram`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tcplat_sinks.histogram import Histograms, human

from tcplat_core import Aggregates, Distribution, Group, Histogram, Output, RunReport
from tcplat_core.plugin.aggregates import BUCKETS, bucket
from tcplat_core.plugin.report import ProbeReport

CONNECT = Histogram("connect", "SYN to established", ("connect", "state"))
REPORT = RunReport(
    probes={
        "tcp_service": ProbeReport(
            hooks=(), counted={}, uncounted={"in_recv": "recv by tracepoint cannot measure it"}
        )
    },
    duration_s=2,
)


def of(group: Group, *samples_us: float, over: int = 0, unmeasured: int = 0) -> Distribution:
    counts = [0] * BUCKETS
    for sample in samples_us:
        counts[bucket(round(sample * 1000))] += 1
    return Distribution(
        probe="tcp_client",
        histogram=CONNECT,
        group=group,
        counts=counts,
        over=over,
        unmeasured=unmeasured,
    )


def at(elapsed_s: float, *distributions: Distribution, final: bool = False) -> Aggregates:
    return Aggregates(
        ts_ns=1,
        time_ns=1_700_000_000_000_000_000,
        elapsed_s=elapsed_s,
        distributions=distributions,
        final=final,
    )


class Written:
    """A sink, and what it has written."""

    def __init__(self, folder: Path, *, as_json: bool, every_s: float = 1) -> None:
        self.path = folder / "out"
        output = Output.open(str(self.path), lambda: False)
        self.sink = Histograms(output, as_json, every_s)

    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def objects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text().splitlines()]


def test_each_interval_has_its_samples_and_the_run_has_all(tmp_path: Path) -> None:
    written = Written(tmp_path, as_json=True)
    nginx = Group(pid=1, comm="nginx")
    written.sink.aggregates(at(1, of(nginx, 100, 100)))
    written.sink.aggregates(at(2, of(nginx, 100, 100)))  # nothing came
    written.sink.aggregates(at(3, of(nginx, 100, 100, 3000), of(Group(pid=2, comm="x"), 5)))
    written.sink.aggregates(at(3.5, of(nginx, 100, 100, 3000), final=True))
    written.sink.close(REPORT)
    *found, report = written.objects()
    assert [(one["window"], one["seconds"], one["pid"], one["count"]) for one in found] == [
        ("interval", 1, 1, 2),
        ("interval", 1, 1, 1),
        ("interval", 1, 2, 1),
        ("run", 3.5, 1, 3),
    ]
    assert found[1]["p50_us"] == pytest.approx(3000, rel=0.032)
    assert report["report"]["probes"]["tcp_service"]["no_histograms"] == {
        "in_recv": "recv by tracepoint cannot measure it"
    }


def test_every_0_shows_the_whole_run_alone(tmp_path: Path) -> None:
    written = Written(tmp_path, as_json=True, every_s=0)
    written.sink.aggregates(at(1, of(Group(), 100), final=True))
    assert [one["window"] for one in written.objects()] == ["run"]


def test_json_counts_samples_beyond_the_buckets_and_not_measured(tmp_path: Path) -> None:
    written = Written(tmp_path, as_json=True, every_s=0)
    written.sink.aggregates(
        at(1, of(Group(address="::1", port=80), 10, over=3, unmeasured=2), final=True)
    )
    (one,) = written.objects()
    assert (one["count"], one["over"], one["not_measured"]) == (4, 3, 2)
    assert (one["address"], one["port"], one["pid"], one["rest"]) == ("::1", 80, None, False)
    assert (one["p50_us"], one["max_us"]) == (None, None)
    ((low, high, count),) = one["buckets"]
    assert low <= 10 < high
    assert count == 1


def test_text_has_percentiles_and_power_of_two_bars(tmp_path: Path) -> None:
    written = Written(tmp_path, as_json=False, every_s=0)
    samples = [20.0] * 30 + [40.0] * 15 + [200.0]
    written.sink.aggregates(at(2, of(Group(pid=7, comm="curl"), *samples), final=True))
    head, empty, what, figures, *bars, _, _ = written.text().split("\n")
    assert head.endswith("the whole run, 2.0 s")
    assert (empty, what) == ("", "tcp_client connect (SYN to established) of curl (7)")
    assert figures.startswith("count 46  p50 20.0 µs  p90 39.9 µs  p99 201 µs")
    counts = [(line.split("|")[0].split()[-1], line.count("*")) for line in bars]
    assert counts == [("30", 40), ("15", 20), ("0", 0), ("1", 2)]


def test_text_names_the_group(tmp_path: Path) -> None:
    groups = {
        Group(): "",
        Group(rest=True): " of others",
        Group(address="10.0.0.1", port=443): " of 10.0.0.1:443",
        Group(address="::1", port=443): " of [::1]:443",
        Group(address="::1"): " of ::1",
        Group(port=80): " of port 80",
    }
    for group, expected in groups.items():
        written = Written(tmp_path, as_json=False, every_s=0)
        written.sink.aggregates(at(1, of(group, 1), final=True))
        assert (
            written.text().splitlines()[2] == f"tcp_client connect (SYN to established){expected}"
        )
        written.sink.close(REPORT)


def test_text_counts_what_was_not_measured(tmp_path: Path) -> None:
    written = Written(tmp_path, as_json=False, every_s=0)
    written.sink.aggregates(at(1, of(Group(), unmeasured=1234), final=True))
    written.sink.close(REPORT)
    assert "count 0  not measured 1,234" in written.text()
    assert "tcp_service in_recv: not measured: recv by tracepoint" in written.text()


def test_empty_interval_writes_nothing(tmp_path: Path) -> None:
    written = Written(tmp_path, as_json=False)
    written.sink.aggregates(at(1))
    assert os.stat(written.path).st_size == 0


@pytest.mark.parametrize(
    ("us", "expected"),
    [
        (0, "0 ns"),
        (0.999, "999 ns"),
        (0.9996, "1.00 µs"),
        (9.87, "9.87 µs"),
        (98.7, "98.7 µs"),
        (999.4, "999 µs"),
        (999.6, "1.00 ms"),
        (2_500_000, "2.50 s"),
        (68_000_000, "68.0 s"),
    ],
)
def test_duration_has_three_digits(us: float, expected: str) -> None:
    assert human(us) == expected
