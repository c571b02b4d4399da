"""Histograms: the bucket of a duration, percentiles, groups and what could not be measured."""

from __future__ import annotations

import math
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcplat_core.errors import PluginError
from tcplat_core.plugin import aggregates
from tcplat_core.plugin.aggregates import (
    BUCKETS,
    CELLS,
    MOST_GROUPS,
    SUB_BITS,
    TOP_BITS,
    Aggregation,
    Counters,
    Distribution,
    Group,
    Histogram,
    bounds_ns,
    bucket,
)
from tcplat_core.testing import FakeArray

durations = st.integers(0, (1 << TOP_BITS) - 1)
CONNECT = Histogram("connect", "SYN to established", ("connect", "state"))


def distribution(*samples_ns: int) -> Distribution:
    counts = [0] * (BUCKETS + 1)
    for sample in samples_ns:
        counts[bucket(sample)] += 1
    return Distribution(
        probe="one", histogram=CONNECT, group=Group(), counts=counts[:-1], over=counts[-1]
    )


# --- buckets


@given(durations)
def test_duration_lies_within_its_bucket(ns: int) -> None:
    low, high = bounds_ns(bucket(ns))
    assert low <= ns <= high


@given(durations)
def test_middle_of_a_bucket_is_at_most_3_2_percent_off(ns: int) -> None:
    assert abs(aggregates.middle_us(bucket(ns)) * 1000 - ns) <= 0.032 * ns


def test_buckets_cover_0_to_68_s_without_gaps() -> None:
    expected = 0
    for number in range(BUCKETS):
        low, high = bounds_ns(number)
        assert low == expected
        assert bucket(low) == bucket(high) == number
        expected = high + 1
    assert expected == 1 << TOP_BITS
    assert expected / 1e9 > 68


def test_duration_beyond_68_s_has_no_bucket() -> None:
    assert bucket(1 << TOP_BITS) == bucket((1 << 64) - 1) == BUCKETS


C_PROGRAM = """
#include <stdint.h>
#include <stdio.h>
typedef uint32_t u32;
typedef uint64_t u64;
#define TCPLAT_SUB_BITS {sub_bits}
#define TCPLAT_TOP_BITS {top_bits}
#define TCPLAT_BUCKETS {buckets}
#include "{header}"
int main(void)
{{
	u64 ns;

	while (fread(&ns, sizeof(ns), 1, stdin)) {{
		u32 number = tcplat_bucket(ns);

		fwrite(&number, sizeof(number), 1, stdout);
	}}
	return 0;
}}
"""


def test_kernel_and_python_agree_on_a_million_buckets(tmp_path: Path) -> None:
    compiler = shutil.which("clang") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("neither clang nor gcc is installed")
    header = Path(aggregates.__file__).parents[1] / "include" / "tcplat" / "bucket.bpf.h"
    source, program = tmp_path / "bucket.c", tmp_path / "bucket"
    source.write_text(
        C_PROGRAM.format(sub_bits=SUB_BITS, top_bits=TOP_BITS, buckets=BUCKETS, header=header)
    )
    subprocess.run([compiler, "-O2", "-Wall", "-Werror", "-o", program, source], check=True)
    some = random.Random(4711)  # noqa: S311 - the same on every run
    values = [some.getrandbits(some.randrange(1, 65)) for _ in range(1_000_000)]
    values += [edge for number in range(BUCKETS) for edge in bounds_ns(number)]
    values += [1 << TOP_BITS, (1 << 64) - 1]
    shown = subprocess.run(
        [program],
        input=b"".join(value.to_bytes(8, "little") for value in values),
        capture_output=True,
        check=True,
    ).stdout
    theirs = [int.from_bytes(shown[at : at + 4], "little") for at in range(0, len(shown), 4)]
    assert theirs == list(map(bucket, values))


# --- what is shown of them


@given(st.lists(durations, min_size=1, max_size=200), st.floats(0, 100))
def test_percentile_is_within_3_2_percent_of_its_sample(samples: list[int], percent: float) -> None:
    rank = max(1, math.ceil(len(samples) * percent / 100))
    true = sorted(samples)[rank - 1]
    assert abs(distribution(*samples).percentile_us(percent) * 1000 - true) <= 0.032 * true


def test_percentile_beyond_the_buckets_is_infinite() -> None:
    one = distribution(1000, 2000, 1 << TOP_BITS)
    assert one.count == 3
    assert one.percentile_us(50) == pytest.approx(2.0, rel=0.032)
    assert math.isinf(one.percentile_us(99))


def test_interval_counts_are_the_difference_of_two_readings() -> None:
    before, now = distribution(10, 2000), distribution(10, 2000, 2000, 1 << TOP_BITS)
    came = now.since(before)
    assert (came.count, came.over, sum(came.counts)) == (2, 1, 1)
    assert now.since(None) is now


# --- what a sink may ask for


def test_aggregation_of_too_many_groups_is_refused() -> None:
    assert Aggregation("process", MOST_GROUPS, 1).numbers == MOST_GROUPS
    with pytest.raises(ValueError, match="groups"):
        Aggregation("process", MOST_GROUPS + 1, 1)


def test_every_cpu_has_a_stripe_while_memory_allows() -> None:
    few = Aggregation("all", 256, 1)
    assert [few.stripes(cpus, 4) for cpus in (1, 2, 3, 8, 100)] == [1, 2, 4, 8, 128]


@pytest.mark.parametrize("groups", [1, 256, 1024, 4096])
@pytest.mark.parametrize("cpus", [1, 2, 64, 1024])
def test_stripes_stay_within_64_mib_where_one_fits(groups: int, cpus: int) -> None:
    wanted = Aggregation("process", groups, 1)
    stripes = wanted.stripes(cpus, 4)
    one = (groups + 1) * 4 * CELLS * 8
    assert stripes >= 1
    assert stripes & (stripes - 1) == 0
    assert stripes == 1 or stripes * one <= 64 << 20


def test_histogram_names_the_point_it_lacks() -> None:
    inside = Histogram("inside", "inside recv()", ("state", "recv"), mechanisms=("fentry",))
    assert inside.missing({"state": "kprobe", "recv": "fentry"}, {}) is None
    assert inside.missing({"state": "kprobe", "recv": "tracepoint"}, {}) == (
        "recv by tracepoint cannot measure it"
    )
    assert inside.missing({"state": "kprobe"}, {"recv": "too old"}) == "no recv: too old"


def test_histogram_name_must_be_a_lower_case_identifier() -> None:
    with pytest.raises(PluginError, match="lower-case"):
        Histogram("Connect time", "", ())


# --- reading what the kernel counted


class Kernel:
    """`keys` and `durations` of a probe with two histograms, as its handlers leave them."""

    def __init__(self, by: str, *, groups: int = 4, stripes: int = 2) -> None:
        self.aggregation = Aggregation(by, groups, 1)
        self.numbers = max(1, self.aggregation.numbers)
        self.keys = FakeArray("=16s16sIHBB", self.numbers + 1)
        self.durations = FakeArray("=Q", stripes * (self.numbers + 1) * 2 * CELLS)
        second = Histogram("second", "", ("state",))
        self.counters = Counters(
            "one", (CONNECT, second), self.aggregation, stripes, self.keys.fd, self.durations.fd
        )

    def count(self, number: int, histogram: int, cell: int, times: int, stripe: int = 0) -> None:
        row = (stripe * (self.numbers + 1) + number) * 2 + histogram
        self.durations.set(row * CELLS + cell, times)

    def close(self) -> None:
        self.counters.close()
        self.keys.close()
        self.durations.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_stripes_are_summed(stack: ExitStack) -> None:
    kernel = Kernel("all")
    stack.callback(kernel.close)
    kernel.count(0, 0, bucket(1000), 3)
    kernel.count(0, 0, bucket(1000), 4, stripe=1)
    kernel.count(0, 0, BUCKETS, 1, stripe=1)
    kernel.count(0, 1, BUCKETS + 1, 2)
    first, second = kernel.counters.read()
    assert (first.histogram, first.group, first.count, first.over) == (CONNECT, Group(), 8, 1)
    assert first.percentile_us(50) == pytest.approx(1.0, rel=0.032)
    assert (second.histogram.name, second.count, second.unmeasured) == ("second", 0, 2)


def test_group_is_decoded_from_its_key(stack: ExitStack) -> None:
    for by, key, expected in (
        ("process", (bytes(16), b"ngi\x1bnx", 4711, 0, 0, 1), Group(pid=4711, comm=r"ngi\x1bnx")),
        ("process", (bytes(16), b"", 0, 0, 0, 1), Group()),
        (
            "remote",
            (bytes(10) + b"\xff\xff\x7f\0\0\1", b"", 0, 443, 4, 1),
            Group(address="127.0.0.1", port=443),
        ),
        ("remote", (bytes(15) + b"\1", b"", 0, 0, 6, 1), Group(address="::1")),
        ("port", (bytes(16), b"", 0, 443, 0, 1), Group(port=443)),
    ):
        kernel = Kernel(by)
        stack.callback(kernel.close)
        kernel.keys.set(1, *key)
        kernel.count(1, 0, 20, 1)
        assert [found.group for found in kernel.counters.read()] == [expected]


def test_groups_behind_an_unused_number_are_read(stack: ExitStack) -> None:
    kernel = Kernel("port")
    stack.callback(kernel.close)
    kernel.keys.set(2, bytes(16), b"", 0, 80, 0, 1)
    kernel.count(2, 0, 20, 1)
    kernel.count(0, 0, 20, 7)
    rest, found = kernel.counters.read()
    assert (rest.group, rest.count) == (Group(rest=True), 7)
    assert (found.group, found.count) == (Group(port=80), 1)
