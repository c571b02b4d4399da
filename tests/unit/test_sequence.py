"""Several programs of one hook as one."""

from __future__ import annotations

import pytest

from tcplat_core.kernel.bpf import CALL, INSTRUCTION, RETURN_0
from tcplat_core.loader.sequence import in_sequence

NOTHING = INSTRUCTION.pack(0xB7, 7, 0, 1)
"""r7 = 1"""
CODES = [NOTHING * count + RETURN_0 for count in (1, 5, 2)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_program_is_called_with_the_context_and_in_order(count: int) -> None:
    codes = CODES[:count]
    whole = in_sequence(codes)
    instructions = list(INSTRUCTION.iter_unpack(whole))
    called = [
        at + 1 + number
        for at, (operation, registers, _, number) in enumerate(instructions)
        if operation == CALL and registers >> 4 == 1
    ]
    assert [whole[8 * at :] for at in called] == [b"".join(codes[n:]) for n in range(count)]
    # r6 = r1 once; r1 = r6 before each call.
    moves = [one[1] for one in instructions if one[0] == 0xBF]
    assert moves == [0x16, *[0x61] * count]


def test_it_returns_before_the_first_program_begins() -> None:
    whole = in_sequence(CODES)
    assert whole.endswith(RETURN_0 + b"".join(CODES))
