"""Options, hook point and descriptions of xdp_port."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files

from tcplat_core import (
    HookPoint,
    Interfaces,
    Moment,
    Option,
    Options,
    PacketEvent,
    ProbeSpec,
    choice,
    hookimpl,
    ports,
    xdp,
)

_MOST_PORTS = 32
"""Most ports: they are compiled in, and compared with each packet."""


def _names(text: str) -> tuple[str, ...]:
    """Split names joined by +; no names mean all interfaces that are up."""
    if text == "all-up":
        return ()
    names = text.split("+")
    if not all(names):
        raise ValueError("write eth0, lo+eth0 or all-up")
    return tuple(dict.fromkeys(names))


OPTIONS = (
    Option(
        name="iface",
        help="interfaces, joined by +; all-up for all that are up",
        convert=_names,
        required=True,
        metavar="IFACE+IFACE|all-up",
        example="eth0",
    ),
    Option(
        name="port",
        help="TCP ports, joined by +; or all",
        convert=ports(_MOST_PORTS),
        required=True,
        example="80+443",
    ),
    Option(
        name="dir",
        help="which port of a packet must match: src, dst or either",
        convert=choice("src", "dst", "either"),
        default="either",
    ),
    Option(
        name="mode",
        help="native, generic, or auto: generic if the driver does not support XDP",
        convert=choice("auto", "native", "generic"),
        default="auto",
    ),
    Option(
        name="netns",
        help="network namespace of the interfaces: a name of ip netns, a path or a process id; "
        "that of --netns unless given",
        default="",
        metavar="NAME|PATH|PID",
    ),
)


def interfaces(options: Options) -> Interfaces:
    """Return the interfaces to attach to."""
    return Interfaces(names=options["iface"], mode=options["mode"], netns=options["netns"])


def defines(options: Options) -> dict[str, int | str]:
    """Return the constants that the C is compiled with."""
    constants: dict[str, int | str] = {
        "XDP_SRC": int(options["dir"] != "dst"),
        "XDP_DST": int(options["dir"] != "src"),
    }
    if options["port"]:
        constants["PACKET_PORTS"] = " ".join(f"case {port}:" for port in options["port"])
    return constants


_WORDS = {
    frozenset({"SYN"}): ("SYN", "SYN and data"),
    frozenset({"SYN", "ACK"}): ("SYN answered", "SYN answered"),
    frozenset({"ACK"}): ("ACK", "data"),
    frozenset({"FIN", "ACK"}): ("FIN", "data and FIN"),
}
"""Flags -> description of an empty packet, and of one with payload."""


def describe(moment: Moment) -> str:
    """Describe a packet in at most 15 characters, the width of the table's column."""
    flags = frozenset((moment.flags or "").split("|")) & {"SYN", "FIN", "RST", "ACK"}
    if "RST" in flags:
        return "RST"
    empty, full = _WORDS.get(flags, ("odd flags", "odd flags"))
    return empty if moment.empty else full


@hookimpl
def tcplat_register_probes() -> Iterator[ProbeSpec]:
    """Offer the probe."""
    yield ProbeSpec(
        name="xdp_port",
        summary="each TCP packet of a port, as an interface receives it (XDP)",
        source=files(__package__).joinpath("xdp_port.bpf.c").read_text(encoding="utf-8"),
        points=(HookPoint("nic_rx", (xdp("tcplat_xdp_port"),)),),
        types=("xdp_buff:rxq", "xdp_rxq_info:dev", "net_device:nd_net"),
        event=PacketEvent,
        describe=describe,
        options=OPTIONS,
        defines=defines,
        interfaces=interfaces,
    )
