"""The event: its record, its decoder, its JSON, and the escaping of texts."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import socket
import subprocess
import time
import unicodedata
from collections.abc import Callable, Iterable
from importlib.resources import files
from typing import Annotated, Any, cast

import msgspec
import pytest

from tcplat_core.errors import PluginError
from tcplat_core.event.clock import clock_offset_ns
from tcplat_core.event.fields import Event, FiredBy, Made, Moment, Wire, fields
from tcplat_core.event.record import _HAS, Record
from tcplat_core.event.text import TCP_FLAGS, TCP_STATES, address, flags, name, text
from tcplat_core.event.validation import LARGEST_RECORD
from tcplat_core.plugin.specs import ProbeSpec
from tcplat_core.testing import make_event, make_record

KEYS = [
    *("v", "ts_ns", "time_ns", "probe", "point", "func", "attach", "pid", "tid", "comm"),
    *(
        "thread",
        "cpu",
        "netns",
        "ip",
        "saddr",
        "sport",
        "daddr",
        "dport",
        "state",
        "old_state",
        "desc",
    ),
    *("seq", "bytes", "flags", "connect_us", "ifname", "sock"),
]
"""Of a JSON line, in this order."""

HAS_SEQ, HAS_BYTES, HAS_FLAGS = 1, 2, 4

TYPEDEFS = (
    "typedef unsigned char u8; typedef unsigned short u16;"
    "typedef unsigned int u32; typedef unsigned long long u64;"
    "typedef signed char s8; typedef short s16; typedef int s32; typedef long long s64;"
    "typedef _Bool bool;\n"
)

needs_clang = pytest.mark.skipif(not shutil.which("clang"), reason="clang is not installed")


class Retransmit(Event, gc=False):
    """What a third party's probe may add."""

    tries: Annotated[int, Wire("u8", "how often it was sent before")]
    cause: Annotated[str | None, Wire("char[6]", "why it was sent again", to=name)]
    rto_us: Annotated[int | None, Wire("u32", "the timer, µs", nullable=True)]
    twice: Annotated[int, Made("tries * 2", "twice as many")]


class Everything(Event, gc=False):
    """A field of each kind that there is."""

    kind: Annotated[int, Wire("s8", "named like a block")]
    socket: Annotated[int | None, Wire("s16", "named like the other", has=True)]
    delta_us: Annotated[int, Wire("s32", "signed")]
    to_kind: Annotated[int, Wire("s64", "named like a converter")]
    fast: Annotated[bool, Wire("bool", "a truth")]
    label: Annotated[str, Wire("char[5]", "a text")]
    cause: Annotated[str | None, Wire("char[8]", "a text, or nothing", nullable=True)]
    via: Annotated[str | None, Wire("u8[16]", "an address, or none", to=address, nullable=True)]


def words(moment: Moment) -> str:
    return f"{moment.point} {moment.state} {moment.old_state} {moment.err} {moment.empty}"


HOOKS = (
    FiredBy("send", "tcp_sendmsg", "kprobe", words),
    FiredBy("state", "sock:inet_sock_set_state", "tracepoint", words),
)


@functools.cache
def decoder(event: type[Event]) -> Callable[[Iterable[tuple[Any, ...]], int], list[Event]]:
    return Record(event).decoder("a_probe", HOOKS, lambda index: f"eth{index}")


def decode(*raw: bytes, event: type[Event] = Event, offset_ns: int = 0) -> list[Event]:
    records = Record(event).layout.iter_unpack(b"".join(raw))
    return decoder(event)(records, offset_ns)


def decode_one(event: type[Event] = Event, **members: int | bytes | str) -> Any:
    (row,) = decode(make_record(event, **members), event=event)
    return row


# --- the record


@pytest.mark.parametrize("event", [Event, Retransmit, Everything])
def test_record_has_no_padding(event: type[Event]) -> None:
    """By the sizes of members; the compiler's layout is asserted in C, below."""
    sizes = {f"{sign}{8 * size}": size for sign in "us" for size in (1, 2, 4, 8)}
    sizes |= {"char": 1, "bool": 1}
    record = Record(event)
    types = [c_type.rstrip("]").partition("[") for _, c_type in record.members]
    total = sum(sizes[base] * int(count or 1) for base, _, count in types)
    assert record.size == record.packing.size == total
    assert total % 8 == 0
    assert len({member for member, _ in record.members}) == len(record.members)


def test_record_is_decoded_field_by_field() -> None:
    record = make_record(
        ts_ns=5_000_000_001,
        connect_ns=1_234_567,
        sock=0xFFFF_FFFF_FFFF_FFFF,
        saddr="192.0.2.1",
        daddr="2001:db8::1",
        comm="nginx",
        thread="pool 1",
        pid=4_194_303,
        tid=4_194_304,
        netns=4_026_531_840,
        seq=0xFFFF_FFFF,
        bytes=0x8000_0000,
        ifindex=3,
        cpu=65_535,
        sport=65_535,
        dport=1,
        err=111,
        ip=6,
        state=1,
        old_state=2,
        flags=0x12,
        hook=1,
        has=HAS_SEQ | HAS_BYTES | HAS_FLAGS,
    )
    (row,) = decode(record, offset_ns=10)
    assert msgspec.structs.asdict(row) == {
        "v": 2,
        "ts_ns": 5_000_000_001,
        "time_ns": 5_000_000_011,
        "probe": "a_probe",
        "point": "state",
        "func": "sock:inet_sock_set_state",
        "attach": "tracepoint",
        "pid": 4_194_303,
        "tid": 4_194_304,
        "comm": "nginx",
        "thread": "pool 1",
        "cpu": 65_535,
        "netns": 4_026_531_840,
        "ip": 6,
        "saddr": "192.0.2.1",
        "sport": 65_535,
        "daddr": "2001:db8::1",
        "dport": 1,
        "state": "TCP_ESTABLISHED",
        "old_state": "TCP_SYN_SENT",
        "desc": "state TCP_ESTABLISHED TCP_SYN_SENT 111 False",
        "seq": 0xFFFF_FFFF,
        "bytes": 0x8000_0000,
        "flags": "SYN|ACK",
        "connect_us": 1234.567,
        "ifname": "eth3",
        "sock": 0xFFFF_FFFF_FFFF_FFFF,
    }


def test_fields_unknown_to_a_hook_are_null() -> None:
    row = msgspec.structs.asdict(decode_one())
    assert [key for key, value in row.items() if value is None] == [
        "pid",
        "tid",
        "comm",
        "thread",
        "netns",
        "ip",
        "sport",
        "dport",
        "state",
        "old_state",
        "seq",
        "bytes",
        "flags",
        "connect_us",
        "ifname",
    ]


@pytest.mark.parametrize(
    ("thread", "expected"),
    [(b"", None), (b"nginx", None), (b"nginx\0rest", None), (b"nginx2", "nginx2"), (b"N", "N")],
)
def test_thread_is_given_where_it_differs_from_comm(thread: bytes, expected: str | None) -> None:
    assert decode_one(comm=b"nginx\0left", thread=thread).thread == expected


def test_process_outside_the_pid_namespace_has_comm_but_no_pid() -> None:
    row = decode_one(pid=1 << 31 | 4711, tid=1 << 31 | 4712, comm=b"nginx")
    assert (row.pid, row.tid, row.comm) == (None, None, "nginx")


@pytest.mark.parametrize("bits", range(8))
def test_zero_bytes_differ_from_unknown_bytes(bits: int) -> None:
    row = decode_one(has=bits)
    assert row.seq == (0 if bits & HAS_SEQ else None)
    assert row.bytes == (0 if bits & HAS_BYTES else None)
    assert row.flags == ("" if bits & HAS_FLAGS else None)


def test_describe_sees_zero_and_unknown_bytes_apart() -> None:
    assert decode_one(has=HAS_BYTES).desc.endswith("True")
    assert decode_one(has=HAS_BYTES, bytes=1).desc.endswith("False")
    assert decode_one(bytes=1).desc.endswith("None")


def test_every_state_of_the_kernel_has_its_name() -> None:
    assert [decode_one(state=number).state for number in range(13)] == list(TCP_STATES)
    for state in TCP_STATES[1:12]:  # those that Python knows
        assert getattr(socket, str(state), TCP_STATES.index(state)) == TCP_STATES.index(state)


def test_every_combination_of_flags_is_spelled_out() -> None:
    for raw in range(256):
        assert flags(raw).split("|") == [
            name for bit, name in enumerate(TCP_FLAGS) if raw & 1 << bit
        ] or [""]


def test_decoder_keeps_order_and_count_when_its_memo_overflows() -> None:
    """It caches 65,536 results of each function, then starts afresh."""
    raw = [make_record(ts_ns=number, daddr=number.to_bytes(16, "big")) for number in range(70_000)]
    rows = decode(*raw)
    assert [row.ts_ns for row in rows] == list(range(70_000))
    assert rows[69_999].daddr == "::0.1.17.111"


def test_subclass_adds_its_fields_behind_the_common_ones() -> None:
    row = decode_one(Retransmit, tries=3, cause="RACK", rto_us=0, pid=1)
    assert (row.pid, row.tries, row.cause, row.rto_us, row.twice) == (1, 3, "RACK", None, 6)
    assert list(json.loads(msgspec.json.encode(row))) == [
        *KEYS,
        "tries",
        "cause",
        "rto_us",
        "twice",
    ]


def test_every_field_type_is_decoded() -> None:
    row = decode_one(
        Everything,
        kind=-128,
        socket=-1,
        has=8,
        delta_us=-5,
        to_kind=-(1 << 63),
        fast=True,
        label=b"a\x1bbcd",
        cause=b"RACK",
        via="2001:db8::1",
    )
    assert (row.kind, row.socket, row.delta_us, row.to_kind) == (-128, -1, -5, -(1 << 63))
    assert (row.fast, row.label, row.cause, row.via) == (True, r"a\x1bbcd", "RACK", "2001:db8::1")
    keys = json.loads(msgspec.json.encode(row))
    assert (keys["fast"], keys["socket"]) == (True, -1)


def test_null_value_applies_to_zeros_where_declared() -> None:
    row = decode_one(Everything)
    assert (row.socket, row.cause, row.via) == (None, None, None)
    assert (row.kind, row.fast, row.label) == (0, False, "")


def test_a_field_has_a_unit_and_a_column_after_its_name() -> None:
    class Own(Event):
        rto_us: Annotated[int, Wire("u32", "a time")]
        tries: Annotated[int, Wire("u8", "a number")]
        queue_bytes: Annotated[int, Wire("u32", "room", column="QUEUE")]
        hidden: Annotated[int, Wire("u8", "no column", column="")]

    own = [field for field in fields(Own) if field.own]
    assert [(field.name, field.unit, field.column) for field in own] == [
        ("rto_us", "us", "RTO(us)"),
        ("tries", "", "TRIES"),
        ("queue_bytes", "bytes", "QUEUE"),
        ("hidden", "", ""),
    ]
    assert not any(field.own for field in fields(Event))


def test_fields_of_a_captured_probe_have_name_and_unit() -> None:
    class Captured(Event):
        rto_us: Any

    (own,) = (field for field in fields(Captured) if field.own)
    assert (own.name, own.type, own.unit, own.doc) == ("rto_us", "any", "us", "")
    assert own.column == "RTO(us)"


# --- what is no field


@pytest.mark.parametrize("c_type", ["int", "u128", "u32[4]", "char", "char[0]", "u8[", "", "s8[4]"])
def test_unknown_c_type_is_refused(c_type: str) -> None:
    with pytest.raises(PluginError, match=r"a field cannot be of the C type .* but of u64, u32"):
        Wire(c_type, "odd")


def test_unknown_block_is_refused() -> None:
    with pytest.raises(PluginError, match="there is no block 'sockets'"):
        Wire("u8", "odd", block="sockets")


NO_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "core": (
        {"pid": Annotated[int, Wire("u32", "x")]},
        "Odd.pid is already a field of every event",
    ),
    "bare": ({"rto": int}, 'Odd.rto is not declared as rto: Annotated.int, Wire."u32"'),
    "other": ({"rto": Annotated[int, "the timer"]}, "Odd.rto is not declared as"),
    "bytes": ({"raw": Annotated[bytes, Wire("u8[4]", "x", to=bytes)]}, "int, float, str or bool"),
    "no_to": ({"raw": Annotated[str, Wire("u8[4]", "x")]}, "want to=, as in to=address"),
    "c_word": ({"register": Annotated[int, Wire("u8", "x")]}, "'register' is a reserved word"),
    "member": ({"a": Annotated[int, Wire("u8", "x", member="in")]}, "'in' is a reserved word"),
    "hidden": ({"err": Annotated[int, Wire("u8", "x")]}, "the record already has a member 'err'"),
    "twice": (
        {
            "a": Annotated[int, Wire("u8", "x", member="c")],
            "b": Annotated[int, Wire("u8", "x", member="c")],
        },
        "Odd.b: the record already has a member 'c'",
    ),
    "capitals": ({"RTO": Annotated[int, Wire("u8", "x")]}, "'RTO' must be lower-case"),
    "nullable": ({"a": Annotated[int, Wire("u8", "x", nullable=True)]}, "is not declared as ... |"),
    "latency": (
        {"wait_ms": Annotated[int, Wire("u32", "x", latency=True)]},
        "a latency is in µs, and its name ends in _us",
    ),
    "six": (
        {f"a{n}": Annotated[int | None, Wire("u8", "x", has=True)] for n in range(6)},
        "Odd has more than five fields with has=True",
    ),
    "large": (
        {"a": Annotated[str, Wire("char[1000]", "x")]},
        r"a record of Odd has 11\d\d bytes; 1024 is the maximum",
    ),
}
"""Fields, and what is wrong with them."""


def event_with(own: dict[str, Any]) -> type[Event]:
    return cast("type[Event]", msgspec.defstruct("Odd", list(own.items()), bases=(Event,)))


@pytest.mark.parametrize("case", NO_FIELDS)
def test_invalid_fields_are_refused(case: str) -> None:
    own, reason = NO_FIELDS[case]
    event = event_with(own)
    with pytest.raises(PluginError, match=reason):
        ProbeSpec(name="odd", summary="odd", source="", points=(), event=event)


def test_event_class_must_derive_from_event() -> None:
    with pytest.raises(PluginError, match=r"is not a subclass of tcplat_core\.Event"):
        ProbeSpec(name="odd", summary="odd", source="", points=(), event=dict)  # type: ignore[arg-type] # that is the fault


# --- addresses


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("00000000000000000000ffff7f000001", "127.0.0.1"),
        ("00000000000000000000ffff00000000", "0.0.0.0"),
        ("00000000000000000000ffffffffffff", "255.255.255.255"),
        ("00000000000000000000000000000001", "::1"),
        ("00000000000000000000000000000000", "::"),
        ("20010db8000000000000000000000001", "2001:db8::1"),
        ("fe8000000000000000000000000000ff", "fe80::ff"),
        ("00000000000000000001ffff7f000001", "::1:ffff:7f00:1"),
    ],
)
def test_mapped_address_is_shown_as_ipv4(raw: str, shown: str) -> None:
    assert address(bytes.fromhex(raw)) == shown


# --- names


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"curl\0\0\0\0", "curl"),
        (b"fifteen bytes !\0", "fifteen bytes !"),
        (b"sixteen bytes !!", "sixteen bytes !!"),
        (b"a\0b", "a"),
        (b"\x1b]0;x\x07", r"\x1b]0;x\x07"),
        (b"a\nb\tc", r"a\nb\tc"),
        (b"C:\\x1b", r"C:\\x1b"),
        ("Übergröße".encode(), "Übergröße"),
        ("漢字".encode(), "漢字"),
        ("漢字".encode()[:5], "漢" + r"\xe5\xad"),
        (b"\xff\xfe", r"\xff\xfe"),
        ("\u202egnp.exe".encode(), r"\u202egnp.exe"),
        ("\u200b".encode(), r"\u200b"),
        ("\U000e0041".encode(), r"\U000e0041"),
        (b"\xed\xb2\x80", r"\xed\xb2\x80"),  # a lone surrogate is no UTF-8
    ],
)
def test_name_is_escaped(raw: bytes, shown: str) -> None:
    assert text(raw) == shown


def test_empty_name_is_null() -> None:
    assert name(bytes(16)) is None
    assert name(b"\0hidden") is None


SHORT = [bytes(raw) for length in (1, 2) for raw in itertools.product(range(256), repeat=length)]
"""Every single byte and every pair."""


def test_two_byte_names_are_always_printable() -> None:
    for raw in SHORT:
        shown = text(raw)
        assert shown.isprintable()
        assert not any(unicodedata.category(char).startswith("C") for char in shown)


def test_different_names_are_shown_differently() -> None:
    shown: dict[str, bytes] = {}
    for raw in SHORT:
        seen = raw.partition(b"\0")[0]
        assert shown.setdefault(text(raw), seen) == seen


def test_every_byte_of_a_name_survives_json() -> None:
    names = [bytes([65, number, 66]) for number in range(1, 256)]
    rows = decode(*(make_record(comm=raw) for raw in names))
    for raw, row in zip(names, rows, strict=True):
        line = msgspec.json.encode(row)
        assert line.count(b"\n") == 0
        assert json.loads(line)["comm"] == text(raw)


# --- JSON


def test_json_keys_have_a_fixed_order() -> None:
    assert list(json.loads(msgspec.json.encode(make_event()))) == KEYS
    assert list(json.loads(msgspec.json.encode(decode_one()))) == KEYS


def test_one_row_is_one_line() -> None:
    rows = [make_event(comm="\n", desc="\r\n\u2028"), make_event()]
    lines = msgspec.json.Encoder().encode_lines(rows)
    assert lines.count(b"\n") == 2
    assert [json.loads(line)["comm"] for line in lines.splitlines()] == ["\n", "curl"]


def test_json_keeps_every_digit() -> None:
    big = (1 << 64) - 1
    row = decode_one(sock=big, ts_ns=(1 << 63) - 1, connect_ns=1)
    read = json.loads(msgspec.json.encode(row))
    assert (read["sock"], read["ts_ns"], read["connect_us"]) == (big, (1 << 63) - 1, 0.001)


@pytest.mark.parametrize("event", [Event, Retransmit, Everything])
def test_every_field_is_documented(event: type[Event]) -> None:
    found = fields(event)
    assert [field.name for field in found] == list(event.__struct_fields__)
    assert all(field.doc and field.type for field in found)


def test_documented_types_are_those_of_the_rows() -> None:
    kinds = {int: "int", float: "float", str: "str", type(None): "null"}
    full = make_event(old_state="TCP_CLOSE", flags="SYN", connect_us=1.5, ifname="lo")
    for row in (full, decode_one()):
        values = msgspec.structs.asdict(row)
        for field in fields():
            assert kinds[type(values[field.name])] in field.type.split(" or "), field


# --- C


def compile_c(code: str, *how: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [
            "clang",
            "-target",
            "bpf",
            "-x",
            "c",
            "-Wall",
            "-Werror",
            *(how or ["-fsyntax-only"]),
            "-",
        ],
        input=(TYPEDEFS + code).encode(),
        capture_output=True,
        check=False,
    )


@needs_clang
@pytest.mark.parametrize("event", [Event, Retransmit, Everything])
def test_compiler_lays_out_the_struct_as_python_reads_it(event: type[Event]) -> None:
    code = Record(event).c_struct()
    done = compile_c(code)
    assert done.returncode == 0, done.stderr.decode()
    # One assertion per member, and one for the size.
    assert code.count("_Static_assert") == len(Record(event).members) + 1


@needs_clang
def test_largest_record_can_be_zeroed_in_bpf() -> None:
    size = LARGEST_RECORD - Record(Event).size
    event = event_with({"a": Annotated[str, Wire(f"char[{size}]", "as long as can be")]})
    ProbeSpec(name="large", summary="large", source="", points=(), event=event)
    code = Record(event).c_struct() + (
        "void clear(struct tcplat_event *e) { __builtin_memset(e, 0, sizeof(*e)); }\n"
    )
    assert compile_c(code, "-O2", "-c", "-o", os.devnull).returncode == 0
    larger = code.replace(f"char a[{size}]", f"char a[{size + 8}]").replace("_Static_assert", "//")
    assert compile_c(larger, "-O2", "-c", "-o", os.devnull).returncode != 0


@needs_clang
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("u64 ts_ns;", "u64 new_in_front; u64 ts_ns;"),
        ("u32 tid;", "u64 tid;"),
        ("char comm[16]", "char comm[8]"),
        ("u16 sport;", "u16 sport, other;"),
        ("u8 has;", "u8 has; u8 other[16];"),
    ],
)
def test_compiler_refuses_a_struct_with_another_layout(old: str, new: str) -> None:
    code = Record(Event).c_struct()
    assert old in code
    done = compile_c(code.replace(old, new))
    assert done.returncode != 0
    assert b"record.py has another" in done.stderr


@needs_clang
def test_has_bits_match_the_header() -> None:

    header = files("tcplat_core").joinpath("include/tcplat/event.bpf.h").read_text()
    for field, bit in _HAS.items():
        assert f"#define TCPLAT_HAS_{field.upper()} {bit}\n" in header


# --- the clock


def test_clock_offset_converts_monotonic_to_unix_time() -> None:
    before = time.time_ns()
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + clock_offset_ns()
    after = time.time_ns()
    measured_within = 5_000_000
    assert before - measured_within < now < after + measured_within
