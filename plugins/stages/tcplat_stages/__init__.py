"""Where the time goes: exchanges and their stages, from rows of any probes."""

from __future__ import annotations

import math
import os
from pathlib import Path


def _compiled(here: Path) -> list[str]:
    """Return the folder of the modules that hatch_build.py has compiled (D123); empty for none.

    None as well with TCPLAT_PURE=1, or if a source was changed since: a wheel has no `.checked`.
    """
    folder = here / "compiled"
    if os.environ.get("TCPLAT_PURE") or not folder.is_dir():
        return []
    if (folder / ".checked").exists():
        made = {one.name.partition(".")[0]: one.stat().st_mtime for one in os.scandir(folder)}
        for one in os.scandir(here):
            name, _, kind = one.name.partition(".")
            if kind in ("py", "pxd") and one.stat().st_mtime > made.get(name, math.inf):
                return []
    return [str(folder)]


# The modules have the same names there; all of them are used, or none.
__path__[:0] = _compiled(Path(__file__).parent)
