"""What a check of the conformance kit gets, and its possible outcomes."""

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


class Fault(Exception):  # noqa: N818 - the plugin has it: the check itself has worked
    """The plugin fails a check: one sentence that names the fault and the remedy."""


class NotChecked(Exception):  # noqa: N818 - the same
    """The check cannot be made here: the reason."""


@attrs.frozen
class Outcome:
    """One check of one plugin.

    Args:
        check: Its name.
        verdict: passed, failed, or not checked: a check that could not be made has not passed.
        why: If it failed, the fault and the remedy; if it was not checked, the reason.
    """

    check: str
    verdict: Verdict
    why: str = ""


@attrs.frozen(kw_only=True)
class Subject:
    """A probe or a sink under examination, with the options it is examined with.

    Args:
        spec: The probe or sink.
        given: Options, as the user would write them.
        trial: Returns a process that may load programs, or None without root.
    """

    spec: ProbeSpec | SinkSpec
    given: Mapping[str, str]
    trial: Callable[[], Trial | None] = lambda: None
    folder: str = attrs.field(factory=lambda: os.path.realpath("/proc/self/cwd"))
    """The folder in which the check was started: relative paths of the user begin there."""
    known: dict[str, Any] = attrs.field(factory=dict, init=False)
    """Results of one check that another one needs as well."""

    @property
    def kind(self) -> str:
        """The word probe, or sink."""
        return "probe" if isinstance(self.spec, ProbeSpec) else "sink"

    def options(self) -> Options:
        """Return the given options, the examples of required ones, and the defaults.

        Raises:
            UsageError: A given value does not convert.
        """
        return read_options(f"{self.kind} {self.spec.name}", self.spec.options, self.texts)

    @property
    def texts(self) -> dict[str, str]:
        """The options that it is examined with, as the user would write them; no defaults."""
        examples = {one.name: one.example for one in self.spec.options if one.required}
        return {**examples, **self.given}

    def paths(self, folder: str) -> dict[str, Any]:
        """Return each option that is a path, with a path in `folder` as its value.

        A file that the user has named is copied there: the plugin may read it.

        Args:
            folder: The folder for output.
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
    """Code of the plugin raised an exception that it must not raise.

    Args:
        error: The exception as a text.
    """


@contextlib.contextmanager
def of_the_plugin() -> Iterator[None]:
    """Run code of the plugin: its exceptions count as the plugin's, not as the kit's.

    Raises:
        NotChecked: For a TcplatError: the plugin says why it does not work here.
        RaisedError: For any other, also if the core has already converted it (blaming()).
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
"""Returns if the check passes; raises Fault, NotChecked or RaisedError if not. Any other exception
is an error of the kit."""


def is_path(option: Option, text: str) -> bool:
    """Return whether an option is the path of a file: by its kind, its metavar, or its value."""
    if isinstance(option.convert, Kind):
        return option.convert is path_kind
    metavars = {"FILE", "PATH", "DIR", "FOLDER", "DATABASE", "SOCKET"}
    return option.metavar in metavars or text.startswith(("/", "./", "../", "~"))
