"""The stages of an exchange: their names, their order, and the arithmetic that makes them add up.

A chain is a row of instants, in the order in which they come to pass, and the stages
between them. Stages are differences of neighbours in the chain, so that their sum is
the whole by construction. All times are integer nanoseconds.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

CLIENT_SENT, REQUEST_TX, REQUEST_RX, REQUEST_IP, REQUEST_READY, REQUEST_READ = range(6)
REPLY_SENT, REPLY_TX, REPLY_RX, REPLY_IP, REPLY_READY, REPLY_READ = range(6, 12)

MILESTONES = (
    "client_sent",  # the client's first send() of the request
    "request_tx",  # the request's last byte leaves by the client's interface, for the first time
    "request_rx",  # the service's interface has all of the request
    "request_ip",  # IP has
    "request_ready",  # TCP has put its last byte into the socket's queue
    "request_read",  # the service's recv() of its last byte returns
    "reply_sent",  # the service's first send() of the reply
    "reply_tx",  # and the same on the way back
    "reply_rx",
    "reply_ip",
    "reply_ready",
    "reply_read",
)
STAGES = (
    "client_send",
    "wire",
    "softirq",
    "tcp",
    "queue",
    "server",
    "server_send",
    "wire_back",
    "softirq_back",
    "tcp_back",
    "queue_back",
)
"""Stage i lies between milestones i and i + 1."""

CONNECT_CALLED, SYN_TX, SYN_RX, SYNACK_TX, SYNACK_RX, CONNECTED, HANDSHAKE_DONE, ACCEPTED = range(8)

CONNECT_MILESTONES = (
    "connect_called",
    "syn_tx",
    "syn_rx",
    "synack_tx",
    "synack_rx",
    "connected",  # the client's socket is ESTABLISHED
    "handshake_done",  # the service's socket is
    "accepted",
)
CONNECT_STAGES = (
    "connect_send",
    "syn",
    "answer",
    "synack",
    "connect_done",
    "ack",
    "accept",
)

UNEXPLAINED = "unexplained"


class Split:
    """A chain's total, and what it is made of.

    Attributes:
        stages: Name and ns, in order. Where instants between them are unknown, stages
            are one: ``wire+softirq``.
        total_ns: From the first known instant to the last.
        unexplained_ns: What no stage can have: ``total_ns`` minus the sum of the stages.
        left_out: Numbers of the instants that contradict the order of the others.
    """

    __slots__ = ("left_out", "stages", "total_ns", "unexplained_ns")

    def __init__(
        self,
        stages: tuple[tuple[str, int], ...],
        total_ns: int,
        unexplained_ns: int,
        left_out: tuple[int, ...] = (),
    ) -> None:
        self.stages = stages
        self.total_ns = total_ns
        self.unexplained_ns = unexplained_ns
        self.left_out = left_out


NOTHING = Split((), 0, 0)


def split(stamps: Sequence[int | None], stages: tuple[str, ...] = STAGES) -> Split:
    """Divide the time between the first and the last known instant into stages.

    An instant that comes before one which it should follow is left out, and the stages
    around it are one; of several such, as few as possible. Where nothing is known
    between the two ends of the whole chain, all of the time is unexplained.
    """
    names = NAMES if stages is STAGES else _names(stages)
    parts = []
    first = before = -1
    first_ns = at_ns = 0
    for number in range(len(stamps)):
        stamp = stamps[number]
        if stamp is None:
            continue
        next_ns = stamp
        if before < 0:
            first, first_ns = number, next_ns
        elif next_ns < at_ns:
            return _split_inconsistent(stamps, stages)
        else:
            parts.append((names[before][number], next_ns - at_ns))
        before, at_ns = number, next_ns
    if not parts:  # one instant is no time
        return NOTHING
    total_ns = at_ns - first_ns
    if len(parts) == 1 and before - first == len(stages) and len(stages) > 1:
        return Split((), total_ns, total_ns)
    return Split(tuple(parts), total_ns, 0)


def _split_inconsistent(stamps: Sequence[int | None], stages: tuple[str, ...]) -> Split:
    """Return the same where not all instants are in order."""
    known = [(number, at) for number, at in enumerate(stamps) if at is not None]
    wrong = [place for place in range(1, len(known)) if known[place][1] < known[place - 1][1]]
    kept = _consistent(known, wrong)
    left_out = tuple(sorted({number for number, _ in known} - {number for number, _ in kept}))
    in_order: list[int | None] = [None] * len(stamps)
    for number, at in kept:
        in_order[number] = at
    found = split(in_order, stages)
    return Split(found.stages, found.total_ns, found.unexplained_ns, left_out)


@functools.cache
def _names(stages: tuple[str, ...]) -> list[list[str]]:
    """Return the names of the stages between any two instants, by the first and the last."""
    count = len(stages) + 1
    return [["+".join(stages[first:last]) for last in range(count)] for first in range(count)]


NAMES = _names(STAGES)


def _consistent(known: list[tuple[int, int]], wrong: list[int]) -> list[tuple[int, int]]:
    """Return the longest part in order, with both ends if those are; of equals, the earlier.

    How long it lasted in all is what matters most, and what the ends say.

    Args:
        known: Number and instant.
        wrong: Places in it of which the instant is before the one ahead.
    """
    if len(wrong) == 1:
        # As on loopback, where XDP comes behind IP: one of two neighbours goes.
        place = wrong[0]
        if place < len(known) - 1 and known[place - 1][1] <= known[place + 1][1]:
            return [*known[:place], *known[place + 1 :]]
    first, last = known[0], known[-1]
    if first[1] > last[1]:
        return _longest(known)
    inner = [item for item in known[1:-1] if first[1] <= item[1] <= last[1]]
    return [first, *_longest(inner), last]


def _longest(items: list[tuple[int, int]]) -> list[tuple[int, int]]:
    best: list[list[tuple[int, int]]] = []
    for item in items:
        before: list[tuple[int, int]] = []
        for run in best:
            if run[-1][1] <= item[1] and len(run) > len(before):
                before = run
        best.append([*before, item])
    return max(best, key=len, default=[])
