"""Assembles the C of a probe: constants, headers, its own text. Needs no rights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files

from tcplat_core.errors import PluginError
from tcplat_core.kernel.layout import (
    ACK_SLOTS,
    ack_slot,
    books_hooks,
    books_slots,
    possible_cpus,
    unsampled_hooks,
    unsampled_slot,
)
from tcplat_core.plugin.hookpoints import HookPoint, reporting

from .filter import Filter
from .protocol import ProbeRequest

CORE_TYPES = (
    "sock",
    "inet_sock",
    "net:ns",
    "sk_buff:sk,cb",
    "sock_exterr_skb:ee",
    "sock_extended_err:ee_errno",
    "socket:file,sk",
    "file:f_inode",
    "inode:i_ino",
    "task_struct:tgid,signal,group_leader,start_time,flags,comm",
    "signal_struct:live",
    "pt_regs",
    "timespec64",
)
"""Kernel types that the shared headers use."""

CGROUP_TYPES = ("task_struct:cgroups", "css_set:dfl_cgrp", "cgroup:level,ancestor_ids")
"""Further types with TCPLAT_READ_CGROUPS."""

PIDNS_TYPES = ("task_struct:thread_pid,pid", "pid:level,numbers", "upid", "pid_namespace:ns")
"""Further types with TCPLAT_PIDNS."""

ALWAYS = ("event.bpf.h", "filter.bpf.h", "sample.bpf.h", "owner.bpf.h")
"""Headers in every probe: they define the shared maps."""
_INCLUDE = re.compile(
    r"^[ \t]*#[ \t]*include[ \t]+<tcplat/([a-z_]+\.bpf\.h)>"
    r"(?:[ \t]*/\* as ([a-z]+) \*/)?[ \t\r]*$",
    re.MULTILINE,
)
_KEYED = "keyed.bpf.h"
_KEYED_NAMES = {
    "keys": "{}_keys",
    "key_numbers": "{}_numbers",
    "key_given": "{}_given",
    "key_count": "{}_count",
    "tcplat_number": "tcplat_{}_number",
    "TCPLAT_KEY": "TCPLAT_KEY_{}",
    "TCPLAT_KEYS": "TCPLAT_KEYS_{}",
}
"""Names in <tcplat/keyed.bpf.h> -> their names if it is included `as`.

bcc rewrites no map call in a macro, so that a macro cannot give a map its name.
"""


def core_defines(
    points: Sequence[HookPoint], wanted: Filter, sample: int = 1, *, adapts: bool = False
) -> dict[str, int | str]:
    """Return the constants of the shared headers.

    Args:
        points: The probe's hook points.
        wanted: The filter.
        sample: Rows are made of one connection in so many.
        adapts: Of fewer where the run would cost too much.
    """
    hooks, cpus = len(reporting(points)), possible_cpus()
    return {
        **({"TCPLAT_SAMPLE": sample} if sample > 1 or adapts else {}),
        **({"TCPLAT_ADAPTS": 1} if adapts else {}),
        "TCPLAT_HOOKS": books_hooks(hooks),
        "TCPLAT_UNSAMPLED": unsampled_slot(cpus, hooks),
        "TCPLAT_UNSAMPLED_HOOKS": unsampled_hooks(hooks),
        "TCPLAT_ACK_SLOT": ack_slot(cpus, hooks),
        "TCPLAT_ACK_SLOTS": ACK_SLOTS,
        "TCPLAT_BOOKS": books_slots(cpus, hooks),
        "TCPLAT_CPU_BITS": cpus.bit_length(),
        **wanted.defines(),
    }


def program_text(
    probe: ProbeRequest, *, taken: Mapping[str, str], defines: Mapping[str, int | str]
) -> str:
    """Return the whole C text of a probe, with headers and the core's own programs pasted in.

    bcc rewrites map calls in the main file only, so headers are pasted.

    Args:
        probe: Its C and its record.
        taken: Point -> mechanism: becomes TCPLAT_<MECHANISM>_<point>, and TCPLAT_<MECHANISM>.
        defines: Constants.
    """
    numbers = {
        f"HOOK_{hook.program}": number for number, (_, hook) in enumerate(reporting(probe.points))
    }
    numbers |= {f"HIST_{name}": number for number, name in enumerate(probe.histograms)}
    chosen = {f"TCPLAT_{way.upper()}_{point}": 1 for point, way in taken.items()}
    chosen |= {f"TCPLAT_{way.upper()}": 1 for way in sorted(set(taken.values()))}
    head = [
        f"#define {name} {value}"
        for name, value in {**defines, **probe.defines, **numbers, **chosen}.items()
    ]
    prelude = "".join(map(_header, ALWAYS))
    name = f'#line 1 "{probe.name}.bpf.c"'

    def pasted(found: re.Match[str]) -> str:
        if found[1] in ALWAYS:
            return ""
        line = probe.source.count("\n", 0, found.end()) + 2
        return f'{_header(found[1], found[2])}#line {line} "{probe.name}.bpf.c"'

    body = _INCLUDE.sub(pasted, probe.source)
    return "\n".join([*head, probe.struct, prelude, name, body, _header("core.bpf.h")])


def with_headers(source: str) -> str:
    """Return the C of a probe after the headers that it includes, except ALWAYS."""
    names = [(found[1], found[2]) for found in _INCLUDE.finditer(source) if found[1] not in ALWAYS]
    return "\n".join([*(_header(*one) for one in names), source])


def _header(name: str, own: str | None = None) -> str:
    """Return the text of a header and its includes; `own` is the name after `as`, if any."""
    try:
        text = files("tcplat_core").joinpath("include", "tcplat", name).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise PluginError(f"there is no header <tcplat/{name}>") from error

    def pasted(found: re.Match[str]) -> str:
        line = text.count("\n", 0, found.end()) + 2
        return f'{_header(found[1], found[2])}#line {line} "tcplat/{name}"'

    if own:
        if name != _KEYED:
            raise PluginError(f"<tcplat/{name}> cannot be included as {own}: <tcplat/{_KEYED}> can")
        for name_there, pattern in _KEYED_NAMES.items():
            text = re.sub(rf"\b{name_there}\b", pattern.format(own), text)

    return f'#line 1 "tcplat/{name}"\n{_INCLUDE.sub(pasted, text)}\n'
