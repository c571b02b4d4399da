"""What a check of the conformance kit looks at, and what it may come to."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import attrs

from tcplat_core.errors import PluginError, TcplatError, in_a_line, is_the_users
from tcplat_core.plugin.options import Kind, Option, Options, read_options
from tcplat_core.plugin.options import path as path_kind
from tcplat_core.plugin.specs import ProbeSpec, SinkSpec

from .trial_process import Trial

Verdict = Literal["passed", "failed", "not checked"]


class Fault(Exception):  # noqa: N818 - it is what the plugin has, not what went wrong here
    """The plugin breaks a promise: one sentence that names the fault and what mends it."""


class NotChecked(Exception):  # noqa: N818 - the same
    """The check cannot be made here: why."""


@attrs.frozen
class Outcome:
    """One check of one plugin.

    Args:
        check: Its name.
        verdict: passed, failed, or not checked: what could not be looked at has not passed.
        why: Where it failed, the fault and what mends it; where it was not checked, why not.
    """

    check: str
    verdict: Verdict
    why: str = ""


@attrs.frozen(kw_only=True)
class Subject:
    """A probe or a sink under examination, with the options it is examined with.

    Args:
        spec: What the plugin offers.
        given: Options, as the user would write them.
        trial: Gives a process that may load programs, or None where there is none.
    """

    spec: ProbeSpec | SinkSpec
    given: Mapping[str, str]
    trial: Callable[[], Trial | None] = lambda: None
    folder: str = attrs.field(factory=lambda: os.path.realpath("/proc/self/cwd"))
    """Where it was asked for: from there go paths that the user has given."""
    known: dict[str, Any] = attrs.field(factory=dict, init=False)
    """What one check has found out and another needs, too."""

    @property
    def kind(self) -> str:
        """A word: probe or sink."""
        return "probe" if isinstance(self.spec, ProbeSpec) else "sink"

    def options(self) -> Options:
        """Return the given options, the examples of required ones, and the defaults.

        Raises:
            UsageError: Something that was given does not convert.
        """
        return read_options(f"{self.kind} {self.spec.name}", self.spec.options, self.texts)

    @property
    def texts(self) -> dict[str, str]:
        """The options that it is examined with, as the user would write them; no defaults."""
        examples = {one.name: one.example for one in self.spec.options if one.required}
        return {**examples, **self.given}

    def paths(self, folder: str) -> dict[str, Any]:
        """Each option that is a path, with the value of one within a folder instead.

        A file that the user has named is there as a copy: it may be one to read.

        Args:
            folder: Where output may go.
        """
        found: dict[str, Any] = {}
        for option in self.spec.options:
            text = self.texts.get(option.name)
            if text is None or not is_path(option, text):
                continue
            inside = Path(folder, Path(text).name or option.name)
            real = Path(self.folder, text)
            if option.name in self.given and real.is_file():
                shutil.copyfile(real, inside)
            with of_the_plugin():
                found[option.name] = option.convert(str(inside))
        return found


class RaisedError(Exception):
    """Code of the plugin's raised something that it must not raise.

    Args:
        error: It, in words.
    """


@contextlib.contextmanager
def of_the_plugin() -> Iterator[None]:
    """Run code of the plugin's: what it raises is its own, and not the kit's.

    Raises:
        NotChecked: A TcplatError: it says why it cannot be tried here.
        RaisedError: Anything else, also where the core has put it into words already (blaming()).
    """
    try:
        yield
    except PluginError as error:
        if error.__cause__ is not None:
            raise RaisedError(in_a_line(error.__cause__)) from error
        raise NotChecked(str(error)) from error
    except TcplatError as error:
        raise NotChecked(str(error)) from error
    except BaseException as error:
        if is_the_users(error):
            raise
        raise RaisedError(in_a_line(error)) from error


Check = Callable[[Subject], None]
"""Returns where all is well. Raises Fault, NotChecked or RaisedError; all else is the kit's own."""


def is_path(option: Option, text: str) -> bool:
    """Whether an option is the path of a file: by its kind, its metavar, or what is written."""
    if isinstance(option.convert, Kind):
        return option.convert is path_kind
    metavars = {"FILE", "PATH", "DIR", "FOLDER", "DATABASE", "SOCKET"}
    return option.metavar in metavars or text.startswith(("/", "./", "../", "~"))
