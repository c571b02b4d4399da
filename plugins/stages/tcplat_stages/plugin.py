"""The sinks that tell where the time goes."""

from __future__ import annotations

import os
from collections.abc import Iterator

from tcplat_core import Option, Options, Output, RunInfo, Sink, SinkSpec, choice, hookimpl

_PIPE_WIDTH = 100
_GROUPINGS = ("process", "remote", "port")
_DEFAULT_GROUPS = ("process", "port")


def _number(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError("it must be 0 or more")
    return value


def _groups(text: str) -> tuple[str, ...]:
    """Several are joined by +."""
    names = () if text == "none" else tuple(dict.fromkeys(text.split("+")))
    for name in names:
        if name not in _GROUPINGS:
            raise ValueError(f"{name!r} is none of {', '.join(_GROUPINGS)}, none")
    return names


def _duration(text: str) -> int:
    from .text import parse_duration  # noqa: PLC0415 - only the sinks in use are imported

    return 0 if text == "0" else parse_duration(text)


def _at_least(text: str) -> object:
    from .waterfall import parse_at_least  # noqa: PLC0415 - only the sinks in use are imported

    return parse_at_least(text)


def _columns(fd: int) -> int:
    """COLUMNS, or the terminal's; 100 into a pipe or a file."""
    if os.environ.get("COLUMNS", "").isdigit():
        return int(os.environ["COLUMNS"]) or _PIPE_WIDTH
    try:
        return os.get_terminal_size(fd).columns or _PIPE_WIDTH
    except OSError:
        return _PIPE_WIDTH


def _waterfall(options: Options, run: RunInfo) -> Sink:
    from .waterfall import Waterfall  # noqa: PLC0415 - only the sinks in use are imported

    output = Output.open(options["path"], run.stopping)
    return Waterfall(
        output,
        options["width"] or _columns(output.fd),
        as_json=options["format"] == "json",
        slow=options["slow"],
        at_least=options["min_stage"],
    )


def _summary(options: Options, run: RunInfo) -> Sink:
    from .summary import Summary  # noqa: PLC0415 - only the sinks in use are imported

    return Summary(Output.open(options["path"], run.stopping), as_json=options["format"] == "json")


def _stages(options: Options, run: RunInfo) -> Sink:
    from .percentiles import Stages  # noqa: PLC0415 - only the sinks in use are imported

    return Stages(
        Output.open(options["path"], run.stopping),
        options["group_by"],
        options["every"],
        as_json=options["format"] == "json",
    )


_COMMON = (
    Option(name="path", help="file to write; standard output if not given"),
    Option(
        name="format",
        help="text, or json: one object a line",
        convert=choice("text", "json"),
        default="text",
    ),
)


@hookimpl
def tcplat_register_sinks() -> Iterator[SinkSpec]:
    """Offer the sinks."""
    yield SinkSpec(
        name="waterfall",
        summary="each request and its reply: where the time went, stage after stage",
        factory=_waterfall,
        options=(
            *_COMMON,
            Option(
                name="slow",
                help="only so many of the slowest, at the end; 0 for all",
                convert=_number,
                default=0,
            ),
            Option(
                name="min_stage",
                help="only where a stage, or total, took so long: queue:1ms; several joined by +",
                convert=_at_least,
            ),
            Option(
                name="width",
                help="columns to fit into; the terminal's if not given",
                convert=_number,
                default=0,
            ),
        ),
    )
    yield SinkSpec(
        name="summary",
        summary="each connection, when it is over: handshake, bytes, RTT, retransmits, resets",
        factory=_summary,
        options=_COMMON,
    )
    yield SinkSpec(
        name="stages",
        summary="percentiles of each stage, by process, remote address or port",
        factory=_stages,
        options=(
            *_COMMON,
            Option(
                name="group_by",
                help="process, remote, port, joined by +; or none",
                convert=_groups,
                default=_DEFAULT_GROUPS,
            ),
            Option(
                name="every",
                help="also so often, by the rows' time: 10s; else at the end alone",
                convert=_duration,
                default=0,
            ),
        ),
    )
