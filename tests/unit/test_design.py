"""ARCHITECTURE.md and docs/design: decisions, the paths they name, and the code that names them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.test_rooms import MAY_IMPORT

ROOT = Path(__file__).parents[2]
CORE = ROOT / "tcplat_core"
DESIGN = sorted((ROOT / "docs" / "design").glob("*.md"))
MAP = ROOT / "ARCHITECTURE.md"
FOLDERS = ("bin", "demo", "docs", "plugins", "tcplat_core", "tests")
MOST_LINES = 150

_HEADING = re.compile(r"^### (D\d+) \S.*$", re.MULTILINE)
_NUMBER = re.compile(r"\bD[1-9]\d{0,2}\b")
_DATE = re.compile(r"^\d{4}-\d\d-\d\d\b.* · \S", re.MULTILINE)
_QUOTED = re.compile(r"`([\w-][\w./-]*)`")
_NAMES = re.compile(r"`([\w./-]+/[\w./-]+\.[a-z]+)`\s\(((?:`[^`]+`(?:,\s|\sof\s)?)+)\)")
_ROOM = re.compile(r"^\| `(\w+)/` \|[^|]*\| ?([^|]*?) ?\| \[", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
_KINDS = (".py", ".c", ".h", ".js", ".json", ".md", ".txt")

every_page = pytest.mark.parametrize("page", [MAP, *DESIGN], ids=lambda page: page.name)


def sources() -> Iterator[Path]:
    """Give each text of the project that may name a decision."""
    yield from (*ROOT.glob("*.md"), *ROOT.glob("*.py"))
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path


def decisions() -> list[tuple[str, str]]:
    """Return number and text of each decision."""
    found = []
    for page in DESIGN:
        _, *parts = re.split(r"^### ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        found += [(part.split()[0], part) for part in parts]
    return found


def is_there(path: str, names: set[str]) -> bool:
    if "/" not in path:
        return path in names
    return (ROOT / path).exists() or (CORE / path).exists()


def test_architecture_is_short() -> None:
    assert len(MAP.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_each_decision_exists_once() -> None:
    counts = Counter(number for number, _ in decisions())
    assert counts
    assert [number for number, count in counts.items() if count > 1] == []


def test_each_decision_has_date_problem_decision_and_place() -> None:
    for number, text in decisions():
        assert _HEADING.match(f"### {text}"), number
        assert _DATE.search(text), number
        for part in ("Problem", "Decision", "Where"):
            assert text.count(f"- **{part}.** ") == 1, f"{number}: {part}"


def test_decisions_cited_in_code_exist() -> None:
    known = {number for number, _ in decisions()}
    # Numbers of decisions that others replaced stand in the one that replaced them.
    replaced = set(re.findall(r"· in force; replaces (D\d+)$", _all_designs(), re.MULTILINE))
    assert not known & replaced
    unknown = []
    for path in sources():
        if path.suffix not in (".py", ".c", ".h", ".md") or path == Path(__file__):
            continue
        for at, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if "noqa" in line:  # rules of ruff's have such names, too
                continue
            unknown += [
                f"{path.relative_to(ROOT)}:{at}: {number}"
                for number in _NUMBER.findall(line)
                if number not in known | replaced
            ]
    assert unknown == []


def _all_designs() -> str:
    return "".join(page.read_text(encoding="utf-8") for page in DESIGN)


@every_page
def test_paths_in_the_design_exist(page: Path) -> None:
    names = {path.name for path in sources()}
    named = {
        word
        for word in _QUOTED.findall(page.read_text(encoding="utf-8"))
        if "/" in word or word.endswith(_KINDS)
    }
    assert named
    assert [word for word in sorted(named) if not is_there(word, names)] == []


@every_page
def test_names_behind_paths_occur_in_those_files(page: Path) -> None:
    for path, names in _NAMES.findall(page.read_text(encoding="utf-8")):
        found = next((base / path for base in (ROOT, CORE) if (base / path).is_file()), None)
        assert found, path
        text = found.read_text(encoding="utf-8")
        for name in re.findall(r"`([^`]+)`", names):
            last = re.split(r"[. ]", name)[-1]
            assert re.search(rf"\b{last}\b", text), f"{path}: {name}"


@every_page
def test_links_in_the_design_exist(page: Path) -> None:
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        assert "://" in link or (page.parent / link).exists(), link


def test_architecture_shows_what_each_room_may_import() -> None:
    shown: dict[str, set[str]] = {}
    for room, cell in _ROOM.findall(MAP.read_text(encoding="utf-8")):
        shown[room] = set(shown) if cell == "all above" else set(filter(None, cell.split(", ")))
    rooms = {name: set(below) - {"errors"} for name, below in MAY_IMPORT.items()}
    assert shown == {name: below for name, below in rooms.items() if name in shown}
    assert {name for name in rooms if (CORE / name).is_dir()} == set(shown)


def test_architecture_names_each_room_and_each_page_of_decisions() -> None:
    text = MAP.read_text(encoding="utf-8")
    # A folder without sources may be left of another version.
    sources = [one for suffix in ("py", "h") for one in CORE.rglob(f"*/*.{suffix}")]
    rooms = {one.relative_to(CORE).parts[0] for one in sources}
    assert [room for room in sorted(rooms) if f"`{room}/" not in text] == []
    assert [page.name for page in DESIGN if f"(docs/design/{page.name})" not in text] == []
