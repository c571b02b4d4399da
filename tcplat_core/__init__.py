"""Everything that a plugin may import, and nothing else. Imports neither bcc nor pyroute2."""

from .errors import CannotRunError, PluginError, ReaderGoneError, TcplatError, UsageError
from .hookspecs import hookimpl
from .model import (
    Hook,
    HookPoint,
    Loss,
    Option,
    Options,
    ProbeSpec,
    RunInfo,
    RunReport,
    Sink,
    SinkSpec,
    Way,
    kentry,
    kprobe,
    kreturn,
    tracepoint,
)
from .output import Output
from .schema import Event, Moment, Wire

__all__ = [
    "CannotRunError",
    "Event",
    "Hook",
    "HookPoint",
    "Loss",
    "Moment",
    "Option",
    "Options",
    "Output",
    "PluginError",
    "ProbeSpec",
    "ReaderGoneError",
    "RunInfo",
    "RunReport",
    "Sink",
    "SinkSpec",
    "TcplatError",
    "UsageError",
    "Way",
    "Wire",
    "hookimpl",
    "kentry",
    "kprobe",
    "kreturn",
    "tracepoint",
]
