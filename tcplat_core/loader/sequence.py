"""Several programs of one hook as one: the kernel's dispatch then costs once."""

from __future__ import annotations

from collections.abc import Sequence

from tcplat_core.kernel.bpf import CALL, INSTRUCTION, RETURN_0

_MOVE = 0xBF
"""BPF_ALU64 | BPF_MOV | BPF_X: the destination register gets the source register."""
_PSEUDO_CALL = 1
"""Source register of a call of a function of the same program; relative to the next instruction."""
_CONTEXT, _SAVED = 1, 6
"""The register of the first argument, and one that a call leaves as it is."""


def in_sequence(codes: Sequence[bytes]) -> bytes:
    """Return one program that runs these one after the other, each with the same context.

    Args:
        codes: Instructions of whole programs. What they return is dropped: for tracepoints,
            kprobes, fentry and fexit it has no meaning.
    """
    head_size = 1 + 2 * len(codes) + len(RETURN_0) // INSTRUCTION.size
    head = [_moved(_SAVED, _CONTEXT)]
    begin = head_size
    for code in codes:
        head.append(_moved(_CONTEXT, _SAVED))
        after = len(head) + 1
        head.append(INSTRUCTION.pack(CALL, _PSEUDO_CALL << 4, 0, begin - after))
        begin += len(code) // INSTRUCTION.size
    return b"".join((*head, RETURN_0, *codes))


def _moved(to: int, source: int) -> bytes:
    return INSTRUCTION.pack(_MOVE, source << 4 | to, 0, 0)
