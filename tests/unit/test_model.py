"""What plugins declare, what a user chooses, and the report at the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tcplat_core.errors import PluginError, UsageError
from tcplat_core.plugin.hookpoints import HookPoint, Way, kentry, kprobe, kreturn, tracepoint
from tcplat_core.plugin.options import (
    Kind,
    Option,
    boolean,
    choice,
    duration,
    integer,
    parse_choice,
    ports,
    read_options,
    size,
)
from tcplat_core.plugin.report import HookReport, ProbeReport, RunReport
from tcplat_core.plugin.specs import ProbeSpec, SinkSpec
from tcplat_core.testing import RecordingSink

# --- name:key=value,...


@pytest.mark.parametrize(
    ("given", "name", "options"),
    [
        ("table", "table", {}),
        ("table:", "table", {}),
        ("jsonl:path=/srv/x:y", "jsonl", {"path": "/srv/x:y"}),
        ("xdp_port:iface=lo,port=9999", "xdp_port", {"iface": "lo", "port": "9999"}),
        ("xdp_port:iface=lo,,", "xdp_port", {"iface": "lo"}),
        ("jsonl:path=a=b", "jsonl", {"path": "a=b"}),
        ("jsonl:path=C:\\x", "jsonl", {"path": "C:\\x"}),
        ("jsonl:path=", "jsonl", {"path": ""}),
        ("", "", {}),
    ],
)
def test_choice_is_parsed_into_name_and_options(
    given: str, name: str, options: dict[str, str]
) -> None:
    assert parse_choice(given) == (name, options)


@pytest.mark.parametrize("given", ["table:width", "table:width=1,path", "table: "])
def test_option_without_a_value_is_an_error(given: str) -> None:
    with pytest.raises(UsageError, match="is not of the form key=value"):
        parse_choice(given)


def positive(given: str) -> int:
    value = int(given)
    if value <= 0:
        raise ValueError("it must be positive")
    return value


DECLARED = (
    Option(name="port", help="which", convert=positive, default=9999),
    Option(name="iface", help="where"),
)


def test_options_are_converted_and_defaults_filled_in() -> None:
    assert read_options("probe x", DECLARED, {}) == {"port": 9999, "iface": None}
    assert read_options("probe x", DECLARED, {"port": "1"}) == {"port": 1, "iface": None}
    assert read_options("probe x", DECLARED, {"iface": "lo"}) == {"port": 9999, "iface": "lo"}


def test_unknown_option_is_named_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="probe x has no option 'prot'; it has iface, port"):
        read_options("probe x", DECLARED, {"prot": "1"})
    with pytest.raises(UsageError, match="sink y has no option 'a'; it has no options"):
        read_options("sink y", (), {"a": "1"})


def test_invalid_option_value_is_refused_with_the_expected_form() -> None:
    with pytest.raises(UsageError, match="probe x: option port='0': it must be positive"):
        read_options("probe x", DECLARED, {"port": "0"})
    with pytest.raises(UsageError, match="option port='lo': invalid literal"):
        read_options("probe x", DECLARED, {"port": "lo"})


# --- names


def _sink(name: str) -> SinkSpec:
    return SinkSpec(name=name, summary="s", factory=lambda _options, _run: RecordingSink())


def _probe(name: str) -> ProbeSpec:
    return ProbeSpec(name=name, summary="s", source="", points=())


def _option(name: str) -> Option:
    return Option(name=name, help="h")


def _point(name: str) -> HookPoint:
    return HookPoint(name, ())


@pytest.mark.parametrize("make", [_sink, _probe, _option, _point])
@pytest.mark.parametrize("name", ["", "9lives", "a-b", "A", "a b", "a:b", "ä", "_x", "a\n"])
def test_name_that_is_not_an_identifier_is_refused(make: Callable[[str], Any], name: str) -> None:
    with pytest.raises(PluginError, match="must be lower-case letters, digits and underscores"):
        make(name)


@pytest.mark.parametrize("make", [_sink, _probe, _option, _point])
@pytest.mark.parametrize("name", ["a", "tcp_client", "x9"])
def test_plain_name_is_accepted(make: Callable[[str], Any], name: str) -> None:
    make(name)


def test_unknown_mechanism_is_refused() -> None:
    with pytest.raises(ValueError, match="mechanism"):
        Way("uprobe", ())


def test_way_helpers_build_ways() -> None:
    way = tracepoint("tcp:tcp_destroy_sock", "tp_close", "struct sock *")
    assert (way.mechanism, way.hooks[0].func, way.hooks[0].args) == (
        "tracepoint",
        "tcp:tcp_destroy_sock",
        ("struct sock *",),
    )
    way = kprobe(kentry("f", "kp_f", "sk", quiet=True), kreturn("f", "kr_f"))
    assert way.mechanism == "kprobe"
    assert [(hook.mechanism, hook.quiet) for hook in way.hooks] == [
        ("kprobe", True),
        ("kretprobe", False),
    ]


# --- the report


def test_report_totals_add_up() -> None:
    hooks = (
        HookReport("send", "tcp_sendmsg", "kprobe", produced=10, dropped=3, delivered=5),
        HookReport("recv", "tcp_recvmsg", "kprobe", produced=4, dropped=0, delivered=4),
    )
    one = ProbeReport(hooks=hooks, missing={"nic_rx": "no interface"}, untracked=7)
    two = ProbeReport(hooks=hooks[1:])
    report = RunReport(
        probes={"one": one, "two": two},
        duration_s=1.23456789,
        late=2,
        switched_off={"jsonl": "disk full"},
    )
    assert [hook.unread for hook in hooks] == [2, 0]
    assert (one.delivered, one.dropped) == (9, 3)
    assert (report.delivered, report.dropped) == (13, 3)
    read = json.loads(json.dumps(report.as_json()))
    assert read["delivered"] == 13
    assert read["dropped"] == 3
    assert read["late"] == 2
    assert read["duration_s"] == 1.234568
    assert read["switched_off"] == {"jsonl": "disk full"}
    assert list(read["probes"]) == ["one", "two"]
    assert read["probes"]["one"]["missing"] == {"nic_rx": "no interface"}
    assert read["probes"]["one"]["untracked"] == 7
    assert read["probes"]["one"]["hooks"][0] == {
        "point": "send",
        "func": "tcp_sendmsg",
        "attach": "kprobe",
        "produced": 10,
        "dropped": 3,
        "delivered": 5,
        "unread": 2,
    }


# --- kinds of options


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (integer(), "-5", -5),
        (integer(0, 10), "10", 10),
        (choice("in", "out"), "out", "out"),
        (ports(3), "443+80+443", (443, 80)),
        (ports(3), "all", ()),
        (boolean, "yes", True),
        (boolean, "0", False),
        (duration, "800ns", 8e-7),
        (duration, "500us", 0.0005),
        (duration, "2.5ms", 0.0025),
        (duration, "30", 30.0),
        (duration, "2m", 120.0),
        (duration, "0", 0.0),
        (size, "4096", 4096),
        (size, "64K", 65536),
        (size, "1G", 1 << 30),
    ],
)
def test_text_converts_to_a_value(kind: Kind, text: str, value: Any) -> None:
    got = kind(text)
    assert got == pytest.approx(value)
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("kind", "text", "wants"),
    [
        *((integer(1, 9), text, "a whole number from 1 to 9") for text in ("0", "10", "", "٣")),
        (integer(), "1.5", "it must be a whole number$"),
        (choice("in", "out"), "both", "it must be one of in, out"),
        *((ports(3), text, "is not a port; write 9999") for text in ("", "0", "65536", "80+", "٣")),
        (ports(3), "1+2+3+4", "4 ports given; at most 3, or all"),
        (boolean, "maybe", "it must be yes or no"),
        *((duration, text, "it is not a time; write") for text in ("", "5d", "-1s", "1e3", "s")),
        *((size, text, "it is not a size; write") for text in ("", "1T", "-1", "1.5K", "K")),
    ],
)
def test_invalid_text_is_refused_with_the_expected_form(kind: Kind, text: str, wants: str) -> None:
    with pytest.raises(ValueError, match=wants):
        kind(text)


def test_option_metavar_follows_its_converter() -> None:
    assert Option(name="a", help="h", convert=choice("x", "y")).metavar == "x|y"
    assert Option(name="a", help="h", convert=choice("x", "y")).choices == ("x", "y")
    assert Option(name="a", help="h", convert=integer()).metavar == "N"
    assert Option(name="a", help="h").metavar == "TEXT"
    assert Option(name="a", help="h", metavar="FILE").metavar == "FILE"


def test_missing_required_option_is_refused() -> None:
    options = (
        Option(name="iface", help="h", required=True, example="eth0"),
        Option(name="port", help="h", required=True, example="80"),
    )
    with pytest.raises(UsageError) as error:
        read_options("probe x", options, {"port": "443"})
    assert str(error.value) == "probe x needs iface=, as in x:iface=eth0,port=80"
    with pytest.raises(PluginError, match="option iface is required, and has no example"):
        Option(name="iface", help="h", required=True)
