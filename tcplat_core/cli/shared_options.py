"""Options that several commands share, and their types."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from tcplat_core.errors import UsageError
from tcplat_core.plugin.numbers import decimal
from tcplat_core.plugin.options import duration, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tcplat_core.loader.filter import Filter


class Duration(click.ParamType[float]):
    """A time: 5 (seconds), 500ms, 30s, 2m or 1h, as seconds."""

    name = "time"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Convert to seconds."""
        if isinstance(value, float):
            return value
        try:
            seconds = float(duration(value))
        except ValueError:
            seconds = 0
        if not seconds:
            self.fail(
                f"{value!r} is not a time above 0; write 5 (seconds), 500ms, 30s, 2m or 1h",
                param,
                ctx,
            )
        return seconds


class Size(click.ParamType[int]):
    """Bytes, a power of two: 64K, 16M."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Convert to a number of bytes."""
        if isinstance(value, int):
            return value
        try:
            number = int(size(value))
        except ValueError:
            number = 0
        if number & (number - 1) or not 1 << 12 <= number <= 1 << 30:
            self.fail(f"{value!r} is not a power of two from 4K to 1G", param, ctx)
        return number


class Share(click.ParamType[int]):
    """A share of the connections, 1/64, as the number below the line."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Convert to a number."""
        from tcplat_core.plugin.sampling import MOST  # noqa: PLC0415 - see __init__.py

        if isinstance(value, int):
            return value
        number = decimal(value.removeprefix("1/"), MOST) if value.startswith("1/") else 0
        if not number:
            self.fail(f"{value!r} is not 1/N with N from 1 to {MOST}, as 1/64", param, ctx)
        return number


class Percent(click.ParamType[float]):
    """A part of a whole, 2% or 0.5%, as a number from 0 to 1."""

    name = "percent"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Convert to a number."""
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"(\d{1,3}(?:\.\d{1,6})?)%", value, re.ASCII)
        part = float(found[1]) / 100 if found else 0.0
        if not 0 < part <= 1:
            self.fail(f"{value!r} is not a percentage above 0, as 2% or 0.5%", param, ctx)
        return part


SINKS = click.option(
    "--sink",
    "sinks",
    multiple=True,
    default=["table"],
    metavar="NAME[:k=v,...]",
    help="Where to send rows; repeatable.  [default: table]",
)
COUNT = click.option(
    "-n", "--count", type=click.IntRange(min=1), default=None, help="End after this many rows."
)
QUIET = click.option(
    "-q",
    "--quiet",
    is_flag=True,
    help="Print only errors on stderr: no final report, so no losses.",
)
_FILTER_OPTIONS = (
    click.option(
        "-p",
        "--pid",
        "pids",
        multiple=True,
        metavar="PID",
        help="Only sockets of this process; repeatable, or a list: 12,34.",
    ),
    click.option(
        "--comm",
        default=None,
        metavar="NAME",
        help="Only sockets of processes with this name; NAME* matches a prefix.",
    ),
    click.option(
        "--port",
        "ports",
        multiple=True,
        metavar="PORT",
        help="Only this port, local or remote; repeatable, or a list: 80,443.",
    ),
    click.option("--lport", "lports", multiple=True, metavar="PORT", help="Only this local port."),
    click.option("--rport", "rports", multiple=True, metavar="PORT", help="Only this remote port."),
    click.option(
        "--addr",
        "networks",
        multiple=True,
        metavar="CIDR",
        help="Only this address or network, local or remote; repeatable.",
    ),
    click.option("-4", "ip4", is_flag=True, help="Only IPv4."),
    click.option("-6", "ip6", is_flag=True, help="Only IPv6."),
    click.option(
        "--min-latency",
        type=Duration(),
        default=0.0,
        help="Skip rows with a shorter duration; rows without one stay. For slow requests: "
        "--sink waterfall:min_stage=total:1s.",
    ),
)
"""Filter options: `run` filters in the kernel, `replay` filters itself."""


_BY_NAME = "; for names: --comm NAME, or -p $(pgrep -d, NAME)"


def filter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the filter options to a command."""
    for option in reversed(_FILTER_OPTIONS):
        command = option(command)
    return command


def filter_of(arguments: dict[str, Any]) -> Filter:
    """Return the filter of the options that `run` and `replay` share; remove them from these."""
    from tcplat_core.loader.filter import Filter  # noqa: PLC0415 - see __init__.py

    ip4, ip6 = arguments.pop("ip4"), arguments.pop("ip6")
    return Filter(
        pids=_numbers(arguments.pop("pids"), "-p", 1 << 22, _BY_NAME) or None,
        comm=_comm(arguments.pop("comm")),
        ports=_ports(arguments.pop("ports")),
        lports=_ports(arguments.pop("lports")),
        rports=_ports(arguments.pop("rports")),
        networks=_networks(arguments.pop("networks")),
        ip=0 if ip4 == ip6 else 4 if ip4 else 6,
        min_ns=round(arguments.pop("min_latency") * 1e9),
    )


def _numbers(texts: Sequence[str], option: str, top: int, hint: str = "") -> tuple[int, ...]:
    """Convert ``("80,443", "8080+8081")`` to numbers from 1 to `top`; plugin options use +."""
    numbers = []
    for text in ",".join(texts).replace("+", ",").split(",") if texts else ():
        number = decimal(text, top)
        if not number:
            raise UsageError(f"{option} {text!r} is not a number from 1 to {top}{hint}")
        numbers.append(number)
    return tuple(numbers)


def _ports(texts: Sequence[str]) -> tuple[int, ...]:
    return _numbers(texts, "port", 65535)


def _comm(text: str | None) -> str:
    if text == "":
        raise UsageError("--comm must not be empty")
    text = text or ""
    if len(os.fsencode(text.rstrip("*"))) > 15:  # noqa: PLR2004 - TASK_COMM_LEN without its NUL
        raise UsageError(
            f"--comm {text!r}: the kernel keeps 15 bytes of a name; write a prefix and *"
        )
    if "*" in text[:-1]:
        raise UsageError(f"--comm {text!r}: * is allowed at the end only")
    return text


def _networks(texts: Sequence[str]) -> tuple[str, ...]:
    for text in texts:
        try:
            ipaddress.ip_network(text, strict=False)
        except ValueError as error:
            raise UsageError(
                f"--addr {text!r} is neither an address nor a network: {error}"
            ) from error
    return tuple(texts)
