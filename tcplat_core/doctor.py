"""What this host can run, one sentence per failure."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from . import privileges
from .errors import CannotRunError
from .fast.library import library
from .hookpoints import MECHANISMS
from .loader.attach import refuse_without_capabilities
from .loader.bpf import tracefs
from .loader.compile import find_bcc
from .loader.host import Host, choose
from .plugins import Plugins
from .show import described

_OLDEST = (5, 8)
"""The first kernel with BPF ring buffers (457f44363a88)."""


@attrs.frozen
class Check:
    """One line of the report.

    Args:
        name: What was looked at.
        ok: True, False, or None where it is good to know and stops nothing.
        found: What there is.
        mend: What to do about it, with the command; empty when all is well.
    """

    name: str
    ok: bool | None
    found: str
    mend: str = ""


def examine() -> tuple[list[Check], dict[str, Any]]:
    """Look at this host, then at each probe.

    What needs root is tried first; then root is given up, before plugins are
    imported.

    Returns:
        The checks, and per probe which mechanism `--attach auto` takes for which
        point (`takes`) and why others are not served (`missing`, `cannot`).
    """
    host = Host()
    checks = [_kernel(), _btf(host), _lockdown(), _tracefs(), _bcc(), _fast(), _privileges()]
    if checks[1].ok:
        host.look()
        checks += [_mechanism(host, name) for name in MECHANISMS]
    privileges.drop()
    probes: dict[str, Any] = {}
    if checks[1].ok:
        for name, spec in sorted(Plugins.load().probes.items()):
            try:
                choice = choose(spec.points, "auto", host.way, name)
            except CannotRunError as error:
                probes[name] = {"cannot": str(error)}
                continue
            takes = {point: described(way) for point, way in choice.taken.items()}
            probes[name] = {"takes": takes, "missing": dict(choice.missing)}
    return checks, probes


def _kernel() -> Check:
    release = platform.release()
    found = f"{release} {platform.machine()}"
    version = tuple(int(part) for part in re.findall(r"\d+", release)[:2])
    if version < _OLDEST:
        return Check("kernel", False, found, "BPF ring buffers came with 5.8: boot a newer kernel")
    return Check("kernel", True, found)


def _btf(host: Host) -> Check:
    try:
        _ = host.btf
    except CannotRunError as error:
        return Check("btf", False, "none", str(error))
    return Check("btf", True, "/sys/kernel/btf/vmlinux")


def _lockdown() -> Check:
    try:
        text = Path("/sys/kernel/security/lockdown").read_text(encoding="ascii")
    except OSError:
        return Check("lockdown", None, "unknown")
    found = text[text.find("[") + 1 : text.find("]")]
    if found == "confidentiality":
        mend = "it hides the kernel's memory from BPF: boot with lockdown=integrity"
        return Check("lockdown", False, found, mend)
    return Check("lockdown", True, found)


def _tracefs() -> Check:
    folder = tracefs()
    if folder:
        return Check("tracefs", True, str(folder))
    mend = "accept rows by tracepoint want it: mount -t tracefs tracefs /sys/kernel/tracing"
    if os.geteuid() != 0:
        return Check("tracefs", None, "not mounted, or not readable without root", mend)
    return Check("tracefs", None, "not mounted", mend)


def _bcc() -> Check:
    try:
        package = find_bcc()
    except CannotRunError as error:
        return Check("bcc", False, "none", str(error))
    version = "?"
    file = package / "version.py"
    if file.exists():
        match = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", file.read_text(encoding="utf-8"))
        version = match[1] if match else "?"
    return Check("bcc", True, f"{version} in {package}")


def _fast() -> Check:
    if library():
        return Check("C", True, "JSON lines are written in C")
    mend = "install a C compiler, and tcplat again"
    return Check("C", None, "JSON lines are written in Python, four times as slow", mend)


def _privileges() -> Check:
    try:
        refuse_without_capabilities()
    except CannotRunError as error:
        return Check("privileges", False, f"uid {os.geteuid()}", str(error))
    return Check("privileges", True, f"uid {os.geteuid()}")


def _mechanism(host: Host, name: str) -> Check:
    reason = host.mechanism(name)
    return Check(name, None if reason else True, reason or "works")


def as_json(checks: list[Check], probes: Mapping[str, Any]) -> dict[str, Any]:
    """For ``tcplat doctor --json``."""
    return {
        "ok": healthy(checks, probes),
        "checks": [attrs.asdict(check) for check in checks],
        "probes": dict(probes),
    }


def healthy(checks: list[Check], probes: Mapping[str, Any]) -> bool:
    """Whether `tcplat run` can work here, with every probe."""
    return all(check.ok is not False for check in checks) and not any(
        "cannot" in probe for probe in probes.values()
    )


def as_text(checks: list[Check], probes: Mapping[str, Any]) -> str:
    """For a reader."""
    words = {True: "ok", False: "FAIL", None: "-"}
    lines = [f"{words[check.ok]:5}{check.name:12}{check.found}" for check in checks]
    for name, probe in probes.items():
        if "cannot" in probe:
            lines.append(f"FAIL {name:12}{probe['cannot']}")
            continue
        lines.append(f"ok   {name:12}auto takes")
        lines += [f"{'':17}{point:12}{way}" for point, way in probe["takes"].items()]
        lines += [f"{'':17}{point:12}no: {why}" for point, why in probe["missing"].items()]
    lines += [f"{check.name}: {check.mend}" for check in checks if check.mend]
    return "\n".join(lines)
