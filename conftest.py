"""Tests hear the signals that their caller ignores (nohup, `&` in a script, cron)."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """Set ignored signals back: what is ignored here is inherited by all that the tests start."""
    handlers = {
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
        signal.SIGQUIT: signal.SIG_DFL,
        signal.SIGTERM: signal.SIG_DFL,
    }
    for number, handler in handlers.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
