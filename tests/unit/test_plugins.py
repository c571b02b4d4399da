"""Plugins are found, loaded one by one, and none of them stops the others."""

from __future__ import annotations

import email
import subprocess
import sys
from collections.abc import Callable, Iterator
from email.message import Message
from importlib.metadata import EntryPoint, entry_points
from inspect import getdoc
from pathlib import Path
from textwrap import dedent

import pytest

from tcplat_core.errors import PluginError
from tcplat_core.plugin import hookspecs
from tcplat_core.registry.find import GROUP, Found, Plugins, _distribution

Install = Callable[..., None]

HEAD = """\
from tcplat_core import HookPoint, ProbeSpec, SinkSpec, hookimpl, tracepoint

def probe(name):
    return ProbeSpec(name=name, summary=f"watches {name}", source="", points=())

def sink(name):
    return SinkSpec(name=name, summary=f"shows {name}", factory=lambda options, run: None)

"""
GOOD = """
@hookimpl
def tcplat_register_probes():
    yield probe("retransmits")

@hookimpl
def tcplat_register_sinks():
    return [sink("count"), sink("graph")]
"""
BROKEN = {
    "import_error": ("import there_is_no_such_module", "ModuleNotFoundError: No module named"),
    "syntax_error": ("def (:", "SyntaxError: "),
    "raises_at_import": ("raise RuntimeError('not today\\nnor tomorrow')", "RuntimeError: not"),
    "misspelled_hook": (
        "@hookimpl\ndef tcplat_register_probe(): return []",
        "there is no hook tcplat_register_probe; it is tcplat_register_probes",
    ),
    "misspelled_without_mark": (
        "def tcplat_register_sinsk(): return []",
        "there is no hook tcplat_register_sinsk; it is tcplat_register_sinks",
    ),
    "hook_of_another_name": (
        "@hookimpl\ndef probes(): return []",
        "there is no hook probes; it is tcplat_register_probes",
    ),
    "hook_without_mark": (
        "def tcplat_register_sinks(): return [sink('x')]",
        "tcplat_register_sinks is not marked @hookimpl",
    ),
    "no_hook": ("", "it registers no probe and no sink"),
    "offers_nothing": (
        "@hookimpl\ndef tcplat_register_probes(): return []",
        "it registers no probe and no sink",
    ),
    "exits": ("raise SystemExit('I need a newer Python')", "SystemExit: I need a newer Python"),
    "interrupts": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "ends_everything": ("class End(BaseException): pass\nraise End('now')", "End: now"),
    "error_without_words": (
        "class Unprintable(Exception):\n    def __str__(self): raise TypeError\nraise Unprintable",
        "Unprintable",
    ),
    "newer_hooks": (
        "tcplat_hookspec = '2.0'",
        "it was made for version 2.0 of the plugin hooks, and this tcplat has 1.0: upgrade tcplat",
    ),
    "odd_version": ("tcplat_hookspec = 1.0", "tcplat_hookspec is 1.0; write '1.0'"),
    "twice_itself": (
        "@hookimpl\ndef tcplat_register_sinks(): return [sink('x'), sink('x')]",
        "it registers two sinks named 'x'",
    ),
    "bad_field": (
        "from tcplat_core import Wire\nWire('int', 'the timer')",
        "a field cannot be of the C type 'int', but of u64, u32, ",
    ),
    "wrong_argument": (
        "@hookimpl\ndef tcplat_register_sinks(config): return []",
        "PluginValidationError: ",
    ),
    "wrong_type": (
        "@hookimpl\ndef tcplat_register_sinks(): return ['count']",
        "it offers a str as a sink",
    ),
    "probe_as_sink": (
        "@hookimpl\ndef tcplat_register_sinks(): return [probe('x')]",
        "it offers a ProbeSpec as a sink",
    ),
    "no_list": (
        "@hookimpl\ndef tcplat_register_sinks(): return 3",
        "TypeError: 'int' object is not iterable",
    ),
    "raises_in_hook": (
        "@hookimpl\ndef tcplat_register_sinks(): yield sink('x'); 1 / 0",
        "ZeroDivisionError: division by zero",
    ),
    "bad_name": (
        "@hookimpl\ndef tcplat_register_probes(): yield probe('Bad Name')",
        "name 'Bad Name' must be lower-case",
    ),
}
"""Module -> its code, and how the reason begins."""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs distributions as pip would, into a folder on sys.path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    modules: list[str] = []

    def add(code: str, module: str, entry: str | None = None, dist: str | None = None) -> None:
        (tmp_path / f"{module}.py").write_text(HEAD + dedent(code), encoding="utf-8")
        modules.append(module)
        name = dist or f"tcplat-{module}"
        info = tmp_path / f"{name.replace('-', '_')}-2.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.5\n")
        (info / "entry_points.txt").write_text(f"[tcplat]\n{entry or module} = {module}\n")

    yield add
    for module in modules:
        sys.modules.pop(module, None)


def load_new() -> Plugins:
    """Load what the test installed, and nothing of ours."""
    return Plugins.load(
        entry
        for entry in entry_points(group=GROUP)
        if entry.dist is not None and entry.dist.version == "2.5"
    )


def test_plugin_offers_probes_and_sinks(install: Install) -> None:
    install(GOOD, "good")
    plugins = load_new()
    assert plugins.probe("retransmits").summary == "watches retransmits"
    assert plugins.sink("graph").summary == "shows graph"
    assert plugins.found == [
        Found("retransmits", "probe", "2.5", "tcplat-good", "ok", "watches retransmits"),
        Found("count", "sink", "2.5", "tcplat-good", "ok", "shows count"),
        Found("graph", "sink", "2.5", "tcplat-good", "ok", "shows graph"),
    ]


def test_empty_list_of_plugins_is_not_an_error() -> None:
    assert Plugins.load([]).found == []


@pytest.mark.parametrize("module", BROKEN)
def test_broken_plugin_is_listed_with_its_reason_and_others_load(
    install: Install, module: str
) -> None:
    code, reason = BROKEN[module]
    install(code, module)
    install(GOOD, "zz_good")
    plugins = load_new()
    broken, *good = plugins.found
    assert (broken.name, broken.kind, broken.status) == (module, "plugin", "broken")
    assert (broken.distribution, broken.version) == (f"tcplat-{module}", "2.5")
    assert broken.summary.startswith(reason)
    assert "\n" not in broken.summary
    assert [found.name for found in good] == ["retransmits", "count", "graph"]
    assert [name for name, _ in plugins.manager.list_name_plugin()] == ["zz_good"]
    for hook in (
        plugins.manager.hook.tcplat_register_probes,
        plugins.manager.hook.tcplat_register_sinks,
    ):
        assert [impl.plugin_name for impl in hook.get_hookimpls()] == ["zz_good"]


def test_two_entry_points_of_one_object_are_both_refused(install: Install) -> None:
    install(GOOD, "good")
    entries = [entry for entry in entry_points(group=GROUP) if entry.name == "good"]
    entries.append(EntryPoint("again", "good", GROUP))
    plugins = Plugins.load(entries)
    assert plugins.probes == {}
    assert {found.status for found in plugins.found} == {"broken"}


def test_hook_wrapper_does_not_change_another_plugin(install: Install) -> None:
    install(GOOD, "good")
    install(
        """
        import pluggy

        @pluggy.HookimplMarker("tcplat")(wrapper=True)
        def tcplat_register_sinks():
            yield
            return [[sink("mine")]]
        """,
        "wraps",
    )
    plugins = load_new()
    assert plugins.sinks.keys() == {"count", "graph"}
    assert [found.summary for found in plugins.found if found.status == "broken"] == [
        "it registers no probe and no sink"
    ]


def test_broken_plugin_offers_nothing(install: Install) -> None:
    """It fails at its second sink: the first one is not registered either."""
    install(BROKEN["raises_in_hook"][0], "half")
    assert load_new().sinks == {}


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("good:there_is_none", "AttributeError: module 'good' has no attribute 'there_is_none'"),
        ("no_such_package.plugin", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("good or bad", "its entry point lost = 'good or bad' is not of the form module:object"),
    ],
)
def test_entry_point_that_leads_nowhere_is_broken(
    install: Install, entry: str, reason: str
) -> None:
    install(GOOD, "good")
    (found,) = Plugins.load([EntryPoint("lost", entry, GROUP)]).found
    assert (found.name, found.kind, found.status) == ("lost", "plugin", "broken")
    assert found.summary == reason


@pytest.mark.parametrize("version", ["1", "1.0", "1.99"])
def test_plugin_for_this_major_version_is_accepted(install: Install, version: str) -> None:
    install(f"tcplat_hookspec = {version!r}\n{GOOD}", "good")
    assert "retransmits" in load_new().probes


def test_output_of_plugins_during_loading_is_kept_off_stdout(
    install: Install, capfd: pytest.CaptureFixture[str]
) -> None:
    install("import os\nprint('by Python')\nos.write(1, b'by its fd\\n')\n" + GOOD, "chatty")
    print("before")  # noqa: T201 - data, which has to stay where it is
    assert "retransmits" in load_new().probes
    print("after")  # noqa: T201
    out, err = capfd.readouterr()
    assert out == "before\nafter\n"
    assert {"by Python", "by its fd"} <= set(err.splitlines())


def test_plugins_load_without_a_standard_output(install: Install) -> None:
    install("print('hello')\n" + GOOD, "chatty")
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); os.close(1); sys.stdout = None\n"
        "from importlib.metadata import EntryPoint\n"
        "from tcplat_core.registry.find import Plugins\n"
        "found = Plugins.load([EntryPoint('chatty', 'chatty', 'tcplat')]).found\n"
        "assert [one.status for one in found] == ['ok'] * 3, found\n"
    )
    (folder,) = (path for path in sys.path if (Path(path) / "chatty.py").exists())
    subprocess.run([sys.executable, "-c", code, folder], check=True)


@pytest.mark.parametrize("kind", ["probe", "sink"])
def test_request_for_a_broken_plugin_names_its_reason(install: Install, kind: str) -> None:
    install("import there_is_no_such_module", "histogram")
    with pytest.raises(PluginError) as error:
        getattr(load_new(), kind)("histogram")
    assert str(error.value) == (
        "plugin histogram (from tcplat-histogram 2.5) is broken: "
        "ModuleNotFoundError: No module named 'there_is_no_such_module'"
    )


def test_request_for_an_unknown_plugin_lists_the_known_ones(install: Install) -> None:
    install(GOOD, "good")
    plugins = load_new()
    with pytest.raises(PluginError, match="there is no sink named 'grahp'; there is count, graph"):
        plugins.sink("grahp")
    with pytest.raises(PluginError, match="there is no probe named 'graph'; there is retransmits"):
        plugins.probe("graph")
    with pytest.raises(PluginError, match="there is no probe named 'x'; there is none"):
        Plugins.load([]).probe("x")


def test_two_plugins_of_one_name_are_both_refused(install: Install) -> None:
    """The choice between the two would be arbitrary."""
    install(GOOD, "a_first")
    install("@hookimpl\ndef tcplat_register_probes(): yield probe('retransmits')", "b_second")
    plugins = load_new()
    assert [(found.name, found.distribution, found.status) for found in plugins.found] == [
        ("retransmits", "tcplat-a_first", "broken"),
        ("count", "tcplat-a_first", "ok"),
        ("graph", "tcplat-a_first", "ok"),
        ("retransmits", "tcplat-b_second", "broken"),
    ]
    reason = (
        "tcplat-a_first 2.5 and tcplat-b_second 2.5 both have a probe of this name: "
        "uninstall one of them"
    )
    assert {found.summary for found in plugins.found if found.status == "broken"} == {reason}
    with pytest.raises(PluginError) as error:
        plugins.probe("retransmits")
    assert str(error.value) == (f"probe retransmits (from tcplat-a_first 2.5) is broken: {reason}")


def test_two_entry_points_of_one_name_are_both_refused(install: Install) -> None:
    install("raise RuntimeError('loaded')", "a_first", entry="graphs")
    install("raise RuntimeError('loaded')", "b_second", entry="graphs")
    install(GOOD, "good")
    plugins = load_new()
    broken = [found for found in plugins.found if found.status == "broken"]
    assert [(found.name, found.distribution) for found in broken] == [
        ("graphs", "tcplat-a_first"),
        ("graphs", "tcplat-b_second"),
    ]
    assert all("both have an entry point of this name" in found.summary for found in broken)
    assert "retransmits" in plugins.probes


def test_plugin_cannot_take_a_built_in_name(install: Install) -> None:
    install("@hookimpl\ndef tcplat_register_probes(): yield probe('tcp_client')", "aaa")
    install(GOOD, "bbb", entry="sinks")
    plugins = Plugins.load()
    assert plugins.probe("tcp_client").points
    assert {"table", "jsonl"} <= set(plugins.sinks)
    broken = {
        (one.name, one.distribution): one.summary for one in plugins.found if one.status != "ok"
    }
    assert broken == {
        ("tcp_client", "tcplat-aaa"): "tcplat itself has a probe of this name",
        ("sinks", "tcplat-bbb"): "tcplat itself has an entry point of this name",
    }


def test_probe_and_sink_may_share_a_name(install: Install) -> None:
    install(
        """
        @hookimpl
        def tcplat_register_probes(): yield probe("latency")

        @hookimpl
        def tcplat_register_sinks(): yield sink("latency")
        """,
        "both",
    )
    assert [found.status for found in load_new().found] == ["ok", "ok"]


def test_plugin_installed_twice_is_loaded_once(install: Install) -> None:
    """Once in tcplat's wheel and once by itself: same name, same module."""
    install(GOOD, "good", dist="tcplat-good")
    (entry,) = [entry for entry in entry_points(group=GROUP) if entry.name == "good"]
    twin = EntryPoint("good", "good", GROUP)
    found = Plugins.load([entry, twin]).found
    assert [(one.name, one.status) for one in found] == [
        ("retransmits", "ok"),
        ("count", "ok"),
        ("graph", "ok"),
    ]


def test_an_entry_point_without_a_distribution_has_no_version(install: Install) -> None:
    install(GOOD, "good")
    found = Plugins.load([EntryPoint("good", "good", GROUP)]).found
    assert {(one.version, one.distribution) for one in found} == {("?", "?")}


def test_installation_order_does_not_matter(install: Install) -> None:
    install(GOOD, "good")
    install(BROKEN["import_error"][0], "bad")
    entries = [entry for entry in entry_points(group=GROUP) if entry.name in ("good", "bad")]
    assert Plugins.load(entries).found == Plugins.load(reversed(entries)).found


def test_built_in_plugins_load() -> None:
    ours = [found for found in Plugins.load().found if found.distribution == "tcplat"]
    assert {found.status for found in ours} == {"ok"}
    assert {("tcp_client", "probe"), ("table", "sink"), ("jsonl", "sink")} <= {
        (found.name, found.kind) for found in ours
    }


def test_hook_examples_are_complete_plugins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = [
        dedent((getdoc(hook) or "").partition("Example::\n")[2])
        for hook in (hookspecs.tcplat_register_probes, hookspecs.tcplat_register_sinks)
    ]
    package = tmp_path / "hook_examples"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "tcp_retransmit.bpf.c").write_text("/* C */")
    head = "from importlib.resources import files\nfrom tcplat_core import *\n"
    (package / "plugin.py").write_text(head + "".join(examples))
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = Plugins.load([EntryPoint("examples", "hook_examples.plugin", GROUP)])
    for module in ("hook_examples.plugin", "hook_examples"):
        sys.modules.pop(module, None)
    assert [(found.name, found.status) for found in plugins.found] == [
        ("tcp_retransmit", "ok"),
        ("count", "ok"),
    ]
    assert plugins.probe("tcp_retransmit").source == "/* C */"


def test_every_hook_has_an_example() -> None:
    hooks = [name for name in vars(hookspecs) if name.startswith("tcplat_")]
    assert len(hooks) == 2
    assert all("Example::" in (getdoc(getattr(hookspecs, hook)) or "") for hook in hooks)


def test_metadata_of_a_distribution_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the README, and is parsed for each name and each version that is asked for."""
    parsed: list[str] = []
    parse = email.message_from_string

    def counted(text: str) -> Message:
        parsed.append(text)
        return parse(text)

    _distribution.cache_clear()
    monkeypatch.setattr(email, "message_from_string", counted)
    plugins = Plugins.load()
    assert len(plugins.found) > 7
    assert 0 < len(parsed) <= 2 * len({one.distribution for one in plugins.found})
