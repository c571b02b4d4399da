"""The clock of the rows, in a time namespace and outside."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcplat_core.errors import CannotRunError
from tcplat_core.event import clock

INITIAL, OTHER, THIRD = (f"time:[{inode}]" for inode in (4026531834, 4026532246, 4026532247))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    clock.ahead_ns.cache_clear()
    yield
    clock.ahead_ns.cache_clear()


@pytest.fixture
def proc(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return what is in /proc/self."""
    files: dict[str, str] = {}

    def read(path: object, *_: object, **__: object) -> str:
        try:
            return files[str(path).removeprefix("/proc/self/")]
        except KeyError:
            raise FileNotFoundError from None

    monkeypatch.setattr(os, "readlink", read)
    monkeypatch.setattr(Path, "read_text", read)
    return files


@pytest.mark.parametrize(
    ("own", "childrens", "offsets", "ahead"),
    [
        (None, None, None, 0),
        (INITIAL, INITIAL, "monotonic 0 0\nboottime 0 0\n", 0),
        (INITIAL, OTHER, "monotonic 1000 0\nboottime 0 0\n", 0),
        (OTHER, OTHER, "monotonic        1000         5\nboottime 3 0\n", 1_000_000_000_005),
        (OTHER, OTHER, "monotonic          -7 999999999\nboottime 3 0\n", -6_000_000_001),
    ],
)
def test_time_namespace_offset_is_read_from_proc(
    own: str | None, childrens: str | None, offsets: str | None, ahead: int, proc: dict[str, str]
) -> None:
    known = {"ns/time": own, "ns/time_for_children": childrens, "timens_offsets": offsets}
    proc.update({name: text for name, text in known.items() if text is not None})
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    now = clock.kernel_ns() + ahead
    assert clock.ahead_ns() == ahead
    assert before <= now <= time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    assert abs(clock.kernel_ns() + clock.clock_offset_ns() - time.time_ns()) < 1e9


def test_offset_of_an_unrelated_time_namespace_is_refused(proc: dict[str, str]) -> None:
    proc.update({"ns/time": OTHER, "ns/time_for_children": THIRD, "timens_offsets": ""})
    with pytest.raises(CannotRunError, match="the offset of this time namespace cannot be known"):
        clock.ahead_ns()
