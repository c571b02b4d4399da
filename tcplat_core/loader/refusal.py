"""The words for a program that the verifier refuses."""

from __future__ import annotations

import errno
import sys

from tcplat_core.kernel.bpf import RefusedError


def refusal(program: str, error: RefusedError) -> str:
    """Write the verifier's log to stderr, which --debug shows, and return the message."""
    sys.stderr.write(f"{program}:\n{error.log}\n")
    why = error.strerror
    if error.errno == errno.E2BIG:
        why = "it is too complex for this kernel: more instructions or paths than it checks"
    return f"the verifier refused {program} ({why}); --debug shows more"
