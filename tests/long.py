"""Tests that take long and seldom find anything are short; with TCPLAT_LONG=1 they are long."""

from __future__ import annotations

import os

LONG = os.environ.get("TCPLAT_LONG") == "1"
