"""What a histogram sink has written, and whether it agrees with samples known one by one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .harness import Row, at

Found = dict[str, Any]

OFF = 0.032
"""The largest relative error of a percentile: half a bucket."""


def found(folder: Path, window: str = "run") -> list[Found]:
    """Return what the sink has written to `folder`/histograms, but for the report."""
    lines = (folder / "histograms").read_bytes().splitlines()
    values = [json.loads(line) for line in lines]
    assert "report" in values[-1]
    return [value for value in values[:-1] if value["window"] == window]


def one(histograms: list[Found], name: str) -> Found:
    """Return the only one of this name."""
    (histogram,) = (value for value in histograms if value["histogram"] == name)
    return histogram


def nearest_rank(samples: Sequence[float], percent: float) -> float:
    """Return a percentile, as the sink defines it."""
    return sorted(samples)[max(1, math.ceil(len(samples) * percent / 100)) - 1]


def assert_agrees(histogram: Found, samples_us: Sequence[float], within_us: float = 0) -> None:
    """Check that every percentile is that of the samples, to half a bucket and `within_us`."""
    assert histogram["count"] == len(samples_us)
    for name, percent in (("p50_us", 50), ("p90_us", 90), ("p99_us", 99), ("max_us", 100)):
        true = nearest_rank(samples_us, percent)
        assert abs(histogram[name] - true) <= OFF * true + within_us, (name, histogram, true)


def waits(rows: list[Row]) -> tuple[list[float], list[float]]:
    """Return rx_ip to ready, and ready to recv, of each new piece of one connection, in µs.

    A FIN wakes the reader as well, in another state: it is no byte.
    """
    arrived = {row["seq"]: row["ts_ns"] for row in at(rows, "rx_ip") if row["bytes"]}
    receive_path, queue, ready_at = [], [], {}
    end = None
    for row in rows:
        if row["point"] == "ready" and row["bytes"] and row["state"] == "TCP_ESTABLISHED":
            begin = row["seq"] if end is None else end
            end = row["seq"] + row["bytes"]
            if begin != end:
                receive_path.append((row["ts_ns"] - arrived[begin]) / 1000)
                ready_at[begin] = row["ts_ns"]
        elif row["point"] == "recv" and row["bytes"]:
            queue.append((row["ts_ns"] - ready_at[row["seq"]]) / 1000)
    return receive_path, queue
