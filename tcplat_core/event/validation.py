"""Checks the event class that a probe declares."""

from __future__ import annotations

import inspect
import keyword
import re
import typing
from typing import Any

from tcplat_core.errors import PluginError

from .fields import JSON_TYPES, Event, Wire, parts_of, sources
from .record import Record, has_bits

LARGEST_RECORD = 1024
"""Bytes: what BPF can fill with zeros in one go. The smallest ring has room for three."""

_RESERVED = frozenset(
    {
        # C11, and what the headers define besides.
        *("auto", "break", "case", "char", "const", "continue", "default", "do", "double"),
        *("else", "enum", "extern", "float", "for", "goto", "if", "inline", "int", "long"),
        *("register", "restrict", "return", "short", "signed", "sizeof", "static", "struct"),
        *("switch", "typedef", "union", "unsigned", "void", "volatile", "while", "bool"),
        *("true", "false", "asm", "typeof", "linux", "unix", "current", "size_t"),
        *("u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64"),
        *keyword.kwlist,
        "offset_ns",  # what the decoder works with
    }
)
"""No name for a member of a record."""


def checked_event(_: object, __: object, event: type[Event]) -> None:
    """Validate a probe's event class: its fields become C, Python, JSON and a column.

    Raises:
        PluginError: The sentence names the field, and what is wrong with it.
    """
    if not (isinstance(event, type) and issubclass(event, Event)):
        raise PluginError(f"event={event!r} is not a subclass of tcplat_core.Event")
    again = [
        field
        for cls in event.__mro__[: event.__mro__.index(Event)]
        for field in inspect.get_annotations(cls)
        if field in Event.__struct_fields__
    ]
    if again:
        raise PluginError(f"{event.__name__}.{again[0]} is already a field of every event")
    hints = typing.get_type_hints(event)
    taken = {member for member, _ in Record(Event).members}
    for field, source in sources(event):
        if field in Event.__struct_fields__:
            continue
        what = f"{event.__name__}.{field}"
        if source is None:
            raise PluginError(
                f'{what} is not declared as {field}: Annotated[int, Wire("u32", "what it is")]'
            )
        kinds = parts_of(hints[field])
        if not set(kinds) <= JSON_TYPES.keys():
            raise PluginError(f"{what}: a field is int, float, str or bool, or that or None")
        if isinstance(source, Wire):
            _check_wire(what, field, source, kinds, taken)
    if len(has_bits(event)) > 8:  # noqa: PLR2004 - it is a u8
        raise PluginError(f"{event.__name__} has more than five fields with has=True")
    size = Record(event).size
    if size > LARGEST_RECORD:
        raise PluginError(
            f"a record of {event.__name__} has {size} bytes; {LARGEST_RECORD} is the maximum"
        )


def _check_wire(
    what: str, field: str, source: Wire, kinds: tuple[Any, ...], taken: set[str]
) -> None:
    member = source.member or field
    for word in (field, member):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", word):
            raise PluginError(f"{what}: {word!r} must be lower-case letters, digits, underscores")
    if member in _RESERVED:
        raise PluginError(f"{what}: {member!r} is a reserved word; give it another member=")
    if member in taken or member == "event_pad":
        raise PluginError(f"{what}: the record already has a member {member!r}")
    taken.add(member)
    if (source.nullable or source.has) and type(None) not in kinds:
        raise PluginError(f"{what} can be unknown: declare it as ... | None")
    if source.latency and not field.endswith("_us"):
        raise PluginError(f"{what}: a latency is in µs, and its name ends in _us")
    if source.c_type.startswith("u8[") and source.to is None:
        raise PluginError(f"{what}: the bytes of {source.c_type} want to=, as in to=address")
