"""tcp_service: descriptions, hook points and their arguments."""

from __future__ import annotations

import errno
import itertools
import re
from pathlib import Path

import pytest
from tcplat_tcp_service.plugin import HISTOGRAMS, POINTS, ServiceEvent, describe

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
    func: str = "",
) -> str:
    return describe(Moment(point, state, old_state, err, empty, func=func))


def test_tcp_service_is_registered() -> None:
    spec = Plugins.load().probe("tcp_service")
    assert spec.points == POINTS
    assert spec.event is ServiceEvent


@pytest.mark.parametrize(
    ("described", "as_"),
    [
        (words("rx_ip", empty=False), "packet arrives"),
        (words("rx_tcp", empty=False), "reaches socket"),
        (words("state", "TCP_LISTEN", "TCP_CLOSE"), "listening"),
        (words("state", "TCP_ESTABLISHED", "TCP_SYN_RECV"), "handshake done"),
        (words("state", "TCP_CLOSE_WAIT", "TCP_ESTABLISHED"), "client sent FIN"),
        (words("state", "TCP_CLOSE", "TCP_LAST_ACK"), "closed"),
        (words("state", "TCP_CLOSE", "TCP_ESTABLISHED", errno.ECONNRESET), "ECONNRESET"),
        (words("state", "TCP_CLOSE", "TCP_ESTABLISHED", errno.ETIMEDOUT), "timed out"),
        (words("state", "TCP_SYN_RECV", None), "segment handled"),
        (words("state", None, "TCP_ESTABLISHED"), "new state"),
        (words("accept"), "accepted"),
        (words("accept", func="syscalls:sys_exit_accept4"), "accepted"),
        (words("accept", func="inet_csk_accept"), "accepted"),
        (words("accept", func="sock:sock_recv_length"), "accept not seen"),
        (words("accept", func="tcp_recvmsg"), "accept not seen"),
        (words("recv", func="sock:sock_recv_length", empty=False), "message read"),
        (words("ready", empty=False), "reader woken"),
        (words("recv", empty=False), "message read"),
        (words("recv", empty=True), "end of stream"),
        (words("send", empty=False), "reply sent"),
        (words("send_short", empty=False), "not all taken"),
        (words("close", "TCP_CLOSE"), "socket gone"),
    ],
)
def test_row_description_matches(described: str, as_: str) -> None:
    assert described == as_


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
    assert {way.mechanism for way in point.ways} == {"fentry", "kprobe", "tracepoint"}


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.point)
def test_every_hook_declares_the_arguments_read(point: HookPoint) -> None:
    for way in point.ways:
        for hook in way.hooks:
            unread = hook.mechanism == "kretprobe" or hook.func.startswith("syscalls:")
            # At the entry of accept only the calling thread is noted.
            assert hook.args or unread or hook.program == "kp_accept", hook


def test_first_use_by_any_mechanism_has_its_own_accept_hook() -> None:
    source = Plugins.load().probe("tcp_service").source
    (accept,) = (point for point in POINTS if point.point == "accept")
    cases = re.findall(r"case HOOK_(\w+):\s+return HOOK_accepted_(\w+);", source)
    assert cases == [(program, program) for program, _ in cases]
    assert {hook.by for hook in accept.also} == dict(cases).keys()
    uses = {
        (point.point, way.mechanism)
        for point in POINTS
        for way in point.ways
        if {hook.program for hook in way.hooks} & dict(cases).keys()
    }
    assert uses == set(
        itertools.product(("state", "recv", "send"), ("fentry", "kprobe", "tracepoint"))
    )


def test_readme_has_every_point_and_every_reporting_function() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    table = [line for line in readme.splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in table] == [point.point for point in POINTS]
    for line, point in zip(table, POINTS, strict=True):
        for hooks in (*(way.hooks for way in point.ways), point.also):
            for hook in hooks:
                assert hook.quiet or f"{hook.func.removeprefix('syscalls:')}`" in line, hook


def test_readme_has_every_histogram() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    shown = [line.split("`")[1] for line in readme.splitlines() if line.startswith("- `")]
    assert [histogram.name for histogram in HISTOGRAMS] == shown[: len(HISTOGRAMS)]
