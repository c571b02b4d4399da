"""The ready file: made once everything is attached."""

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
    """A file that comes to be, whole, when the run is ready; or a pipe that is told then.

    Args:
        path: As the user wrote it.
    """

    path: str
    told: bool = attrs.field(default=False, init=False)

    def check(self) -> None:
        """Find out whether it can be written, without making it.

        Raises:
            UsageError: It cannot.
        """
        with in_words(self.path, _WHAT), contextlib.closing(find(self.path)) as place:
            place.check(replacing=True)

    def tell(self) -> None:
        """Write our process id. A pipe that has no reader yet is left for the next call.

        Raises:
            UsageError: It cannot be written.
        """
        words = f"{os.getpid()}\n".encode()
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
                    # It has room for so little, or its reader has gone again.
                    with contextlib.suppress(BrokenPipeError, BlockingIOError):
                        os.write(fd, words)
                    os.close(fd)
                    self.told = True
                    return
            with whole_file(self.path) as file:
                file.write(words)
        self.told = True
