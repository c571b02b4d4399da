"""Giving up root, and saying so."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from tcplat_core.event import terminal
from tcplat_core.run import privileges


def give_up_root(say: Callable[[str], None] = terminal.say) -> None:
    """Give up root, and say where that is not the user behind sudo."""
    privileges.drop()
    uid = os.environ.get("SUDO_UID") or "0"
    if os.geteuid() == 0 and uid != "0":
        say(
            f"uid {uid} cannot read {sys.prefix}, so that tcplat stays uid 0, without capabilities:"
            " what it writes is root's; install it where everybody can read it, as in /opt/tcplat"
        )
