"""One distribution ships every plugin, and each plugin folder is a project of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import tcplat_core

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))

every_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("group", ["tcplat", "tcplat.commands"])
def test_root_project_has_the_entry_points_of_all_plugins(group: str) -> None:
    entries: dict[str, str] = {}
    for folder in FOLDERS:
        own = project(folder)["project"]["entry-points"].get(group, {})
        assert not own.keys() & entries.keys()
        entries |= own
    root = project(ROOT)["project"]["entry-points"][group]
    # A folder without a pyproject.toml is being written: its entries are not looked at.
    written = {f"tcplat_{folder.name}" for folder in FOLDERS}
    assert {
        name: value for name, value in root.items() if value.partition(".")[0] in written
    } == entries
    assert {"tcplat_tcp_client", "tcplat_sinks"} <= written


@every_folder
def test_wheel_and_editable_install_contain_the_package(folder: Path) -> None:
    hatch = project(ROOT)["tool"]["hatch"]["build"]
    package = f"plugins/{folder.name}/tcplat_{folder.name}"
    assert package in hatch["targets"]["wheel"]["packages"]
    assert f"plugins/{folder.name}" in hatch["dev-mode-dirs"]
    assert (ROOT / package / "__init__.py").exists()


@every_folder
def test_a_plugin_folder_is_a_project_of_its_own(folder: Path) -> None:
    own = project(folder)
    assert own["project"]["name"] == f"tcplat-{folder.name.replace('_', '-')}"
    assert own["project"]["dependencies"] == ["tcplat"]
    assert own["project"]["version"] == project(ROOT)["project"]["version"]
    # By itself it compiles nothing: Cython is the root project's.
    assert own["build-system"] == {**project(ROOT)["build-system"], "requires": ["hatchling"]}
    packages = own["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert packages == [f"tcplat_{folder.name}"]
    assert own["project"]["readme"] == "README.md"
    assert (folder / "README.md").read_text(encoding="utf-8").startswith("# ")


def test_no_project_depends_on_the_bcc_of_pypi() -> None:
    for folder in (ROOT, *FOLDERS):
        shown = project(folder)["project"]
        groups = [shown["dependencies"], *shown.get("optional-dependencies", {}).values()]
        names = [entry.partition(">")[0].strip() for group in groups for entry in group]
        assert "bcc" not in names


def imported_by(code: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter holds after `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules, file=sys.stderr)"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONWARNINGS": "error"},
        check=True,
    )
    return {name.partition(".")[0] for name in done.stderr.decode().split()}


def test_listing_plugins_imports_neither_bcc_nor_pyroute2() -> None:
    modules = imported_by(
        "from tcplat_core.cli.main import cli\ncli.main(['plugins', 'list'], standalone_mode=False)"
    )
    assert {"tcplat_core", "pluggy", "tcplat_tcp_client", "tcplat_sinks"} <= modules
    assert not {"bcc", "pyroute2"} & modules


def test_public_names_import_neither_bcc_nor_pyroute2() -> None:
    modules = imported_by("from tcplat_core import *\nfrom tcplat_core.testing import *")
    assert not {"bcc", "pyroute2", "pytest"} & modules


def test_help_imports_no_plugin() -> None:
    modules = imported_by(
        "from tcplat_core.cli.main import cli\ncli.main(['--help'], standalone_mode=False)"
    )
    assert not {"bcc", "pyroute2", "pluggy", "tcplat_sinks"} & modules


@pytest.mark.parametrize("name", tcplat_core.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(tcplat_core, name) is not None


def test_private_name_is_not_exported() -> None:
    with pytest.raises(AttributeError, match="module 'tcplat_core' has no attribute 'Router'"):
        tcplat_core.Router  # noqa: B018


@every_folder
def test_built_in_plugins_use_public_names_alone(folder: Path) -> None:
    for path in folder.glob("tcplat_*/**/*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]) and "tcplat_core" in line:
                assert words[:3] == ["from", "tcplat_core", "import"], f"{path}: {line}"
