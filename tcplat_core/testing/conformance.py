"""The conformance kit: one named check for each rule of plugins; most need no root.

``tcplat plugins check NAME`` shows it, :mod:`tcplat_core.testing.pytest_plugin` makes a test of
each check, and :func:`check_plugin` returns the outcomes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs

from tcplat_core.errors import UsageError, in_a_line, is_the_users
from tcplat_core.kernel.remover import passing_folder
from tcplat_core.plugin.options import Option, parse_choice
from tcplat_core.registry.find import Plugins

from . import probe_checks, program_checks, sink_checks
from .check import Check, Fault, NotChecked, Outcome, RaisedError, Subject
from .trial_process import Trial


def checks(subject: Subject) -> dict[str, Check]:
    """Return all checks for a probe or a sink, by name."""
    if subject.kind == "probe":
        of_kind = {**probe_checks.checks_of(subject), **program_checks.checks_of(subject)}
    else:
        of_kind = sink_checks.checks_of(subject)
    return {"help": _help, "options": _options, **of_kind}


def run(name: str, check: Check, subject: Subject) -> Outcome:
    """Make one check, in a folder of its own: relative paths of the plugin lie there."""
    try:
        with _own_folder():
            check(subject)
    except Fault as fault:
        return Outcome(name, "failed", str(fault))
    except (NotChecked, UsageError) as reason:
        return Outcome(name, "not checked", str(reason))
    except RaisedError as error:
        return Outcome(name, "failed", f"it raises {error}: it must not")
    except BaseException as error:
        if is_the_users(error):
            raise
        if not isinstance(error, Exception):  # the kit raises none of these
            return Outcome(name, "failed", f"it raises {in_a_line(error)}: it must not")
        # An error of the kit must not be reported as the plugin's.
        why = f"the kit itself failed ({in_a_line(error)}): a bug of tcplat, please report it"
        return Outcome(name, "not checked", why)
    return Outcome(name, "passed")


@contextlib.contextmanager
def _own_folder() -> Iterator[None]:
    """Work in an empty folder, which is removed with its content."""
    back = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with passing_folder() as folder:
            os.chdir(folder)
            try:
                yield
            finally:
                os.fchdir(back)
    finally:
        os.close(back)


def subjects(
    choice: str,
    plugins: Plugins | None = None,
    trial: Callable[[], Trial | None] = lambda: None,
) -> list[Subject]:
    """Return the probe, the sink, or both, of a name.

    Args:
        choice: ``NAME`` or ``NAME:key=value,...``.
        plugins: Where to look; all that are installed unless given.
        trial: See :class:`Subject`.

    Raises:
        PluginError: There is none, or it is broken.
        UsageError: An option that it does not have.
    """
    name, given = parse_choice(choice)
    made = [
        Subject(spec=spec, given=given, trial=trial)
        for _, spec in (plugins or Plugins.load()).named(name)
    ]
    for subject in made:
        subject.options()
    return made


def check_plugin(
    choice: str,
    plugins: Plugins | None = None,
    trial: Callable[[], Trial | None] = lambda: None,
) -> Iterator[tuple[Subject, Outcome]]:
    """Make all checks of a plugin, one after the other.

    Args:
        choice: ``NAME`` or ``NAME:key=value,...``.
        plugins: Where to look; all that are installed unless given.
        trial: See :class:`Subject`.

    Raises:
        PluginError: There is no such plugin, or it is broken.
        UsageError: An option that it does not have.
    """
    for subject in subjects(choice, plugins, trial):
        for name, check in checks(subject).items():
            yield subject, run(name, check, subject)


def _help(subject: Subject) -> None:
    """Check that the plugin and each option have a help text of one line."""
    texts = {"summary": subject.spec.summary}
    texts |= {f"the help of option {one.name}": one.help for one in subject.spec.options}
    for what, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise Fault(f"{what} is empty: say in one line what it is for")
        if not text.isprintable():
            raise Fault(f"{what} is unprintable, or has more than one line: {text!r}")


_RUBBISH = (
    *("", " ", "?", "-1", "0", "0x", "1e999", "nan", "9" * 30, "\x00", "\x1b[31m", "\n", "é", "٣"),
    *("a+b", "+", "/", "..", "[", "%s", "::1", "1.2.3.4/99", "True", "None", "x" * 5000),
)


def _options(subject: Subject) -> None:
    """Check names and defaults of options, and that they refuse invalid values with a reason."""
    names = [one.name for one in subject.spec.options]
    if doubled := _doubled(names):
        raise Fault(f"it has two options named {doubled!r}: rename one")
    for option in subject.spec.options:
        _check_default(option)
        _check_rubbish(option)


def _check_default(option: Option) -> None:
    default = option.default
    if isinstance(default, str | int | float) and not option.required:
        # True is written "true".
        text = str(default).lower() if isinstance(default, bool) else str(default)
        try:
            value = option.convert(text)
        except BaseException as error:
            if is_the_users(error):
                raise
            raise Fault(
                f"the default of option {option.name}, {default!r}, does not convert "
                f"({in_a_line(error)}): give a default that a user could write"
            ) from error
        if value != default:
            raise Fault(
                f"the default of option {option.name} is {default!r}, and what a user writes "
                f"as {text!r} becomes {value!r}: give the converted value"
            )


def _check_rubbish(option: Option) -> None:
    for rubbish in _RUBBISH:
        try:
            option.convert(rubbish)
        except ValueError as error:
            if not str(error):
                raise Fault(
                    f"option {option.name}={rubbish[:20]!r} is refused without a reason: "
                    "let its ValueError say which values are valid"
                ) from error
        except BaseException as error:
            if is_the_users(error):
                raise
            raise Fault(
                f"option {option.name}={rubbish[:20]!r} raises {in_a_line(error)}: "
                "its converter has to raise ValueError, with a reason for the user"
            ) from error


def _doubled(names: Sequence[str]) -> str | None:
    return next((name for name in names if names.count(name) > 1), None)


def as_json(outcomes: Sequence[tuple[Subject, Outcome]]) -> list[dict[str, Any]]:
    """Return the objects of ``tcplat plugins check --json``: one per probe or sink."""
    by_spec: dict[int, tuple[Subject, list[Outcome]]] = {}
    for subject, outcome in outcomes:
        by_spec.setdefault(id(subject), (subject, []))[1].append(outcome)
    return [
        {
            "name": subject.spec.name,
            "kind": subject.kind,
            "options": subject.texts,
            "passed": sum(one.verdict == "passed" for one in of_it),
            "failed": sum(one.verdict == "failed" for one in of_it),
            "not_checked": sum(one.verdict == "not checked" for one in of_it),
            "checks": [attrs.asdict(one) for one in of_it],
        }
        for subject, of_it in by_spec.values()
    ]


def as_text(outcomes: Sequence[tuple[Subject, Outcome]]) -> str:
    """Return a line for each check, and the sums."""
    lines = []
    for one in as_json(outcomes):
        options = ",".join(f"{name}={text}" for name, text in one["options"].items())
        lines.append(f"{one['kind']} {one['name']}" + (options and f":{options}"))
        for check in one["checks"]:
            shown = "FAILED" if check["verdict"] == "failed" else check["verdict"]
            why = f": {check['why']}" if check["why"] else ""
            lines.append(f"  {shown:11}  {check['check']}{why}")
        lines.append(
            f"{one['passed']} passed, {one['failed']} failed, {one['not_checked']} not checked"
        )
    return "\n".join(lines)
