"""The sinks that come with tcplat."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator

from tcplat_core import (
    Aggregation,
    Option,
    Options,
    Output,
    RunInfo,
    Sink,
    SinkSpec,
    hookimpl,
)

_PATH = Option(name="path", help="file to write; standard output if not given")


def _width(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError("it must be 0 (no limit) or a number of columns")
    return value


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


_GROUPINGS = ("process", "remote", "port", "all")
_MOST_GROUPS = 4096
_LEAST_S = 0.1


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h)?", text)
    value = 0.0
    if found:
        value = float(found[1]) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[found[2] or "s"]
    if text != "0" and value < _LEAST_S:
        raise ValueError("it must be a time of 100ms or more, or 0 for the end alone")
    return value


def _one_of(*words: str) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in words:
            raise ValueError(f"it must be one of {', '.join(words)}")
        return text

    return convert


def _groups(text: str) -> int:
    value = int(text)
    if not 1 <= value <= _MOST_GROUPS:
        raise ValueError(f"it must be a number from 1 to {_MOST_GROUPS}")
    return value


def _histogram(options: Options, run: RunInfo) -> Sink:
    from .histogram import Histograms  # noqa: PLC0415 - only the sinks in use are imported

    output = Output.open(options["path"], run.stopping)
    return Histograms(output, options["format"] == "json", options["every"])


def _aggregation(options: Options) -> Aggregation:
    return Aggregation(options["by"], options["groups"], options["every"] or math.inf)


@hookimpl
def tcplat_register_sinks() -> Iterator[SinkSpec]:
    """Offer the sinks."""
    yield SinkSpec(
        name="histogram",
        summary="percentiles and bars of durations that the kernel counts: for what is too fast",
        factory=_histogram,
        aggregate=_aggregation,
        options=(
            _PATH,
            Option(
                name="every",
                help="interval between two looks, 0 for the end of the run alone",
                convert=_seconds,
                default=1.0,
            ),
            Option(
                name="by",
                help="whose durations are counted together: process, remote, port, all",
                convert=_one_of(*_GROUPINGS),
                default="process",
            ),
            Option(
                name="groups",
                help="how many of them are told apart; the others are counted as others",
                convert=_groups,
                default=256,
            ),
            Option(
                name="format",
                help="text, or json: one object per histogram and group",
                convert=_one_of("text", "json"),
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
        summary="aligned columns to read",
        factory=_table,
        options=(
            _PATH,
            Option(
                name="width",
                help="columns to fit into, 0 for no limit; the terminal's if not given",
                convert=_width,
            ),
        ),
    )
