"""What rows of packets have beside the fields of all rows."""

from __future__ import annotations

from typing import Annotated

from .fields import Event, Wire


class PacketEvent(Event, gc=False):
    """A row of a packet. ``<tcplat/packet.bpf.h>`` fills in its fields."""

    ack: Annotated[
        int | None,
        Wire("u32", "acknowledgement number", has=True, column=""),
    ]
    window: Annotated[int, Wire("u16", "receive window of the sender, not scaled", column="")]
