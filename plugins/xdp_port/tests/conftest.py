"""Packet tests: made and mutated frames through BPF_PROG_TEST_RUN. They need root, no network."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from .rig import Rig


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "load" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.root)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print figures; they come with the reports, as tests may run in other processes (xdist)."""
    figures = [
        figure
        for report in terminalreporter.getreports("passed")
        for name, figure in report.user_properties
        if name == "xdp_port"
    ]
    if figures:
        terminalreporter.section("xdp_port", sep="-")
    for figure in figures:
        terminalreporter.write_line(figure)


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Print a figure at the end of the test run."""
    return lambda figure: record_property("xdp_port", figure)


@pytest.fixture(scope="session")
def load() -> Iterator[Callable[..., Rig]]:
    """Load the program for these options; see Rig.load()."""
    if os.geteuid() != 0:
        if os.environ.get("TCPLAT_REQUIRE_ROOT") == "1":
            pytest.fail("packet tests need root, and TCPLAT_REQUIRE_ROOT=1 is set")
        pytest.skip("packet tests need root")
    with ExitStack() as stack:

        def load(**options: str | int) -> Rig:
            rig = Rig.load(**options)  # type: ignore[arg-type]  # ring_bytes is the only int
            stack.callback(rig.close)
            return rig

        yield load


@pytest.fixture(scope="session")
def rig(load: Callable[..., Rig]) -> Rig:
    """Return the program for packets from and to port 9999."""
    return load()


@pytest.fixture(scope="session")
def everything(load: Callable[..., Rig]) -> Rig:
    """Return the program for all TCP packets."""
    return load(port="all")
