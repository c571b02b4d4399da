"""Capabilities of this process."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

from tcplat_core.errors import NEEDS_CAPABILITIES, NEEDS_ROOT, CannotRunError, refused


def refuse_without_capabilities() -> None:
    """Raise if a capability is missing, before the kernel answers EPERM.

    Raises:
        CannotRunError: Not allowed to load programs.
    """
    if not may_load():
        raise CannotRunError(NEEDS_ROOT if os.geteuid() else NEEDS_CAPABILITIES)


def may_load() -> bool:
    """Return whether this process has the capabilities to load and attach programs."""
    return not lacking("CAP_SYS_ADMIN") or not lacking("CAP_PERFMON", "CAP_BPF")


_NUMBERS = {
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}
"""As in linux/capability.h."""


def lacking(*names: str) -> list[str]:
    """Return those of these capabilities that are not effective in this process.

    Reads /proc, unlike capabilities(): all callers need /proc anyway.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    effective = int(status.split("CapEff:")[1].split()[0], 16)
    return [name for name in names if not effective >> _NUMBERS[name] & 1]


CAP_VERSION_3 = 0x20080522
CAPABILITIES = struct.Struct("=6I")
"""Effective, permitted, inheritable of capabilities 0 to 31, then those of 32 to 63."""
_libc = ctypes.CDLL(None, use_errno=True)


def held() -> bool:
    """Return whether this process is root or has capabilities."""
    effective, permitted, _ = capabilities()
    return 0 in os.getresuid() or bool(effective | permitted)


def capabilities() -> tuple[int, int, int]:
    """Return the effective, permitted and inheritable capabilities of this thread."""
    data = ctypes.create_string_buffer(CAPABILITIES.size)
    if _libc.capget(struct.pack("=Ii", CAP_VERSION_3, 0), data):
        raise refused("capget", ctypes.get_errno())
    low, high = CAPABILITIES.unpack(data)[:3], CAPABILITIES.unpack(data)[3:]
    effective, permitted, inheritable = (a | b << 32 for a, b in zip(low, high, strict=True))
    return effective, permitted, inheritable
