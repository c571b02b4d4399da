"""The command ``tcplat``, also as ``python -m tcplat_core``."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line, as root only where nobody can slip modules in."""
    if os.geteuid() == 0 and not sys.flags.isolated:
        # Without -I they come from PYTHONPATH, the user's site and the current folder as well.
        os.execv(sys.executable, [sys.executable, "-I", "-m", "tcplat_core", *sys.argv[1:]])
    from .cli import main as isolated_main  # noqa: PLC0415 - not before it is safe, nor twice

    isolated_main()


if __name__ == "__main__":
    main()
