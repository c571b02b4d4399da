"""The probes and sinks that the user chose, with their options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tcplat_core.errors import PluginError, ReaderGoneError, UsageError, blaming
from tcplat_core.plugin.options import parse_choice, read_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tcplat_core.plugin.histogram import Aggregation
    from tcplat_core.plugin.output import Output
    from tcplat_core.plugin.specs import RunInfo, Sink
    from tcplat_core.registry.find import Plugins


def chosen_probes(plugins: Plugins, texts: Sequence[str]) -> list[tuple[Any, Any]]:
    """Return the probes, each with its options."""
    chosen: list[tuple[Any, Any]] = []
    for text in texts:
        name, given = parse_choice(text)
        spec = plugins.probe(name)
        if any(other.name == name for other, _ in chosen):
            raise UsageError(f"--probe {name} is given twice")
        chosen.append((spec, read_options(f"probe {name}", spec.options, given)))
    return chosen


def chosen_sinks(
    plugins: Plugins, texts: Sequence[str], run: RunInfo
) -> tuple[dict[str, Sink], list[Output]]:
    """Return the sinks by the user's text, and the files that open when they begin."""
    from tcplat_core.deliver.sinks import cancel  # noqa: PLC0415
    from tcplat_core.plugin.output import held_back  # noqa: PLC0415 - see __init__.py

    made: dict[str, Sink] = {}
    with held_back() as outputs:
        try:
            for text in texts:
                made[text] = _sink(plugins, text, run, made)
        except BaseException:
            cancel(made.values(), outputs)
            raise
    return made, outputs


def _sink(plugins: Plugins, text: str, run: RunInfo, others: Mapping[str, Sink]) -> Sink:
    from tcplat_core.deliver.sinks import ReaderGone, as_sink  # noqa: PLC0415 - see __init__.py

    name, given = parse_choice(text)
    spec = plugins.sink(name)
    if text in others:
        raise UsageError(f"--sink {text} is given twice")
    if spec.aggregate and not run.live:
        raise UsageError(
            f"--sink {name} counts in the kernel while a run lasts; "
            "--sink stages has percentiles of a capture"
        )
    options = read_options(f"sink {name}", spec.options, given)
    with blaming(f"sink {name}: its factory"):
        try:
            sink = spec.factory(options, run)
        except ReaderGoneError:
            return ReaderGone()
        for method in ("write", "lost", "close"):
            if not callable(getattr(sink, method, None)):
                raise PluginError(
                    f"sink {name}: its factory returned no sink: "
                    f"{type(sink).__name__} has no {method}()"
                )
        return as_sink(sink)


def chosen_aggregation(
    plugins: Plugins, texts: Sequence[str], probes: Sequence[tuple[Any, Any]]
) -> tuple[Aggregation | None, bool]:
    """Return what the sinks want counted in the kernel, and whether any of them takes rows."""
    asked: list[tuple[str, Aggregation]] = []
    events = False
    for text in texts:
        name, given = parse_choice(text)
        spec = plugins.sink(name)
        if spec.aggregate is None:
            events = True
            continue
        options = read_options(f"sink {name}", spec.options, given)
        with blaming(f"sink {name}: aggregate()"):
            asked.append((name, spec.aggregate(options)))
    if not asked:
        return None, events
    if len(asked) > 1:
        raise UsageError(
            f"one sink can have the kernel count, and {' and '.join(name for name, _ in asked)} "
            "both want it"
        )
    able = ", ".join(sorted(name for name, spec in plugins.probes.items() if spec.histograms))
    for spec, _ in probes:
        if not spec.histograms:
            raise UsageError(
                f"--sink {asked[0][0]}: probe {spec.name} has no histograms "
                f"(of these: {able or 'none'}); give it a run of its own"
            )
    return asked[0][1], events
