"""The command ``tcplat``, also as ``python -I -m tcplat_core``."""

from __future__ import annotations

import os
import signal
import site
import sys
from pathlib import Path
from typing import NoReturn

from .errors import CannotRunError
from .kernel import rights
from .kernel.end_request import Interrupts
from .run import privileges
from .run.standard import keep_taken


def start() -> NoReturn:
    """Run the script tcplat, which starts Python with -I for every user.

    A process without rights is restarted without -I, so that PYTHONPATH and the user's own
    packages work.
    """
    keep_taken()
    if not _held() and _differs():
        os.execv(sys.executable, [sys.executable, "-P", "-m", "tcplat_core", *sys.argv[1:]])
    main()


def main() -> NoReturn:
    """Run the command line; with rights only where no other user's code can have run by now."""
    keep_taken()
    # SIG_DFL: bin/tcplat-start.
    if signal.getsignal(signal.SIGINT) in (signal.SIG_DFL, signal.default_int_handler):
        signal.signal(signal.SIGINT, Interrupts())
    if _held():
        if not sys.flags.isolated:
            print(  # noqa: T201 - click is not to be imported here
                "tcplat: with root's rights Python needs -I, or it runs what it finds in the "
                "current folder, PYTHONPATH and the user's packages: start tcplat by its command "
                "(one of an older installation: install it again), or by python -I -m tcplat_core",
                file=sys.stderr,
            )
            sys.exit(CannotRunError.exit_code)
        privileges.hide_environment()
    try:
        from .cli.main import main as isolated_main  # noqa: PLC0415 - not before it is safe
    except KeyboardInterrupt:
        from .run.signals import stopped_early  # noqa: PLC0415 - as above

        sys.exit(stopped_early(sys.argv[1:]))
    isolated_main()


def _held() -> bool:
    try:
        return rights.held()
    except CannotRunError as error:
        print(f"tcplat: {error}", file=sys.stderr)  # noqa: T201 - as above
        sys.exit(error.exit_code)


def _differs() -> bool:
    """Return whether -I hides any packages or settings from this user."""
    return (
        any(name.startswith("PYTHON") for name in os.environ)
        or Path(site.getusersitepackages()).is_dir()
    )


if __name__ == "__main__":
    main()
