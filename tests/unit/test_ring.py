"""The ring is drained in order, whole records only; the counters add up."""

from __future__ import annotations

import os
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tcplat_core.deliver.books import Books
from tcplat_core.deliver.ring import BATCH, RecordSizeError, Ring
from tcplat_core.kernel.layout import books_slots, possible_cpus
from tcplat_core.testing import FakeBooks, FakeRing

LAYOUT = struct.Struct("=QI")
"""12 bytes: the kernel rounds them up to 16, and puts 8 in front."""
STRIDE = 24

Pair = tuple[FakeRing, Ring]


@pytest.fixture
def rings() -> Iterator[Callable[..., Pair]]:
    """Make a ring that the test fills, and its reader."""
    with ExitStack() as stack:

        def make(size: int = 1 << 16, start: int = 0, layout: struct.Struct = LAYOUT) -> Pair:
            fake = FakeRing(size, start)
            stack.callback(fake.close)
            ring = Ring(fake.fd, size, layout)
            stack.callback(ring.close)
            return fake, ring

        yield make


@pytest.fixture
def pair(rings: Callable[..., Pair]) -> Pair:
    return rings()


def payload(number: int) -> bytes:
    return LAYOUT.pack(number, number ^ 0xFFFF)


def drained(ring: Ring) -> list[int]:
    records = [record for batch in ring.drain() for record in batch]
    assert all(check == number ^ 0xFFFF for number, check in records)
    return [number for number, _ in records]


def test_empty_ring_drains_to_nothing(pair: Pair) -> None:
    fake, ring = pair
    assert list(ring.drain()) == []
    assert not ring.pending()
    assert fake.consumed == 0


def test_one_record_is_drained(pair: Pair) -> None:
    fake, ring = pair
    fake.feed([payload(7)])
    assert ring.pending()
    assert drained(ring) == [7]
    assert not ring.pending()
    assert fake.consumed == fake.produced == STRIDE
    assert drained(ring) == []


@pytest.mark.parametrize("count", [BATCH - 1, BATCH, BATCH + 1, 2 * BATCH, 2 * BATCH + 500])
def test_batches_are_bounded_and_in_order(pair: Pair, count: int) -> None:
    fake, ring = pair
    assert fake.feed(map(payload, range(count))) == count
    batches = list(ring.drain())
    assert max(map(len, batches)) <= BATCH
    assert [number for batch in batches for number, _ in batch] == list(range(count))


def test_record_added_during_a_drain_waits_for_the_next(pair: Pair) -> None:
    fake, ring = pair
    fake.feed(map(payload, range(2)))
    for _ in ring.drain():
        fake.feed([payload(2)])
    assert ring.pending()
    assert drained(ring) == [2]


def test_space_of_a_batch_is_free_once_it_is_returned(pair: Pair) -> None:
    fake, ring = pair
    fake.feed(map(payload, range(2 * BATCH)))
    batches = ring.drain()
    next(batches)
    assert fake.consumed == BATCH * STRIDE
    next(batches)
    assert fake.consumed == 2 * BATCH * STRIDE


def test_a_batch_is_a_copy(rings: Callable[..., Pair]) -> None:
    fake, ring = rings(4096)
    fake.feed(map(payload, range(100)))
    (batch,) = ring.drain()
    fake.feed(map(payload, range(1000, 1100)))
    assert [number for number, _ in batch] == list(range(100))


@pytest.mark.parametrize("start", [4096 - 8, 4096 - 16, 4096 - 24, 1 << 32, (1 << 40) - 8])
def test_records_wrap_around_the_end(rings: Callable[..., Pair], start: int) -> None:
    fake, ring = rings(4096, start)
    for number in range(1000):
        fake.feed([payload(number)])
        assert drained(ring) == [number]
    assert fake.consumed == start + 1000 * STRIDE


def test_batch_continues_beyond_the_end(rings: Callable[..., Pair]) -> None:
    fake, ring = rings(4096, 4096 - 100 * 8)
    assert fake.feed(map(payload, range(150))) == 150
    (batch,) = ring.drain()
    assert [number for number, _ in batch] == list(range(150))


def test_full_ring_refuses_records_until_drained(rings: Callable[..., Pair]) -> None:
    fake, ring = rings(4096)
    fits = 4095 // STRIDE
    assert fake.feed(map(payload, range(1000))) == fits
    assert drained(ring) == list(range(fits))
    assert fake.feed(map(payload, range(1000))) == fits


def test_busy_record_stops_the_drain_until_submitted(pair: Pair) -> None:
    fake, ring = pair
    fake.feed([payload(0)])
    busy = fake.reserve(payload(1))
    assert busy is not None
    fake.feed([payload(2)])
    assert drained(ring) == [0]
    assert fake.consumed == busy
    assert drained(ring) == []
    assert ring.pending()
    fake.submit(busy)
    assert drained(ring) == [1, 2]
    assert not ring.pending()


def test_record_submitted_during_a_drain_is_drained_once(pair: Pair) -> None:
    fake, ring = pair
    fake.feed(map(payload, range(BATCH)))
    busy = fake.reserve(payload(BATCH))
    assert busy is not None
    batches = ring.drain()
    next(batches)
    fake.submit(busy)
    rest = [number for batch in batches for number, _ in batch]
    assert rest + drained(ring) == [BATCH]


def test_discarded_records_are_skipped(pair: Pair) -> None:
    fake, ring = pair
    for number in range(10):
        position = fake.reserve(payload(number))
        assert position is not None
        (fake.discard if number % 3 == 0 else fake.submit)(position)
    assert drained(ring) == [1, 2, 4, 5, 7, 8]
    assert ring.taken == dict.fromkeys([1, 2, 4, 5, 7, 8], 1)
    assert fake.consumed == fake.produced


def test_ring_of_discarded_records_is_empty(pair: Pair) -> None:
    fake, ring = pair
    position = fake.reserve(payload(0))
    assert position is not None
    fake.discard(position)
    assert drained(ring) == []
    assert not ring.pending()


@pytest.mark.parametrize("size", [8, 11, 13, 20, 104])
def test_a_record_of_another_size_is_refused(pair: Pair, size: int) -> None:
    fake, ring = pair
    fake.feed([bytes(size)] * 10)
    with pytest.raises(RecordSizeError, match=f"of {size} bytes where 12"):
        list(ring.drain())
    assert fake.consumed == 0


def test_a_single_shorter_record_is_refused(pair: Pair) -> None:
    fake, ring = pair
    fake.feed([bytes(4)])
    with pytest.raises(RecordSizeError, match="of 4 bytes where 12"):
        list(ring.drain())


def test_a_discarded_record_of_another_size_is_refused(pair: Pair) -> None:
    fake, ring = pair
    position = fake.reserve(bytes(20))
    assert position is not None
    fake.discard(position)
    with pytest.raises(RecordSizeError):
        list(ring.drain())


@pytest.mark.parametrize("size", [1, 8, 9, 96, 101, 104])
def test_records_of_any_size_are_read(rings: Callable[..., Pair], size: int) -> None:
    fake, ring = rings(layout=struct.Struct(f"={size}s"))
    payloads = [bytes([number]) * size for number in range(200)]
    fake.feed(payloads)
    assert [found for batch in ring.drain() for (found,) in batch] == payloads


def test_random_operations_neither_lose_nor_invent_records(rings: Callable[..., Pair]) -> None:
    """Reserve, submit, discard and drain in random order, against a list that does the same."""
    chance = random.Random(20_240_501)  # noqa: S311 - reproducible on purpose
    fake, ring = rings(4096, 4096 - 64)
    open_: list[tuple[int, int]] = []
    expected: dict[int, bool] = {}
    got: list[int] = []
    for number in range(20_000):
        action = chance.random()
        if action < 0.6:
            position = fake.reserve(payload(number))
            if position is not None:
                open_.append((position, number))
        elif action < 0.9 and open_:
            position, fed = open_.pop(chance.randrange(len(open_)))
            expected[fed] = chance.random() < 0.8
            (fake.submit if expected[fed] else fake.discard)(position)
        else:
            got += drained(ring)
    for position, fed in open_:
        fake.submit(position)
        expected[fed] = True
    got += drained(ring)
    assert got == sorted(number for number, kept in expected.items() if kept)
    assert ring.taken == Counter(number & 0xFF for number in got)
    assert not ring.pending()


def test_close_leaves_the_fd_open(rings: Callable[..., Pair]) -> None:
    fake, ring = rings()
    fake.feed([payload(1)])
    ring.close()
    again = Ring(fake.fd, 1 << 16, LAYOUT)
    assert drained(again) == [1]
    again.close()


# --- the books


@pytest.fixture
def books() -> Iterator[tuple[FakeBooks, Books]]:
    fake = FakeBooks(hooks=3, cpus=4)
    read = Books(fake.fd, cpus=4, hooks=3)
    yield fake, read
    read.close()
    fake.close()


def test_books_begin_at_zero(books: tuple[FakeBooks, Books]) -> None:
    _, read = books
    assert read.read() == [(0, 0)] * 3
    assert read.dropped() == read.untracked() == 0


def test_books_sum_over_cpus_and_keep_hooks_apart(books: tuple[FakeBooks, Books]) -> None:
    fake, read = books
    for cpu in range(4):
        for hook in range(3):
            fake.count(hook, produced=10 ** (hook + 1), dropped=hook * (cpu + 1), cpu=cpu)
    fake.lose_track(5)
    assert read.read() == [(40, 0), (400, 10), (4000, 20)]
    assert read.dropped() == 30
    assert read.untracked() == 5


def test_untracked_sockets_are_not_counted_as_dropped_events(
    books: tuple[FakeBooks, Books],
) -> None:
    fake, read = books
    fake.lose_track()
    assert read.dropped() == 0
    assert read.read() == [(0, 0)] * 3


def test_books_hold_more_than_32_bits(books: tuple[FakeBooks, Books]) -> None:
    fake, read = books
    fake.count(2, produced=1 << 40, dropped=1 << 33, cpu=3)
    assert read.read()[2] == (1 << 40, 1 << 33)


def test_books_larger_than_a_page_are_read_whole() -> None:
    fake = FakeBooks(hooks=7, cpus=128)
    read = Books(fake.fd, cpus=128, hooks=7)
    for cpu in range(128):
        fake.count(6, produced=1, cpu=cpu)
    fake.lose_track(9)
    assert read.read()[6] == (128, 0)
    assert read.untracked() == 9
    read.close()
    fake.close()


def test_bare_acknowledgements_are_added_up_and_count_as_nothing_else(
    books: tuple[FakeBooks, Books],
) -> None:
    fake, read = books
    for cpu in range(4):
        fake.acknowledge(10**cpu, cpu=cpu)
    assert read.bare_acks() == 1111
    assert read.read() == [(0, 0)] * 3
    assert read.unsampled() == [0] * 3
    assert read.untracked() == 0


def test_each_cpu_has_cache_lines_of_its_own_in_the_books() -> None:
    # Whole cache lines for each CPU: of four hooks and two counts, of eight hooks and one, and one
    # of bare acknowledgements.
    assert books_slots(cpus=4, hooks=3) == 4 * 4 * 2 + 4 * 8 + 4 * 8 + 1


def test_possible_cpus_include_every_usable_cpu() -> None:
    assert max(os.sched_getaffinity(0)) < possible_cpus()
