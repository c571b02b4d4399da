"""The sinks that come with tcplat."""

from __future__ import annotations

import os
from collections.abc import Iterator

from tcplat_core import (
    Option,
    Options,
    Output,
    RunInfo,
    Sink,
    SinkSpec,
    boolean,
    hookimpl,
    integer,
    size,
)

_PATH = Option(name="path", help="file to write; standard output if not given", metavar="FILE")


def _size(text: str) -> int:
    value = int(size(text))
    if value < 1 << 16:
        raise ValueError("it must be 64K or more")
    return value


def _address(text: str) -> tuple[str, int]:
    """``HOST:PORT``; without a host this one."""
    host, colon, port = text.rpartition(":")
    if not (colon and port.isdecimal() and int(port) < 1 << 16):
        raise ValueError("write HOST:PORT, 127.0.0.1:4711 or [::1]:4711")
    return host.strip("[]") or "127.0.0.1", int(port)


def _msgpack(options: Options, run: RunInfo) -> Sink:
    from .msgpack import Msgpack  # noqa: PLC0415 - only the sinks in use are imported

    return Msgpack.open(options, run)


def _jsonl(options: Options, run: RunInfo) -> Sink:
    from .jsonl import Jsonl  # noqa: PLC0415 - only the sinks in use are imported

    return Jsonl(Output.open(options["path"], run.stopping))


def _table(options: Options, run: RunInfo) -> Sink:
    from .table import Table  # noqa: PLC0415 - only the sinks in use are imported

    output = Output.open(options["path"], run.stopping)
    limit = options["width"]
    if limit is None:
        limit = _terminal_width(output.fd)
    return Table(output, limit)


def _terminal_width(fd: int) -> int:
    """COLUMNS, or the terminal's; 0 into a pipe or a file, where nothing is cut."""
    if os.environ.get("COLUMNS", "").isdigit():
        return int(os.environ["COLUMNS"])
    try:
        return os.get_terminal_size(fd).columns
    except OSError:
        return 0


@hookimpl
def tcplat_register_sinks() -> Iterator[SinkSpec]:
    """Offer the sinks."""
    yield SinkSpec(
        name="jsonl",
        summary="one JSON object per line, and the books at the end",
        factory=_jsonl,
        options=(_PATH,),
    )
    yield SinkSpec(
        name="table",
        summary="aligned columns to read",
        factory=_table,
        options=(
            _PATH,
            Option(
                name="width",
                help="columns to fit into, 0 for no limit; the terminal's if not given",
                convert=integer(least=0),
            ),
        ),
    )
    yield SinkSpec(
        name="msgpack",
        summary="msgpack maps to whoever reads a socket",
        factory=_msgpack,
        options=(
            Option(
                name="unix",
                help="path of the socket, which its owner alone may use",
                metavar="PATH",
            ),
            Option(
                name="tcp", help="HOST:PORT instead of it", convert=_address, metavar="HOST:PORT"
            ),
            Option(
                name="connect",
                help="go to a reader that listens there, instead of letting readers come",
                convert=boolean,
                default=False,
            ),
            Option(
                name="buffer",
                help="bytes that may wait for one reader; what is more, he misses",
                convert=_size,
                metavar=size.metavar,
                default=8 << 20,
            ),
            Option(
                name="wait",
                help="so many readers must have come before the run begins",
                convert=integer(least=0),
                default=0,
            ),
            Option(
                name="public",
                help="tcp= may be an address that other hosts reach",
                convert=boolean,
                default=False,
            ),
        ),
    )
