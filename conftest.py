"""For all tests: signals that the caller ignores, and figures to print at the end."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest


def pytest_configure() -> None:
    """Restore ignored signals (nohup, `&` in a script, cron): what tests start inherits them."""
    handlers = {
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
        signal.SIGQUIT: signal.SIG_DFL,
        signal.SIGTERM: signal.SIG_DFL,
    }
    for number, handler in handlers.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print figures; they come with the reports, as tests may run in other processes (xdist)."""
    figures = [
        figure
        for report in terminalreporter.getreports("passed")
        for name, figure in report.user_properties
        if name == "measured"
    ]
    if figures:
        terminalreporter.section("measured", sep="-")
    for figure in figures:
        terminalreporter.write_line(figure)


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Print a figure at the end of the test run."""
    return lambda figure: record_property("measured", figure)
