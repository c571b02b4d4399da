"""A plugin for pytest, which finds it where tcplat is installed: one test per check of a plugin.

In the tests of a plugin::

    @pytest.mark.tcplat_plugin("my_probe:option=value")
    def test_plugin_conforms(tcplat_check):
        tcplat_check()

Required options have their example as value, unless the mark gives another. Checks that
need root are skipped without it, or with ``root=False`` in the mark. The mark may name several.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tcplat_core.errors import TcplatError

_SUBJECTS = pytest.StashKey[dict[str, list[Any]]]()


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark."""
    config.addinivalue_line(
        "markers",
        "tcplat_plugin(*choices, root=True): the probes and sinks that tcplat_check checks, each "
        "NAME or NAME:key=value; root=False: load and attach nothing",
    )
    config.stash[_SUBJECTS] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test for each check of the plugin that the mark names."""
    if "tcplat_check" not in metafunc.fixturenames:
        return
    mark = metafunc.definition.get_closest_marker("tcplat_plugin")
    if mark is None:
        raise pytest.Collector.CollectError(
            f"{metafunc.definition.nodeid} uses tcplat_check, and no mark names the plugin: "
            '@pytest.mark.tcplat_plugin("NAME")'
        )
    from . import conformance, trial_process  # noqa: PLC0415 - most tests do not need it

    known = metafunc.config.stash[_SUBJECTS]
    as_root = trial_process.as_root if mark.kwargs.get("root", True) else lambda: None
    made = []
    for choice in mark.args:
        key = f"{choice} {as_root is trial_process.as_root}"
        if key not in known:
            try:
                known[key] = conformance.subjects(choice, trial=as_root)
            except TcplatError as error:
                raise pytest.Collector.CollectError(str(error)) from error
        made += known[key]
    metafunc.parametrize(
        "tcplat_check",
        [
            pytest.param(
                (subject, name, check),
                id=f"{subject.spec.name}: {name}" if len(made) > 1 else name,
            )
            for subject in made
            for name, check in conformance.checks(subject).items()
        ],
        indirect=True,
    )


@pytest.fixture
def tcplat_check(request: pytest.FixtureRequest) -> Callable[[], None]:
    """Return a function that makes one check: it fails, or skips, with the reason."""
    from . import conformance  # noqa: PLC0415 - see above

    subject, name, check = request.param

    def make() -> None:
        __tracebackhide__ = True
        outcome = conformance.run(name, check, subject)
        if outcome.verdict == "failed":
            pytest.fail(f"{subject.kind} {subject.spec.name}: {outcome.why}", pytrace=False)
        if outcome.verdict == "not checked":
            pytest.skip(outcome.why)

    return make
