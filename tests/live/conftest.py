"""Live tests: real TCP over `lo` and over namespaces of the test, seen through a real tcplat.

A worker of pytest-xdist has a network namespace and ports of its own. Tests marked `alone` are not
for it: they measure time, or look at more than their own rows.

Environment: TCPLAT_ATTACH names the mechanism (auto), TCPLAT_SLOW how many times slower
this machine is than the reference (1), TCPLAT_REQUIRE_ROOT=1 fails instead of skips without root,
TCPLAT_LONG=1 is the long form of some: docs/design/tests.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from .harness import (
    BLACKHOLE,
    SLOW,
    Listener,
    PidFile,
    Puppet,
    Tcplat,
    Traffic,
    Watched,
    network,
    set_apart,
)
from .packages import wheel as built_wheel

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.root)
            item.add_marker(pytest.mark.timeout(600 * SLOW))


@pytest.fixture(autouse=True, scope="session")
def _root() -> None:
    if os.geteuid() == 0:
        worker = os.environ.get("PYTEST_XDIST_WORKER")
        if worker:
            set_apart(int(worker[2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
        return
    if os.environ.get("TCPLAT_REQUIRE_ROOT") == "1":
        pytest.fail("live tests need root, and TCPLAT_REQUIRE_ROOT=1 is set")
    pytest.skip("live tests need root")


@pytest.fixture(scope="session")
def wheel(_root: None) -> Path:
    """Return a wheel of this tree; see packages.wheel()."""
    return built_wheel()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def start_tcplat(tmp_path: Path, stack: ExitStack) -> Callable[..., Tcplat]:
    """Start `tcplat run` with these arguments; see Tcplat.start()."""

    def start(*arguments: str, **how: Any) -> Tcplat:
        run = Tcplat.start(how.pop("folder", tmp_path), *arguments, **how)
        stack.callback(run.kill)
        return run

    return start


@pytest.fixture
def running_tcplat(start_tcplat: Callable[..., Tcplat]) -> Callable[..., Tcplat]:
    """Start the same, and wait until everything is attached."""
    return lambda *arguments, **how: start_tcplat(*arguments, **how).wait_ready()


@pytest.fixture
def puppet(stack: ExitStack) -> Callable[..., Puppet]:
    """Start a process that runs what a test sends it; see Puppet.start()."""

    def start(**how: Any) -> Puppet:
        one = Puppet.start(**how)
        stack.callback(one.end)
        return one

    return start


@pytest.fixture
def listener(stack: ExitStack) -> Callable[..., Listener]:
    """Open a listening socket; see Listener.open()."""

    def start(*what: Any) -> Listener:
        one = Listener.open(*what)
        stack.callback(one.close)
        return one

    return start


@pytest.fixture
def server(listener: Callable[..., Listener]) -> Listener:
    """Yield a listening socket on 127.0.0.1."""
    return listener()


@pytest.fixture
def client(puppet: Callable[..., Puppet]) -> Puppet:
    """Yield a process that runs what a test sends it."""
    return puppet()


@pytest.fixture(scope="session")
def watched(_root: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Yield two processes and a tcplat that traces them, shared by all tests that need no other."""
    with ExitStack() as stack:
        client, stranded = Puppet.start(), Puppet.start(alone=True)
        stack.callback(client.end)
        stack.callback(stranded.end)
        network(stranded, script=BLACKHOLE)
        run = Tcplat.start(tmp_path_factory.mktemp("watched"), "-p", f"{client.pid},{stranded.pid}")
        stack.callback(run.kill)
        fence = Listener.open()
        stack.callback(fence.close)
        yield Watched(client, stranded, run.wait_ready(), fence)
        outcome = run.stop()
        assert outcome.returncode == 0
        assert outcome.report["dropped"] == 0
        # No other process's rows came in between.
        assert {row["pid"] for row in outcome.rows} <= {client.pid, stranded.pid}


@pytest.fixture
def traffic(watched: Watched, server: Listener) -> Traffic:
    """Return the rows of the traced processes' connections to `server`."""
    return watched.to(server.port)


@pytest.fixture
def stranded(puppet: Callable[..., Puppet]) -> Puppet:
    """Yield a puppet in a network where 10.77.0.2 and fd77::2 never answer."""
    one = puppet(alone=True)
    network(one, script=BLACKHOLE)
    return one


@pytest.fixture
def pid_file(tmp_path: Path, stack: ExitStack) -> PidFile:
    """Return a pid file for a command that tcplat starts and has to end."""
    one = PidFile(tmp_path / "pid")
    stack.callback(one.kill)
    return one
