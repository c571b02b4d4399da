"""Arrays of a probe, as its Python side reads them."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from tcplat_core.plugin.maps import MapView, ReadableMap
from tcplat_core.testing import FakeArray


@pytest.fixture
def array() -> Iterator[FakeArray]:
    """Of entries that the kernel rounds up: 12 bytes take 16."""
    array = FakeArray("=QI", 1000)
    yield array
    array.close()


@pytest.fixture
def view(array: FakeArray) -> Iterator[MapView]:
    view = MapView(array.fd, struct.Struct(array.layout), array.entries)
    yield view
    view.close()


def test_each_entry_is_found_at_its_index(array: FakeArray, view: MapView) -> None:
    for index in range(1000):
        array.set(index, index << 40, index)
    assert len(view) == 1000
    assert list(view) == [(index << 40, index) for index in range(1000)]
    assert view[-1] == (999 << 40, 999)
    assert view[1:3] == [(1 << 40, 1), (2 << 40, 2)]


def test_entry_is_read_at_access_time(array: FakeArray, view: MapView) -> None:
    assert view[7] == (0, 0)
    array.set(7, 1, 2)
    assert view[7] == (1, 2)


@pytest.mark.parametrize("index", [1000, -1001])
def test_index_beyond_the_end_raises_indexerror(view: MapView, index: int) -> None:
    with pytest.raises(IndexError):
        view[index]


def test_map_size_follows_from_its_layout() -> None:
    assert ReadableMap("counts", "=QI").size == 12
    assert ReadableMap("counts", "QI4x").size == 16
