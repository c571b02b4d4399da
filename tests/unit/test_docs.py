"""The documents in docs/: their examples are run, and generated pages are up to date."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import click
import msgspec
import pytest

import tcplat_core
from tcplat_core import testing
from tcplat_core.cli.main import cli
from tcplat_core.event.fields import Event
from tcplat_core.event.record import Record
from tcplat_core.plugin.options import parse_choice, read_options
from tcplat_core.registry.find import Plugins
from tcplat_core.registry.new import create
from tcplat_core.testing import make_event
from tests.long import LONG

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
PROJECTS = {"write-a-probe.md": ("probe", "goodbye"), "write-a-sink.md": ("sink", "totals")}
"""Page -> the project that it is about, as `tcplat plugins new` makes it."""
UNPRIVILEGED = ("setpriv", "--bounding-set=-all") if os.geteuid() == 0 else ()
"""The same user without any capability: `plugins check` then loads nothing."""
TYPEDEFS = (
    "typedef unsigned char u8; typedef unsigned short u16;"
    "typedef unsigned int u32; typedef unsigned long long u64;\n"
)


@attrs.frozen
class Block:
    """A code block.

    Args:
        language: As behind the fence; empty for plain text.
        code: What is between the fences.
        file: The file that it is to be, where a line of its own in front of it names one.
    """

    language: str
    code: str
    file: str = ""


def blocks(page: str) -> list[Block]:
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(
        r"(?:^`([\w./]+)`:\n\n)?^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    )
    assert 2 * len(found) == len(re.findall(r"^```", text, re.MULTILINE))
    return [Block(language, code, file) for file, language, code in found]


every_page = pytest.mark.parametrize("page", PAGES)
every_project = pytest.mark.parametrize("page", PROJECTS)


def made_by_hand(name: str) -> ModuleType:
    """docs/generate.py."""
    spec = importlib.util.spec_from_file_location(name, DOCS / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = made_by_hand("tcplat_docs_generate")


@pytest.fixture
def folder(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield a folder with the project of a page, importable as if installed."""
    monkeypatch.chdir(tmp_path)
    if page in PROJECTS:
        kind, name = PROJECTS[page]
        project, *_ = create(kind, name, tmp_path)
        info = project / f"tcplat_{name}-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: tcplat-{name}\nVersion: 0.1.0\n")
        (info / "entry_points.txt").write_text(f"[tcplat]\n{name} = tcplat_{name}.plugin\n")
        monkeypatch.syspath_prepend(str(project))
    yield tmp_path
    for module in [
        one for one in sys.modules if one.startswith(("tcplat_goodbye", "tcplat_totals"))
    ]:
        del sys.modules[module]


@pytest.mark.parametrize("page", list(GENERATE.MAKES))
def test_generated_pages_are_up_to_date(page: str) -> None:
    """If this fails: `make docs`."""
    assert (DOCS / page).read_text(encoding="utf-8") == GENERATE.MAKES[page]()


def test_every_public_name_is_described_once() -> None:
    names = [name for section in GENERATE.SECTIONS.values() for name in section]
    assert sorted(names) == sorted(tcplat_core.__all__)


def test_every_test_helper_shown_is_public() -> None:
    shown = re.findall(r"tcplat_core\.testing import (\w+)", "".join(map(read, PAGES)))
    assert shown
    assert set(shown) <= set(testing.__all__)


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def test_every_link_in_the_docs_exists() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)\)", read(page)):
            assert "://" in link or (DOCS / link).exists(), f"{page}: {link}"


@every_page
def test_every_code_block_has_a_tested_language(page: str) -> None:
    assert {block.language for block in blocks(page)} <= {
        *("", "text", "python", "c", "json", "toml", "console")
    }
    for block in blocks(page):
        if block.language in ("", "text"):
            assert not re.search(r"^\$ |^sudo ", block.code, re.MULTILINE)


@every_project
def test_files_shown_match_those_of_plugins_new(page: str, folder: Path) -> None:
    kind, name = PROJECTS[page]
    files = {block.file: block.code for block in blocks(page) if block.file}
    assert f"tcplat_{name}/plugin.py" in files
    assert len(files) == 2, kind
    for file, code in files.items():
        assert code == (folder / f"tcplat-{name}" / file).read_text(encoding="utf-8")


@every_page
def test_python_blocks_run(page: str, folder: Path) -> None:
    for block in blocks(page):
        if block.language != "python" or block.file:
            continue
        names: dict[str, Any] = {"__name__": "docs", "__package__": "docs"}
        if page == "hooks.md":  # examples of hooks, as they stand in a plugin
            names |= {name: getattr(tcplat_core, name) for name in tcplat_core.__all__}
        code = compile(block.code, page, "exec", dont_inherit=True)
        exec(code, names)  # noqa: S102 - it is ours
    assert folder.exists()


@every_page
def test_json_blocks_match_what_tcplat_writes(page: str) -> None:
    for block in blocks(page):
        if block.language == "json":
            for line in block.code.splitlines():
                value = json.loads(line)
                assert value["v"] == tcplat_core.SCHEMA_VERSION
                if "probe" in value:
                    assert list(value) == list(Event.__struct_fields__)
                    assert msgspec.json.encode(make_event()).decode() == line


@every_page
def test_toml_blocks_match_the_project(page: str, folder: Path) -> None:
    for block in blocks(page):
        if block.language == "toml":
            _, name = PROJECTS[page]
            project = tomllib.loads((folder / f"tcplat-{name}/pyproject.toml").read_text())
            declared = tomllib.loads(block.code)["project"]["entry-points"]
            assert declared == project["project"]["entry-points"]


@pytest.mark.skipif(not shutil.which("clang"), reason="clang is not installed")
@every_page
def test_c_blocks_match_the_record_layout(page: str) -> None:
    """The C of whole probes is compiled and loaded by tests/live/test_new_plugins.py."""
    for block in blocks(page):
        if block.language == "c" and not block.file:
            asserts = Record(Event).c_struct().partition("_Static_assert")
            subprocess.run(
                ["clang", "-target", "bpf", "-x", "c", "-Werror", "-fsyntax-only", "-"],
                input="".join([TYPEDEFS, block.code, *asserts[1:]]).encode(),
                check=True,
            )


# --- commands


def parsed(words: list[str]) -> None:
    """Check a command of tcplat's down to the options of its probes and sinks."""
    with cli.make_context("tcplat", words) as top:
        name, command, rest = cli.resolve_command(top, top._protected_args + top.args)
        assert command
        if isinstance(command, click.Group):  # plugins
            with command.make_context(name, rest, parent=top) as below:
                name, command, rest = command.resolve_command(
                    below, below._protected_args + below.args
                )
            assert command
        parameters = command.make_context(name, rest, parent=top).params
    plugins = Plugins.load()
    for kind in ("probe", "sink"):
        for text in parameters.get(f"{kind}s", ()):
            chosen, given = parse_choice(text)
            spec = plugins.probe(chosen) if kind == "probe" else plugins.sink(chosen)
            read_options(f"{kind} {chosen}", spec.options, given)


def ran(words: list[str], cwd: Path) -> str:
    """Run a command that needs neither root nor anything installed; what it prints."""
    program = {"tcplat": "tcplat_core", "pytest": "pytest"}[words[0]]
    done = subprocess.run(
        [*UNPRIVILEGED, sys.executable, "-c", _RUN, program, *words[1:]],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


# As root, tcplat itself would look neither at PYTHONPATH nor at what is not installed.
_RUN = f"""
import runpy, sys
from tcplat_core.testing import sink_checks
if not {LONG}:
    sink_checks.MANY, sink_checks.WARM = 30_000, 10_000
program = sys.argv.pop(1)
if program == "pytest":
    runpy.run_module("pytest", run_name="__main__")
from tcplat_core.cli.main import main
sys.argv[0] = "tcplat"
main()
"""


@pytest.mark.slow
@every_page
def test_shown_commands_print_the_shown_output(page: str, folder: Path) -> None:
    cwd = folder
    for block in blocks(page):
        if block.language != "console":
            continue
        for part in re.split(r"^\$ ", block.code, flags=re.MULTILINE)[1:]:
            line, *shown = part.splitlines()
            words = shlex.split(line)
            if words[0] == "cd":
                cwd = folder / words[1]
                assert cwd.is_dir()
            elif words[:2] == ["pip", "install"]:
                assert (folder / words[-1] / "pyproject.toml").exists()
            elif words[0] == "sudo":
                assert words[1] == "tcplat"
                parsed(words[2:])
            elif words[:2] == ["tcplat", "replay"]:
                parsed(words[1:])
            elif words[:3] == ["tcplat", "plugins", "new"]:
                (elsewhere := folder / "elsewhere").mkdir()
                ran([*words, "--dir", str(elsewhere)], cwd)
            else:
                printed = ran(words, cwd).splitlines()
                assert printed
                for expected in shown:
                    assert expected in [re.sub(r"^ +\*", "  *", one) for one in printed]


def test_tutorials_show_the_new_and_run_commands() -> None:
    for page in PROJECTS:
        shown = "".join(block.code for block in blocks(page) if block.language == "console")
        assert shown.count("$ tcplat plugins new") == 1
        assert "$ sudo tcplat run" in shown


READMES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", *ROOT.glob("plugins/*/README.md"), *ROOT.glob("demo/*/*.md")]
)


@pytest.mark.parametrize("readme", READMES)
def test_commands_of_the_readmes_are_accepted_by_tcplat(readme: str) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8").replace("\\\n", " ")
    # What the shell puts in: a process id.
    text = re.sub(r'"\$\(pidof[^)]*\)"', "1", text)
    code = re.findall(r"^```\n(.*?)^```$|^    (\S[^\n]*\n)", text, re.MULTILINE | re.DOTALL)
    lines = "".join(map("".join, code))
    found = re.findall(r"^(?:\$ )?(?:sudo )?tcplat ((?!run \.\.\.).*)$", lines, re.MULTILINE)
    assert found
    for line in found:
        command = re.split(r" (?:\||<|&&|--) ", line)[0]
        words = shlex.split(command, comments=True)
        if not re.search("tcp_retransmit|demo1", command):  # they are not installed here
            parsed(words)


def test_command_parser_of_this_test_refuses_wrong_commands() -> None:
    with pytest.raises(click.ClickException):
        parsed(["run", "--probe", "tcp_client", "--no-such-option"])
    with pytest.raises(tcplat_core.PluginError):
        parsed(["run", "--probe", "no_such_probe"])
    with pytest.raises(tcplat_core.UsageError):
        parsed(["run", "--probe", "tcp_client", "--sink", "table:no_such=1"])
