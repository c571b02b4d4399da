"""The sinks that show where the time goes."""

from __future__ import annotations

from collections.abc import Iterator

from tcplat_core import (
    Option,
    Options,
    Output,
    RunInfo,
    Sink,
    SinkSpec,
    choice,
    duration,
    hookimpl,
    integer,
    path,
)

_PIPE_WIDTH = 100
_GROUPINGS = ("process", "remote", "port")
_DEFAULT_GROUPS = ("process", "port")
POINTS = (
    *("connect", "state", "accept", "close", "stats"),
    *("send", "send_short", "recv", "ready"),
    *("nic_tx", "nic_rx", "rx_ip"),
)
"""Points whose rows are joined."""


def parse_groups(text: str) -> tuple[str, ...]:
    """``process+port``, or none.

    Raises:
        ValueError: There is no such grouping.
    """
    names = () if text == "none" else tuple(dict.fromkeys(text.split("+")))
    for name in names:
        if name not in _GROUPINGS:
            raise ValueError(f"{name!r} is none of {', '.join(_GROUPINGS)}, none")
    return names


def _at_least(text: str) -> object:
    from .waterfall import parse_at_least  # noqa: PLC0415 - only the sinks in use are imported

    return parse_at_least(text)


def _waterfall(options: Options, run: RunInfo) -> Sink:
    from .waterfall import Waterfall  # noqa: PLC0415 - only the sinks in use are imported

    output = Output.open(options["path"], run.stopping)
    return Waterfall(
        output,
        options["width"] or output.columns() or _PIPE_WIDTH,
        as_json=options["format"] == "json",
        slow=options["slow"],
        at_least=options["min_stage"],
    )


def _summary(options: Options, run: RunInfo) -> Sink:
    from .summary import Summary  # noqa: PLC0415 - only the sinks in use are imported

    return Summary(Output.open(options["path"], run.stopping), as_json=options["format"] == "json")


def _stages(options: Options, run: RunInfo) -> Sink:
    from .stages import Stages  # noqa: PLC0415 - only the sinks in use are imported

    return Stages(
        Output.open(options["path"], run.stopping),
        options["group_by"],
        round(options["every"] * 1e9),
        as_json=options["format"] == "json",
    )


_COMMON = (
    Option(name="path", help="file to write; standard output if not given", convert=path),
    Option(
        name="format",
        help="text, or json: one object a line",
        convert=choice("text", "json"),
        default="text",
    ),
)

_WATERFALL = (
    Option(
        name="slow",
        help="only this many of the slowest, at the end; 0: all",
        convert=integer(least=0),
        default=0,
    ),
    Option(
        name="min_stage",
        help="only where a stage, or total, took this long or longer: queue:1ms; join by +",
        convert=_at_least,
        metavar="STAGE:TIME",
    ),
    Option(
        name="width",
        help="columns to fit into; the terminal's if not given",
        convert=integer(least=0),
        default=0,
    ),
)


@hookimpl
def tcplat_register_sinks() -> Iterator[SinkSpec]:
    """Offer the sinks."""
    yield SinkSpec(
        name="waterfall",
        summary="each request and its reply, with the time of each stage",
        factory=_waterfall,
        points=POINTS,
        acks=False,
        options=(*_COMMON, *_WATERFALL),
    )
    yield SinkSpec(
        name="summary",
        summary="each connection, when it is over: handshake, bytes, RTT, retransmits, resets",
        factory=_summary,
        points=POINTS,
        acks=False,
        options=_COMMON,
    )
    yield SinkSpec(
        name="stages",
        summary="percentiles of each stage, by process, remote address or port",
        factory=_stages,
        points=POINTS,
        acks=False,
        options=(
            *_COMMON,
            Option(
                name="group_by",
                help="process, remote, port, joined by +; or none",
                convert=parse_groups,
                metavar="NAME+NAME|none",
                default=_DEFAULT_GROUPS,
            ),
            Option(
                name="every",
                help="report at this interval of the rows' time, as 10s; default: only at the end",
                convert=duration,
                default=0.0,
            ),
        ),
    )
