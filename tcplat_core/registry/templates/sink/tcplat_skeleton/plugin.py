"""What the sink is called, and what a user may set."""

from __future__ import annotations

from collections.abc import Iterator

from tcplat_core import Option, Options, Output, RunInfo, Sink, SinkSpec, choice, hookimpl, path

from .sink import Totals

tcplat_hookspec = "1.0"
"""The version of tcplat's plugin hooks that this is made for."""

OPTIONS = (
    Option(name="by", help="what to count by", convert=choice("comm", "pid"), default="comm"),
    Option(name="path", help="file to write; standard output if not given", convert=path),
)


def make(options: Options, run: RunInfo) -> Sink:
    """Open the sink; called before anything is attached."""
    return Totals(Output.open(options["path"], run.stopping), options["by"])


@hookimpl
def tcplat_register_sinks() -> Iterator[SinkSpec]:
    """Offer the sink."""
    yield SinkSpec(
        name="skeleton",
        summary="rows and bytes by process, counted until the end",
        factory=make,
        options=OPTIONS,
    )
