"""Commands of plugins; a broken one affects no other."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from tcplat_core.cli.main import cli
from tcplat_core.errors import PluginError
from tcplat_core.registry import command_group

Install = Callable[[str, str, str], None]
GOOD = """
import click

@click.command()
@click.argument("name")
def greet(name):
    \"\"\"Say hello.\"\"\"
    click.echo(f"hello {name}")
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a distribution with one command, as pip would."""
    monkeypatch.syspath_prepend(str(tmp_path))
    modules: list[str] = []

    def add(module: str, code: str, entry: str) -> None:
        (tmp_path / f"{module}.py").write_text(code, encoding="utf-8")
        modules.append(module)
        info = tmp_path / f"tcplat_{module}-2.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: tcplat-{module}\nVersion: 2.5\n"
        )
        (info / "entry_points.txt").write_text(f"[tcplat.commands]\n{entry}\n")

    yield add
    for module in modules:
        sys.modules.pop(module, None)


def ran(*arguments: str, **how: object) -> Result:
    return CliRunner().invoke(cli, arguments, catch_exceptions=False, **how)  # type: ignore[arg-type] # obj=


def test_plugin_command_runs_and_is_listed_in_the_help(install: Install) -> None:
    install("good", GOOD, "greet = good:greet")
    assert ran("greet", "world").output == "hello world\n"
    assert "Say hello." in ran("--help").output
    (line,) = [line for line in ran("plugins", "list").output.splitlines() if "greet" in line]
    assert line.split()[:5] == ["greet", "command", "2.5", "tcplat-good", "ok"]


def test_plugin_is_not_imported_before_its_command_is_called(install: Install) -> None:
    install("good", GOOD, "greet = good:greet")
    ran("run", "--help")
    ran("plugins", "--help")
    assert "good" not in sys.modules


def test_root_is_dropped_before_a_plugin_is_imported(install: Install) -> None:
    install("good", GOOD, "greet = good:greet")
    given: list[bool] = []
    ran("greet", "world", obj=lambda: given.append("good" in sys.modules))
    assert given == [False]


@pytest.mark.parametrize(
    ("code", "entry", "words"),
    [
        ("import there_is_no_such_module", "bad = bad:bad", "ModuleNotFoundError: No module"),
        ("raise SystemExit(3)", "bad = bad:bad", "SystemExit: 3"),
        ("bad = 5", "bad = bad:bad", "it offers a int as a command"),
        ("", "bad = bad:nothing", "AttributeError: "),
    ],
)
def test_broken_command_is_reported_and_others_still_run(
    install: Install, code: str, entry: str, words: str
) -> None:
    install("bad", code, entry)
    install("good", GOOD, "greet = good:greet")
    with pytest.raises(PluginError, match=words):
        ran("bad", "--any", "thing")
    assert "Broken: " in ran("--help").output
    assert ran("greet", "world").exit_code == 0
    (line,) = [line for line in ran("plugins", "list").output.splitlines() if "tcplat-bad" in line]
    assert "broken" in line
    assert words in line


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise GeneratorExit", "GeneratorExit"),
        (
            "class E(Exception):\n    def __str__(self): raise ValueError\nraise E",
            "E",
        ),
    ],
)
def test_any_exception_of_a_command_module_breaks_that_command_alone(
    install: Install, code: str, said: str
) -> None:
    install("bad", code, "bad = bad:bad")
    (line,) = [line for line in ran("plugins", "list").output.splitlines() if "tcplat-bad" in line]
    assert line.split()[4:] == ["broken", said]


RAISING = """
import click
class Odd(BaseException):
    def __str__(self): raise GeneratorExit
class Typed(click.ParamType):
    name = "odd"
    def convert(self, value, param, ctx): {of_type}
@click.command()
@click.argument("it", type=Typed(), default="it")
def bad(it):
    "Raise."
    {of_callback}
"""


@pytest.mark.parametrize("where", ["of_type", "of_callback"])
@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("raise KeyError('x')", "KeyError: 'x'"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("raise Odd", "Odd"),
        (
            "raise BaseExceptionGroup('two', [SystemExit(3)])",
            "BaseExceptionGroup: two .1 sub-exception.",
        ),
        ("raise OSError(22, 'words')", "OSError: .Errno 22. words"),
    ],
)
def test_any_exception_of_a_running_command_is_a_plugin_error(
    install: Install, where: str, statement: str, words: str
) -> None:
    code = {"of_type": "return value", "of_callback": "pass"} | {where: statement}
    install("bad", RAISING.format(**code), "bad = bad:bad")
    with pytest.raises(PluginError, match=f"^command bad failed: {words}$"):
        ran("bad")


@pytest.mark.parametrize(
    ("statement", "status"),
    [
        ("raise SystemExit(3)", 3),
        ("raise click.exceptions.Exit(6)", 6),
        ("raise BrokenPipeError(32, 'gone')", 0),
        ("from tcplat_core.errors import ReaderGoneError; raise ReaderGoneError", 0),
    ],
)
def test_plugin_command_sets_the_exit_status(install: Install, statement: str, status: int) -> None:
    install("bad", RAISING.format(of_type="return value", of_callback=statement), "bad = bad:bad")
    assert ran("bad").exit_code == status


def test_command_with_a_failing_help_text_is_broken(install: Install) -> None:
    code = """
import click
class Bad(click.Command):
    def get_short_help_str(self, limit=45): raise ValueError("no words")
bad = Bad("bad")
"""
    install("bad", code, "bad = bad:bad")
    assert "Broken: ValueError: no words" in ran("--help").output


def test_plugin_cannot_replace_a_core_command(install: Install) -> None:
    install("thief", GOOD, "replay = thief:greet")
    assert "Send the rows of a capture to sinks" in ran("replay", "--help").output
    (line,) = [line for line in ran("plugins", "list").output.splitlines() if "thief" in line]
    assert "a command of this name exists already" in line


def test_unknown_command_is_refused() -> None:
    with pytest.raises(click.UsageError, match="No such command"):
        cli.main(["nonesuch"], standalone_mode=False)


def test_help_takes_less_than_200_ms_of_cpu() -> None:
    ran("--help")
    took = []
    for _ in range(5):
        began = time.process_time()
        ran("--help")
        took.append(time.process_time() - began)
    assert min(took) < 0.2


def test_built_in_commands_are_found() -> None:
    names = {entry.name: status for entry, status, _ in command_group.found(())}
    assert names.items() >= {"report": "ok", "diff": "ok", "merge": "ok"}.items()


def test_sigterm_swallowed_by_c_code_is_raised_later() -> None:
    code = """
import ctypes, os, signal, time
from tcplat_core.registry.command_group import terminated_in_order

class Key:
    def __hash__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return hash("key")

# Clears what is raised meanwhile, as msgspec's decoders do.
get = ctypes.pythonapi.PyDict_GetItem
get.argtypes, get.restype = [ctypes.py_object, ctypes.py_object], ctypes.c_void_p
with terminated_in_order():
    try:
        get({}, Key())
        print("lost", flush=True)
        time.sleep(60)
    finally:
        time.sleep(1.2)  # the next ones do not come in between
        print("undone", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=40, check=False
    )
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "lost\nundone\n")
