"""Lines that lines.c reads become the rows, and the refusals, that Python makes of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcplat_core import SLIM_NUMBERS, Event, json_lines, slim_rows
from tcplat_core.capture import rows as capture_rows
from tcplat_core.capture.rows import Capture
from tcplat_core.deliver.fast.library import library
from tcplat_core.deliver.fast.lines import Lines, line_reader
from tcplat_core.event.fields import row as made_row
from tcplat_core.registry.find import Plugins
from tcplat_core.testing import make_event
from tests.long import LONG

pytestmark = pytest.mark.skipif(library() is None, reason="there was no C compiler")

EVENTS = {name: spec.event for name, spec in Plugins.load().probes.items()}
LARGEST = (1 << 63) - 1
PLAIN = {
    "int": st.sampled_from([0, 1, 4_000_000_000, LARGEST]) | st.integers(0, LARGEST),
    "str": st.sampled_from(["nginx", "", "TCP_CLOSE", "127.0.0.1", "a,b", ',"pid', "{}"]),
    "float": st.integers(0, 10**14).map(lambda ns: ns / 1000),
    "bool": st.booleans(),
}


def hint_of(probe: str, name: str) -> str:
    from tcplat_core.event.fields import fields  # noqa: PLC0415 - of one place

    return next(field.type for field in fields(EVENTS[probe]) if field.name == name)


@st.composite
def rows(draw: st.DrawFn) -> Event:
    probe = draw(st.sampled_from(sorted(EVENTS)))
    values: dict[str, Any] = {}
    for name in EVENTS[probe].__struct_fields__:
        kind = hint_of(probe, name)
        choices = [PLAIN[one] for one in kind.split(" or ") if one in PLAIN]
        if "null" in kind:
            choices.append(st.none())
        values[name] = draw(st.one_of(choices))
    return made_row(EVENTS[probe], **{**values, "v": 2, "probe": probe})


def read(data: bytes) -> tuple[list[Any], Capture]:
    said: list[str] = []
    capture = Capture(EVENTS, said.append)
    found: list[Any] = []
    for item in capture.items(iter([data])):
        # The class of an unknown probe's rows is of one reader.
        found += map(msgspec.to_builtins, item) if isinstance(item, Sequence) else [item]
    return [*found, *said], capture


@settings(max_examples=500 if LONG else 30, deadline=None)
@given(st.lists(rows(), min_size=1, max_size=8))
def test_lines_become_the_rows_that_were_written(some: list[Event]) -> None:
    data = msgspec.json.Encoder().encode_lines(some)
    (batch,) = [item for item in Capture(EVENTS).items(iter([data])) if isinstance(item, Sequence)]
    assert list(batch) == some
    pieces: list[bytes] = []
    json_lines(batch, lambda piece: pieces.append(bytes(piece)))
    assert b"".join(pieces) == data


@settings(max_examples=500 if LONG else 30, deadline=None)
@given(st.lists(rows(), min_size=1, max_size=8))
def test_slim_rows_have_the_values_of_the_rows(some: list[Event]) -> None:
    reader = line_reader(lambda _: True)
    assert reader is not None
    for probe, event in EVENTS.items():
        reader.know(probe, event, msgspec.json.Decoder(event).decode)
    data = msgspec.json.Encoder().encode_lines(some)
    batch = reader.read(data)
    if b"\\" in data:  # what may have to be escaped is left to Python
        assert batch is None
        return
    assert batch is not None
    slim = slim_rows(batch)
    assert slim is not None
    assert len(slim.numbers) == slim.width * len(some)
    for index, row in enumerate(some):
        numbers = dict(zip(SLIM_NUMBERS, slim.numbers[index * slim.width :], strict=False))
        assert slim.hooks[numbers["hook"]] == (row.probe, row.point, row.func, row.attach)
        assert slim.users[numbers["user"]] == (row.pid, row.tid, row.comm, row.thread)
        assert slim.ends[numbers["ends"]] == (
            *(row.netns, row.ip, row.saddr, row.sport, row.daddr, row.dport),
        )
        assert slim.states[numbers["states"]] == (row.state, row.old_state, row.desc)
        assert slim.flags[numbers["flags"]] == row.flags
        assert slim.ifnames[numbers["ifname"]] == row.ifname
        assert slim.row(index) == row
        missing = {"ack", "window"} - set(row.__struct_fields__)
        for name in ("ts_ns", "time_ns", "seq", "bytes", "sock", "ack", "window"):
            value = None if name in missing else getattr(row, name)
            null = -(1 << 63) + (name in missing)
            assert numbers[name] == (null if value is None else value)
    assert [row.ts_ns for row in batch[1:]] == [row.ts_ns for row in some[1:]]
    assert batch.ordered == all(one.ts_ns <= other.ts_ns for one, other in pairwise(some))


PIECES = [
    *(b" ", b"\n", b"null", b"-", b"0", b"1.5", b"1e3", b"99999999999999999999", b'"', b"\\", b","),
    *(b'"x":1,', b"{", b"}", b"\x00", b"\x7f", b"\xc3\xa9", b"\\u001b", b'"sock":', b',"cpu":'),
]


@settings(max_examples=3_000 if LONG else 150, deadline=None)
@given(st.lists(rows(), min_size=1, max_size=4), st.integers(), st.data())
def test_changed_lines_are_read_as_python_reads_them(
    some: list[Event], seed: int, data: st.DataObject
) -> None:
    chance = random.Random(seed)  # noqa: S311 - no secret
    text = msgspec.json.Encoder().encode_lines(some)
    at = chance.randrange(len(text))
    piece = data.draw(st.sampled_from(PIECES) | st.binary(max_size=3))
    text = text[:at] + piece + text[at + chance.choice([0, 0, 1, len(piece)]) :]
    with pytest.MonkeyPatch.context() as patch:
        found, capture = read(text)
        patch.setattr(capture_rows, "line_reader", lambda _: None)
        expected, other = read(text)
    assert found == expected
    assert (capture.read, capture.left_out, capture.ended) == (
        *(other.read, other.left_out, other.ended),
    )


def test_full_lists_of_texts_are_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tcplat_core.deliver.fast.lines._FULL", 5)
    reader = line_reader(lambda _: True)
    assert reader is not None
    reader.know(
        "tcp_client", EVENTS["tcp_client"], msgspec.json.Decoder(EVENTS["tcp_client"]).decode
    )
    kept: list[tuple[Lines, int]] = []
    for number in range(40):
        row = make_event(dport=number)
        batch = reader.read(msgspec.json.Encoder().encode_lines([row]))
        assert batch is not None
        kept.append((batch, number))
    for batch, number in kept:  # older batches keep their texts
        slim = batch.slim()
        assert slim.ends[slim.numbers[SLIM_NUMBERS.index("ends")]][5] == number
