"""The probes and sinks that the user chose, with their options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tcplat_core.errors import PluginError, ReaderGoneError, UsageError, blaming
from tcplat_core.plugin.options import parse_choice, read_options

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tcplat_core.plugin.aggregates import Aggregation
    from tcplat_core.plugin.output import Output
    from tcplat_core.plugin.specs import Chosen, ProbeSpec, RunInfo, Sink, SinkSpec
    from tcplat_core.registry.find import Plugins

    ChosenProbes = Sequence[Chosen[ProbeSpec]]
    ChosenSinks = Mapping[str, Chosen[SinkSpec]]


def chosen_probes(plugins: Plugins, texts: Sequence[str]) -> list[Chosen[ProbeSpec]]:
    """Return the probes, each with its options."""
    from tcplat_core.plugin.specs import Chosen  # noqa: PLC0415 - see __init__.py

    chosen: dict[str, Chosen[ProbeSpec]] = {}
    for text in texts:
        name, given = parse_choice(text)
        spec = plugins.probe(name)
        if name in chosen:
            raise UsageError(f"--probe {name} is given twice")
        chosen[name] = Chosen(spec, read_options(f"probe {name}", spec.options, given))
    return list(chosen.values())


def chosen_sinks(
    plugins: Plugins, texts: Sequence[str], *, live: bool
) -> dict[str, Chosen[SinkSpec]]:
    """Return the sinks by the text that the user gave, each with its options."""
    from tcplat_core.plugin.specs import Chosen  # noqa: PLC0415 - see __init__.py

    chosen: dict[str, Chosen[SinkSpec]] = {}
    for text in texts:
        name, given = parse_choice(text)
        spec = plugins.sink(name)
        if text in chosen:
            raise UsageError(f"--sink {text} is given twice")
        if spec.aggregate and not live:
            raise UsageError(
                f"--sink {name} counts in the kernel while a run lasts; "
                "--sink stages has percentiles of a capture"
            )
        chosen[text] = Chosen(spec, read_options(f"sink {name}", spec.options, given))
    return chosen


def made_sinks(chosen: ChosenSinks, run: RunInfo) -> tuple[dict[str, Sink], list[Output]]:
    """Return the sinks, made by their factories, and the files that open when they begin."""
    from tcplat_core.deliver.sinks import cancel  # noqa: PLC0415
    from tcplat_core.plugin.output import held_back  # noqa: PLC0415 - see __init__.py

    made: dict[str, Sink] = {}
    with held_back() as outputs:
        try:
            for text, one in chosen.items():
                made[text] = _made(one, run)
        except BaseException:
            cancel(made.values(), outputs)
            raise
    return made, outputs


def _made(chosen: Chosen[SinkSpec], run: RunInfo) -> Sink:
    from tcplat_core.deliver.sinks import ReaderGoneSink, as_sink  # noqa: PLC0415 - see __init__.py

    name = chosen.spec.name
    with blaming(f"sink {name}: its factory"):
        try:
            sink = chosen.spec.factory(chosen.options, run)
        except ReaderGoneError:
            return ReaderGoneSink()
        for method in ("write", "lost", "close"):
            if not callable(getattr(sink, method, None)):
                raise PluginError(
                    f"sink {name}: its factory returned no sink: "
                    f"{type(sink).__name__} has no {method}()"
                )
        return as_sink(sink)


def used_points(sinks: ChosenSinks) -> frozenset[str]:
    """Return the points whose rows some sink uses; empty for all."""
    taken = [one.spec.points for one in sinks.values() if one.spec.aggregate is None]
    return frozenset().union(*taken) if all(taken) else frozenset()


def aggregation_of(
    plugins: Plugins, sinks: ChosenSinks, probes: ChosenProbes
) -> Aggregation | None:
    """Return the histograms that the sinks use; None if none."""
    asked: list[tuple[str, Aggregation]] = []
    for one in sinks.values():
        if one.spec.aggregate is not None:
            with blaming(f"sink {one.spec.name}: aggregate()"):
                asked.append((one.spec.name, one.spec.aggregate(one.options)))
    if not asked:
        return None
    if len(asked) > 1:
        raise UsageError(
            f"one sink can have the kernel count, and {' and '.join(name for name, _ in asked)} "
            "both want it"
        )
    able = ", ".join(sorted(name for name, spec in plugins.probes.items() if spec.histograms))
    for probe in probes:
        if not probe.spec.histograms:
            raise UsageError(
                f"--sink {asked[0][0]}: probe {probe.spec.name} has no histograms "
                f"(of these: {able or 'none'}); give it a run of its own"
            )
    return asked[0][1]
