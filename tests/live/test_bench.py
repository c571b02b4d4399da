"""The bench: empty programs are where those of tcplat are."""

from __future__ import annotations

import os

import pytest

from tests.bench import limit
from tests.bench.programs import attached, empty_programs, hooks_of
from tests.bench.servers import Server, free_ports

pytestmark = pytest.mark.alone  # it puts programs at the hooks of the whole host


def test_empty_programs_are_at_the_hooks_of_the_run() -> None:
    (port,) = free_ports(1)
    server = Server((port,), load=lambda _: NotImplemented)
    (four,) = (variant for variant in limit.VARIANTS if variant.name == "four")
    hooks = hooks_of(four.run(server))
    assert {"raw_tracepoint", "xdp"} <= {hook.kind for hook in hooks}
    with empty_programs(hooks):
        found = attached(os.getpid())
    assert sorted(hook for hook, programs in found.items() for _ in programs) == list(hooks)
    assert attached(os.getpid()) == {}
