"""The probes and sinks that the user chose."""

from __future__ import annotations

from typing import Any

import pytest

from tcplat_core.cli.chosen import (
    aggregation_of,
    chosen_probes,
    chosen_sinks,
    made_sinks,
    used_points,
)
from tcplat_core.errors import UsageError
from tcplat_core.plugin.aggregates import Aggregation, Histogram
from tcplat_core.plugin.hookpoints import HookPoint, tracepoint
from tcplat_core.plugin.options import Option
from tcplat_core.plugin.specs import ProbeSpec, RunInfo, SinkSpec
from tcplat_core.registry.find import Plugins
from tcplat_core.testing import RecordingSink

PROBE = ProbeSpec(
    name="one",
    summary="s",
    source="",
    points=(HookPoint("send", (tracepoint("tcp:tcp_sendmsg_locked", "tp_send"),)),),
    histograms=(Histogram("sent", "time of a send", ("send",)),),
)


def test_sink_options_are_converted_once() -> None:
    converted: list[str] = []

    def convert(text: str) -> int:
        converted.append(text)
        return int(text)

    spec = SinkSpec(
        name="counts",
        summary="s",
        factory=lambda _options, _run: RecordingSink(),
        aggregate=lambda options: Aggregation("process", options["groups"], 1),
        options=(Option(name="groups", help="h", convert=convert),),
    )
    plugins = Plugins(probes={"one": PROBE}, sinks={"counts": spec})
    probes = chosen_probes(plugins, ["one"])
    sinks = chosen_sinks(plugins, ["counts:groups=7"], live=True)
    aggregation = aggregation_of(plugins, sinks, probes)
    made, outputs = made_sinks(sinks, RunInfo(("one",)))
    assert aggregation
    assert aggregation.groups == 7
    assert made.keys() == {"counts:groups=7"}
    assert outputs == []
    assert converted == ["7"]


def test_wrong_option_is_refused_before_any_sink_is_created() -> None:
    made: list[str] = []

    def factory(_options: object, _run: object) -> RecordingSink:
        made.append("it")
        return RecordingSink()

    option = Option(name="n", help="h", convert=int)
    spec = SinkSpec(name="it", summary="s", factory=factory, options=(option,))
    with pytest.raises(UsageError, match="option n='x'"):
        chosen_sinks(Plugins(sinks={"it": spec}), ["it", "it:n=x"], live=True)
    assert made == []


@pytest.mark.parametrize(
    ("sinks", "points"),
    [
        (["some"], {"send", "recv"}),
        (["some", "other"], {"send", "recv", "close"}),
        (["some", "all"], set()),
        (["some", "counts"], {"send", "recv"}),
        (["counts"], set()),
    ],
)
def test_points_are_used_if_any_sink_uses_their_rows(sinks: list[str], points: set[str]) -> None:
    def spec(name: str, **more: Any) -> SinkSpec:
        return SinkSpec(
            name=name, summary="s", factory=lambda _options, _run: RecordingSink(), **more
        )

    known = (
        spec("some", points=("send", "recv")),
        spec("other", points=("close",)),
        spec("all"),
        spec("counts", aggregate=lambda _: Aggregation("process", 1, 1)),
    )
    plugins = Plugins(probes={}, sinks={one.name: one for one in known})
    assert used_points(chosen_sinks(plugins, sinks, live=True)) == points
