"""Checks of this host for ``tcplat doctor``, with a remedy for each failure."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from tcplat_core.deliver.fast.library import library
from tcplat_core.errors import CannotRunError
from tcplat_core.kernel import owners
from tcplat_core.kernel.bcc import find_bcc
from tcplat_core.kernel.bpf import (
    lift_memory_limit,
    refuse_other_machines,
    tracefs,
    tracefs_missing,
    try_bpf,
)
from tcplat_core.kernel.core_hooks import USE
from tcplat_core.kernel.host import Host, choose
from tcplat_core.kernel.rights import may_load, refuse_without_capabilities
from tcplat_core.plugin.hookpoints import MECHANISMS
from tcplat_core.registry.find import Plugins
from tcplat_core.registry.show import HostView, described
from tcplat_core.run import privileges

_OLDEST = (5, 8)
"""The first kernel with BPF ring buffers (457f44363a88)."""


@attrs.frozen
class Check:
    """One line of the report.

    Args:
        name: What was checked.
        ok: True, False, or None where it is good to know and stops nothing.
        found: What there is.
        mend: What to do about it, with the command; empty when all is well.
    """

    name: str
    ok: bool | None
    found: str
    mend: str = ""


def examine() -> tuple[list[Check], dict[str, Any]]:
    """Check this host, then each probe.

    What needs root is tried first; then root is given up, before plugins are
    imported.

    Returns:
        The checks, and per probe which mechanism `--attach auto` takes for which
        point (`takes`) and why others are not served (`missing`, `cannot`; `unknown`
        where only root can tell).
    """
    view = HostView.now()
    host = view.host
    checks = [
        _kernel(),
        _btf(host),
        _lockdown(),
        _tracefs(),
        _bcc(),
        _fast(),
        _privileges(),
        *([_bpf()] if view.as_root else []),
    ]
    if checks[1].ok:
        checks += [_mechanism(host, name) for name in MECHANISMS]
        checks.append(_owners(view))
    checks.append(_older())
    privileges.drop()
    probes: dict[str, Any] = {}
    if checks[1].ok:
        for name, spec in sorted(Plugins.load().probes.items()):
            try:
                choice = choose(spec.points, "auto", view.why_not, name)
            except CannotRunError as error:
                key = "cannot" if view.as_root else "unknown"
                probes[name] = {key: str(error)}
                continue
            takes = {point: described(way) for point, way in choice.taken.items()}
            probes[name] = {"takes": takes, "missing": dict(choice.missing)}
    return checks, probes


def _kernel() -> Check:
    release = platform.release()
    found = f"{release} {platform.machine()}"
    try:
        refuse_other_machines()
    except CannotRunError as error:
        return Check("kernel", False, found, str(error))
    version = tuple(int(part) for part in re.findall(r"\d+", release)[:2])
    if version < _OLDEST:
        return Check("kernel", False, found, "BPF ring buffers need Linux 5.8: boot a newer kernel")
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
        # Their system calls have a table of their own, for which no tracepoint of one call fires.
        silent = "; accept by 32-bit programs and io_uring is seen at the first recv or send"
        return Check("tracefs", True, str(folder) + silent)
    what, mend = tracefs_missing()
    return Check("tracefs", None, what, f"needed for accept rows by tracepoint: {mend}")


def _bcc() -> Check:
    try:
        package = find_bcc()
    except CannotRunError as error:
        return Check("bcc", False, "none", str(error))
    version = "?"
    file = package / "version.py"
    if file.exists():
        text = file.read_text(encoding="utf-8", errors="replace")
        match = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", text)
        version = match[1] if match else "?"
    found = f"{version} in {package}"
    # In a separate process: bcc loads LLVM, which may crash if it is broken.
    code = (
        "import sys\n"
        "from tcplat_core.errors import CannotRunError\n"
        "from tcplat_core.loader.compile import import_bcc\n"
        "try:\n    import_bcc()\n"
        "except CannotRunError as error:\n    sys.exit(str(error))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-I", "-c", code],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if ran.returncode:
        output = ran.stderr.strip() or f"importing it exits with status {ran.returncode}"
        return Check("bcc", False, found, output.splitlines()[-1])
    return Check("bcc", True, found)


def _fast() -> Check:
    if library():
        return Check("fast JSON", True, "JSON lines are written in C")
    mend = "install a C compiler, then reinstall tcplat"
    return Check("fast JSON", None, "JSON lines are written in Python, four times as slow", mend)


def _privileges() -> Check:
    try:
        refuse_without_capabilities()
    except CannotRunError as error:
        mend = f"{error}; without it, the mechanisms were not tested"
        return Check("privileges", False, f"uid {os.geteuid()}", mend)
    return Check("privileges", True, f"uid {os.geteuid()}")


def _bpf() -> Check:
    try:
        lift_memory_limit()
        try_bpf()
    except (CannotRunError, OSError) as error:
        return Check("bpf(2)", False, "refused", str(error))
    return Check("bpf(2)", True, "works")


def _mechanism(host: Host, name: str) -> Check:
    reason = host.mechanism(name)
    if reason:
        return Check(name, None, reason)
    return Check(name, True, "works") if may_load() else Check(name, None, "not tried")


def _owners(view: HostView) -> Check:
    """Check how reads and writes are traced, for probes that trace packets only."""
    reasons = [view.why_not(way) for way in USE.ways]
    if None in reasons:
        seen = described(USE.ways[reasons.index(None)])
        return Check("owners", True, f"known by {seen}, for packets as well")
    reason = "; ".join(dict.fromkeys(filter(None, reasons)))
    found = f"packets keep the listener's process as owner after accept: {reason}"
    return Check("owners", None, found, "run as root on a kernel with kprobes, or on 6.3 or newer")


def _older() -> Check:
    """Check whether the processes of existing sockets can be found."""
    hidden = owners.Hidden()
    try:
        found = owners.find(hidden)
    except OSError as error:
        return Check("sockets", None, f"owners of existing sockets are unknown: {error.strerror}")
    if said := hidden.sentences():
        return Check(
            "sockets", None, "owners of some existing sockets are unknown", "; ".join(said)
        )
    return Check("sockets", True, f"owners of all {len(found)} existing sockets are known")


def as_json(checks: list[Check], probes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checks for ``tcplat doctor --json``."""
    return {
        "ok": healthy(checks, probes),
        "checks": [attrs.asdict(check) for check in checks],
        "probes": dict(probes),
    }


def healthy(checks: list[Check], probes: Mapping[str, Any]) -> bool:
    """Return whether `tcplat run` works here, with every probe."""
    return all(check.ok is not False for check in checks) and not any(
        "cannot" in probe for probe in probes.values()
    )


def as_text(checks: list[Check], probes: Mapping[str, Any]) -> str:
    """Return the checks as text."""
    verdicts = {True: "ok", False: "FAIL", None: "-"}
    tried = not any(check.name == "privileges" and check.ok is False for check in checks)
    lines = [f"{verdicts[check.ok]:5}{check.name:12}{check.found}" for check in checks]
    for name, probe in probes.items():
        for word, key in (("FAIL", "cannot"), ("-", "unknown")):
            if key in probe:
                lines.append(f"{word:5}{name:12}{probe[key]}")
        if "takes" not in probe:
            continue
        takes = "auto takes" if tried else "auto would take, not tested"
        lines.append(f"{'ok' if tried else '-':5}{name:12}{takes}")
        lines += [f"{'':17}{point:12}{way}" for point, way in probe["takes"].items()]
        lines += [f"{'':17}{point:12}no: {why}" for point, why in probe["missing"].items()]
    lines += [f"{check.name}: {check.mend}" for check in checks if check.mend]
    if any(line.startswith("-") for line in lines):
        lines.append("(-: missing or not tested, and not needed by every run)")
    return "\n".join(lines)
