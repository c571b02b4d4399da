"""tcplat merge: two hosts' captures become one, with true bounds of the clock offset."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from tcplat_report.clocks import DRIFT_PPM, Corridor, PacketMatcher, UnboundedError
from tcplat_report.commands import merge
from tcplat_stages.exchange import Exchange
from tcplat_stages.join import Joiner

from tcplat_core import Event, Loss, Reader, Sampled, UsageError

from .captures import Traffic, joint, of_host, write

SHIFT_NS = 3_700_000_000


def drifting(ts_ns: int) -> int:
    """3.7 s ahead, and 50 ppm too fast."""
    return ts_ns + SHIFT_NS + ts_ns * 50 // 1_000_000


def merged(folder: Path, first: Iterator[Event], second: Iterator[Event]) -> tuple[Result, Path]:
    paths = [write(folder / "a", first), write(folder / "b", second)]
    out = folder / "out"
    arguments = [*map(str, paths), "-o", str(out)]
    return CliRunner().invoke(merge, arguments, catch_exceptions=False), out


def heads(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [value["merge"] for line in file if "merge" in (value := json.loads(line))]


def exchanges(rows: Iterator[Event]) -> list[Exchange]:
    joiner = Joiner()
    return [
        one for one in [*joiner.feed(list(rows)), *joiner.finish()] if isinstance(one, Exchange)
    ]


def read(path: Path) -> Iterator[Event]:
    for batch in Reader.open(str(path), quiet=True).batches():
        yield from batch


def test_clock_offset_and_drift_are_found_within_the_bound(tmp_path: Path) -> None:
    traffic = Traffic(connections=200, gap_us=50_000)
    result, out = merged(tmp_path, of_host(traffic, 0), of_host(traffic, 1, drifting))
    host, other = heads(out)
    assert (host["host"], host["offset_ns"], host["bound_ns"]) == (0, 0, 0)
    assert other["host"] == 1
    truth = drifting(traffic.began_ns) - traffic.began_ns
    assert abs(other["offset_ns"] - truth) <= other["bound_ns"]
    assert 0 < other["bound_ns"] < 30_000  # the fastest packets took about 20 µs each way
    assert abs(other["drift_ppm"] - 50) <= other["drift_bound_ppm"] < 10
    assert "± " in result.stderr
    # And so is every row: of the same packet, host B's is where it truly was.
    true = sorted((row.seq or 0, row.ts_ns) for host, row in traffic.rows() if host == 1)
    got = sorted((row.seq or 0, row.ts_ns) for row in read(out) if (row.netns or 0) >> 32 == 1)
    assert len(true) == len(got)
    for (_, expected), (_, found) in zip(true, got, strict=True):
        assert abs(found - expected) <= other["bound_ns"]


def test_merged_capture_has_the_exchanges_of_a_joint_capture(tmp_path: Path) -> None:
    traffic = Traffic(connections=100)
    _, out = merged(tmp_path, of_host(traffic, 0), of_host(traffic, 1, drifting))
    bound = heads(out)[1]["bound_ns"]
    expected, found = exchanges(joint(traffic)), exchanges(read(out))
    assert len(found) == len(expected) == 1000
    key = {(one.conn.client, one.number): one for one in expected}
    for one in found:
        true = key[one.conn.client, one.number]
        assert (one.request_bytes, one.reply_bytes) == (true.request_bytes, true.reply_bytes)
        assert [name for name, _ in one.split.stages] == [name for name, _ in true.split.stages]
        assert abs(one.total_ns - true.total_ns) <= 1  # by the client's clock alone
        for (name, ns), (_, true_ns) in zip(one.split.stages, true.split.stages, strict=True):
            # Elsewhere: host B's own drift, and how fast the bounds may move.
            drift = 3 + true_ns * (DRIFT_PPM + 50) // 1_000_000
            allowed = bound if name.startswith("wire") else drift
            assert abs(ns - true_ns) <= allowed, name


def test_sum_of_wire_times_is_off_by_the_drift_alone(tmp_path: Path) -> None:
    # Half of the services take 20 ms longer: times within B are by B's clock.
    traffic = Traffic(connections=100, slow={(n, 3): 20_000 for n in range(0, 100, 2)})
    _, out = merged(tmp_path, of_host(traffic, 0), of_host(traffic, 1, drifting))
    true = {(one.conn.client, one.number): one for one in exchanges(joint(traffic))}
    worst = 0.0
    for one in exchanges(read(out)):
        stages = dict(one.split.stages)
        known = dict(true[one.conn.client, one.number].split.stages)
        within = one.total_ns - sum(stages[name] for name in ("wire", "wire_back"))
        off = sum(stages[name] - known[name] for name in ("wire", "wire_back"))
        assert abs(off) <= 4 + 2 * DRIFT_PPM * within / 1_000_000
        worst = max(worst, abs(off))
    assert worst > 100  # so it is not exact, and the README does not say so


def test_merged_capture_is_sorted_and_readable(tmp_path: Path) -> None:
    traffic = Traffic(connections=20)
    _, out = merged(tmp_path, of_host(traffic, 0), of_host(traffic, 1, drifting))
    rows = list(read(out))
    times = [row.ts_ns for row in rows]
    assert times == sorted(times)
    assert {(row.netns or 0) >> 32 for row in rows} == {0, 1}
    assert len({row.sock for row in rows if row.sock}) == 2 * 20
    assert {row.time_ns - row.ts_ns for row in rows} == {1_700_000_000_000_000_000}
    reader = Reader.open(str(out), quiet=True)
    assert len([1 for _ in reader.items()]) > 0
    assert [host.host for host in reader.merges] == [0, 1]
    assert not list(reader.remarks())


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (1, 1, []),
        (8, 8, [(8, 0), (8, 1)]),
        (8, 64, [(8, 0), (64, 1)]),
        (1, 8, [(1, 0), (8, 1)]),
        (8, 1, [(1, 1), (8, 0)]),
    ],
)
def test_merged_capture_has_the_shares_of_both_hosts(
    tmp_path: Path, first: int, second: int, expected: list[tuple[int, int]]
) -> None:
    traffic = Traffic(connections=20)
    paths = [
        write(tmp_path / "a", of_host(traffic, 0), one_in=first),
        write(tmp_path / "b", of_host(traffic, 1, drifting), one_in=second),
    ]
    out = tmp_path / "out"
    result = CliRunner().invoke(merge, [*map(str, paths), "-o", str(out)], catch_exceptions=False)
    reader = Reader.open(str(out), quiet=True)
    items = list(reader.items())
    shares = [(item.one_in, item.host) for item in items if isinstance(item, Sampled)]
    assert shares == expected
    assert len([item for item in items if isinstance(item, list)]) > 0
    assert reader.report.one_in == (min(first, second), max(first, second))
    assert ("seen from one end" in result.stderr) == (first != second)


def test_loss_intervals_are_converted_to_the_first_hosts_clock(tmp_path: Path) -> None:
    traffic = Traffic(connections=20)
    paths = [write(tmp_path / "a", of_host(traffic, 0))]
    paths.append(write(tmp_path / "b", of_host(traffic, 1, drifting)))
    lines = paths[1].read_text().splitlines()
    middle = len(lines) // 2
    times = [json.loads(lines[at])["ts_ns"] for at in (middle - 1, middle)]
    for since_ns, until_ns in ((0, 0), times):
        lost = {"probe": "p", "point": "send", "count": 1}
        lost |= {"since_ns": since_ns, "until_ns": until_ns}
        lines.insert(middle, json.dumps({"v": 2, "lost": lost}))
    paths[1].write_text("".join(line + "\n" for line in lines))
    out = tmp_path / "out"
    arguments = [*map(str, paths), "-o", str(out)]
    CliRunner().invoke(merge, arguments, catch_exceptions=False)
    known, unknown = [item for item in Reader.open(str(out)).items() if isinstance(item, Loss)]
    assert (unknown.since_ns, unknown.until_ns) == (0, 0)
    theirs = [row.ts_ns for row in read(out) if (row.netns or 0) >> 32 == 1]
    assert known.since_ns in theirs
    assert theirs[theirs.index(known.since_ns) + 1] == known.until_ns


def test_merged_capture_is_complete_until_the_earlier_end(tmp_path: Path) -> None:
    traffic = Traffic(connections=20)
    ends = (traffic.began_ns + 30_000_000_000, traffic.began_ns + 20_000_000_000)
    first = write(tmp_path / "a", of_host(traffic, 0), until_ns=ends[0])
    second = write(tmp_path / "b", of_host(traffic, 1, drifting), until_ns=drifting(ends[1]))
    out = tmp_path / "out"
    arguments = [str(first), str(second), "-o", str(out)]
    CliRunner().invoke(merge, arguments, catch_exceptions=False)
    reader = Reader.open(str(out), quiet=True)
    list(reader.items())
    # Behind the last packet the clocks may drift apart, by 200 ppm of 20 s.
    assert abs(reader.report.until_ns - ends[1]) < 4_000_000


def test_merged_capture_can_be_merged_again(tmp_path: Path) -> None:
    traffic = Traffic(connections=20)
    _, out = merged(tmp_path, of_host(traffic, 0), of_host(traffic, 1, drifting))
    again = tmp_path / "again"
    arguments = [str(tmp_path / "b"), str(out), "-o", str(again)]
    CliRunner().invoke(merge, arguments, catch_exceptions=False)
    assert [host["host"] for host in heads(again)] == [0, 1, 2]
    assert {(row.netns or 0) >> 32 for row in read(again)} == {0, 1, 2}


@pytest.mark.parametrize(
    ("without", "words"),
    [
        (("0/nic_rx", "0/rx_ip"), "no packet from B to A"),
        (("1/nic_tx",), "no packet from B to A"),
        (("0/nic_tx",), "no packet from A to B"),
    ],
)
def test_missing_direction_is_reported(
    tmp_path: Path, without: tuple[str, ...], words: str
) -> None:
    traffic = Traffic(without=frozenset(without))
    with pytest.raises(UnboundedError, match=words):
        merged(tmp_path, of_host(traffic, 0), of_host(traffic, 1))
    assert not (tmp_path / "out").exists()


def test_contradictory_packets_are_reported(tmp_path: Path) -> None:
    traffic = Traffic(connections=50, gap_us=100_000)
    fast: Callable[[int], int] = lambda ts_ns: ts_ns + ts_ns // 1000  # noqa: E731 - 1000 ppm
    with pytest.raises(UnboundedError, match="contradict each other"):
        merged(tmp_path, of_host(traffic, 0), of_host(traffic, 1, fast))


def test_stdin_is_refused_as_a_capture() -> None:
    with pytest.raises(UsageError, match="cannot be read twice"):
        CliRunner().invoke(merge, ["-", "x"], catch_exceptions=False)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    ppm=st.integers(-150, 150),
    shift=st.integers(-(10**15), 10**15),
    gap_us=st.integers(1, 3_000_000),
    one_way_us=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
)
def test_true_offset_is_within_the_bounds_at_every_packet(
    seed: int, ppm: int, shift: int, gap_us: int, one_way_us: tuple[int, int]
) -> None:
    """Whatever the delays in each direction, however rare the packets."""
    chance = Random(seed)  # noqa: S311 - made-up traffic

    def clock(ts_ns: int) -> int:
        return ts_ns + shift + ts_ns * ppm // 1_000_000

    corridor = Corridor()
    now = 10**12
    seen = []
    for number in range(300):
        now += chance.randrange(1, 2 * gap_us * 1000)
        way = number and chance.randrange(2)
        took = round(one_way_us[way] * 1000 * (1 + chance.expovariate(1)))
        if number < 2 or way == 0:
            corridor.at_most(clock(now + took), clock(now + took) - now)
            seen.append(now + took)
        if number < 2 or way == 1:
            corridor.at_least(clock(now), clock(now) - now - took)
            seen.append(now)
    offset = corridor.offset()
    for true in seen:
        truth = clock(true) - true
        assert abs(offset.at(clock(true)) - truth) <= offset.bound_ns + 1
    moved = [true - truth for true, truth in ((t, offset.at(t)) for t in sorted(map(clock, seen)))]
    assert moved == sorted(moved)


def test_bounds_hold_when_windows_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tcplat_report.clocks._MOST_WINDOWS", 64)
    corridor = Corridor()
    for now in range(0, 10**10, 10**7):
        corridor.at_most(now + 20_000, 20_000)
        corridor.at_least(now, -20_000)
    assert corridor.window_ns > 10**8
    assert len(corridor.highs) <= 64
    offset = corridor.offset()
    assert all(abs(offset.at(now)) <= offset.bound_ns for now in range(0, 10**10, 10**7))


class Packets:
    """What two hosts see of packets between them, one by one."""

    def __init__(self) -> None:
        self.sightings = PacketMatcher()
        self.like = {
            (row.point, host): row
            for host, row in Traffic(connections=1, exchanges=1).rows()
            if row.point in ("nic_tx", "nic_rx") and not row.bytes
        }

    def __call__(
        self, host: int, point: str, sender: int, ts_ns: int, seq: int, count: int, **more: Any
    ) -> None:
        row = self.like[point, host]
        values = {name: getattr(row, name) for name in row.__struct_fields__}
        ends = [("10.0.0.1", 1000), ("10.0.0.2", 80)]
        (saddr, sport), (daddr, dport) = ends[sender], ends[1 - sender]
        values |= {"ts_ns": ts_ns, "seq": seq, "bytes": count, "flags": "ACK", "ack": 7}
        values |= {"saddr": saddr, "sport": sport, "daddr": daddr, "dport": dport, **more}
        self.sightings.feed(host, [type(row)(**values)])


def test_retransmitted_merged_or_split_segments_do_not_mislead() -> None:
    """B's clock is A's: no bound may be below 0."""
    packet = Packets()
    sightings = packet.sightings
    packet(0, "nic_tx", 0, 0, 99, 0, flags="SYN", ack=None)
    packet(0, "nic_tx", 0, 1_000, 100, 1000)  # lost
    packet(0, "nic_tx", 0, 900_000, 100, 1000)  # again: arrives
    packet(1, "nic_rx", 0, 0, 99, 0, flags="SYN", ack=None)
    packet(1, "nic_rx", 0, 930_000, 100, 1000)
    packet(0, "nic_tx", 0, 1_000_000, 1100, 3000)  # three packets on the wire
    packet(0, "nic_tx", 0, 1_001_000, 1100, 1000)  # and the first of them once more
    for step in range(3):
        packet(1, "nic_rx", 0, 1_000_500 + step * 10_000, 1100 + 1000 * step, 1000)
    packet(0, "nic_tx", 0, 2_000_000, 4100, 1000)
    packet(0, "nic_tx", 0, 2_010_000, 5100, 1000)
    packet(1, "nic_rx", 0, 2_040_000, 4100, 2000)  # GRO
    highs = sightings.corridor.highs
    assert sightings.corridor.counts == [5, 0]  # SYN, three times bytes, and one acknowledgement
    assert sightings.corridor.packets == 4  # one has both
    assert min(highs.values()) >= 0


def test_numbers_that_wrap_are_not_those_of_4_gib_before() -> None:
    # Each packet takes 50 µs by either clock; B sees it as two halves.
    packet = Packets()
    packet(0, "nic_tx", 0, 0, 99, 0, flags="SYN", ack=None)
    packet(1, "nic_rx", 0, 50_000, 99, 0, flags="SYN", ack=None)
    size, at, seq = 1 << 29, 0, 100
    for number in range(12):
        at += 1_000_000
        # In the second 4 GiB, A's packets end where B's halves ended in the first.
        count = size // 2 if number == 8 else size
        packet(0, "nic_tx", 0, at, seq % 2**32, count)
        for half in (0, count // 2):
            packet(1, "nic_rx", 0, at + 50_000, (seq + half) % 2**32, count // 2)
        seq += count
    corridor = packet.sightings.corridor
    assert corridor.packets == 14  # SYN, data, and one acknowledgement
    assert all(50_000 <= high < 1_000_000 for high in corridor.highs.values())


@pytest.mark.parametrize("begun", [True, False])
def test_connections_of_several_namespaces_with_equal_ends_are_not_mixed(*, begun: bool) -> None:
    """The second pair's numbers are those of the first, 10 ms before. B's clock is A's."""
    packet = Packets()
    syn = {"flags": "SYN", "ack": None}
    for pair, at in ((1, 0), (2, 10_000_000)) if begun else ():
        packet(0, "nic_tx", 0, at, 99, 0, netns=pair, **syn)
        packet(1, "nic_rx", 0, at + 50_000, 99, 0, netns=10 + pair, **syn)
    late = 0 if begun else 2_000_000_000
    for pair in (1, 2):  # from the middle on, what comes within a second is not certain to be new
        packet(0, "nic_tx", 0, 11_000_000, 99, 1, netns=pair)
        packet(1, "nic_rx", 0, 11_050_000, 99, 1, netns=10 + pair)
    for pair, at in ((2, 20_000_000), (1, 20_100_000)):
        packet(0, "nic_tx", 0, late + at, 100 * pair, 10, netns=pair)
        packet(1, "nic_rx", 0, late + at + 50_000, 100 * pair, 10, netns=10 + pair)
    # The same numbers in both, at once; B's row of the first pair is lost, or comes later.
    packet(0, "nic_tx", 0, late + 30_000_000, 1000, 10, netns=1)
    packet(0, "nic_tx", 0, late + 40_000_000, 1000, 10, netns=2)
    packet(1, "nic_rx", 0, late + 40_050_000, 1000, 10, netns=12)
    packet(0, "nic_tx", 0, late + 50_000_000, 2000, 10, netns=2)
    packet(0, "nic_tx", 0, late + 60_000_000, 2000, 10, netns=1)
    packet(1, "nic_rx", 0, late + 50_050_000, 2000, 10, netns=12)
    highs = packet.sightings.corridor.highs
    assert packet.sightings.corridor.counts[0] >= 3
    assert all(50_000 <= high < 1_000_000 for high in highs.values())


def test_packets_forwarded_by_a_namespace_count() -> None:
    packet = Packets()
    for netns, at in ((1, 0), (2, 1000)):  # a container, and its host
        packet(0, "nic_tx", 0, at, 99, 0, netns=netns, flags="SYN", ack=None)
        packet(0, "nic_tx", 0, 100_000 + at, 100, 10, netns=netns)
    for at, seq, more in ((50_000, 99, {"flags": "SYN", "ack": None}), (150_000, 100, {})):
        packet(1, "nic_rx", 0, at, seq, 10 * (seq > 99), netns=11, **more)
    assert packet.sightings.corridor.packets == 2


@pytest.mark.parametrize("link", [None, Path.symlink_to, Path.hardlink_to])
def test_file_is_not_merged_with_itself(
    link: Callable[[Path, Path], None] | None, tmp_path: Path
) -> None:
    path = other = write(tmp_path / "a", of_host(Traffic(connections=20), 0))
    if link:
        other = tmp_path / "b"
        link(other, path)
    with pytest.raises(UsageError, match="are one file: merge joins the captures of two hosts"):
        CliRunner().invoke(
            merge, [str(path), str(other), "-o", str(tmp_path / "out")], catch_exceptions=False
        )
    assert not (tmp_path / "out").exists()


def test_wire_times_are_printed_with_their_bound(tmp_path: Path) -> None:
    traffic = Traffic(connections=5)
    _, out = merged(tmp_path, of_host(traffic, 0), of_host(traffic, 1, drifting))
    bound_us = heads(out)[1]["bound_ns"] / 1000

    def replayed(sink: str) -> str:
        shown = tmp_path / "shown"
        arguments = ["replay", str(out), "-q", "--sink", f"{sink},path={shown}"]
        # In a process of its own: as root, a replay gives up root for good.
        subprocess.run([sys.executable, "-I", "-m", "tcplat_core", *arguments], check=True)
        return shown.read_text(encoding="utf-8")

    stages = [json.loads(line) for line in replayed("stages:format=json").splitlines()]
    bounds = {one["stage"]: one["wire_bound_us"] for one in stages if "wire_bound_us" in one}
    assert bounds == {"wire": bound_us, "wire_back": bound_us}
    said = f"± {bound_us:.1f} µs"
    assert said in replayed("stages:group_by=none")
    lines = replayed("waterfall:width=100").splitlines()
    marked = {line.split()[0] for line in lines if said in line}
    assert marked == {"wire", "wire_back", "syn", "synack"}
    connections = [json.loads(line) for line in replayed("summary:format=json").splitlines()]
    assert [one["wire_bound_us"] for one in connections] == [bound_us] * 5
    assert None not in {one["synack_us"] for one in connections}
    connects = [line for line in replayed("summary:format=text").splitlines() if "connect " in line]
    assert [line.count(said) for line in connects] == [2] * 5  # SYN-ACK, ACK
