"""The command after ``--``: forked early, executed when everything is attached."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Sequence

import attrs

from tcplat_core.errors import UsageError

from . import privileges, signals


@attrs.define(eq=False)
class TracedCommand:
    """A child that waits for :meth:`go` before it executes the command.

    It is forked before tcplat drops root, and keeps tcplat's original rights:
    ``sudo tcplat run -- CMD`` runs CMD as ``sudo CMD`` does.
    """

    pid: int
    _gate: int
    _ender: int
    status: int | None = None
    """The shell's exit status (128 + signal), once it has ended."""
    stopped: bool = False
    """Whether stop() ended it."""

    @classmethod
    def fork(cls, arguments: Sequence[str]) -> TracedCommand:
        """Prepare to run `arguments`.

        Raises:
            UsageError: There is no such program.
        """
        # The original environment: variables hidden from tcplat are not hidden from the command.
        environment = privileges.environment()
        path = shutil.which(arguments[0], path=environment.get("PATH"))
        if path is None:
            raise UsageError(f"there is no program {arguments[0]!r} to run")
        wait, gate = os.pipe()
        pid = os.fork()
        if pid:
            os.close(wait)
            return cls(pid, gate, _fork_ender(pid, gate))
        try:
            # A handler of ours would note a signal, and execve(2) would forget it.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if callable(signal.getsignal(number)):
                    signal.signal(number, signal.SIG_DFL)
            os.close(gate)
            if os.read(wait, 1) == b"!":
                # Python ignores these, and execve(2) keeps ignored signals ignored.
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                signals.block_again()
                os.execve(path, list(arguments), environment)
        except OSError as error:
            os.write(2, f"tcplat: cannot run {path}: {error.strerror}\n".encode())
            os._exit(126)
        finally:
            os._exit(127)

    def go(self) -> None:
        """Execute the command."""
        with contextlib.suppress(BrokenPipeError):  # the child was killed
            os.write(self._gate, b"!")
        os.close(self._gate)
        self._gate = -1

    def ended(self) -> bool:
        """Return whether it has ended, without waiting."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self.status = code if code >= 0 else 128 - code
        return self.status is not None

    def stop(self) -> None:
        """End it and wait: before go() it exits by itself, after go() it gets SIGTERM."""
        if self._gate >= 0:
            os.close(self._gate)
            self._gate = -1
        elif not self.ended():
            self.stopped = True
            os.write(self._ender, b"!")
        if self._ender >= 0:
            os.close(self._ender)
            self._ender = -1
        if self.status is None:
            _, status = os.waitpid(self.pid, 0)
            code = os.waitstatus_to_exitcode(status)
            self.status = code if code >= 0 else 128 - code


def _fork_ender(pid: int, gate: int) -> int:
    """Fork a process that keeps the right to signal the command, which this one drops.

    Returns:
        A pipe. A byte in it sends SIGTERM; closing it does nothing. Plugins could write to it
        too, even after the command's pid was reused: so the signal goes to a pidfd.
    """
    wait, ender = os.pipe()
    # Opened here, where the pid cannot have been reused: the child was not waited for.
    process = os.pidfd_open(pid)
    if os.fork():
        os.close(wait)
        os.close(process)
        return ender
    try:
        os.close(ender)
        os.close(gate)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if os.read(wait, 1):
            signal.pidfd_send_signal(process, signal.SIGTERM)
    finally:
        os._exit(0)
