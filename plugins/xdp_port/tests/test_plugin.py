"""xdp_port: options, descriptions and the record; no root needed."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest
from tcplat_xdp_port.plugin import describe, tcplat_register_probes

from tcplat_core import Interfaces, Moment, PacketEvent, UsageError
from tcplat_core.event.record import Record
from tcplat_core.event.text import TCP_FLAGS
from tcplat_core.loader.protocol import Request
from tcplat_core.plugin.options import read_options
from tcplat_core.run.probe_run import fired_by, probe_request
from tcplat_core.testing import make_record

SPEC = next(tcplat_register_probes())


def options(**given: str) -> Any:
    return read_options("xdp_port", SPEC.options, {"iface": "lo", "port": "9999", **given})


def packet(flags: str | None, *, empty: bool = True) -> str:
    return describe(Moment("nic_rx", None, None, 0, empty, flags))


@pytest.mark.parametrize(
    ("flags", "empty", "full"),
    [
        ("SYN", "SYN", "SYN and data"),
        ("SYN|ACK", "SYN answered", "SYN answered"),
        ("ACK", "ACK", "data"),
        ("PSH|ACK", "ACK", "data"),
        ("FIN|ACK", "FIN", "data and FIN"),
        ("FIN|PSH|ACK", "FIN", "data and FIN"),
        ("RST", "RST", "RST"),
        ("RST|ACK", "RST", "RST"),
        ("SYN|ECE|CWR", "SYN", "SYN and data"),
        ("SYN|FIN", "odd flags", "odd flags"),
        ("FIN", "odd flags", "odd flags"),
        ("", "odd flags", "odd flags"),
        (None, "odd flags", "odd flags"),
    ],
)
def test_packets_are_described_by_flags_and_payload(
    flags: str | None, empty: str, full: str
) -> None:
    assert (packet(flags), packet(flags, empty=False)) == (empty, full)


def test_every_packet_description_fits_its_column() -> None:
    for count in range(9):
        for flags in itertools.combinations(TCP_FLAGS, count):
            for empty in (True, False):
                assert 0 < len(packet("|".join(flags), empty=empty)) <= 15


def test_iface_option_is_parsed() -> None:
    wanted = SPEC.interfaces
    assert wanted is not None
    assert wanted(options()) == Interfaces(names=("lo",))
    assert wanted(options(iface="lo+eth0+lo")).names == ("lo", "eth0")
    assert wanted(options(iface="all-up")).names == ()
    assert wanted(options(mode="native", netns="blue")) == Interfaces(
        names=("lo",), mode="native", netns="blue"
    )


@pytest.mark.parametrize(
    ("given", "constants"),
    [
        ({}, {"XDP_SRC": 1, "XDP_DST": 1, "PACKET_PORTS": "case 9999:"}),
        ({"dir": "src"}, {"XDP_SRC": 1, "XDP_DST": 0, "PACKET_PORTS": "case 9999:"}),
        ({"dir": "dst"}, {"XDP_SRC": 0, "XDP_DST": 1, "PACKET_PORTS": "case 9999:"}),
        ({"port": "80+443+80"}, {"XDP_SRC": 1, "XDP_DST": 1, "PACKET_PORTS": "case 80: case 443:"}),
        ({"port": "all"}, {"XDP_SRC": 1, "XDP_DST": 1}),
    ],
)
def test_options_become_constants(given: dict[str, str], constants: dict[str, int | str]) -> None:
    assert SPEC.defines(options(**given)) == constants


@pytest.mark.parametrize("missing", ["iface", "port"])
def test_iface_and_port_are_required(missing: str) -> None:
    given = {"iface": "lo", "port": "80"}
    del given[missing]
    with pytest.raises(UsageError, match=f"needs {missing}="):
        read_options("xdp_port", SPEC.options, given)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("port", value) for value in ("", "0", "65536", "-1", "80,443", "80+", "http", "٣")),
        ("port", "+".join(map(str, range(1, 34)))),
        *(("iface", value) for value in ("", "lo+", "+lo")),
        ("dir", "both"),
        ("mode", "skb"),
    ],
)
def test_invalid_options_are_refused(key: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"option {key}="):
        options(**{key: value})


def test_request_survives_packing() -> None:
    request = Request(probes=(probe_request(SPEC, options(iface="a+b", mode="native")),))
    assert Request.unpack(request.pack()) == request


def test_row_has_an_acknowledgement_where_the_packet_has_one() -> None:
    record = Record(PacketEvent)
    assert "#define TCPLAT_HAS_ACK 8\n" in record.c_struct()
    decode = record.decoder("xdp_port", fired_by(SPEC), lambda index: f"if{index}")
    raw = b"".join(
        make_record(PacketEvent, has=has, ack=7, seq=6, bytes=0, flags=0x12, ifindex=3)
        for has in (15, 7)
    )
    with_it, without = decode(record.layout.iter_unpack(raw), 0)
    assert cast("PacketEvent", with_it).ack == 7
    assert cast("PacketEvent", without).ack is None
    assert (with_it.seq, with_it.flags, with_it.desc, with_it.ifname) == (
        *(6, "SYN|ACK", "SYN answered", "if3"),
    )
    assert (with_it.point, with_it.func, with_it.attach) == ("nic_rx", "xdp", "xdp")
