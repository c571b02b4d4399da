"""What the commands share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tcplat_stages.connection import Finished
from tcplat_stages.join import Joiner

from tcplat_core import Loss, Reader, Sampled


def finished(reader: Reader, joiner: Joiner) -> Iterator[Finished]:
    """Yield exchanges and connections of a capture, as they are complete."""
    for item in reader.items():
        if isinstance(item, Loss):
            joiner.lost(item)
        elif isinstance(item, Sampled):
            yield from joiner.sampled(item)
        elif isinstance(item, Sequence):
            yield from joiner.feed(item)
    yield from joiner.finish(reader.report.until_ns)


def remarks(reader: Reader, joiner: Joiner) -> Iterator[str]:
    """Yield sentences that a reader of the figures has to know."""
    yield from reader.remarks()
    for count, what in (
        (joiner.cut, "requests were under way when the capture began, and are left out"),
        (joiner.untimed, "messages are left out: one instant alone is known of each"),
        (joiner.missed, "messages are left out: they were under way where events were lost"),
        (joiner.unsampled, "messages are left out: their connection left the sample meanwhile"),
        (joiner.given_up, "connections were given up for want of room"),
    ):
        if count:
            yield f"{reader.name}: {count} {what}"
