"""Options of probes and sinks, and the kinds that convert their texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from tcplat_core.errors import PluginError, UsageError, blaming, message

from .hookpoints import checked_name


@attrs.frozen
class Kind:
    """A type of option. Call it with a text to get the value.

    Args:
        metavar: Placeholder for the value in ``tcplat plugins show``.
        convert: Returns the value, or raises ValueError with what it expects.
        choices: All values, if there are only a few.
    """

    metavar: str
    convert: Callable[[str], Any]
    choices: tuple[str, ...] = ()

    def __call__(self, text: str) -> Any:
        """Return the value of a text."""
        return self.convert(text)


def integer(least: int | None = None, most: int | None = None) -> Kind:
    """Accept a whole number within these bounds."""
    words = "a whole number" + (f" from {least}" if least is not None else "")
    words += f" to {most}" if most is not None else ""

    def convert(text: str) -> int:
        # No bound has more digits, and int() raises at 4,300.
        if not re.fullmatch(r"-?[0-9]{1,40}", text):
            raise ValueError(f"it must be {words}")
        value = int(text)
        if (least is not None and value < least) or (most is not None and value > most):
            raise ValueError(f"it must be {words}")
        return value

    return Kind("N", convert)


def choice(*words: str) -> Kind:
    """Accept one of these words."""

    def convert(text: str) -> str:
        if text not in words:
            raise ValueError(f"it must be one of {', '.join(words)}")
        return text

    return Kind("|".join(words), convert, words)


_HIGHEST_PORT = 65535


def ports(most: int) -> Kind:
    """Accept at most `most` TCP ports, joined by +, as a tuple; ``all`` is the empty tuple."""

    def convert(text: str) -> tuple[int, ...]:
        if text == "all":
            return ()
        words = text.split("+")
        for word in words:
            if not re.fullmatch(r"[0-9]{1,5}", word) or not 0 < int(word) <= _HIGHEST_PORT:
                raise ValueError(f"{word!r} is not a port; write 9999, 80+443 or all")
        if len(words) > most:
            raise ValueError(f"{len(words)} ports given; at most {most}, or all")
        return tuple(dict.fromkeys(map(int, words)))

    return Kind("PORT+PORT|all", convert)


def _boolean(text: str) -> bool:
    if text not in ("yes", "no", "true", "false", "on", "off", "1", "0"):
        raise ValueError("it must be yes or no")
    return text in ("yes", "true", "on", "1")


_MOST_SECONDS = 1e9
"""Some 30 years: as nanoseconds it fits into 64 bits."""
_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}


def _duration(text: str) -> float:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(ns|us|ms|s|m|h)?", text)
    time = float(found[1]) * _SECONDS[found[2] or "s"] if found else _MOST_SECONDS
    if time >= _MOST_SECONDS:
        raise ValueError("it is not a time; write 5, 500ms, 30s, 2m or 1h")
    return time


def _size(text: str) -> int:
    found = re.fullmatch(r"([0-9]{1,20})([KMG]?)", text)
    if not found:
        raise ValueError("it is not a size; write 4096, 64K, 16M or 1G")
    return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]]


def _path(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError("it is not a path")
    return text


path = Kind("FILE", _path)
"""The path of a file, unchanged. The conformance kit recognizes output files by this kind."""
boolean = Kind("yes|no", _boolean, ("yes", "no"))
"""yes or no (true, false, on, off, 1, 0), as a bool."""
duration = Kind("TIME", _duration)
"""``800ns``, ``500us``, ``2.5ms``, ``30``, ``30s``, ``2m``, ``1h``, as seconds."""
size = Kind("SIZE", _size)
"""``4096``, ``64K``, ``16M``, ``1G``, as bytes."""


@attrs.frozen(kw_only=True)
class Option:
    """An option of a probe or sink, given as ``name:key=value,...``.

    Args:
        name: The key.
        help: One line for ``tcplat plugins show``.
        convert: Turns the text into the value: :func:`integer`, :func:`choice`, :func:`ports`,
            `boolean`, `duration`, `size`, or your own function, which raises ValueError with
            what it expects. Default: the text itself.
        default: The value if the option is not given.
        required: The option must be given.
        metavar: Placeholder for the value; default: that of `convert`.
        example: A value for the example in ``tcplat plugins show``. Needed for a required
            option, and for one of several options of which one is required.
    """

    name: str = attrs.field(validator=checked_name)
    help: str
    convert: Callable[[str], Any] = str
    default: Any = None
    required: bool = False
    metavar: str = attrs.field()
    example: str = attrs.field(default="")

    @metavar.default
    def _metavar(self) -> str:
        return self.convert.metavar if isinstance(self.convert, Kind) else "TEXT"

    @example.validator
    def _check_example(self, _: object, example: str) -> None:
        if self.required and not example:
            raise PluginError(f"option {self.name} is required, and has no example")

    @property
    def choices(self) -> tuple[str, ...]:
        """All values, if there are only a few; else empty."""
        return self.convert.choices if isinstance(self.convert, Kind) else ()


Options = Mapping[str, Any]
"""The converted value, or the default, of each option of a probe or sink."""


def example(name: str, options: Sequence[Option]) -> str:
    """Return a probe or sink as on the command line, with each option that has an example."""
    given = ",".join(f"{option.name}={option.example}" for option in options if option.example)
    return f"{name}:{given}" if given else name


def parse_choice(text: str) -> tuple[str, dict[str, str]]:
    """Split ``name:key=value,key=value`` into the name and the texts of options.

    Raises:
        UsageError: The text has another form.
    """
    name, _, rest = text.partition(":")
    given: dict[str, str] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(
                f"{text!r}: {item!r} is not of the form key=value; several values are joined by +"
            )
        if key in given:
            raise UsageError(f"{text!r}: {key}= is given twice")
        given[key] = value
    return name, given


def read_options(owner: str, declared: Sequence[Option], given: Mapping[str, str]) -> Options:
    """Check and convert what was given, and fill in defaults.

    Args:
        owner: ``probe NAME`` or ``sink NAME``.
        declared: Its options.
        given: As texts.

    Raises:
        UsageError: An option that is not declared or is missing, or a value that does not convert.
    """
    known = {option.name: option for option in declared}
    for key in given:
        if key not in known:
            has = ", ".join(sorted(known)) or "no options"
            raise UsageError(f"{owner} has no option {key!r}; it has {has}")
    values: dict[str, Any] = {}
    for option in declared:
        if option.name not in given:
            if option.required:
                whole = example(owner.rpartition(" ")[2], declared)
                raise UsageError(f"{owner} needs {option.name}=, as in {whole}")
            values[option.name] = option.default
            continue
        with blaming(f"{owner}: reading its option {option.name}"):
            try:
                values[option.name] = option.convert(given[option.name])
            except ValueError as error:
                raise UsageError(
                    f"{owner}: option {option.name}={given[option.name]!r}: {message(error)}"
                ) from error
    return values
