"""The ready file: created when everything is attached."""

from __future__ import annotations

import contextlib
import errno
import os
import stat

import attrs

from tcplat_core.plugin.outfile import find, in_words, whole_file

_WHAT = "the ready file "


@attrs.define(eq=False)
class ReadyFile:
    """A file that is created atomically when the run is ready, or a pipe that is written then.

    Args:
        path: As the user wrote it.
    """

    path: str
    written: bool = attrs.field(default=False, init=False)

    def check(self) -> None:
        """Check that it can be written, without creating it.

        Raises:
            UsageError: It cannot be written.
        """
        with in_words(self.path, _WHAT), contextlib.closing(find(self.path)) as place:
            place.check(replacing=True)

    def write(self) -> None:
        """Write our pid. If a pipe has no reader yet, do nothing: call it again later.

        Raises:
            UsageError: It cannot be written.
        """
        line = f"{os.getpid()}\n".encode()
        with in_words(self.path, _WHAT):
            with contextlib.closing(find(self.path)) as place:
                found = place.status()
                if found and stat.S_ISFIFO(found.st_mode):
                    try:
                        fd = place.open()
                    except OSError as error:
                        if error.errno == errno.ENXIO:
                            return
                        raise
                    os.set_blocking(fd, False)
                    # A pipe that was written before may be full, or its reader gone.
                    with contextlib.suppress(BrokenPipeError, BlockingIOError):
                        os.write(fd, line)
                    os.close(fd)
                    self.written = True
                    return
            with whole_file(self.path) as file:
                file.write(line)
        self.written = True
