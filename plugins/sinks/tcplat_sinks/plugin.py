"""The sinks that come with tcplat."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from tcplat_core import (
    Aggregation,
    Option,
    Options,
    Output,
    RunInfo,
    Sink,
    SinkSpec,
    boolean,
    choice,
    duration,
    hookimpl,
    integer,
    path,
    size,
)

_PATH = Option(name="path", help="file to write; standard output if not given", convert=path)


def _size(text: str) -> int:
    value = int(size(text))
    if value < 1 << 16:
        raise ValueError("it must be 64K or more")
    return value


def _address(text: str) -> tuple[str, int]:
    """``HOST:PORT``; without a host this one."""
    host, colon, port = text.rpartition(":")
    # Five digits: int() raises at 4,300.
    if not (colon and re.fullmatch("[0-9]{1,5}", port) and int(port) < 1 << 16):
        raise ValueError("write HOST:PORT, 127.0.0.1:4711 or [::1]:4711")
    return host.strip("[]") or "127.0.0.1", int(port)


def _msgpack(options: Options, run: RunInfo) -> Sink:
    from .msgpack_socket import Msgpack  # noqa: PLC0415 - only the sinks in use are imported

    return Msgpack.open(options, run)


def _jsonl(options: Options, run: RunInfo) -> Sink:
    from .jsonl import Jsonl  # noqa: PLC0415 - only the sinks in use are imported

    return Jsonl(Output.open(options["path"], run.stopping, alone=True))


def _table(options: Options, run: RunInfo) -> Sink:
    from .table import Table  # noqa: PLC0415 - only the sinks in use are imported

    output = Output.open(options["path"], run.stopping)
    limit = options["width"]
    if limit is None:
        limit = output.columns()  # into a pipe or a file nothing is cut
    return Table(output, limit)


_LEAST_S = 0.1


def _every(text: str) -> float:
    value = 0.0 if text == "0" else float(duration(text))
    if text != "0" and value < _LEAST_S:
        raise ValueError("it must be a time of 100ms or more, or 0 for the end alone")
    return value


def _histogram(options: Options, run: RunInfo) -> Sink:
    from .histogram import Histograms  # noqa: PLC0415 - only the sinks in use are imported

    output = Output.open(options["path"], run.stopping)
    return Histograms(output, options["format"] == "json", options["every"])


def _aggregation(options: Options) -> Aggregation:
    return Aggregation(options["by"], options["groups"], options["every"] or math.inf)


@hookimpl
def tcplat_register_sinks() -> Iterator[SinkSpec]:  # long: a list of declarations
    """Offer the sinks."""
    yield SinkSpec(
        name="histogram",
        summary="histograms of durations, counted in the kernel",
        factory=_histogram,
        aggregate=_aggregation,
        options=(
            _PATH,
            Option(
                name="every",
                help="print at this interval; 0: only at the end",
                convert=_every,
                metavar=duration.metavar,
                default=1.0,
            ),
            Option(
                name="by",
                help="group durations by process, remote, port, or all together",
                convert=choice("process", "remote", "port", "all"),
                default="process",
            ),
            Option(
                name="groups",
                help="groups to count separately; the rest is counted as others",
                convert=integer(least=1, most=4096),
                default=256,
            ),
            Option(
                name="format",
                help="text, or json: one object per histogram and group",
                convert=choice("text", "json"),
                default="text",
            ),
        ),
    )
    yield SinkSpec(
        name="jsonl",
        summary="one JSON object per line, and the books at the end",
        factory=_jsonl,
        options=(_PATH,),
    )
    yield SinkSpec(
        name="table",
        summary="aligned columns",
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
        summary="msgpack maps to the readers of a socket",
        factory=_msgpack,
        options=(
            Option(
                name="unix",
                help="path of the socket, readable by its owner only",
                convert=path,
                metavar="PATH",
                example="/run/user/1000/tcplat.sock",
            ),
            Option(
                name="tcp",
                help="HOST:PORT, instead of unix=",
                convert=_address,
                metavar="HOST:PORT",
            ),
            Option(
                name="connect",
                help="connect to a reader that listens there, instead of listening",
                convert=boolean,
                default=False,
            ),
            Option(
                name="buffer",
                help="bytes to buffer for each reader; it skips rows beyond that",
                convert=_size,
                metavar=size.metavar,
                default=8 << 20,
            ),
            Option(
                name="wait",
                help="number of readers to wait for before the run begins",
                convert=integer(least=0),
                default=0,
            ),
            Option(
                name="public",
                help="allow a tcp= address that other hosts can reach",
                convert=boolean,
                default=False,
            ),
        ),
    )
