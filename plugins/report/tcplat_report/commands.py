"""The commands. What they need is imported when they are called, so that --help is quick."""

from __future__ import annotations

import click

_CAPTURE = "FILE|unix:PATH|tcp:HOST:PORT|-"
_QUIET = click.option("-q", "--quiet", is_flag=True, help="Print only errors on stderr.")


@click.command()
@click.argument("capture", metavar=_CAPTURE)
@click.option("-o", "--output", required=True, metavar="PATH", help="File to write; - for stdout.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["html", "perfetto"]),
    default="html",
    show_default=True,
    help="One HTML page, or a trace for ui.perfetto.dev.",
)
@click.option(
    "--slow",
    type=click.IntRange(1, 1000),
    default=50,
    show_default=True,
    help="How many of the slowest requests to show one by one.",
)
@click.option(
    "--connections",
    type=click.IntRange(1, 20_000),
    default=2000,
    show_default=True,
    help="How many connections to list: those with the slowest requests.",
)
@_QUIET
def report(
    capture: str, output: str, form: str, slow: int, connections: int, *, quiet: bool
) -> None:
    """Make one HTML page, or a trace, of a capture.

    The page shows latency over time, stages, the slowest requests, connections and their
    packets, and works offline. Needs no root and no BPF.
    """
    from .report import write_report  # noqa: PLC0415 - see the top

    write_report(capture, output, form, slow=slow, most_connections=connections, quiet=quiet)


@click.command()
@click.argument("base", metavar="BASE")
@click.argument("new", metavar="NEW")
@click.option(
    "--fail-on",
    "conditions",
    multiple=True,
    metavar="STAGE.PCT:LIMIT",
    help="Exit with status 1 if the whole confidence interval of a change is beyond LIMIT: "
    "queue.p99:+10%, total.p50:+2ms, or unanswered:+0 (more requests without a reply); repeatable.",
)
@click.option(
    "--group-by",
    default="none",
    show_default=True,
    metavar="NAME[+NAME]",
    help="Compare each process, remote address or port by itself.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="A table, or one JSON object per line.",
)
@click.option(
    "--seed",
    type=int,
    default=1,
    show_default=True,
    help="Random seed: the same seed gives the same intervals.",
)
@_QUIET
def diff(
    base: str,
    new: str,
    conditions: tuple[str, ...],
    group_by: str,
    form: str,
    seed: int,
    *,
    quiet: bool,
) -> None:
    """Compare two captures, stage by stage.

    Each change has a 99 % confidence interval; * marks those that do not contain 0. Exits
    with status 1 if a --fail-on limit is exceeded. Too little data is reported, and passes.
    """
    from .diff import compare  # noqa: PLC0415 - see the top

    compare(base, new, conditions, group_by, as_json=form == "json", seed=seed, quiet=quiet)


@click.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option(
    "-o", "--output", default="-", metavar="PATH", help="File to write.  [default: stdout]"
)
@_QUIET
def merge(first: str, second: str, output: str, *, quiet: bool) -> None:
    """Join the captures of two hosts, by the clock of A.

    All times are converted to the clock of A. The offset of the clocks follows from packets
    that both hosts saw; its largest error is printed. A and B are files: they are read twice.
    """
    from .merge import join_captures  # noqa: PLC0415 - see the top

    join_captures(first, second, output, quiet=quiet)
