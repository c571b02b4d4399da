"""What every built-in probe must satisfy on any kernel."""

from __future__ import annotations

import errno
import itertools
import re
from collections.abc import Iterator
from importlib.resources import files

import pytest

from tcplat_core.event.fields import Moment, fields
from tcplat_core.event.text import TCP_STATES
from tcplat_core.loader.program_text import program_text, with_headers
from tcplat_core.plugin.hookpoints import (
    MECHANISMS,
    Hook,
    HookPoint,
    kentry,
    kprobe,
    programs_of,
    reporting,
    tracepoint,
)
from tcplat_core.plugin.options import read_options
from tcplat_core.plugin.specs import ProbeSpec
from tcplat_core.registry.find import Plugins
from tcplat_core.run.probe_run import probe_request

PLUGINS = Plugins.load()
OURS = [
    PLUGINS.probe(found.name)
    for found in PLUGINS.found
    if found.kind == "probe" and found.distribution == "tcplat"
]

GIVEN = {"xdp_port": {"iface": "lo", "port": "9999"}}
"""Options that a probe cannot do without."""

every_probe = pytest.mark.parametrize("spec", OURS, ids=lambda spec: spec.name)


def hooks(spec: ProbeSpec) -> Iterator[Hook]:
    for point in spec.points:
        for way in point.ways:
            yield from way.hooks


def test_probes_are_found() -> None:
    assert "tcp_client" in {spec.name for spec in OURS}


@every_probe
def test_probes_add_no_table_column_of_their_own(spec: ProbeSpec) -> None:
    """A field in every row of a packet would widen all other rows, and show their head again."""
    own = [field.name for field in fields(spec.event) if field.own and field.column]
    assert bool(own) == (spec.name == "tcp_stats"), own


@every_probe
def test_every_program_is_a_function_in_its_c(spec: ProbeSpec) -> None:
    text = with_headers(spec.source)
    functions = set(re.findall(r"^(?:static )?int (\w+)\(", text, re.MULTILINE))
    assert {hook.program for hook in hooks(spec)} <= functions


@every_probe
def test_every_hook_number_in_c_is_of_a_reporting_hook(spec: ProbeSpec) -> None:
    used = set(re.findall(r"\bHOOK_(\w+)", with_headers(spec.source)))
    known = {hook.program for _, hook in reporting(spec.points)}
    assert used <= known
    # A reporting hook has its number in its records.
    assert known <= used


@every_probe
def test_every_histogram_is_counted_and_its_points_exist(
    spec: ProbeSpec,
) -> None:
    names = [histogram.name for histogram in spec.histograms]
    assert len(set(names)) == len(names)
    assert set(re.findall(r"\bHIST_(\w+)", spec.source)) == set(names)
    points = {point.point for point in spec.points}
    for histogram in spec.histograms:
        assert set(histogram.points) <= points
        assert histogram.help


@every_probe
def test_each_program_serves_one_function(spec: ProbeSpec) -> None:
    """Its number in a record names the function and the mechanism."""
    seen: dict[str, tuple[str, str]] = {}
    for hook in hooks(spec):
        assert seen.setdefault(hook.program, (hook.func, hook.mechanism)) == (
            hook.func,
            hook.mechanism,
        )


@every_probe
def test_also_hook_is_at_the_function_of_its_program(spec: ProbeSpec) -> None:
    places = {hook.program: (hook.func, hook.mechanism) for hook in hooks(spec)}
    for point in spec.points:
        for hook in point.also:
            assert places[hook.by] == (hook.func, hook.mechanism)
            assert hook.program not in places


def test_also_hook_is_there_with_its_point_and_its_program() -> None:
    called, traced, begun = (
        kprobe(kentry("f", "kp_f")),
        tracepoint("a:b", "tp_b"),
        tracepoint("a:c", "tp_c"),
    )
    points = (
        HookPoint("use", (called, traced)),
        HookPoint(
            "begin",
            (begun,),
            also=(
                Hook("f", "began_kp_f", "kprobe", by="kp_f"),
                Hook("a:b", "began_tp_b", "tracepoint", by="tp_b"),
            ),
        ),
    )
    assert programs_of(points, {"use": called, "begin": begun}) == ("kp_f", "tp_c", "began_kp_f")
    assert programs_of(points, {"use": traced, "begin": begun}) == ("tp_b", "tp_c", "began_tp_b")
    assert programs_of(points, {"use": traced}) == ("tp_b",)
    assert programs_of(points, {"begin": begun}) == ("tp_c",)


@every_probe
def test_hooks_attached_together_differ_in_point_or_func(spec: ProbeSpec) -> None:
    """Rows are counted by point and func: hooks attached together may not share both."""
    for point in spec.points:
        for way in point.ways:
            funcs = [hook.func for hook in way.hooks if not hook.quiet]
            assert len(funcs) == len(set(funcs)), point


@every_probe
def test_hook_numbers_fit_into_a_byte(spec: ProbeSpec) -> None:
    assert 0 < len(reporting(spec.points)) <= 255


@every_probe
def test_points_have_unique_names_and_ways(spec: ProbeSpec) -> None:
    names = [point.point for point in spec.points]
    assert len(names) == len(set(names))
    for point in spec.points:
        assert point.ways
        assert {way.mechanism for way in point.ways} <= set(MECHANISMS)
        assert all(way.hooks for way in point.ways)


@every_probe
def test_no_handler_has_a_name_that_bcc_attaches_automatically(spec: ProbeSpec) -> None:
    taken = ("kprobe__", "kretprobe__", "tracepoint__", "raw_tracepoint__", "kfunc__", "lsm__")
    assert not [hook.program for hook in hooks(spec) if hook.program.startswith(taken)]


@every_probe
def test_program_text_is_built_without_a_kernel(spec: ProbeSpec) -> None:
    options = read_options(spec.name, spec.options, GIVEN.get(spec.name, {}))
    taken = {point.point: point.ways[0].mechanism for point in spec.points}
    text = program_text(probe_request(spec, options), taken=taken, defines={})
    for _, hook in reporting(spec.points):
        assert text.count(f"#define HOOK_{hook.program} ") == 1


ERRORS = (0, errno.ECONNREFUSED, errno.ETIMEDOUT, errno.EADDRNOTAVAIL, errno.ENETUNREACH, 9999)
FLAGS = (None, "", "SYN", "SYN|ACK", "FIN|SYN|RST|PSH|ACK|URG|ECE|CWR")


@every_probe
def test_every_row_has_a_printable_description(spec: ProbeSpec) -> None:
    for point, state, old_state, error, empty, flags in itertools.product(
        [point.point for point in spec.points], TCP_STATES, TCP_STATES, ERRORS, (None, 0, 1), FLAGS
    ):
        moment = Moment(
            point, state, old_state, error, None if empty is None else bool(empty), flags
        )
        words = spec.describe(moment)
        assert words
        assert words.isprintable()


def test_each_old_c_name_is_an_alias_of_an_existing_function() -> None:
    folder = files("tcplat_core").joinpath("include", "tcplat")
    old = folder.joinpath("old_names.bpf.h").read_text(encoding="utf-8")
    names = re.findall(r"^#define (\w+) (\w+)$", old, re.MULTILINE)
    assert len(names) == 4
    text = "".join(header.read_text(encoding="utf-8") for header in folder.iterdir())
    for before, now in names:
        assert re.search(rf"\b{now}\(const struct sock \*sk", text)
        assert not re.search(rf"\b{before}\(", text)
