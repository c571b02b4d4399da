"""The probes and sinks that the user chose."""

from __future__ import annotations

import pytest

from tcplat_core.cli.chosen import aggregation_of, chosen_probes, chosen_sinks, made_sinks
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
