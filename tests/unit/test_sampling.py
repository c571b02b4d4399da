"""--sample: one number for each connection, whole connections, and books that say so."""

from __future__ import annotations

import ipaddress
import json
import os
import random
import shutil
import struct
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any, cast

import attrs
import click
import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tcplat_core import SCHEMA_VERSION, Event, Loss, RunReport, Sampled, Sink
from tcplat_core.capture.replay import Replay
from tcplat_core.capture.rows import Capture
from tcplat_core.capture.source import Source
from tcplat_core.cli.main import cli
from tcplat_core.cli.shared_options import Share
from tcplat_core.deliver.books import Books
from tcplat_core.deliver.sinks import as_sink
from tcplat_core.kernel.layout import possible_cpus
from tcplat_core.loader.protocol import Request
from tcplat_core.plugin import sampling
from tcplat_core.plugin.hookpoints import HookPoint, tracepoint
from tcplat_core.plugin.options import parse_choice, read_options
from tcplat_core.plugin.report import HookReport, ProbeReport, add_reports
from tcplat_core.plugin.sampling import MOST, connection_hash, is_in_share
from tcplat_core.plugin.specs import Chosen, ProbeSpec, RunInfo
from tcplat_core.registry.find import Plugins
from tcplat_core.run.loader_process import LoaderProcess
from tcplat_core.run.session import Session
from tcplat_core.testing import FakeBooks, FakeLoader, FakeProbe, RecordingSink, make_event

PLUGINS = Plugins.load()
EVENTS = {name: spec.event for name, spec in PLUGINS.probes.items()}
ports = st.integers(0, 65535)
addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str)


# --- the number of a connection


@given(addresses, ports, addresses, ports)
def test_both_ends_have_the_same_number(saddr: str, sport: int, daddr: str, dport: int) -> None:
    number = connection_hash(saddr, sport, daddr, dport)
    assert number == connection_hash(daddr, dport, saddr, sport)
    assert 0 < number < 1 << 32


@given(st.ip_addresses(v=4).map(str), ports, st.ip_addresses(v=4).map(str), ports)
def test_mapped_addresses_count_as_ipv4(saddr: str, sport: int, daddr: str, dport: int) -> None:
    mapped = connection_hash(f"::ffff:{saddr}", sport, f"::ffff:{daddr}", dport)
    assert mapped == connection_hash(saddr, sport, daddr, dport)


@given(st.integers(1, (1 << 32) - 1), st.integers(1, MOST), st.integers(1, MOST))
def test_smaller_share_is_part_of_a_larger_one(number: int, one_in: int, other: int) -> None:
    larger, smaller = sorted((one_in, other))
    assert is_in_share(number, 1)
    assert not is_in_share(number, smaller) or is_in_share(number, larger)


@pytest.mark.parametrize("one_in", [2, 3, 8, 64])
@pytest.mark.parametrize(
    ("saddr", "daddr"),
    [("127.0.0.1", "127.0.0.1"), ("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2"), ("::1", "::1")],
)
def test_share_of_neighbouring_ports_is_as_large_as_asked(
    one_in: int, saddr: str, daddr: str
) -> None:
    """Linux gives even ports to connect(): their numbers must not be alike."""
    count = 14_000
    found = sum(
        is_in_share(connection_hash(saddr, 32_768 + 2 * number, daddr, 443), one_in)
        for number in range(count)
    )
    expected = count / one_in
    assert abs(found - expected) < 5 * (expected * (1 - 1 / one_in)) ** 0.5


def test_neighbouring_addresses_and_services_do_not_agree() -> None:
    in_both: Counter[bool] = Counter()
    for number in range(4000):
        first = is_in_share(connection_hash("10.0.0.1", 40_000 + number, "10.0.0.2", 443), 2)
        second = is_in_share(connection_hash("10.0.0.1", 40_000 + number, "10.0.0.3", 443), 2)
        in_both[first == second] += 1
    assert abs(in_both[True] - 2000) < 5 * 1000**0.5


C_PROGRAM = """
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
#undef __always_inline
#define __always_inline inline __attribute__((always_inline))
#include "{header}"
struct ends {{
	u8 saddr[16], daddr[16];
	u16 sport, dport;
	u32 one_in;
}} __attribute__((aligned(8)));
int main(void)
{{
	struct ends e;

	while (fread(&e, sizeof(e), 1, stdin)) {{
		u32 hash = tcplat_connection_hash(e.saddr, e.sport, e.daddr, e.dport);
		u32 found[2] = {{hash, tcplat_is_in_share(hash, e.one_in)}};

		fwrite(found, sizeof(found), 1, stdout);
	}}
	return 0;
}}
"""


def test_kernel_and_python_agree_on_100_000_connections(tmp_path: Path) -> None:
    compiler = shutil.which("clang") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("neither clang nor gcc is installed")
    header = Path(sampling.__file__).parents[1] / "include" / "tcplat" / "hash.bpf.h"
    source, program = tmp_path / "hash.c", tmp_path / "hash"
    source.write_text(C_PROGRAM.format(header=header))
    subprocess.run([compiler, "-O2", "-Wall", "-Werror", "-o", program, source], check=True)
    chance = random.Random(4711)  # noqa: S311 - the same on every run
    data, ours = [], []
    for _ in range(100_000):
        if chance.random() < 0.5:
            ends = [f"::ffff:{ipaddress.IPv4Address(chance.getrandbits(32))}" for _ in range(2)]
        else:
            ends = [str(ipaddress.IPv6Address(chance.getrandbits(128))) for _ in range(2)]
        sport, dport = chance.choice((0, 443, 65535)), chance.randrange(65536)
        one_in = chance.choice((1, 2, 3, 64, MOST))
        packed = (ipaddress.IPv6Address(end).packed for end in ends)
        data.append(struct.pack("=16s16sHHI", *packed, sport, dport, one_in))
        number = connection_hash(ends[0], sport, ends[1], dport)
        ours.append((number, int(is_in_share(number, one_in))))
    answer = subprocess.run([program], input=b"".join(data), capture_output=True, check=True)
    assert list(struct.iter_unpack("=II", answer.stdout)) == ours


# --- the option


@pytest.mark.parametrize(("text", "one_in"), [("1/1", 1), ("1/64", 64), (f"1/{MOST}", MOST)])
def test_share_is_written_as_a_fraction(text: str, one_in: int) -> None:
    assert Share().convert(text, None, None) == one_in


@pytest.mark.parametrize("text", ["64", "2/64", "1/0", f"1/{MOST + 1}", "1/", "0.1", "1/-2", "1/x"])
def test_other_shares_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not 1/N"):
        Share().convert(text, None, None)


def test_share_without_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoaderProcess, "start", lambda: FakeLoader([]))
    arguments = ["--probe", "tcp_client", "--sample", "1/8", "--sink", "histogram"]
    result = CliRunner().invoke(cli, ["run", *arguments])
    assert "counts every connection" in str(result.exception)


# --- a run

POINTS = (
    HookPoint("send", (tracepoint("tcp:tcp_sendmsg_locked", "tp_send"),)),
    HookPoint("close", (tracepoint("tcp:tcp_destroy_sock", "tp_close"),)),
)


def sampled_run(
    sinks: dict[str, Sink], one_in: int = 8, left_out: tuple[int, int] = (70, 7)
) -> RunReport:
    probe = FakeProbe(
        ProbeSpec(
            name="tcp_client", summary="s", source="", points=POINTS, event=EVENTS["tcp_client"]
        )
    )
    for number in range(1, 11):
        probe.emit("tp_send", ts_ns=number)
    for hook, rows in enumerate(left_out):
        for cpu in range(possible_cpus()):
            probe.books.leave_out(hook, rows, cpu)
    session = Session(
        loader=cast("LoaderProcess", FakeLoader([probe])),
        probes=[Chosen(probe.spec, {})],
        sinks=sinks,
        request=Request(probes=(), ring_bytes=probe.ring_bytes, sample=one_in),
        duration_s=0.01,
    )
    report = session.run()
    probe.close()
    return report


def opened(text: str, *, live: bool = True) -> Sink:
    name, given = parse_choice(text)
    spec = PLUGINS.sink(name)
    info = RunInfo(("tcp_client",), live=live)
    return as_sink(spec.factory(read_options(f"sink {name}", spec.options, given), info))


def test_share_comes_before_the_first_row() -> None:
    sink = RecordingSink()
    report = sampled_run({"it": sink})
    assert sink.stream[0] == Sampled(8)
    assert sink.rows == sink.stream[1:]
    assert len(sink.rows) == 10
    assert report.one_in == (8, 8)
    assert report.sampled == "1/8"


def test_rows_that_were_not_made_are_counted_by_hook() -> None:
    report = sampled_run({"it": RecordingSink()})
    send, close = report.probes["tcp_client"].hooks
    cpus = possible_cpus()
    assert (send.unsampled, close.unsampled) == (70 * cpus, 7 * cpus)
    assert (send.produced, send.delivered, send.unread) == (10, 10, 0)
    assert report.unsampled == 77 * cpus


def test_run_without_a_share_says_nothing_of_it() -> None:
    sink = RecordingSink()
    report = sampled_run({"it": sink}, one_in=1, left_out=(0, 0))
    assert sink.stream == sink.rows
    line = json.dumps(report.as_json())
    assert "one_in" not in line
    assert "unsampled" not in line


@pytest.mark.parametrize(("cpus", "hooks"), [(1, 1), (4, 3), (128, 9)])
def test_counts_of_the_books_do_not_overlap(cpus: int, hooks: int) -> None:
    fake = FakeBooks(hooks=hooks, cpus=cpus)
    books = Books(fake.fd, cpus=cpus, hooks=hooks)
    for hook in range(hooks):
        for cpu in range(cpus):
            fake.count(hook, produced=3, dropped=1, cpu=cpu)
            fake.leave_out(hook, 1 + hook, cpu)
    fake.lose_track(5)
    assert books.read() == [(3 * cpus, cpus)] * hooks
    assert books.dropped() == cpus * hooks
    assert books.unsampled() == [(1 + hook) * cpus for hook in range(hooks)]
    assert books.untracked() == 5
    books.close()
    fake.close()


# --- captures


def replayed(path: Path, sinks: dict[str, Sink], **how: Any) -> tuple[RunReport, list[str]]:
    source = Source.open(str(path))
    said: list[str] = []
    one = Replay(source, Capture(EVENTS, said.append), sinks, **how)
    try:
        report = one.run()
        said += one.summary(report)
    finally:
        os.close(source.fd)
    return report, said


@pytest.mark.parametrize(
    "form", ["jsonl", "table", "waterfall", "summary", "stages", "stages:format=json"]
)
def test_replay_of_a_sampled_run_is_the_run_byte_for_byte(form: str, tmp_path: Path) -> None:
    capture, live, again = tmp_path / "c", tmp_path / "live", tmp_path / "again"
    join = "," if ":" in form else ":"
    report = sampled_run(
        {"a": opened(f"jsonl:path={capture}"), "b": opened(f"{form}{join}path={live}")}
    )
    found, said = replayed(capture, {"b": opened(f"{form}{join}path={again}", live=False)})
    assert again.read_bytes() == live.read_bytes()
    assert b"8" in live.read_bytes()
    assert found.one_in == report.one_in
    assert found.unsampled == report.unsampled
    assert said == []


def encoded(*items: object) -> bytes:
    lines = []
    for item in items:
        value = item
        if isinstance(item, Sampled):
            value = {"v": SCHEMA_VERSION, "sampled": attrs.asdict(item)}
        elif isinstance(item, RunReport):
            value = {"v": SCHEMA_VERSION, "report": item.as_json()}
        elif isinstance(item, Loss):
            value = {"v": SCHEMA_VERSION, "lost": attrs.asdict(item)}
        lines.append(msgspec.json.encode(value) + b"\n")
    return b"".join(lines)


def report_of(count: int, one_in: int = 1, unsampled: int = 0) -> RunReport:
    hook = HookReport("send", "tcp_sendmsg", "kprobe", count, 0, count, unsampled)
    return RunReport(
        probes={"tcp_client": ProbeReport(hooks=(hook,))}, duration_s=1, one_in=(one_in, one_in)
    )


def row(number: int) -> Event:
    return make_event(EVENTS["tcp_client"], ts_ns=number, func="tcp_sendmsg", attach="kprobe")


def test_concatenated_captures_keep_their_own_shares(tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_bytes(
        encoded(
            *(Sampled(8), row(1), report_of(1, 8, 50)),
            *(row(2), row(3), report_of(2)),
            *(Sampled(4), row(4), report_of(1, 4, 5)),
            *(Loss("tcp_client", "send", 1), row(5)),
        )
    )
    sink = RecordingSink()
    report, _ = replayed(path, {"it": sink})
    assert [one.ts_ns if isinstance(one, Event) else one for one in sink.stream] == [
        *(Sampled(8), 1),
        *(Sampled(1), 2, 3),
        *(Sampled(4), 4),
        *(Sampled(1), Loss("tcp_client", "send", 1), 5),
    ]
    assert report.one_in == (1, 8)
    assert report.unsampled == 55


def test_capture_that_was_cut_off_has_its_share(tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_bytes(encoded(Sampled(8), row(1), row(2)))
    report, _ = replayed(path, {"it": RecordingSink()})
    assert report.one_in == (8, 8)
    assert report.incomplete


@pytest.mark.parametrize(
    "value", [0, -1, MOST + 1, "8", None, {"one_in": 0}, {"one_in": 8, "host": -1}, {}]
)
def test_impossible_share_is_skipped(value: object, tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_bytes(encoded({"v": SCHEMA_VERSION, "sampled": value}, row(1), report_of(1)))
    sink = RecordingSink()
    report, said = replayed(path, {"it": sink})
    assert sink.stream == sink.rows
    assert report.one_in == (1, 1)
    assert any("skipped" in sentence for sentence in said)


# --- reports


@given(st.integers(1, MOST), st.integers(0, 1 << 40))
def test_report_survives_json(one_in: int, unsampled: int) -> None:
    report = report_of(3, one_in, unsampled if one_in > 1 else 0)
    data = json.loads(json.dumps(report.as_json()))
    assert RunReport.from_json(data) == report


def test_sum_of_reports_names_both_shares() -> None:
    both = add_reports(report_of(3, 8, 20), report_of(4, 64, 200))
    assert both.sampled == "1/8 to 1/64"
    assert both.unsampled == 220
    assert add_reports(report_of(1), report_of(1)).sampled == ""
