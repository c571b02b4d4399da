"""The loader, as the session sees it.

Started before the session imports what it needs itself, which takes as long as the loader's
own start: so this file imports next to nothing.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING, Self

import attrs

from tcplat_core.errors import NEEDS_ROOT, CannotRunError, PluginError, TcplatError, UsageError
from tcplat_core.kernel.orphan import end_with

from .privileges import SYSTEM_PATH

if TYPE_CHECKING:
    from tcplat_core.loader.protocol import Answer, Request

_MOST_LETTERS = 300
"""Of the loader's last words that a sentence repeats."""


@attrs.define(eq=False)
class LoaderProcess:
    """The privileged child, from its start to its answer."""

    process: subprocess.Popen[bytes]
    answers: socket.socket
    log: IO[bytes]

    @classmethod
    def start(cls) -> Self:
        """Start it while we are still root; it waits for the request."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # libbcc and clang print on standard output, too: it must not be ours.
        log = os.fdopen(os.memfd_create("tcplat-log"), "w+b")
        try:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-m", "tcplat_core.loader"),
                    *(str(os.getpid()), str(theirs.fileno())),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                # bcc hands much of its environment on to a shell and to the compiler.
                env={"PATH": SYSTEM_PATH, "LC_ALL": "C"},
                cwd="/",
                # Ctrl-C is for the session, which then stops the loader itself.
                start_new_session=True,
                preexec_fn=functools.partial(end_with, os.getpid()),  # noqa: PLW1509 - one thread
            )
        except PermissionError as error:
            if error.filename is None:  # not of execve(2): a filter's
                raise
            # This user may read his way to what runs already, and not start it anew.
            raise CannotRunError(NEEDS_ROOT) from error
        theirs.close()
        return cls(process, ours, log)

    def ask(self, request: Request, stopping: Callable[[], bool]) -> Answer | None:
        """Return the loader's answer; None if the user stops first.

        Raises:
            TcplatError: It refuses; the class tells the exit code.
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
        """Return a sentence with the last line that it printed.

        LLVM, which compiles in the loader, ends its process at an error.
        """
        lines = [line.strip() for line in self.output().splitlines() if line.strip()]
        last = f": {lines[-1][:_MOST_LETTERS]}" if lines else ""
        return f"the loader died (status {self.process.returncode}){last}"

    def output(self) -> str:
        """Return what libbcc, clang and the verifier printed."""
        self.log.seek(0)
        return self.log.read().decode(errors="backslashreplace")

    def close(self) -> None:
        """Stop it, wherever it is.

        It is root's, and we are not any more: then it ends by itself, as soon as it
        has nobody to answer to.
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
