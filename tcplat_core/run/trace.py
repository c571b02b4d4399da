"""Reads the output of tcplat_debug(), for --debug."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Self

import attrs

from tcplat_core.kernel.bpf import tracefs

_MARK = ": tcplat: "


@attrs.define(eq=False)
class TracePipe:
    """The kernel's trace_pipe, read without waiting. Reading takes lines from other readers."""

    fd: int
    _rest: str = ""

    @classmethod
    def open(cls) -> Self | None:
        """Open it, as root; None if tracefs is not mounted or not readable."""
        folder = tracefs()
        if folder is None:
            return None
        with contextlib.suppress(OSError):
            return cls(os.open(folder / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        return None

    def relay(self, say: Callable[[str], None]) -> None:
        """Pass the lines of our programs since the last call to `say`."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.fd, 1 << 16):
                *lines, self._rest = (self._rest + data.decode(errors="replace")).split("\n")
                for line in lines:
                    _, mark, text = line.partition(_MARK)
                    if mark:
                        say(text)
