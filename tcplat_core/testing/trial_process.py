"""Starts and asks the process that tries a probe: loader/trial.py."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, Self

import attrs
import msgpack

from tcplat_core.errors import TcplatError
from tcplat_core.kernel.orphan import end_with
from tcplat_core.kernel.rights import lacking
from tcplat_core.run.privileges import SYSTEM_PATH


@attrs.define(eq=False)
class Trial:
    """A process that waits for a request."""

    process: subprocess.Popen[bytes]
    log: Any

    @classmethod
    def start(cls, what: str) -> Self:
        """Start it; for `attach`, before this process drops root."""
        log = os.fdopen(os.memfd_create("tcplat-log"), "w+b")
        process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-m", "tcplat_core.loader.trial"),
                *(str(os.getpid()), what),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            # As for the loader: bcc uses much of its environment.
            env={
                "PATH": SYSTEM_PATH,
                "LC_ALL": "C",
                **{k: v for k, v in os.environ.items() if k in ("HOME", "XDG_CACHE_HOME")},
            },
            cwd="/",
            preexec_fn=functools.partial(end_with, os.getpid()),  # noqa: PLW1509 - one thread
        )
        return cls(process, log)

    def ask(self, request: Mapping[str, Any] | bytes) -> dict[str, Any]:
        """Return the outcome.

        Raises:
            TcplatError: The process failed; that is no fault of the plugin.
        """
        data = request if isinstance(request, bytes) else msgpack.packb(request)
        out, _ = self.process.communicate(data)
        if self.process.returncode or not out:
            self.log.seek(0)
            words = self.log.read().decode(errors="replace").strip().splitlines()
            raise TcplatError(f"the trial process failed: {(words or ['no output'])[-1]}")
        return dict(msgpack.unpackb(out))

    def close(self) -> None:
        """End the process: without a request it tries nothing."""
        if self.process.stdin and not self.process.stdin.closed:
            self.process.communicate(b"")
        self.process.wait()
        self.log.close()


def as_root() -> Trial | None:
    """Return a process that may attach programs; None if this process may not."""
    if lacking("CAP_SYS_ADMIN"):
        return None
    return Trial.start("attach")
