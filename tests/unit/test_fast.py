"""records.c gives the same lines in the same order as the Python implementation."""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcplat_core import json_lines, slim_rows
from tcplat_core.deliver.fast import records as fast
from tcplat_core.deliver.fast.codec import Codec
from tcplat_core.deliver.fast.library import FILE, library
from tcplat_core.deliver.fast.records import RecordBuffer, Records, reorder_buffer
from tcplat_core.deliver.fast.slim import MISSING, SLIM_NUMBERS, USER, SlimTexts
from tcplat_core.deliver.fast.slim import UNKNOWN as NULL
from tcplat_core.deliver.reorder import FOREVER, ReorderBuffer, RingSource, RowBuffer
from tcplat_core.deliver.ring import RecordSizeError, Ring
from tcplat_core.event.fields import Event, FiredBy, Made, Moment, Wire
from tcplat_core.event.record import Record
from tcplat_core.event.text import micros
from tcplat_core.testing import FakeRing, make_event, make_record
from tests.long import LONG

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler"
)


class Everything(Event, gc=False):
    """A field of every kind."""

    small: Annotated[int, Wire("s8", "signed")]
    short: Annotated[int, Wire("s16", "signed")]
    word: Annotated[int | None, Wire("s32", "signed, and 0 is null", nullable=True)]
    long: Annotated[int, Wire("s64", "signed")]
    wide: Annotated[int | None, Wire("u64", "where it is there", has=True)]
    narrow: Annotated[int, Wire("u8", "unsigned")]
    flag: Annotated[bool, Wire("bool", "true or false")]
    maybe: Annotated[bool | None, Wire("bool", "where it is there", has=True)]
    word_of: Annotated[str | None, Wire("char[9]", "text or null", nullable=True)]
    hexed: Annotated[str | None, Wire("u8[3]", "bytes", to=bytes.hex, nullable=True, has=True)]
    doubled: Annotated[int, Wire("u16", "worked out", to=lambda raw: 2 * raw)]
    rto_us: Annotated[float | None, Wire("u32", "µs", to=micros, has=True, member="rto_ns")]
    late_us: Annotated[float, Wire("s64", "µs, signed", to=micros, member="late_ns")]


class Packet(Event, gc=False):
    """Numbers that slim rows have if a probe has them."""

    ack: Annotated[int | None, Wire("u32", "number of the next byte", has=True)]
    window: Annotated[int | None, Wire("u16", "as in the packet", nullable=True)]


EVENTS: tuple[type[Event], ...] = (Event, Everything)


def words(moment: Moment) -> str:
    return f'"{moment.point}" {moment.state} {moment.err} {moment.empty} {moment.flags}'


HOOKS = [FiredBy(point, f"{point}_func", "kprobe", words) for point in ("send", "recv", "\\é")]


def chance(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - the same each time is what is wanted


def ifname(index: int) -> str | None:
    return f"if{index}"


READING = ("pröbe", HOOKS, ifname)


def decoder_of(event: type[Event]) -> Callable[[Any, int], list[Event]]:
    return Record(event).decoder(*READING)


def codec_of(event: type[Event]) -> Codec:
    codec = Codec.of(Record(event), *READING)
    assert codec
    return codec


def batch(
    codecs: Sequence[Codec],
    raw: Sequence[tuple[int, bytes]],
    offset_ns: int = 0,
    texts: SlimTexts | None = None,
) -> Records:
    if texts is None:
        texts = SlimTexts()
        for codec in codecs:
            codec.use(texts)
    return Records(
        codecs,
        b"".join(record for _, record in raw),
        bytes(source for source, _ in raw),
        offset_ns,
        0,
        0,
        texts,
    )


def by_c(rows: Sequence[Event]) -> bytes:
    pieces: list[bytes] = []
    json_lines(rows, lambda piece: pieces.append(bytes(piece)))
    assert all(piece.endswith(b"\n") for piece in pieces)
    return b"".join(pieces)


def by_python(rows: Sequence[Event]) -> bytes:
    return msgspec.json.Encoder().encode_lines(list(rows))


def any_record(event: type[Event], source: random.Random) -> bytes:
    """Draw a record of any bytes, many of them 0, of an existing hook."""
    record = Record(event)
    raw = bytearray(
        source.choice((0, 1, 9, 10, 99, 100, 127, 128, 255, source.randrange(256)))
        if source.random() < 0.6
        else 0
        for _ in range(record.size)
    )
    raw[record.offset("hook")] = source.randrange(len(HOOKS))
    return bytes(raw)


def test_library_is_built_where_a_compiler_exists() -> None:
    assert FILE.exists()
    assert library()


@pytest.mark.parametrize("event", [Event, Everything])
def test_lines_match_those_of_msgspec(event: type[Event]) -> None:
    source = chance(4711)
    codecs = [codec_of(event)]
    for _ in range(60 if LONG else 25):
        raw = [(0, any_record(event, source)) for _ in range(50)]
        offset_ns = source.randrange(1 << 60)
        rows = batch(codecs, raw, offset_ns)
        assert by_c(rows) == by_python(rows)


def some_records(event: type[Event], source: random.Random, count: int) -> list[tuple[int, bytes]]:
    """Draw records whose numbers have room in 63 bits."""
    found: list[tuple[int, bytes]] = []
    while len(found) < count:
        raw = any_record(event, source)
        row = next(iter(decoder_of(event)(Record(event).layout.iter_unpack(raw), 0)))
        if max(row.ts_ns, row.sock) < 1 << 62:
            found.append((0, raw))
    return found


@pytest.mark.parametrize("event", [Event, Everything, Packet])
def test_slim_rows_have_the_values_of_the_rows(event: type[Event]) -> None:
    source = chance(4712)
    codec = codec_of(event)
    for _ in range(10):
        rows = batch([codec], some_records(event, source, 50), 17, codec.texts)
        slim = slim_rows(rows)
        assert slim is not None
        # A row that is made alone is the same.
        assert [slim.row(index) for index in range(len(rows))] == list(rows)
        for index, row in enumerate(rows):
            numbers = dict(zip(SLIM_NUMBERS, slim.numbers[index * slim.width :], strict=False))
            for name in SLIM_NUMBERS[: SLIM_NUMBERS.index("hook")]:
                value = getattr(row, name, MISSING)
                assert numbers[name] == (NULL if value is None else value), name
            assert slim.hooks[numbers["hook"]] == (row.probe, row.point, row.func, row.attach)
            assert slim.users[numbers["user"]] == (row.pid, row.tid, row.comm, row.thread)
            ends = (row.netns, row.ip, row.saddr, row.sport, row.daddr, row.dport)
            assert slim.ends[numbers["ends"]] == ends
            assert slim.states[numbers["states"]] == (row.state, row.old_state, row.desc)
            assert slim.flags[numbers["flags"]] == row.flags
            assert slim.ifnames[numbers["ifname"]] == row.ifname


def test_slim_rows_of_several_probes_share_their_texts() -> None:
    source = chance(4713)
    codecs = [codec_of(Event), codec_of(Packet)]
    raw = [some_records(event, source, 20) for event in (Event, Packet)]
    mixed = [
        (number, record)
        for pair in zip(*raw, strict=True)
        for number, (_, record) in enumerate(pair)
    ]
    rows = batch(codecs, mixed)
    slim = slim_rows(rows)
    assert slim is not None
    assert [slim.row(index) for index in range(len(rows))] == list(rows)
    users = [slim.users[number] for number in slim.numbers[USER :: slim.width]]
    assert users == [(row.pid, row.tid, row.comm, row.thread) for row in rows]


def test_one_row_of_a_batch_is_made_without_the_others() -> None:
    made: list[int] = []

    def ifname(index: int) -> str:
        made.append(index)
        return f"if{index}"

    codec = Codec.of(Record(Event), "probe", HOOKS, ifname)
    assert codec
    rows = batch([codec], [(0, make_record(Event, ifindex=number)) for number in range(1, 9)])
    assert slim_rows(rows)
    made.clear()
    assert (rows[-1].ifname, rows[3].ifname) == ("if8", "if4")
    assert made == [8, 4]


def test_batch_that_is_older_than_the_texts_has_rows_alone() -> None:
    codec = codec_of(Event)
    old = batch([codec], [(0, make_record(Event, sport=1, pid=7))])
    kept = batch([codec], [(0, make_record(Event, sport=2, pid=8))], texts=codec.texts)
    assert slim_rows(kept)
    codec.use(SlimTexts())
    new = batch([codec], [(0, make_record(Event, sport=3, pid=9))], texts=codec.texts)
    assert slim_rows(new)
    assert slim_rows(old) is None
    assert old[0].sport == 1
    slim = slim_rows(kept)  # it was made before
    assert slim is not None
    assert slim.users[slim.numbers[USER]][0] == 8


@pytest.mark.parametrize("member", ["ts_ns", "sock"])
def test_number_without_room_in_a_slim_row_makes_the_batch_one_of_rows(member: str) -> None:
    raw = [make_record(Event), make_record(Event, **{member: 1 << 63})]
    rows = batch([codec_of(Event)], [(0, record) for record in raw])
    assert slim_rows(rows) is None
    assert getattr(rows[1], member) == 1 << 63


def test_field_that_is_worked_out_makes_the_batch_one_of_rows() -> None:
    class Odd(Event, gc=False):
        window: Annotated[int, Wire("u16", "worked out", to=lambda raw: 2 * raw)]

    rows = batch([codec_of(Odd)], [(0, make_record(Odd, window=3))])
    assert slim_rows(rows) is None
    assert rows[0].window == 6  # type: ignore[attr-defined]  # of a class made here


@given(number=st.integers(0, (1 << 64) - 1))
@settings(max_examples=2000 if LONG else 100)
def test_json_of_the_library_keeps_every_digit(number: int) -> None:
    rows = batch(
        [codec_of_everything()],
        [
            (
                0,
                make_record(
                    Everything, connect_ns=number, wide=number, has=0xFF, seq=number & 0xFFFFFFFF
                ),
            )
        ],
    )
    assert by_c(rows) == by_python(rows)


_CODECS: dict[type[Event], Codec] = {}


def codec_of_everything() -> Codec:
    return _CODECS.setdefault(Everything, codec_of(Everything))


@pytest.mark.parametrize("digits", range(20))
def test_numbers_around_each_power_of_ten_are_exact(digits: int) -> None:
    for number in (10**digits, 10 ** (digits + 1) - 1, 10**digits + 1):
        if number < 1 << 64:
            record = make_record(Everything, connect_ns=number, wide=number, has=0xFF)
            rows = batch([codec_of_everything()], [(0, record)])
            assert b'"wide":%d,' % number in by_c(rows)
            assert by_c(rows) == by_python(rows)


def test_rows_of_two_probes_keep_their_order() -> None:
    codecs = [codec_of(Event), codec_of(Everything)]
    source = chance(1)
    raw = []
    for _ in range(500):
        which = source.randrange(2)
        raw.append((which, any_record(EVENTS[which], source)))
    rows = batch(codecs, raw)
    assert [type(row) for row in rows] == [EVENTS[which] for which, _ in raw]
    assert by_c(rows) == by_python(rows)


def test_memo_overflow_keeps_lines_correct() -> None:
    codecs = [codec_of(Event)]
    for begin in range(0, 40_000, 5000):
        raw = [(0, make_record(Event, sock=number)) for number in range(begin, begin + 5000)]
        rows = batch(codecs, raw)
        assert by_c(rows) == by_python(rows)


def test_batch_of_many_pieces_and_long_lines_is_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = [(0, any_record(Event, chance(number))) for number in range(100)]
    rows = batch([codec_of(Event)], raw)
    for size in (64, 600, 1000):
        fast._text.cache_clear()
        monkeypatch.setattr(fast, "PIECE", size)
        assert by_c(rows) == by_python(rows)
    fast._text.cache_clear()


def test_rows_are_made_once_and_are_a_sequence() -> None:
    rows = batch([codec_of(Event)], [(0, make_record(Event, ts_ns=ns)) for ns in range(5)], 100)
    assert len(rows) == 5
    assert [row.time_ns for row in rows] == [100, 101, 102, 103, 104]
    assert rows[-1] is rows[4]
    assert [row.ts_ns for row in rows[1:3]] == [1, 2]


def test_event_with_a_computed_field_is_left_to_python() -> None:
    class Strange(Event):
        twice_ns: Annotated[int, Made("2 * ts_ns", "worked out")]

    assert Codec.of(Record(Strange), "probe", HOOKS, ifname) is None


def test_python_encodes_where_the_library_is_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCPLAT_PURE", "1")
    library.cache_clear()
    try:
        assert Codec.of(Record(Event), "probe", HOOKS, ifname) is None
    finally:
        library.cache_clear()


def test_compiler_gives_no_warning_for_records_c() -> None:
    sources = [FILE.with_name("records.c"), FILE.with_name("lines.c")]
    for compiler in filter(shutil.which, ("gcc", "clang")):
        done = subprocess.run(
            [compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", *sources],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""


# --- the reorder buffer, in C and in Python


Made_ = tuple[ReorderBuffer, list[FakeRing], list[Ring]]


@pytest.fixture(params=[RecordBuffer, RowBuffer])
def buffers(request: pytest.FixtureRequest) -> Iterator[Callable[..., Made_]]:
    """Make a reorder buffer of rings that the test fills, one for each event."""
    in_c = request.param is RecordBuffer
    with ExitStack() as stack:

        def make(*events: type[Event], size: int = 1 << 16, start: int = 0) -> Made_:
            fakes, rings = [], []
            for event in events:
                record = Record(event)
                fake = FakeRing(size, start)
                stack.callback(fake.close)
                ring = Ring(fake.fd, size, record.layout, record.offset("hook"))
                stack.callback(ring.close)
                fakes.append(fake)
                rings.append(ring)
            buffer = reorder_buffer(
                [
                    RingSource("a", ring, decoder_of(event), codec_of(event) if in_c else None)
                    for ring, event in zip(rings, events, strict=True)
                ]
            )
            assert isinstance(buffer, request.param)
            stack.callback(buffer.close)
            return buffer, fakes, rings

        yield make


def at(ns: int, event: type[Event] = Event, **members: Any) -> bytes:
    return make_record(event, ts_ns=ns, **members)


def popped(buffer: ReorderBuffer, before_ns: int = FOREVER) -> list[Event]:
    return list(buffer.pop(before_ns))


def test_records_leave_in_time_order_and_ties_in_arrival_order(
    buffers: Callable[..., Made_],
) -> None:
    buffer, fakes, _ = buffers(Event, Everything)
    source = chance(5)
    expected = []
    for number, (fake, event) in enumerate(zip(fakes, EVENTS, strict=True)):
        times = [source.randrange(40) for _ in range(100)]
        fake.feed(at(ns, event, sock=index) for index, ns in enumerate(times))
        expected += [(ns, number, index) for index, ns in enumerate(times)]
        assert buffer.take(number, 1000, 0) == 0
    rows = popped(buffer)
    got = [(row.ts_ns, int(isinstance(row, Everything)), row.sock) for row in rows]
    assert got == sorted(expected)
    assert popped(buffer) == []


def test_records_beyond_the_horizon_stay_buffered_unchanged(buffers: Callable[..., Made_]) -> None:
    buffer, fakes, _ = buffers(Event, Everything)
    got: list[tuple[int, int]] = []
    source = chance(6)
    now = 0
    fed = []
    for _ in range(200):
        for number, (fake, event) in enumerate(zip(fakes, EVENTS, strict=True)):
            times = sorted(now + source.randrange(100) for _ in range(source.randrange(30)))
            fed += [(ns, number) for ns in times]
            fake.feed(at(ns, event, sock=ns, seq=ns, has=1) for ns in times)
            buffer.take(number, 1000, 0)
        now += 100
        horizon_ns = now - source.randrange(100)
        if got or fed:
            rows = popped(buffer, horizon_ns)
            assert all(row.ts_ns < horizon_ns for row in rows)
            assert all(row.sock == row.seq == row.ts_ns for row in rows)
            got += [(row.ts_ns, int(isinstance(row, Everything))) for row in rows]
        assert buffer.waiting == (len(fed) > len(got))
    got += [(row.ts_ns, int(isinstance(row, Everything))) for row in popped(buffer)]
    assert len(got) == len(fed) > 1000
    assert sorted(got) == sorted(fed)
    assert [ns for ns, _ in got] == sorted(ns for ns, _ in fed)


def test_take_stops_at_the_limit(buffers: Callable[..., Made_]) -> None:
    buffer, (fake,), (ring,) = buffers(Event)
    fake.feed(map(at, range(1, 101)))
    assert buffer.take(0, 30, 0) == 30
    assert ring.pending()
    assert buffer.take(0, 70, 0) == 100
    assert not ring.pending()
    assert buffer.take(0, 70, 0) == 0
    assert [row.ts_ns for row in popped(buffer)] == list(range(1, 101))


def test_records_wrap_around_the_end(buffers: Callable[..., Made_]) -> None:
    buffer, (fake,), _ = buffers(Event, size=4096, start=(1 << 40) - 8)
    for begin in range(0, 1000, 10):
        assert fake.feed(map(at, range(begin, begin + 10))) == 10
        buffer.take(0, 1000, 0)
        assert fake.consumed == fake.produced
        assert [row.ts_ns for row in popped(buffer)] == list(range(begin, begin + 10))


def test_busy_record_holds_back_its_successors(buffers: Callable[..., Made_]) -> None:
    buffer, (fake,), (ring,) = buffers(Event)
    fake.feed([at(1)])
    position = fake.reserve(at(2))
    assert position is not None
    fake.feed([at(3)])
    buffer.take(0, 10, 0)
    assert [row.ts_ns for row in popped(buffer)] == [1]
    assert ring.pending()
    fake.submit(position)
    buffer.take(0, 10, 0)
    assert [row.ts_ns for row in popped(buffer)] == [2, 3]


def test_discarded_record_is_skipped_and_not_counted(
    buffers: Callable[..., Made_],
) -> None:
    buffer, (fake,), (ring,) = buffers(Event)
    position = fake.reserve(at(1))
    assert position is not None
    fake.feed([at(2)])
    fake.discard(position)
    buffer.take(0, 10, 0)
    assert [row.ts_ns for row in popped(buffer)] == [2]
    assert ring.taken.total() == 1


def test_records_are_counted_by_their_hook(buffers: Callable[..., Made_]) -> None:
    buffer, (fake,), (ring,) = buffers(Event)
    fake.feed(at(1, hook=hook) for hook in itertools.chain([0] * 3, [1] * 5, [2] * 7))
    buffer.take(0, 100, 0)
    assert ring.taken == {0: 3, 1: 5, 2: 7}


def test_record_of_another_size_raises_foreignrecorderror(buffers: Callable[..., Made_]) -> None:
    buffer, (fake,), _ = buffers(Event)
    fake.feed([at(1), b"x" * 16])
    with pytest.raises(RecordSizeError):
        buffer.take(0, 10, 0)


def test_counts_outlive_the_buffer(buffers: Callable[..., Made_]) -> None:
    buffer, (fake,), (ring,) = buffers(Event)
    fake.feed([at(1)])
    buffer.take(0, 10, 0)
    buffer.close()
    buffer.close()
    assert ring.taken == {0: 1}


def test_rows_from_no_ring_are_sorted_in(buffers: Callable[..., Made_]) -> None:
    buffer, (fake,), _ = buffers(Event)
    assert not buffer.waiting
    fake.feed([at(1), at(3)])
    buffer.take(0, 10, 0)
    buffer.feed([make_event(ts_ns=4), make_event(ts_ns=2)])
    assert [row.ts_ns for row in popped(buffer, 4)] == [1, 2, 3]
    assert buffer.waiting
    assert [row.ts_ns for row in popped(buffer)] == [4]
    assert not buffer.waiting
