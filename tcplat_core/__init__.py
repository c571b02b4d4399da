"""Everything that a plugin may import, and nothing else. Imports neither bcc nor pyroute2.

Names are imported when they are first used: the loader and ``--help`` need few of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .capture.reading import Reader
    from .deliver.fast.records import json_lines
    from .deliver.fast.slim import SLIM_NUMBERS, SlimRows, ends_ns, slim_rows
    from .errors import CannotRunError, PluginError, ReaderGoneError, TcplatError, UsageError
    from .event.clock import clock_offset_ns
    from .event.fields import SCHEMA_VERSION, Event, Field, Moment, Wire, fields
    from .event.packet import PacketEvent
    from .event.terminal import printable, say
    from .event.text import address, columns, micros
    from .plugin.aggregates import Aggregates, Aggregation, Distribution, Group, Histogram
    from .plugin.connecting import connect
    from .plugin.hookpoints import (
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
    from .plugin.hookspecs import HOOKSPEC_VERSION, hookimpl
    from .plugin.maps import Maps, MapView, ReadableMap
    from .plugin.options import (
        Kind,
        Option,
        Options,
        boolean,
        choice,
        duration,
        integer,
        path,
        ports,
        size,
    )
    from .plugin.outfile import Place, whole_file
    from .plugin.output import Output
    from .plugin.report import RunReport, add_reports
    from .plugin.sampling import Sampled, Shares, connection_hash, is_in_share, share_text
    from .plugin.specs import (
        HOST_BITS,
        AggregateSink,
        Loss,
        Merge,
        ProbeSpec,
        RunInfo,
        Sink,
        SinkSpec,
    )
    from .plugin.stream_points import stream_points

__all__ = [
    "HOOKSPEC_VERSION",
    "HOST_BITS",
    "SCHEMA_VERSION",
    "SLIM_NUMBERS",
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
    "PacketEvent",
    "Place",
    "PluginError",
    "ProbeSpec",
    "ReadableMap",
    "Reader",
    "ReaderGoneError",
    "RunInfo",
    "RunReport",
    "Sampled",
    "Shares",
    "Sink",
    "SinkSpec",
    "SlimRows",
    "TcplatError",
    "UsageError",
    "Way",
    "Wire",
    "add_reports",
    "address",
    "boolean",
    "choice",
    "clock_offset_ns",
    "columns",
    "connect",
    "connection_hash",
    "duration",
    "ends_ns",
    "fenter",
    "fentry",
    "fexit",
    "fields",
    "hookimpl",
    "integer",
    "is_in_share",
    "json_lines",
    "kentry",
    "kprobe",
    "kreturn",
    "micros",
    "path",
    "ports",
    "printable",
    "say",
    "share_text",
    "size",
    "slim_rows",
    "stream_points",
    "tracepoint",
    "tracepoints",
    "whole_file",
    "xdp",
]

_HOMES = (
    "event.clock",
    "event.fields",
    "event.packet",
    "event.text",
    "event.terminal",
    "errors",
    "plugin.connecting",
    "plugin.aggregates",
    "plugin.hookpoints",
    "plugin.hookspecs",
    "plugin.options",
    "plugin.maps",
    "plugin.sampling",
    "plugin.specs",
    "plugin.stream_points",
    "plugin.report",
    "plugin.outfile",
    "plugin.output",
    "capture.reading",
    "deliver.fast.records",
    "deliver.fast.slim",
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in _HOMES:
            module = import_module(f".{home}", __name__)
            if name in vars(module):
                return vars(module)[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
