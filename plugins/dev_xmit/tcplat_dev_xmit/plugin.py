"""Options, hook point and descriptions of dev_xmit."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from typing import Annotated

from tcplat_core import (
    HookPoint,
    Moment,
    Option,
    Options,
    PacketEvent,
    ProbeSpec,
    Wire,
    hookimpl,
    ports,
    tracepoint,
)

_MOST_PORTS = 32
_PRINTS = range(0x21, 0x7F)


def device(raw: bytes) -> str:
    """Return a device's name, safe to print: the kernel forbids only slash, colon, white space."""
    name = raw.split(b"\0", 1)[0]
    return "".join(
        chr(byte) if byte in _PRINTS and byte != ord("\\") else f"\\x{byte:02x}" for byte in name
    )


class LeavingEvent(PacketEvent, gc=False):
    """A row of dev_xmit."""

    dev: Annotated[
        str,
        Wire(
            "char[16]",
            "name of the device, in its own network namespace",
            to=device,
            column="",
        ),
    ]


def defines(options: Options) -> dict[str, int | str]:
    """Return the constants that the C is compiled with."""
    if not options["port"]:
        return {}
    return {"PACKET_PORTS": " ".join(f"case {port}:" for port in options["port"])}


_WORDS = {
    frozenset({"SYN"}): ("SYN leaves", "SYN, data leave"),
    frozenset({"SYN", "ACK"}): ("SYN answered", "SYN answered"),
    frozenset({"ACK"}): ("ACK leaves", "data leave"),
    frozenset({"FIN", "ACK"}): ("FIN leaves", "data, FIN leave"),
}
"""Flags -> description of an empty packet, and of one with payload."""


def describe(moment: Moment) -> str:
    """Describe a packet in at most 15 characters, the width of the table's column."""
    flags = frozenset((moment.flags or "").split("|")) & {"SYN", "FIN", "RST", "ACK"}
    if "RST" in flags:
        return "RST leaves"
    empty, full = _WORDS.get(flags, ("odd flags", "odd flags"))
    return empty if moment.empty else full


@hookimpl
def tcplat_register_probes() -> Iterator[ProbeSpec]:
    """Offer the probe."""
    yield ProbeSpec(
        name="dev_xmit",
        summary="each TCP packet that leaves, as it is handed to a device",
        source=files(__package__).joinpath("dev_xmit.bpf.c").read_text(encoding="utf-8"),
        points=(
            HookPoint(
                "nic_tx",
                (
                    tracepoint(
                        "net:net_dev_start_xmit",
                        "tp_start_xmit",
                        "const struct sk_buff *",
                        "const struct net_device *",
                    ),
                    # In front of the device's queue: what waits there seems to be on the wire.
                    tracepoint("net:net_dev_queue", "tp_queue", "struct sk_buff *"),
                ),
            ),
        ),
        types=("sk_buff", "net_device:nd_net", "net_device:name", "tcp_sock"),
        event=LeavingEvent,
        describe=describe,
        options=(
            Option(
                name="port",
                help="TCP ports, of either end, joined by +; all of them if not given",
                convert=ports(_MOST_PORTS),
                default=(),
            ),
        ),
        defines=defines,
        track=True,
    )
