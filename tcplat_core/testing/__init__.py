"""Fakes for tests, and the conformance kit: for tcplat's own tests and for those of a plugin.

Rows, a sink that keeps them, and a kernel side that needs no kernel::

    from tcplat_core.testing import make_event

    def test_my_sink_shows_the_bytes():
        sink.write([make_event(bytes=42)])

The conformance kit of `tcplat plugins check NAME`, as one test per check. Where tcplat is
installed, pytest knows the mark and the fixture (:mod:`tcplat_core.testing.pytest_plugin`)::

    @pytest.mark.tcplat_plugin("my_probe")
    def test_plugin_conforms(tcplat_check):
        tcplat_check()
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .check import Outcome
    from .conformance import check_plugin
    from .fake_rows import RecordingSink, make_event, make_record, make_row
    from .kernel import FakeArray, FakeBooks, FakeLoader, FakeProbe, FakeRing

__all__ = [
    "FakeArray",
    "FakeBooks",
    "FakeLoader",
    "FakeProbe",
    "FakeRing",
    "Outcome",
    "RecordingSink",
    "check_plugin",
    "make_event",
    "make_record",
    "make_row",
]

_HOMES = ("check", "conformance", "fake_rows", "kernel")


# Names are imported when they are first used: pytest loads the plugin in this package
# wherever tcplat is installed, also for tests that have nothing to do with it.
def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in _HOMES:
            module = import_module(f".{home}", __name__)
            if name in vars(module):
                return vars(module)[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
