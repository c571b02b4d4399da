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
    from .hookspecs import hookimpl
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
        Moment,
        Wire,
        clock_offset_ns,
        json_types,
        micros,
    )

__all__ = [
    "HOST_BITS",
    "SCHEMA_VERSION",
    "CannotRunError",
    "Event",
    "Hook",
    "HookPoint",
    "Interfaces",
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
    "clock_offset_ns",
    "fenter",
    "fentry",
    "fexit",
    "hookimpl",
    "json_types",
    "kentry",
    "kprobe",
    "kreturn",
    "micros",
    "tracepoint",
    "tracepoints",
    "xdp",
]

_HOMES = ("errors", "hookpoints", "hookspecs", "model", "output", "reading", "replay", "schema")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in _HOMES:
            module = import_module(f".{home}", __name__)
            if name in vars(module):
                return vars(module)[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
