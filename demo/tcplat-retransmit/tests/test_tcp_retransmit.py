"""Descriptions of the probe, and how it finds the kernel's HZ."""

from __future__ import annotations

import gzip
import re
import time
from pathlib import Path

import pytest
from tcplat_retransmit import plugin
from tcplat_retransmit.plugin import defines, describe, kernel_hz

from tcplat_core import CannotRunError, Moment

CONFIG = Path("/proc/config.gz")


def words(point: str, flags: str, *, err: int = 0, empty: bool = False) -> str:
    return describe(Moment(point, "TCP_ESTABLISHED", None, err, empty, flags))


@pytest.mark.parametrize(
    ("described", "as_"),
    [
        (words("retransmit", "PSH|ACK"), "data again"),
        (words("retransmit", "SYN", empty=True), "SYN again"),
        (words("retransmit", "FIN|ACK", empty=True), "FIN again"),
        (words("retransmit", "FIN|PSH|ACK"), "data, FIN again"),
        (words("not_sent", "ACK", err=1), "EPERM"),
        (words("not_sent", "ACK"), "dropped by host"),
    ],
)
def test_row_is_described_in_plain_words(described: str, as_: str) -> None:
    assert described == as_


@pytest.mark.skipif(not CONFIG.exists(), reason="the kernel does not show its configuration")
def test_hz_matches_the_kernel_config() -> None:
    config = gzip.decompress(CONFIG.read_bytes()).decode()
    found = re.search(r"^CONFIG_HZ=(\d+)$", config, re.MULTILINE)
    assert found
    assert kernel_hz() == int(found[1])


@pytest.mark.parametrize("hz", [100, 250, 300, 1000, 1024])
def test_hz_follows_from_the_length_of_a_tick(hz: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tick_ns = (10**9 + hz // 2) // hz
    monkeypatch.setattr(time, "clock_getres", lambda _: tick_ns / 1e9)
    assert kernel_hz() == hz
    assert defines({"min_rto_us": 5}) == {"RETRANSMIT_MIN_RTO_US": 5, "RETRANSMIT_HZ": hz}


@pytest.mark.parametrize("tick_s", [0.0, 1e-9, 1.0, 0.0031])
def test_high_resolution_coarse_clock_gives_no_hz(
    tick_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No RTO is better than a wrong one."""
    monkeypatch.setattr(time, "clock_getres", lambda _: tick_s)
    assert kernel_hz() is None
    assert "RETRANSMIT_HZ" not in defines({"min_rto_us": 0})
    with pytest.raises(CannotRunError, match="leave min_rto_us out"):
        defines({"min_rto_us": 1})


@pytest.mark.parametrize("text", ["", "-1", "1ms", "1e3"])
def test_rto_option_must_be_a_number_of_microseconds(text: str) -> None:
    (option,) = plugin.OPTIONS
    with pytest.raises(ValueError, match="microseconds"):
        option.convert(text)
