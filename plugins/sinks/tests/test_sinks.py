"""What every built-in sink must do."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import attrs
import pytest

from tcplat_core import (
    Aggregates,
    Distribution,
    Group,
    Histogram,
    Loss,
    ReaderGoneError,
    RunInfo,
    RunReport,
    Sink,
    SinkSpec,
)
from tcplat_core.registry.find import Plugins
from tcplat_core.testing import make_event

PLUGINS = Plugins.load()
OURS = [
    PLUGINS.sink(found.name)
    for found in PLUGINS.found
    if found.kind == "sink" and found.distribution == "tcplat"
]
RUN = RunInfo(("tcp_client",))
REPORT = RunReport(probes={}, duration_s=1.5)
CONNECTION = [
    make_event(ts_ns=1_000, point="connect", state="TCP_SYN_SENT", sport=None),
    make_event(ts_ns=2_000, point="state", state="TCP_ESTABLISHED", connect_us=58.4),
    make_event(ts_ns=3_000, point="send", bytes=100),
    make_event(ts_ns=4_000, point="recv", bytes=0, ip=6, saddr="2001:db8::1", daddr="::1"),
    make_event(ts_ns=5_000, point="close", state="TCP_CLOSE", pid=None, tid=None, comm=None),
]

AGGREGATES = Aggregates(
    ts_ns=1_000_000_000,
    time_ns=1_700_000_000_000_000_000,
    elapsed_s=1.5,
    distributions=[
        Distribution(
            probe="tcp_client",
            histogram=Histogram("connect", "SYN to established", ("connect", "state")),
            group=Group(pid=4711, comm=r"\x1b]0;x\x07"),
            counts=[0] * 500 + [3] + [0] * 27,
            over=1,
        )
    ],
    final=True,
)

every_sink = pytest.mark.parametrize(
    "spec",
    [spec for spec in OURS if "path" in [option.name for option in spec.options]],
    ids=lambda spec: spec.name,
)
"""Each that writes a file, or to standard output."""


@attrs.define
class Stdout:
    """Standard output is a pipe."""

    reader: int
    file: TextIO

    def make(self, spec: SinkSpec, **given: Any) -> Sink:
        """Make a sink that writes to it, or where `given` says."""
        options = {**{option.name: option.default for option in spec.options}, **given}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", self.file)
            sink = spec.factory(options, RUN)
        assert isinstance(sink, Sink)
        return sink

    def written(self) -> bytes:
        """Return what has come since the last call."""
        try:
            return os.read(self.reader, 1 << 16)
        except BlockingIOError:
            return b""


@pytest.fixture
def stdout() -> Iterator[Stdout]:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with os.fdopen(writer, "w") as file:
        yield Stdout(reader, file)
    os.close(reader)


def test_built_in_sinks_are_found() -> None:
    assert {"table", "jsonl", "msgpack"} <= {spec.name for spec in OURS}


@every_sink
def test_run_is_written_to_stdout(spec: SinkSpec, stdout: Stdout) -> None:
    sink = stdout.make(spec)
    sink.write(CONNECTION[:2])
    sink.write(CONNECTION[2:])
    if hasattr(sink, "aggregates"):
        sink.aggregates(AGGREGATES)
    sink.close(REPORT)
    assert stdout.written() != b""


@every_sink
def test_run_without_rows_is_not_an_error(spec: SinkSpec, stdout: Stdout) -> None:
    stdout.make(spec).close(REPORT)


@every_sink
def test_empty_batch_writes_nothing(spec: SinkSpec, stdout: Stdout) -> None:
    sink = stdout.make(spec)
    sink.write([])
    assert stdout.written() == b""


@every_sink
def test_loss_is_accepted_at_any_time(spec: SinkSpec, stdout: Stdout) -> None:
    sink = stdout.make(spec)
    sink.lost(Loss("tcp_client", "send", 3))
    sink.write(CONNECTION)
    sink.lost(Loss("tcp_client", "send", 1))
    sink.close(REPORT)


@every_sink
def test_closed_stdout_raises_readergoneerror(spec: SinkSpec, stdout: Stdout) -> None:
    """At the first write; where a sink writes at the end only, in close()."""
    sink = stdout.make(spec)
    with Path(os.devnull).open() as other:
        os.dup2(other.fileno(), stdout.reader)  # the pipe has no reader any more
    with pytest.raises(ReaderGoneError):
        _write_and_close(sink)


def _write_and_close(sink: Sink) -> None:
    _write(sink)
    sink.close(REPORT)


def _write(sink: Sink) -> None:
    """Give the sink its input: rows or, if it asked for them, aggregates."""
    sink.write(CONNECTION)
    if hasattr(sink, "aggregates"):
        sink.aggregates(AGGREGATES)


@every_sink
def test_escaped_process_names_stay_escaped(spec: SinkSpec, stdout: Stdout) -> None:
    """Rows carry escaped names; no sink may undo that."""
    sink = stdout.make(spec)
    sink.write([make_event(comm=r"\x1b]0;x\x07", desc=r"\x1b[2J")])
    _write(sink)
    sink.close(REPORT)
    assert not set(stdout.written()) & (set(range(32)) - set(b"\n") | {127})


@every_sink
def test_path_option_replaces_stdout(spec: SinkSpec, stdout: Stdout, tmp_path: Path) -> None:
    path = tmp_path / "out"
    sink = stdout.make(spec, path=str(path))
    _write(sink)
    before = path.read_bytes()
    sink.close(REPORT)
    assert path.read_bytes().startswith(before)
    assert path.read_bytes() != b""
    assert stdout.written() == b""


@every_sink
def test_close_leaves_no_file_open(spec: SinkSpec, stdout: Stdout, tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    sink = stdout.make(spec, path=str(tmp_path / "out"))
    sink.write(CONNECTION)
    sink.close(REPORT)
    assert sorted(os.listdir("/proc/self/fd")) == sorted(before)
    assert stdout.written() == b""


@pytest.mark.parametrize("spec", OURS, ids=lambda spec: spec.name)
def test_readme_documents_each_sink_and_its_options(spec: SinkSpec) -> None:
    folders = Path(__file__).parents[2].glob("*/README.md")
    lines = [line for path in folders for line in path.read_text(encoding="utf-8").splitlines()]
    (line,) = (line for line in lines if line.startswith(f"| `{spec.name}` | "))
    assert all(f"`{option.name}`" in line for option in spec.options)
    assert all(option.help for option in spec.options)
    assert spec.summary
