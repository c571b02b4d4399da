"""A request and its reply: when it was where, how long that took, and what became of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .chain import MILESTONES, REPLY_SENT, STAGES, Split, split
from .stream import CLIENT, SERVICE

if TYPE_CHECKING:
    from .connection import Connection, End
    from .row_fields import Process

ANSWERED, UNANSWERED, CUT, OPEN, ONE_WAY, UNKNOWN, PUSH = (
    "answered",
    "unanswered",
    "cut",
    "open",
    "one_way",
    "unknown",
    "push",
)
OUTCOMES = (ANSWERED, UNANSWERED, CUT, OPEN, ONE_WAY, UNKNOWN, PUSH)
"""What may become of an exchange. The first alone is a sample of the time that a request takes."""
FAILED = frozenset({UNANSWERED, CUT})
"""Outcomes of requests that never were answered, or not to the end."""


class Exchange:
    """A request and its reply, or a message that has none.

    Attributes:
        conn: Whose.
        number: Counts exchanges of the connection, from 1.
        kind: ``exchange``; ``request`` for one that got no reply; ``push`` for what
            the service sent without being asked.
        outcome: One of OUTCOMES; only an ``answered`` one has a total.
        over_ns: When its waiting was over; None where nothing waited, or it was answered.
        over_by: What ended it, in plain words.
        urgent: Bytes of the request and of the reply that are beside the stream.
        request: First byte of the request, and the one after its last; unwrapped.
        reply: Of the reply.
        replied_ns: When its first byte was sent, or first seen; 0 without a reply.
        parted: The client had left before that, with a farewell: instants of the request up to the
            pause before it, and the farewell.
        by: The process at each end, as the rows of this exchange have it: which sent the request's
            first byte, and the reply's; else the one that used the end last by then.
        stamps: Instants, see chain.MILESTONES.
        retransmits: Segments of it that were sent again, as seen in packets.
        zero_windows: How often one end closed its window meanwhile.
        missed: Rows of it were lost: it is not reported.
        beyond: The client has read of its reply what the service was not seen to send.
        ended: How its end was known: ``turn``, ``closed``, ``idle``, ``given up``, ``end of run``.
    """

    __slots__ = (
        "_split",
        "beyond",
        "by",
        "conn",
        "ended",
        "kind",
        "missed",
        "number",
        "outcome",
        "over_by",
        "over_ns",
        "parted",
        "replied_ns",
        "reply_begin",
        "reply_end",
        "request_begin",
        "request_end",
        "retransmits",
        "stamps",
        "urgent",
        "zero_windows",
    )

    def __init__(self, conn: Connection, kind: str) -> None:
        self.conn = conn
        self.kind = kind
        self.number = 0
        self.request_begin = self.request_end = -1
        self.reply_begin = self.reply_end = -1
        self.replied_ns = 0
        self.parted: tuple[list[int | None], Exchange] | None = None
        self.by: list[Process | None] = [None, None]
        self.urgent = (0, 0)
        self.stamps: list[int | None] = [None] * len(MILESTONES)
        self.retransmits = 0
        self.zero_windows = 0
        self.ended = ""
        self.beyond = self.missed = False
        self.outcome = PUSH if kind == "push" else ANSWERED
        self.over_ns: int | None = None
        self.over_by = ""
        self._split: Split | None = None

    @property
    def split(self) -> Split:
        """How its time divides into stages: those that it went through to their end.

        Where the end of a reply was not sent or did not come, what is known of its last byte
        is not of the last byte: nothing behind the beginning of the reply is a stage.
        """
        return self.divide()

    def divide(self) -> Split:
        """Return `split`."""
        if self._split is None:
            whole = self.over_ns is None
            self._split = split(self.stamps if whole else self.stamps[: REPLY_SENT + 1])
        return self._split

    @property
    def total_ns(self) -> int:
        """From its first known instant to its last."""
        return self.split.total_ns

    @property
    def waited_ns(self) -> int | None:
        """So long a request waited that was not answered; None for one that was, or did not."""
        return None if self.over_ns is None else max(self.over_ns - self.began_ns, 0)

    @property
    def lasted_ns(self) -> int:
        """Its total, or as long as it waited."""
        waited_ns = self.waited_ns
        return self.split.total_ns if waited_ns is None else waited_ns

    @property
    def measured(self) -> bool:
        """Its total is how long a request took: it was answered, to the last byte."""
        return self.outcome == ANSWERED

    @property
    def under_way(self) -> tuple[str, ...]:
        """Stages in one of which it was when its waiting was over; none where nothing waited."""
        if self.over_ns is None:
            return ()
        last = max(number for number, at in enumerate(self.stamps) if at is not None)
        if last < REPLY_SENT and self.kind == "request" and self.conn.ends[1].streams:
            return STAGES[last:REPLY_SENT]
        return STAGES[last:]

    @property
    def began_ns(self) -> int:
        """Where its stages begin: its first known instant, by the rows' clock; there is one."""
        left_out = self.split.left_out
        return next(
            at for number, at in enumerate(self.stamps) if at is not None and number not in left_out
        )

    @property
    def request_bytes(self) -> int:
        """Of the request; 0 for a push."""
        return self.request_end - self.request_begin - self.urgent[CLIENT]

    @property
    def reply_bytes(self) -> int:
        """Of the reply; 0 for a request without one."""
        return self.reply_end - self.reply_begin - self.urgent[SERVICE]

    def process(self, index: int) -> Process:
        """Return the process at an end; see `by`."""
        return self.by[index] or self.conn.ends[index].process

    @property
    def end(self) -> End:
        """The end that it is reported for: the client's, if that is known, else the service's."""
        client, service = self.process(CLIENT), self.process(SERVICE)
        known = client.pid is not None or service.pid is None
        return self.conn.ends[CLIENT if known else SERVICE]
