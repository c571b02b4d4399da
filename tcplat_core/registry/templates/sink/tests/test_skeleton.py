"""The sink, without root and without a kernel."""

from pathlib import Path

from tcplat_core import Loss, RunInfo, RunReport
from tcplat_core.testing import make_event

from tcplat_skeleton.plugin import tcplat_register_sinks
from tcplat_skeleton.sink import MOST, OTHERS, Totals

(SPEC,) = tcplat_register_sinks()
REPORT = RunReport(probes={}, duration_s=1)


def open_sink(path: Path, by: str = "comm") -> Totals:
    """Make the sink as a run does."""
    sink = SPEC.factory({"by": by, "path": str(path)}, RunInfo(("tcp_client",)))
    assert isinstance(sink, Totals)
    return sink


def test_sink_is_registered_as_skeleton() -> None:
    assert SPEC.name == "skeleton"


def test_bytes_are_summed_by_process(tmp_path: Path) -> None:
    sink = open_sink(tmp_path / "out")
    sink.write([make_event(comm="curl", point="send", bytes=100)])
    sink.write([make_event(comm="curl", point="send_short", bytes=30)])
    sink.write([])
    sink.write([make_event(comm="curl", point="recv", bytes=7), make_event(comm=None, bytes=1)])
    sink.close(REPORT)
    head, *lines, last = (tmp_path / "out").read_text().splitlines()
    assert head.split() == ["ROWS", "SENT", "RECEIVED", "COMM"]
    assert [line.split() for line in lines] == [["3", "70", "7", "curl"], ["1", "1", "0", "-"]]
    assert last == "in 1.0 s"


def test_losses_are_reported(tmp_path: Path) -> None:
    sink = open_sink(tmp_path / "out", by="pid")
    sink.lost(Loss("tcp_client", "send", 3))
    sink.close(REPORT)
    *_, last = (tmp_path / "out").read_text().splitlines()
    assert last == "3 events were lost: these figures are too low"


def test_memory_is_bounded(tmp_path: Path) -> None:
    sink = open_sink(tmp_path / "out")
    sink.write([make_event(comm=f"c{number}") for number in range(MOST + 5)])
    assert len(sink.totals) == MOST + 1
    assert sink.totals[OTHERS][0] == 5
    sink.close(REPORT)
