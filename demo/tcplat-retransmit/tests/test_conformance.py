"""The probe conforms to what tcplat requires of a probe: one test for each check."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.tcplat_plugin("tcp_retransmit:min_rto_us=1000")
def test_plugin_conforms(tcplat_check: Callable[[], None]) -> None:
    tcplat_check()
