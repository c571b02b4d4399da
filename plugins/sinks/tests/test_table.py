"""The table: aligned columns, whole numbers, and no control characters."""

from __future__ import annotations

import fcntl
import itertools
import os
import random
import re
import struct
import tempfile
import termios
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tcplat_sinks.table import Table

from tcplat_core import Event, Loss, Output, RunInfo, RunReport, Sampled, UsageError, Wire
from tcplat_core.event.fields import Made
from tcplat_core.event.text import text
from tcplat_core.plugin.options import read_options
from tcplat_core.registry.find import Plugins
from tcplat_core.testing import make_event

HEADS = [
    *("PID", "COMM", "IP", "SADDR", "SPORT", "DADDR", "DPORT", "TIMESTAMP(us)", "FUNC"),
    *("TCP_STATE", "TCP_DESCRIPTION", "TCP_CONNECT_TIME(us)"),
]
V6 = {"ip": 6, "saddr": "2001:db8:1234:5678:9abc:def0:1234:5678", "daddr": "fe80::1ff:fe23:4567"}
REPORT = RunReport(probes={}, duration_s=1)

Write = Callable[..., list[str]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write batches to a table of so many columns; the lines that come of it."""

    def call(*batches: Sequence[Event], width: int = 0) -> list[str]:
        path = tmp_path / "table"
        table = Table(Output.open(str(path), lambda: True), width)
        for batch in batches:
            table.write(batch)
        table.close(REPORT)
        return path.read_text(encoding="utf-8").splitlines()

    return call


def cells(head: str, line: str) -> dict[str, str]:
    """Return a line cut where the heads begin; the last column may be missing."""
    at = [found.start() for found in re.finditer(r"\S+", head)]
    at += [len(line) + 1] * (len(HEADS) + 1 - len(at))
    return {name: line[at[i] : at[i + 1]].strip() for i, name in enumerate(HEADS)}


def headed(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each row's line, and the head that it stands under."""
    head = ""
    for line in lines:
        if line.startswith("PID "):
            head = line
        else:
            yield head, line


# --- columns


def test_columns_have_fixed_names_and_order(write: Write) -> None:
    head, _ = write([make_event()])
    assert head.split() == HEADS


def test_each_value_is_below_its_header(write: Write) -> None:
    head, line = write([make_event(ts_ns=1_234_567_890, connect_us=207.4)])
    assert cells(head, line) == {
        "PID": "4711",
        "COMM": "curl",
        "IP": "4",
        "SADDR": "127.0.0.1",
        "SPORT": "40000",
        "DADDR": "127.0.0.1",
        "DPORT": "9999",
        "TIMESTAMP(us)": "1234567",
        "FUNC": "tcp_sendmsg",
        "TCP_STATE": "TCP_ESTABLISHED",
        "TCP_DESCRIPTION": "message sent",
        "TCP_CONNECT_TIME(us)": "207",
    }


def test_unknown_value_is_a_dash(write: Write) -> None:
    row = make_event(pid=None, comm=None, ip=None, sport=None, dport=None, state=None)
    head, line = write([row])
    shown = cells(head, line)
    assert {name for name, cell in shown.items() if cell == "-"} == {
        "PID",
        "COMM",
        "IP",
        "SPORT",
        "DPORT",
        "TCP_STATE",
    }
    assert "None" not in line


def test_tracepoint_is_shown_without_its_group(write: Write) -> None:
    head, line = write([make_event(func="sock:inet_sock_set_state")])
    assert cells(head, line)["FUNC"] == "inet_sock_set_state"


def test_missing_connect_time_is_blank(write: Write) -> None:
    head, without, with_ = write([make_event(), make_event(connect_us=0.4)])
    assert cells(head, without)["TCP_CONNECT_TIME(us)"] == ""
    assert cells(head, with_)["TCP_CONNECT_TIME(us)"] == "0"
    assert without == without.rstrip()


def test_ipv6_addresses_line_up(write: Write) -> None:
    head, six, four = write([make_event(**V6), make_event()])
    assert cells(head, six)["SADDR"] == V6["saddr"]
    assert cells(head, six)["DADDR"] == V6["daddr"]
    assert cells(head, four)["SADDR"] == "127.0.0.1"
    assert cells(head, six)["TCP_STATE"] == cells(head, four)["TCP_STATE"] == "TCP_ESTABLISHED"


# --- the head


def test_header_is_printed_once(write: Write) -> None:
    lines = write([make_event()], [make_event()] * 3, [make_event()])
    assert [line.startswith("PID") for line in lines] == [True, *[False] * 5]


def test_header_is_repeated_when_a_column_grows(write: Write) -> None:
    lines = write([make_event()], [make_event(**V6)], [make_event()], [make_event(**V6)])
    heads = [at for at, line in enumerate(lines) if line.startswith("PID")]
    assert heads == [0, 2]
    assert cells(lines[2], lines[4])["DADDR"] == "127.0.0.1"


@given(
    st.lists(st.integers(0, 2**32), max_size=30),
    st.lists(st.integers(0, 30), max_size=10),
    st.sampled_from([0, 60, 120, 160]),
)
def test_batch_boundaries_do_not_change_the_table(
    seeds: list[int], cuts: list[int], width: int
) -> None:
    rows = [row for seed in seeds for row in rows_of_all_kinds(1, seed)]
    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    batches = [rows[start:end] for start, end in itertools.pairwise(edges)]
    assert table_of(batches, width) == table_of([rows], width)


def table_of(batches: Sequence[Sequence[Event]], width: int) -> bytes:
    """Return the table of these batches, as bytes."""
    with tempfile.TemporaryFile() as file:
        table = Table(Output(file.fileno(), lambda: True), width)
        for batch in batches:
            table.write(batch)
        table.close(REPORT)
        file.seek(0)
        return file.read()


def test_header_is_not_printed_without_rows(write: Write) -> None:
    assert write() == []


# --- the width


def rows_of_all_kinds(count: int, seed: int = 20_240_503) -> Iterator[Event]:
    chance = random.Random(seed)  # noqa: S311 - reproducible on purpose
    for _ in range(count):
        extra: dict[str, Any] = V6 if chance.random() < 0.3 else {}
        yield make_event(
            pid=chance.choice((None, 1, 99_999, 4_194_304)),
            comm=chance.choice((None, "sh", "a name of 15 b", r"\xff" * 15)),
            ts_ns=chance.randrange(1 << 53),
            func=chance.choice(("tcp_sendmsg", "sock:inet_sock_set_state", "xdp")),
            state=chance.choice((None, "TCP_ESTABLISHED", "TCP_NEW_SYN_RECV")),
            desc=chance.choice(("", "message sent", "something long enough to be cut")),
            connect_us=chance.choice((None, 0.1, 9_999.4)),
            **extra,
        )


@pytest.mark.parametrize("width", [40, 80, 100, 120, 160, 200])
def test_no_line_is_wider_than_the_terminal(write: Write, width: int) -> None:
    lines = write(*([row] for row in rows_of_all_kinds(300)), width=width)
    assert max(map(len, lines)) <= width
    assert len(lines) > 300


def test_lines_without_a_width_limit_are_not_cut(write: Write) -> None:
    rows = list(rows_of_all_kinds(300))
    lines = write(rows)
    assert "…" not in "".join(lines)
    for row, (_, line) in zip(rows, headed(lines), strict=True):
        assert row.desc in line
        assert row.saddr in line


NUMBERS = ("PID", "IP", "SPORT", "DPORT", "TIMESTAMP(us)")


def numbers_of(row: Event) -> list[str]:
    shown = (row.pid, row.ip, row.sport, row.dport, row.ts_ns // 1000)
    return ["-" if number is None else str(number) for number in shown]


@pytest.mark.parametrize("width", [120, 160])
def test_numbers_are_never_cut(write: Write, width: int) -> None:
    rows = list(rows_of_all_kinds(300))
    lines = write(rows, width=width)
    for row, (head, line) in zip(rows, headed(lines), strict=True):
        shown = cells(head, line)
        assert [shown[name] for name in NUMBERS] == numbers_of(row)


@pytest.mark.parametrize("width", [120, 130])
@pytest.mark.parametrize("connect_us", [14_000, 3_000_000, 127_000_000])
def test_connect_time_is_never_cut(write: Write, width: int, connect_us: int) -> None:
    """A retransmitted SYN makes it long."""
    rows = [
        make_event(**V6, comm="a name of 15 b", func="sock:inet_sock_set_state"),
        make_event(connect_us=connect_us),
    ]
    *_, line = write(rows, width=width)
    assert line.split()[-1] == str(connect_us)


def test_narrow_terminal_shows_numbers_whole_or_not_at_all(write: Write) -> None:
    for width in range(20, 100):
        _, line = write([make_event(ts_ns=1_234_567_890_123_000)], width=width)
        numbers = [word for word in line.split() if word.isdigit()]
        whole = ["4711", "4", "40000", "9999", "1234567890123"]
        assert numbers == whole[: len(numbers)], width


def test_shortened_value_keeps_its_beginning_and_end(write: Write) -> None:
    head, line = write([make_event(**V6, comm="a_name_of_15_by")], width=120)
    shown = cells(head, line)
    assert shown["SADDR"].startswith("2001:db")
    assert shown["SADDR"].endswith(":5678")
    assert "…" in shown["SADDR"]


# --- safety


def test_control_bytes_of_names_never_reach_the_terminal(write: Write) -> None:
    rows = [make_event(comm=text(bytes([number, 65, number]))) for number in range(1, 256)]
    lines = write(rows)
    assert len(lines) == 256
    assert all(line.isprintable() for line in lines)


# --- fields of the probes' own


class Again(Event):
    rto_us: Annotated[int | None, Wire("u32", "the timer", nullable=True)]
    share: Annotated[float, Made("0.5", "a part")]
    hidden: Annotated[int, Wire("u8", "no column", column="")]


class Ended(Event):
    rto_us: Annotated[int | None, Wire("u32", "the same timer", nullable=True)]
    cause: Annotated[str, Wire("char[8]", "why", column="WHY")]


AGAIN = make_event(Again, rto_us=204_000, share=1 / 3, hidden=1, connect_us=58.4)
ENDED = make_event(Ended, rto_us=None, cause="RST")


@pytest.mark.parametrize("width", [0, 300])
def test_probe_specific_fields_precede_the_last_column(write: Write, width: int) -> None:
    head, first, head_again, second, third = write([AGAIN, ENDED, make_event()], width=width)
    own = ["RTO(us)", "SHARE"]
    assert head.split() == [*HEADS[:-1], *own, HEADS[-1]]
    assert first.split()[-3:] == ["204000", "0.333", "58"]
    # The head comes again with the first row that has more.
    assert head_again.split() == [*HEADS[:-1], *own, "WHY", HEADS[-1]]
    assert second.split()[-3:] == ["-", "-", "RST"]
    assert third.split()[-3:] == ["-", "-", "-"]
    for line, value, name in ((first, "204000", "RTO(us)"), (second, "RST", "WHY")):
        assert line[head_again.index(name) :].startswith(value)


def test_probe_specific_column_grows(write: Write) -> None:
    first, second = (make_event(Ended, rto_us=1, cause=cause) for cause in ("RST", "overlong"))
    lines = write([first, second])
    assert len(lines) == 4
    assert lines[2].index("TCP_CONNECT") - lines[2].index("WHY") == len("overlong ")


@pytest.mark.parametrize("width", [0, 100, 180])
def test_batch_boundaries_do_not_change_probe_specific_columns(write: Write, width: int) -> None:
    rows = [make_event(), AGAIN, ENDED, make_event(), ENDED, AGAIN]
    assert write(rows, width=width) == write(*([row] for row in rows), width=width)


# --- losses


def test_loss_is_a_line_of_its_own(tmp_path: Path) -> None:
    table = Table(Output.open(str(tmp_path / "table"), lambda: True), 0)
    table.write([make_event()])
    table.lost(Loss("tcp_client", "send", 3))
    table.write([make_event()])
    table.close(REPORT)
    lines = (tmp_path / "table").read_text().splitlines()
    assert lines[2] == "-- 3 events lost here (tcp_client, send) --"
    assert len(lines) == 4


def test_share_of_the_connections_is_a_line_of_its_own(tmp_path: Path) -> None:
    table = Table(Output.open(str(tmp_path / "table"), lambda: True), 0)
    table.sampled(Sampled(64))
    table.write([make_event()])
    table.close(REPORT)
    first, head, _ = (tmp_path / "table").read_text().splitlines()
    assert first == "-- 1/64 of the connections --"
    assert head.startswith("PID")


# --- options


def factory_width(given: dict[str, str], tmp_path: Path) -> int:
    spec = Plugins.load().sink("table")
    options = read_options("sink table", spec.options, {**given, "path": str(tmp_path / "out")})
    sink = spec.factory(options, RunInfo(()))
    assert isinstance(sink, Table)
    sink.close(REPORT)
    return sink.limit


def test_width_is_the_option_or_that_of_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert factory_width({"width": "99"}, tmp_path) == 99
    assert factory_width({}, tmp_path) == 0  # a file has no width
    monkeypatch.setenv("COLUMNS", "77")
    assert factory_width({}, tmp_path) == 77
    assert factory_width({"width": "0"}, tmp_path) == 0


@pytest.mark.parametrize("width", ["-1", "wide", ""])
def test_invalid_width_is_refused(tmp_path: Path, width: str) -> None:
    with pytest.raises(UsageError, match="sink table: option width="):
        factory_width({"width": width}, tmp_path)


def test_terminal_width_comes_from_the_tty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    main, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 101, 0, 0))
    spec = Plugins.load().sink("table")
    options = read_options("sink table", spec.options, {"path": os.ttyname(terminal)})
    sink = spec.factory(options, RunInfo(()))
    assert isinstance(sink, Table)
    assert sink.limit == 101
    sink.close(REPORT)
    os.close(main)
    os.close(terminal)
