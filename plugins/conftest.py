"""What holds for the tests of all built-in plugins."""

from __future__ import annotations

import tests.examples  # noqa: F401 - it sets hypothesis up
