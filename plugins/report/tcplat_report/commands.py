"""The commands' own words. What they need is imported when they are called: --help is quick."""

from __future__ import annotations

import click

_CAPTURE = "FILE|unix:PATH|tcp:HOST:PORT|-"
_QUIET = click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors.")


@click.command()
@click.argument("capture", metavar=_CAPTURE)
@click.option("-o", "--output", required=True, metavar="PATH", help="File to write; - for stdout.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["html", "perfetto"]),
    default="html",
    show_default=True,
    help="One page to look at, or a trace for ui.perfetto.dev.",
)
@click.option(
    "--slow",
    type=click.IntRange(1, 1000),
    default=50,
    show_default=True,
    help="So many of the slowest requests are shown one by one.",
)
@click.option(
    "--connections",
    type=click.IntRange(1, 20_000),
    default=2000,
    show_default=True,
    help="So many connections stand in the table: those with the slowest requests.",
)
@_QUIET
def report(
    capture: str, output: str, form: str, slow: int, connections: int, *, quiet: bool
) -> None:
    """A capture as one page, or as a trace.

    The page needs no network: latency over time, stages, the slowest requests, connections
    and their packets. Needs neither root nor a kernel.
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
    help="Exit 1 if it surely changed by more: queue.p99:+10%, total.p50:+2ms; unanswered:+0 "
    "if more requests had no reply; repeatable.",
)
@click.option(
    "--group-by",
    default="none",
    show_default=True,
    metavar="NAME[+NAME]",
    help="Compare process, remote or port, each by itself.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="A table, or one JSON object a line.",
)
@click.option("--seed", type=int, default=1, show_default=True, help="Of the random numbers.")
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
    """What changed from one capture to another, stage by stage, and how sure that is.

    Exit status 1 if a --fail-on is met; too little data never fails, and is said.
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
    """Captures of two hosts as one, by the clock of A's.

    How far the clocks are apart follows from the packets that both hosts saw, and the bound
    of it is told. Both files are read twice.
    """
    from .merge import join_captures  # noqa: PLC0415 - see the top

    join_captures(first, second, output, quiet=quiet)
