"""How many examples hypothesis tries where a test does not say so."""

from __future__ import annotations

from hypothesis import settings

from .long import LONG

# No deadline: the first example of a test may have to import what all of them use.
settings.register_profile("tcplat", max_examples=500 if LONG else 50, deadline=None)
settings.load_profile("tcplat")
