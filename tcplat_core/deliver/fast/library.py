"""Bindings to records.c and lines.c."""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import (
    POINTER,
    Structure,
    c_char,
    c_char_p,
    c_int,
    c_int64,
    c_uint8,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("librecords.so")
"""Built by hatch_build.py at installation, if there is a C compiler."""

TEXT, CHOICE, INTEGER, SIGNED, INSTANT, MICROS, ABSENT = range(7)
"""`enum kind`."""
DONE, FULL, UNKNOWN, CANNOT = range(4)
"""`enum status`."""
IDS = 5
"""Ids of a block: as in records.c."""
WRONG_SIZE = -1
"""A record of another size."""


class Op(Structure):
    """`struct op`."""

    _fields_ = (
        ("kind", c_uint8),
        ("width", c_uint8),
        ("nullable", c_uint8),
        ("has", c_uint8),
        ("at", c_uint32),
        ("block", c_uint32),
        ("text", c_uint32),
        ("other", c_uint32),
    )


class Popped(Structure):
    """`struct popped`."""

    _fields_ = (
        ("count", c_uint64),
        ("bytes", c_uint64),
        ("first_ns", c_uint64),
        ("last_ns", c_uint64),
        ("records", c_void_p),
        ("sources", c_void_p),
    )


class Progress(Structure):
    """`struct progress`."""

    _fields_ = (
        ("next", c_uint64),
        ("at", c_uint64),
        ("written", c_uint64),
        ("block", c_uint32),
    )


class Part(Structure):
    """`struct part` of lines.c."""

    _fields_ = (
        ("kind", c_uint8),
        ("to", c_uint8),
        ("length", c_uint8),
        ("skip", c_uint8),
        ("literal", c_char * 252),
    )


class Form(Structure):
    """`struct form` of lines.c."""

    _fields_ = (("count", c_uint32), ("parts", c_void_p))


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "buffer_new": (c_void_p,),
    "buffer_free": (None, c_void_p),
    "ring_map": (c_void_p, c_int, c_uint64, c_uint32, c_uint32, c_uint32, c_uint32),
    "ring_unmap": (None, c_void_p),
    "ring_taken": (c_void_p, c_void_p),
    "buffer_take": (c_int64, c_void_p, c_void_p, c_uint32),
    "buffer_oldest_ns": (c_uint64, c_void_p),
    "buffer_pop": (c_int, c_void_p, c_uint64, c_void_p, POINTER(Popped)),
    "codec_new": (
        *(c_void_p, c_uint32, c_uint32, c_uint32, c_void_p),
        *(c_uint32, c_uint32, c_void_p),
    ),
    "codec_forget": (None, c_void_p),
    "codec_learn": (c_int, c_void_p, c_uint32, c_char_p, c_char_p, c_void_p, c_void_p),
    "codec_free": (None, c_void_p),
    "lines": (
        *(c_int, c_void_p, c_char_p, c_char_p, c_uint64, c_int64),
        *(c_void_p, c_uint64, POINTER(Progress)),
    ),
    "slim_rows": (
        *(c_int, c_void_p, c_char_p, c_char_p, c_uint64, c_int64),
        *(c_void_p, POINTER(Progress)),
    ),
    "reader_new": (c_void_p,),
    "reader_free": (None, c_void_p),
    "reader_forget": (None, c_void_p),
    "reader_count": (c_uint32, c_void_p),
    "reader_text": (c_void_p, c_void_p, c_uint32, POINTER(c_uint32)),
    "read_lines": (
        *(c_int64, c_void_p, c_void_p, c_uint32, c_char_p, c_uint64),
        *(c_void_p, c_uint32, c_uint64, POINTER(c_uint32)),
    ),
}
"""Function -> its result type and argument types."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the functions of both; None if it was not built, or TCPLAT_PURE is set."""
    if os.environ.get("TCPLAT_PURE") or not FILE.exists():
        return None
    loaded = ctypes.CDLL(str(FILE))
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype = result
        function.argtypes = arguments
    return loaded
