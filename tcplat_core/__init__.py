"""Everything that a plugin may import, and nothing else. Imports neither bcc nor pyroute2.

Names are imported when they are first used: the loader and ``--help`` need few of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .clock import clock_offset_ns
    from .connecting import connect
    from .errors import CannotRunError, PluginError, ReaderGoneError, TcplatError, UsageError
    from .fast.records import json_lines
    from .histogram import Aggregates, Aggregation, Distribution, Group, Histogram
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
    from .kinds import Kind, boolean, choice, duration, integer, path, ports, size
    from .maps import Maps, MapView, ReadableMap
    from .model import (
        HOST_BITS,
        AggregateSink,
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
    from .outfile import Place, whole_file
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
        fields,
        micros,
    )
    from .texts import printable

__all__ = [
    "HOOKSPEC_VERSION",
    "HOST_BITS",
    "SCHEMA_VERSION",
    "AggregateSink",
    "Aggregates",
    "Aggregation",
    "CannotRunError",
    "Distribution",
    "Event",
    "Field",
    "Group",
    "Histogram",
    "Hook",
    "HookPoint",
    "Interfaces",
    "Kind",
    "Loss",
    "MapView",
    "Maps",
    "Merge",
    "Moment",
    "Option",
    "Options",
    "Output",
    "Place",
    "PluginError",
    "ProbeSpec",
    "ReadableMap",
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
    "connect",
    "duration",
    "fenter",
    "fentry",
    "fexit",
    "fields",
    "hookimpl",
    "integer",
    "json_lines",
    "kentry",
    "kprobe",
    "kreturn",
    "micros",
    "path",
    "ports",
    "printable",
    "size",
    "tracepoint",
    "tracepoints",
    "whole_file",
    "xdp",
]

_HOMES = (
    *(
        "clock",
        "connecting",
        "errors",
        "histogram",
        "hookpoints",
        "hookspecs",
        "kinds",
        "maps",
        "model",
        "outfile",
        "output",
    ),
    *("schema", "reading", "replay", "fast.records"),
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in _HOMES:
            module = import_module(f".{home}", __name__)
            if name in vars(module):
                return vars(module)[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
