"""Starts the loader and talks to it, from the session's side.

The loader starts before the session's own imports, which take as long as its start. So this
module imports almost nothing.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING, Self

import attrs

from tcplat_core.errors import (
    NEEDS_ROOT,
    OUT_OF_MEMORY,
    CannotRunError,
    PluginError,
    TcplatError,
    UsageError,
    lacks_memory,
)
from tcplat_core.kernel.orphan import end_with

from .privileges import SYSTEM_PATH

if TYPE_CHECKING:
    from tcplat_core.loader.protocol import Answer, Request

_MOST_CHARACTERS = 300
"""Characters of the loader's last line of output that an error message repeats."""


@attrs.define(eq=False)
class LoaderProcess:
    """The privileged child, from its start to its answer."""

    process: subprocess.Popen[bytes]
    answers: socket.socket
    log: IO[bytes]

    @classmethod
    def start(cls) -> Self:
        """Start it before root is dropped; it waits for the request."""
        own, childs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # libbcc and clang also print on standard output, which is reserved for sinks here.
        log = os.fdopen(os.memfd_create("tcplat-log"), "w+b")
        try:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-m", "tcplat_core.loader"),
                    *(str(os.getpid()), str(childs.fileno())),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[childs.fileno()],
                # bcc passes much of its environment on to a shell and to the compiler.
                env={"PATH": SYSTEM_PATH, "LC_ALL": "C"},
                cwd="/",
                # Ctrl-C is for the session, which then stops the loader itself.
                start_new_session=True,
                preexec_fn=functools.partial(end_with, os.getpid()),  # noqa: PLW1509 - one thread
            )
        except PermissionError as error:
            if error.filename is None:  # not from execve(2): a seccomp filter
                raise
            # The interpreter is readable but not executable for this user.
            raise CannotRunError(NEEDS_ROOT) from error
        childs.close()
        return cls(process, own, log)

    def ask(self, request: Request, stopping: Callable[[], bool]) -> Answer | None:
        """Return the loader's answer; None if the user stops first.

        Raises:
            TcplatError: The loader refuses; the class has its exit code.
        """
        from tcplat_core.loader.protocol import Refusal, receive_answer  # noqa: PLC0415 - see the top

        assert self.process.stdin is not None  # noqa: S101 - it is a pipe
        with contextlib.suppress(BrokenPipeError):  # it has refused already
            self.process.stdin.write(request.pack())
            self.process.stdin.close()
        while not select.select([self.answers], [], [], 0.05)[0]:
            if stopping():
                return None
        answer = receive_answer(self.answers)
        self.process.wait()
        if answer is None:
            answer = Refusal(self._died(), 1)
        if isinstance(answer, Refusal):
            error = _ERRORS.get(answer.exit_code, TcplatError)(answer.sentence)
            error.add_note(answer.log)
            raise error
        return answer

    def _died(self) -> str:
        """Return a message with the last line that the loader printed.

        LLVM compiles in the loader's process, and may abort it at an error.
        """
        lines = [line.strip() for line in self.output().splitlines() if line.strip()]
        last = f": {lines[-1][:_MOST_CHARACTERS]}" if lines else ""
        status = self.process.returncode
        if status == -signal.SIGKILL:
            return f"the loader was killed (SIGKILL), perhaps for lack of memory: see dmesg{last}"
        # LLVM and libstdc++ print a line or two more.
        if lacks_memory("\n".join(lines[-3:])):
            return f"the loader ran {OUT_OF_MEMORY}"
        return f"the loader died (status {status}){last}"

    def output(self) -> str:
        """Return what libbcc, clang and the verifier printed."""
        self.log.seek(0)
        return self.log.read().decode(errors="backslashreplace")

    def close(self) -> None:
        """Stop the loader.

        If root was dropped, this process cannot kill it: it then ends by itself, when its sockets
        are closed.
        """
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        self.answers.close()
        with contextlib.suppress(PermissionError):
            self.process.kill()
        self.process.wait()
        self.log.close()


_ERRORS: Mapping[int, type[TcplatError]] = {
    error.exit_code: error for error in (TcplatError, UsageError, CannotRunError, PluginError)
}
