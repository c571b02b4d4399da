"""tcp_client: descriptions, hook points and their arguments."""

from __future__ import annotations

import errno
import itertools
from pathlib import Path

import pytest
from tcplat_tcp_client.plugin import HISTOGRAMS, POINTS, describe

from tcplat_core import HookPoint, Moment
from tcplat_core.event.text import TCP_STATES
from tcplat_core.registry.find import Plugins


def words(
    point: str,
    state: str | None = "TCP_ESTABLISHED",
    old_state: str | None = None,
    err: int = 0,
    *,
    empty: bool | None = None,
) -> str:
    return describe(Moment(point, state, old_state, err, empty))


def test_tcp_client_is_registered() -> None:
    spec = Plugins.load().probe("tcp_client")
    assert spec.points == POINTS
    assert "tp_connect" in spec.source


@pytest.mark.parametrize(
    ("described", "as_"),
    [
        (words("connect", "TCP_SYN_SENT"), "SYN goes out"),
        (words("connect", "TCP_CLOSE", err=errno.EADDRNOTAVAIL), "EADDRNOTAVAIL"),
        (words("state", "TCP_SYN_SENT", "TCP_CLOSE"), "sending SYN"),
        (words("state", "TCP_ESTABLISHED", "TCP_SYN_SENT"), "connected"),
        (words("state", "TCP_CLOSE", "TCP_SYN_SENT", errno.ECONNREFUSED), "refused"),
        (words("state", "TCP_CLOSE", "TCP_SYN_SENT", errno.ETIMEDOUT), "timed out"),
        (words("state", "TCP_CLOSE", "TCP_SYN_SENT", errno.EHOSTUNREACH), "EHOSTUNREACH"),
        (words("state", "TCP_CLOSE", "TCP_SYN_SENT", 9999), "errno 9999"),
        (words("state", "TCP_CLOSE", "TCP_SYN_SENT"), "given up"),
        (words("state", "TCP_CLOSE", "TCP_LAST_ACK"), "closed"),
        (words("state", "TCP_CLOSE_WAIT", "TCP_ESTABLISHED"), "peer sent FIN"),
        (words("state", "TCP_CLOSE", "TCP_ESTABLISHED", errno.ECONNRESET), "ECONNRESET"),
        (words("state", None), "new state"),
        (words("send", empty=False), "message sent"),
        (words("send_short", empty=False), "not all taken"),
        (words("recv", empty=False), "message read"),
        (words("recv", empty=True), "end of stream"),
        (words("close", "TCP_CLOSE"), "socket gone"),
    ],
)
def test_row_description_matches(described: str, as_: str) -> None:
    assert described == as_


def test_earlier_error_does_not_describe_a_later_state() -> None:
    assert words("state", "TCP_FIN_WAIT1", "TCP_ESTABLISHED", errno.EPIPE) == "FIN sent"


def test_description_fits_its_column() -> None:
    for point, state, old_state, err, empty in itertools.product(
        [point.point for point in POINTS],
        TCP_STATES,
        TCP_STATES,
        (*errno.errorcode, 0, 65_535),
        (None, False, True),
    ):
        assert 0 < len(words(point, state, old_state, err, empty=empty)) <= 15


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.point)
def test_each_point_works_with_and_without_function_hooks(point: HookPoint) -> None:
    mechanisms = {way.mechanism for way in point.ways}
    assert mechanisms == {"fentry", "kprobe", "tracepoint"}


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.point)
def test_every_hook_declares_the_arguments_read(point: HookPoint) -> None:
    """Only a kretprobe has none."""
    for way in point.ways:
        for hook in way.hooks:
            assert hook.args or hook.mechanism == "kretprobe", hook


def test_readme_has_every_point_and_every_reporting_hook() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    table = [line for line in readme.splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in table] == [point.point for point in POINTS]
    for line, point in zip(table, POINTS, strict=True):
        for way in point.ways:
            for hook in way.hooks:
                assert hook.quiet or f"`{hook.func}`" in line, hook


def test_readme_has_every_histogram() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    shown = [line.split("`")[1] for line in readme.splitlines() if line.startswith("- `")]
    assert [histogram.name for histogram in HISTOGRAMS] == shown[: len(HISTOGRAMS)]
