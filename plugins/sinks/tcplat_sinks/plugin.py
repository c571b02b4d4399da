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
    hookimpl,
    integer,
)

_PATH = Option(name="path", help="file to write; standard output if not given", metavar="FILE")


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
