"""What holds for all unit tests."""

from __future__ import annotations

import pytest

import tests.examples  # noqa: F401 - it sets hypothesis up
from tcplat_core.run import privileges


@pytest.fixture(autouse=True)
def _still_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep commands that run in this process from dropping the privileges of other tests."""
    monkeypatch.setattr(privileges, "drop", lambda: None)


@pytest.fixture(autouse=True)
def _as_wide_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """No COLUMNS: readline sets it in the process that starts pytest-xdist's workers."""
    monkeypatch.delenv("COLUMNS", raising=False)
