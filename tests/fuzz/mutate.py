"""Hostile captures, made from captures of real runs.

Its own grammar instead of a library: what hypothesis and atheris bring (values by type, coverage
as a guide) finds faults of parsers, and these parsers are msgspec's and msgpack's. What tcplat adds
is the meaning of the values, so nearly all inputs have to be lines that get as far as that: rows
of connections that belong together, changed in one or two places. Each input follows from a seed
and a number, and takes half a millisecond to make.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import msgpack

from tcplat_core import SCHEMA_VERSION, fields

FOLDER = Path(__file__).parent
EVIL = "\x1b]0;x\x07\x1b[2J\x7f\x9b1m\u202e\u2066\u200e\u2028\u2029\n\r\t\0"
TEXTS = (
    *("", " ", "\\x1b", EVIL, "x" * 5000, "é" * 20, "\U0010ffff", "TCP_ESTABLISHED", "SYN|ACK"),
    *("127.0.0.1", "::1", "1.2.3.4.5", "fe80::1%eth0", "nic_rx", "rx_ip", "recv", "send", "close"),
    *("tcp_client", "tcp_service", "xdp_port", "dev_xmit", "tcp_stats", "nobody", "connect"),
)
NUMBERS = (
    *(0, 1, -1, 2, 3, 255, 65535, 65536, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 53) + 1),
    *((1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, -(1 << 63), -(1 << 63) - 1, 10**40),
    *(0.0, -0.0, 0.5, 1e-300, 1e18, 1e300, math.inf, -math.inf, math.nan),
)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[[[]]]], {"a": {"b": 1}}, [1, "x"])
BYTES = (
    *(b"\n", b"\0", b"{", b"}", b"[" * 2000, b'{"v":1,', b"\xff\xfe", b"1e999", b'"\\ud800"'),
    *(b"\x81\xa1v\x81", b"\xcc\x8f\xa1v", b"\xdf\xff\xff\xff\xff\xa1v", b"\xc1"),
    *(
        b"\xdb\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
        b"\x91" * 2000,
    ),
)
MINE = {"why": "rto", "rto": 204.5, "tries": 3, "again": False}
"""Fields of a third-party probe."""

Value = dict[str, Any]


def seeds() -> list[list[Value]]:
    """Return captures of real runs, with losses, hosts and rows of a third-party probe added."""
    found = []
    for path in sorted((FOLDER / "corpus").glob("*.jsonl")):
        values: list[Value] = [json.loads(line) for line in path.read_bytes().splitlines()]
        rows = [value for value in values if "point" in value]
        for at in range(5, len(rows), 20):
            own = {key: rows[at][key] for key in rows[at] if key in _COMMON}
            values.insert(at, {**own, "probe": "mine", "point": "again", **MINE})
        loss = {"v": SCHEMA_VERSION, "lost": {"probe": "tcp_client", "point": "send", "count": 3}}
        values.insert(len(rows) // 2, loss)
        values.insert(len(rows) // 3, {"v": SCHEMA_VERSION, "gap": 7})
        share = {"one_in": 4, "since_ns": rows[len(rows) // 4]["ts_ns"]}
        values.insert(len(rows) // 4, {"v": SCHEMA_VERSION, "sampled": share})
        hosts = [
            {"v": SCHEMA_VERSION, "merge": host}
            for host in (
                {"host": 0, "name": "a"},
                {"host": 1, "name": "b", "offset_ns": 7, "bound_ns": 900},
            )
        ]
        found += [values, [*hosts, *values]]
    return found


_COMMON = frozenset(field.name for field in fields())


def mutant(seeds: Sequence[list[Value]], random: Random) -> bytes:
    """One capture."""
    values = random.choice(seeds)
    if random.random() < 0.9:  # short ones are quick, long ones have whole connections
        at = random.randrange(len(values))
        values = values[at : at + random.randrange(1, 16)]
    values = list(values)
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        random.choice(_CHANGES)(values, random)
    packed = random.random() < 0.5
    data = b"".join(_encoded(value, random, packed=packed) for value in values)
    if random.random() < 0.25:
        for _ in range(random.choice((1, 1, 2, 5))):
            data = _damaged(data, random)
    return data


def _value(random: Random, old: Any = None) -> Any:
    """Return a value that may replace another."""
    kind = random.random()
    if kind < 0.35:
        return random.choice(NUMBERS)
    if kind < 0.55:
        return random.choice(TEXTS)
    if kind < 0.7:
        return random.choice(OTHERS)
    if isinstance(old, int | float):
        return old + random.choice((-1, 1, 1 << 20, -(1 << 20), 1 << 31, 1 << 40, -(1 << 40)))
    if isinstance(old, str):
        return random.choice((old + EVIL, old[:-1], old * 3, old.upper()))
    return random.randrange(1 << random.choice((3, 16, 33, 63)))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Yield each container in a value, with each key or index."""
    found: list[tuple[Any, Any]] = []
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, one in items:
        found.append((value, key))
        found += _places(one)
    return found


def _one(values: list[Value], random: Random) -> tuple[int, Value]:
    at = random.randrange(len(values))
    values[at] = json.loads(json.dumps(values[at]))
    return at, values[at]


def _replace(values: list[Value], random: Random) -> None:
    if values:
        _, value = _one(values, random)
        if places := _places(value):
            holder, key = random.choice(places)
            holder[key] = _value(random, holder[key])


def _replace_everywhere(values: list[Value], random: Random) -> None:
    """Change one field of all rows: what one place accepts, another may not."""
    key = random.choice(sorted(_COMMON))
    new, same = _value(random), random.random() < 0.5
    for at, value in enumerate(values):
        if key in value:
            values[at] = {**value, key: new if same else _value(random, value[key])}


def _rename(values: list[Value], random: Random) -> None:
    if values:
        _, value = _one(values, random)
        if places := [place for place in _places(value) if isinstance(place[0], dict)]:
            holder, key = random.choice(places)
            new = random.choice(
                (*TEXTS, "ack", "window", "role", "srtt_us", "dev", "accept_us", "_x")
            )
            holder[new] = holder.pop(key)


def _add(values: list[Value], random: Random) -> None:
    if values:
        _, value = _one(values, random)
        names = (
            "ack",
            "window",
            "role",
            "srtt_us",
            "dev",
            "accept_us",
            "call_us",
            EVIL,
            "lost",
            "merge",
        )
        value[random.choice((*names, *TEXTS))] = _value(random)


def _drop(values: list[Value], random: Random) -> None:
    if values:
        _, value = _one(values, random)
        if places := _places(value):
            holder, key = random.choice(places)
            del holder[key]


def _line(values: list[Value], random: Random) -> None:
    """Add, remove or move a line."""
    if values:
        at = random.randrange(len(values))
        kind = random.randrange(4)
        if kind == 0:
            del values[at]
        elif kind == 1:
            values[at:at] = [values[at]] * random.choice((1, 2, 50))
        elif kind == 2:
            values.insert(random.randrange(len(values)), values.pop(at))
        else:
            random.shuffle(values)


def _other(values: list[Value], random: Random) -> None:
    """Return a line that is not a row."""
    some: list[Value] = [
        {"lost": {"probe": _value(random), "point": _value(random), "count": _value(random)}},
        {"gap": _value(random)},
        {"merge": {"host": _value(random), "name": _value(random), "packets": _value(random)}},
        {"merge": {"host": random.randrange(4), "name": EVIL, "bound_ns": _value(random)}},
        {"sampled": {"one_in": _value(random), "since_ns": _value(random)}},
        {"sampled": {"one_in": random.choice((1, 2, 64)), "since_ns": random.randrange(1 << 62)}},
        {"report": _report(random)},
        {"schema": _value(random)},
    ]
    values.insert(random.randrange(len(values) + 1), {"v": SCHEMA_VERSION, **random.choice(some)})


def _report(random: Random) -> Value:
    def few(make: Callable[[], Any]) -> Value:
        return {str(_value(random)): make() for _ in range(random.randrange(3))}

    def count() -> Any:
        return random.choice((0, 1, 7, (1 << 63) - 1, _value(random)))

    def hook() -> Value:
        names = {key: str(_value(random)) for key in ("point", "func", "attach")}
        return {**names, **{key: count() for key in ("produced", "dropped", "delivered")}}

    def probe() -> Value:
        return {
            "hooks": [hook() for _ in range(random.randrange(3))],
            **{
                key: few(lambda: str(_value(random))) for key in ("missing", "silent", "interfaces")
            },
            "skipped": few(count),
            "untracked": count(),
        }

    return {
        "probes": few(probe),
        "duration_s": random.choice((1.0, _value(random))),
        "late": count(),
        "switched_off": few(lambda: str(_value(random))),
    }


_CHANGES: tuple[Callable[[list[Value], Random], None], ...] = (
    *(_replace, _replace, _replace, _replace_everywhere, _replace_everywhere),
    *(_rename, _add, _drop, _line, _line, _other),
)


def _encoded(value: Value, random: Random, *, packed: bool) -> bytes:
    if not packed:
        return json.dumps(value, ensure_ascii=random.random() < 0.5).encode() + b"\n"
    try:
        return bytes(msgpack.packb(value))
    except (OverflowError, ValueError):  # a number beyond 64 bits
        return bytes(msgpack.packb(json.loads(json.dumps(value), parse_int=_small)))


def _small(text: str) -> int:
    return int(text) % (1 << 64)


def _damaged(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    until = min(len(data), at + random.choice((1, 1, 4, 60, 1000)))
    return random.choice(
        (
            lambda: data[:at] + bytes([random.randrange(256)]) + data[until:],
            lambda: data[:at] + random.choice(BYTES) + data[at:],
            lambda: data[:at] + random.choice(BYTES) + data[until:],
            lambda: data[:at] + random.choice(BYTES) * 200 + data[at:],
            lambda: data[:at] + data[until:],
            lambda: data[:at],
            lambda: data[:at] + data[at:until] * 3 + data[until:],
        )
    )()
