"""``tcplat plugins new`` writes projects that work, from templates that are projects themselves."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tcplat_core.errors import UsageError
from tcplat_core.registry.find import Plugins
from tcplat_core.registry.new import create, rendered

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LONGEST = "n2345678_0123456_8901234_6789012"
"""32 characters."""

every_kind = pytest.mark.parametrize("kind", ["probe", "sink"])
every_name = pytest.mark.parametrize("name", ["x", "slow_link", "zzz9", LONGEST])


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=cwd,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )


@every_kind
@every_name
def test_new_project_is_lint_clean_and_consistently_named(
    kind: str, name: str, tmp_path: Path
) -> None:
    project, *files = create(kind, name, tmp_path)
    assert project.name == f"tcplat-{name.replace('_', '-')}"
    assert not any("skeleton" in f"{file} {file.read_text()}" for file in files)
    # By the project's rules, and by those of this repository.
    for how in ((), ("--config", ROOT / "pyproject.toml")):
        checked = run("ruff", "check", "--no-cache", *how, ".", cwd=project)
        assert checked.returncode == 0, checked.stdout
        formatted = run("ruff", "format", "--no-cache", "--check", *how, ".", cwd=project)
        assert formatted.returncode == 0, formatted.stdout


@every_kind
def test_tests_of_a_new_project_pass(kind: str, tmp_path: Path) -> None:
    project, *_ = create(kind, "slow_link", tmp_path)
    done = run("pytest", "-q", "-p", "no:cacheprovider", cwd=project)
    assert done.returncode == 0, done.stdout
    assert re.search(r"[4-9] passed", done.stdout)


@every_kind
def test_new_project_passes_mypy_strict(kind: str, tmp_path: Path) -> None:
    project, *_ = create(kind, "slow_link", tmp_path)
    done = run("mypy", "--strict", "tcplat_slow_link", "tests", cwd=project)
    assert done.returncode == 0, done.stdout


@every_kind
def test_new_project_is_found_by_its_entry_point(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, *_ = create(kind, "slow_link", tmp_path)
    shown = tomllib.loads((project / "pyproject.toml").read_text())
    info = project / "tcplat_slow_link-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {shown['project']['name']}\nVersion: 0.1.0\n")
    entries = shown["project"]["entry-points"]["tcplat"]
    lines = [f"{entry} = {value}" for entry, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[tcplat]", *lines]))
    monkeypatch.syspath_prepend(str(project))
    plugins = Plugins.load()
    for module in [name for name in sys.modules if name.startswith("tcplat_slow_link")]:
        del sys.modules[module]
    ((found, spec),) = plugins.named("slow_link")
    assert (found.kind, found.distribution, found.status) == (kind, "tcplat-slow-link", "ok")
    assert spec.options


@every_kind
def test_new_project_has_a_licence(kind: str, tmp_path: Path) -> None:
    project, *_ = create(kind, "slow_link", tmp_path)
    assert "MIT License" in (project / "LICENSE").read_text()
    assert "Licence: MIT" in (project / "README.md").read_text()
    assert "__pycache__/" in (project / ".gitignore").read_text()


@pytest.mark.parametrize(
    "name",
    ["", "Demo", "1st", "_x", "x_", "a__b", "my-probe", "ö", "a b", "../x", "x.y", f"{LONGEST}3"],
)
def test_invalid_plugin_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="is not a valid name for a plugin: use lower-case letters"
    ):
        create("probe", name, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("class", "is a Python keyword"),
        ("core", "is a name of tcplat itself"),
        ("sinks", "is a name of tcplat itself"),
        ("tcp_client", "is a name of tcplat itself"),
        ("jsonl", "is a name of tcplat itself"),
    ],
)
def test_existing_plugin_name_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=reason):
        create("sink", name, tmp_path)


def test_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    there = tmp_path / "tcplat-slow-link"
    there.mkdir()
    with pytest.raises(UsageError, match="exists already: remove it, or give another --dir"):
        create("probe", "slow_link", tmp_path)
    assert not list(there.iterdir())


def test_missing_parent_folder_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot write .*nowhere/tcplat-x: No such file"):
        create("probe", "x", tmp_path / "nowhere")


OTHER = 4711
"""The uid of another user."""


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """Return a folder that other users can write to."""
    if os.geteuid():
        pytest.skip("only root can give files away")
    folder = tmp_path / "theirs"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


@pytest.mark.parametrize("name", ["dir", "dir/below"])
def test_symlink_of_another_user_is_not_followed(theirs: Path, tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    (victim / "below").mkdir(parents=True)
    link = theirs / "dir"
    link.symlink_to(victim)
    os.chown(link, OTHER, OTHER, follow_symlinks=False)
    with pytest.raises(UsageError, match="it is a symbolic link of another user"):
        create("probe", "x", theirs / name)
    assert [path.name for path in victim.rglob("*")] == ["below"]


def test_symlink_planted_during_creation_changes_nothing(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()

    def exchanging(text: str, name: str) -> str:
        project = theirs / "tcplat-x"
        if not project.is_symlink():
            project.rename(theirs / "moved")
            project.symlink_to(victim)
        return rendered(text, name)

    monkeypatch.setattr("tcplat_core.registry.new.rendered", exchanging)
    _, *files = create("probe", "x", theirs)
    assert not list(victim.iterdir())
    made = {path.relative_to(theirs / "moved") for path in (theirs / "moved").rglob("*.*")}
    assert {file.relative_to(theirs / "tcplat-x") for file in files if file.suffix} <= made


def test_new_project_is_not_writable_by_others(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        project, *files = create("probe", "x", tmp_path)
    finally:
        os.umask(before)
    folders = {project, *(file.parent for file in files)}
    assert {path.stat().st_mode & 0o7777 for path in folders} == {0o755}
    assert {path.stat().st_mode & 0o7777 for path in files} == {0o644}


def test_full_disk_leaves_no_partial_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A partial project would make the next attempt fail."""
    written = 0

    def full(text: str, name: str) -> str:
        nonlocal written
        written += 1
        if written > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rendered(text, name)

    with monkeypatch.context() as patch:
        patch.setattr("tcplat_core.registry.new.rendered", full)
        with pytest.raises(UsageError, match="No space left on device"):
            create("probe", "x", tmp_path)
    assert written > 8
    assert not list(tmp_path.iterdir())
    create("probe", "x", tmp_path)
