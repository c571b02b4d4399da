"""Name and options of the sink."""

from __future__ import annotations

from collections.abc import Iterator

from tcplat_core import Option, Options, Output, RunInfo, Sink, SinkSpec, choice, hookimpl, path

from .sink import Totals

tcplat_hookspec = "1.0"
"""Version of tcplat's plugin hooks that this plugin is made for."""

OPTIONS = (
    Option(name="by", help="field to group by", convert=choice("comm", "pid"), default="comm"),
    Option(name="path", help="file to write; standard output if not given", convert=path),
)


def make(options: Options, run: RunInfo) -> Sink:
    """Create the sink, before anything is attached."""
    return Totals(Output.open(options["path"], run.stopping), options["by"])


@hookimpl
def tcplat_register_sinks() -> Iterator[SinkSpec]:
    """Offer the sink."""
    yield SinkSpec(
        name="skeleton",
        summary="rows and bytes per process, at the end of the run",
        factory=make,
        options=OPTIONS,
    )
