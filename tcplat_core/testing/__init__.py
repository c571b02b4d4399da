"""Fakes for tests: rows, a sink that remembers, and a kernel side that needs no kernel.

For tcplat's own tests and for those of a plugin::

    from tcplat_core.testing import make_event

    def test_my_sink_shows_the_bytes():
        sink.write([make_event(bytes=42)])
"""

from .kernel import FakeArray, FakeBooks, FakeLoader, FakeProbe, FakeRing
from .rows import RecordingSink, make_event, make_record

__all__ = [
    "FakeArray",
    "FakeBooks",
    "FakeLoader",
    "FakeProbe",
    "FakeRing",
    "RecordingSink",
    "make_event",
    "make_record",
]
