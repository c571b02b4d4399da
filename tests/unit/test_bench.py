"""The bench: what counts as met, and what is compared with what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest

from tests.bench import bench, limit, peers, rates
from tests.bench.figure import QUICK, Figure
from tests.bench.limit import Blocks, Target, best_met
from tests.bench.servers import Block, Server

TO_BASE, TO_EMPTY = Target("rate", "base", 0.95), Target("rate", "empty", 0.97)


def test_one_of_two_targets_suffices() -> None:
    assert best_met({TO_BASE: 0.93, TO_EMPTY: 0.98}) is TO_EMPTY
    assert best_met({TO_BASE: 0.96, TO_EMPTY: 0.94}) is TO_BASE
    assert best_met({}) is None


def test_p99_is_met_from_below() -> None:
    target = Target("p99", "empty", 1.06)
    assert target.met_by(1.0) > 1 > target.met_by(1.1)


@pytest.mark.parametrize(
    ("value", "at_least", "word"),
    [(0.94, True, "MISS"), (0.95, True, "ok"), (0.96, False, "MISS"), (0.95, False, "ok")],
)
def test_figure_says_what_misses_its_target(value: float, *, at_least: bool, word: str) -> None:
    assert Figure("B0", "", "", "", value, 0.95, at_least=at_least).cells()[-1] == word


def test_ratio_is_of_neighbours_in_the_same_turn() -> None:
    # The machine gets twice as slow in the second turn: no ratio shows it.
    pace = iter([100, 90, 100, 50, 45, 50])
    blocks = Blocks(Server((), lambda seconds: Block(next(pace) * seconds, seconds)), 2)
    blocks.starts["ours"] = nullcontext
    blocks.turn(backwards=False)
    blocks.turn(backwards=True)
    assert blocks.of("base", "rate") == [100, 50]
    assert blocks.ratio("ours", "base", "rate") == pytest.approx(0.9)


def test_second_turn_goes_backwards() -> None:
    order: list[str] = []

    @contextmanager
    def started(name: str) -> Iterator[None]:
        order.append(name)
        yield

    def starter(name: str) -> AbstractContextManager[None]:
        return started(name)

    blocks = Blocks(Server((), lambda seconds: Block(1, seconds)), 1)
    blocks.starts = {"one": lambda: starter("one"), "two": lambda: starter("two")}
    blocks.turn(backwards=False)
    blocks.turn(backwards=True)
    assert order == ["one", "two", "two", "one"]


def test_rate_that_loses_at_once_is_no_lossless_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "offered", lambda rate, _seconds: (rate, 1))
    monkeypatch.setattr(peers, "lossless", lambda *_: 1000.0)
    assert [figure.value for figure in rates.lossless(QUICK)] == [0, 0]


def test_lossless_rate_has_to_hold_for_the_whole_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def offered(rate: int, seconds: float) -> tuple[float, int]:
        return rate, int(rate > (400_000 if seconds == QUICK.lossless_s else 600_000))

    monkeypatch.setattr(rates, "offered", offered)
    monkeypatch.setattr(peers, "lossless", lambda *_: 1000.0)
    held = next(rates.lossless(QUICK)).value
    assert 380_000 <= held <= 400_000


def test_every_row_can_be_selected_and_each_variant_of_a_server() -> None:
    assert {f"B{number}" for number in range(14, 20)} <= bench.FIGURES.keys()
    assert len(bench.PARTS) == len(limit.ROWS) * len(limit.VARIANTS)
    assert not bench.PARTS.keys() & bench.FIGURES.keys()


def test_unknown_row_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["B14", "B99"])
    assert ended.value.code == 2
    assert "no row B99" in capsys.readouterr().err
