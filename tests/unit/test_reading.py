"""A capture as a command reads it, and hosts of a merged one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import attrs
import msgspec
import pytest

from tcplat_core import HOST_BITS, SCHEMA_VERSION, Event, Loss, Merge, Reader, TcplatError
from tcplat_core.plugin.report import HookReport, ProbeReport, RunReport
from tcplat_core.testing import make_event

HOSTS = [
    Merge(0, "a.jsonl"),
    Merge(1, "b.jsonl", 3_700_000_123, 50.25, 0.5, 7_300, 1090),
]
LOSS = Loss("tcp_client", "send", 3)


def books(delivered: int, produced: int | None = None) -> RunReport:
    """Of a run of one hook."""
    row = make_event()
    hook = HookReport(row.point, row.func, row.attach, produced or delivered, 0, delivered)
    return RunReport(probes={row.probe: ProbeReport(hooks=(hook,))}, duration_s=1.0)


def capture(path: Path, *, end: bool = True, report: RunReport | None = None) -> list[Event]:
    rows = [make_event(ts_ns=1000 + n, netns=4 + (n % 2 << HOST_BITS)) for n in range(10)]
    encode = msgspec.json.Encoder().encode
    lines = [encode({"v": SCHEMA_VERSION, "merge": attrs.asdict(host)}) for host in HOSTS]
    lines += [encode(row) for row in rows[:5]]
    lines.append(encode({"v": SCHEMA_VERSION, "lost": attrs.asdict(LOSS)}))
    lines += [encode(row) for row in rows[5:]]
    if end:
        lines.append(encode({"v": SCHEMA_VERSION, "report": (report or books(10)).as_json()}))
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return rows


def test_rows_losses_and_hosts_keep_their_order(tmp_path: Path) -> None:
    rows = capture(tmp_path / "capture")
    reader = Reader.open(str(tmp_path / "capture"))
    items = list(reader.items())
    assert items == [*HOSTS, rows[:5], LOSS, rows[5:]]
    assert (reader.rows, reader.lost, reader.merges) == (10, 3, HOSTS)
    assert list(reader.remarks()) == [
        f"{tmp_path}/capture: 3 events were lost in the run: the figures lack them"
    ]
    assert not reader.report.incomplete


def test_batches_contain_rows_alone(tmp_path: Path) -> None:
    rows = capture(tmp_path / "capture")
    batches = Reader.open(str(tmp_path / "capture")).batches()
    assert [row for batch in batches for row in batch] == rows


def test_truncated_capture_is_reported(tmp_path: Path) -> None:
    capture(tmp_path / "capture", end=False)
    reader = Reader.open(str(tmp_path / "capture"))
    list(reader.items())
    assert reader.report.incomplete
    assert any("is truncated" in sentence for sentence in reader.remarks())


@pytest.mark.parametrize(
    ("delivered", "produced", "said"),
    [
        (10, 10, None),
        (17, 17, "{}: 7 of the run's rows are not in what was read"),
        (10, 12, None),  # --count left 2 in the ring
        (4, 4, "6 rows are not in its books: a run did not end, or the capture lacks its"),
    ],
)
def test_row_count_that_differs_from_the_report_is_remarked(
    tmp_path: Path, delivered: int, produced: int, said: str | None
) -> None:
    rows = capture(tmp_path / "capture", report=books(delivered, produced))
    reader = Reader.open(str(tmp_path / "capture"))
    list(reader.items())
    _, *more = reader.remarks()  # that events were lost
    if said is None:
        assert not more
        return
    (found,) = more
    assert said.format(rows[0].probe) in found


def test_report_with_wrong_sums_is_damaged(tmp_path: Path) -> None:
    capture(tmp_path / "capture")
    path = tmp_path / "capture"
    path.write_bytes(path.read_bytes().replace(b'{"delivered":10', b'{"delivered":5', 1))
    reader = Reader.open(str(path), quiet=True)
    list(reader.items())
    assert any(sentence.startswith("1 line of ") for sentence in reader.remarks())


def test_file_that_is_not_a_capture_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("hello\n")
    with pytest.raises(TcplatError, match=r"is not a tcplat capture|is empty"):
        list(Reader.open(str(tmp_path / "x"), quiet=True).items())


def test_replay_keeps_the_hosts(tmp_path: Path) -> None:
    capture(tmp_path / "capture")
    arguments = ["replay", str(tmp_path / "capture"), "--sink", f"jsonl:path={tmp_path / 'out'}"]
    # In a process of its own: as root, a replay gives up root for good.
    subprocess.run([sys.executable, "-I", "-m", "tcplat_core", *arguments], check=True)
    before, after = (
        (tmp_path / name).read_bytes().splitlines()[:-1] for name in ("capture", "out")
    )
    assert before == after


def test_damaged_host_is_skipped(tmp_path: Path) -> None:
    rows = capture(tmp_path / "capture")
    path = tmp_path / "capture"
    path.write_bytes(path.read_bytes().replace(b'"host":1', b'"host":"one"'))
    reader = Reader.open(str(path), quiet=True)
    assert [host.host for host in (item for item in reader.items() if isinstance(item, Merge))] == [
        0
    ]
    assert reader.rows == len(rows)
    assert any(sentence.startswith("1 line of ") for sentence in reader.remarks())


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_bar_on_a_terminal_shows_a_percentage(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    quiet: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    monkeypatch.setattr("tcplat_core.plugin.progress._AFTER_S", -1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    capture(tmp_path / "capture")
    list(Reader.open(str(tmp_path / "capture"), quiet=quiet).items())
    shown = capsys.readouterr()
    assert ("100%" in shown.err) is not quiet
    assert shown.err.endswith("\x1b[K") is not quiet
    assert shown.out == ""
