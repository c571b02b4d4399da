"""Everything that a plugin may import, and nothing else. Imports neither bcc nor pyroute2.

Names are imported when they are first used: the loader and ``--help`` need few of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import CannotRunError, PluginError, ReaderGoneError, TcplatError, UsageError
    from .hookpoints import (
        Hook,
        HookPoint,
        Interfaces,
        Way,
        fenter,
        fentry,
        fexit,
        kentry,
        kprobe,
        kreturn,
        tracepoint,
        tracepoints,
        xdp,
    )
    from .hookspecs import HOOKSPEC_VERSION, hookimpl
    from .kinds import Kind, boolean, choice, duration, integer, size
    from .model import (
        HOST_BITS,
        Loss,
        Merge,
        Option,
        Options,
        ProbeSpec,
        RunInfo,
        RunReport,
        Sink,
        SinkSpec,
    )
    from .output import Output
    from .reading import Reader
    from .replay import add_reports
    from .schema import (
        SCHEMA_VERSION,
        Event,
        Field,
        Moment,
        Wire,
        address,
        clock_offset_ns,
        fields,
        micros,
        printable,
    )

__all__ = [
    "HOOKSPEC_VERSION",
    "HOST_BITS",
    "SCHEMA_VERSION",
    "CannotRunError",
    "Event",
    "Field",
    "Hook",
    "HookPoint",
    "Interfaces",
    "Kind",
    "Loss",
    "Merge",
    "Moment",
    "Option",
    "Options",
    "Output",
    "PluginError",
    "ProbeSpec",
    "Reader",
    "ReaderGoneError",
    "RunInfo",
    "RunReport",
    "Sink",
    "SinkSpec",
    "TcplatError",
    "UsageError",
    "Way",
    "Wire",
    "add_reports",
    "address",
    "boolean",
    "choice",
    "clock_offset_ns",
    "duration",
    "fenter",
    "fentry",
    "fexit",
    "fields",
    "hookimpl",
    "integer",
    "kentry",
    "kprobe",
    "kreturn",
    "micros",
    "printable",
    "size",
    "tracepoint",
    "tracepoints",
    "xdp",
]

_HOMES = (
    "errors",
    "hookpoints",
    "hookspecs",
    "kinds",
    "model",
    "output",
    "schema",
    "reading",
    "replay",
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in _HOMES:
            module = import_module(f".{home}", __name__)
            if name in vars(module):
                return vars(module)[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
