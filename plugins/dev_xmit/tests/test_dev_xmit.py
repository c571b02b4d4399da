"""dev_xmit: options, descriptions and the record; no root needed."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from tcplat_dev_xmit.plugin import LeavingEvent, describe, device, tcplat_register_probes

from tcplat_core import Moment, UsageError
from tcplat_core.event.fields import FiredBy
from tcplat_core.event.record import Record
from tcplat_core.event.text import TCP_FLAGS
from tcplat_core.plugin.options import read_options
from tcplat_core.testing import make_record

SPEC = next(tcplat_register_probes())


def options(**given: str) -> Any:
    return read_options("dev_xmit", SPEC.options, given)


def packet(flags: str | None, *, empty: bool = True) -> str:
    return describe(Moment("nic_tx", None, None, 0, empty, flags))


@pytest.mark.parametrize(
    ("flags", "empty", "full"),
    [
        ("SYN", "SYN leaves", "SYN, data leave"),
        ("SYN|ACK", "SYN answered", "SYN answered"),
        ("PSH|ACK", "ACK leaves", "data leave"),
        ("FIN|ACK", "FIN leaves", "data, FIN leave"),
        ("RST|ACK", "RST leaves", "RST leaves"),
        ("SYN|FIN", "odd flags", "odd flags"),
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


def test_ports_become_case_labels_and_none_means_all() -> None:
    assert SPEC.defines(options(port="80+443+80")) == {"PACKET_PORTS": "case 80: case 443:"}
    assert SPEC.defines(options()) == SPEC.defines(options(port="all")) == {}


@pytest.mark.parametrize(
    "port", ["0", "65536", "http", "", "80+", "+".join(map(str, range(1, 40)))]
)
def test_invalid_port_is_refused(port: str) -> None:
    with pytest.raises(UsageError, match="port"):
        options(port=port)


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (b"eth0\0\0\0\0\0\0\0\0\0\0\0\0", "eth0"),
        (b"a\x1b[31mb\0", "a\\x1b[31mb"),
        ("schön".encode(), "sch\\xc3\\xb6n"),
        (b"back\\slash", "back\\x5cslash"),
    ],
)
def test_device_name_is_escaped(raw: bytes, name: str) -> None:
    assert device(raw) == name


def test_record_is_decoded_to_a_row() -> None:
    record = Record(LeavingEvent)
    raw = make_record(
        LeavingEvent,
        saddr="10.0.0.1",
        daddr="10.0.0.2",
        sport=40_000,
        dport=80,
        seq=7,
        bytes=100,
        flags=24,
        ack=9,
        window=0,
        dev="eth0",
        has=15,
    )
    hooks = [FiredBy("nic_tx", "net:net_dev_start_xmit", "tracepoint", describe)]
    (row,) = record.decoder("dev_xmit", hooks, str)(record.layout.iter_unpack(raw), 0)
    assert (row.point, row.desc, row.flags) == ("nic_tx", "data leave", "PSH|ACK")
    assert isinstance(row, LeavingEvent)
    assert (row.ack, row.window, row.dev, row.ifname) == (9, 0, "eth0", None)
    assert (row.pid, row.sock) == (None, 0)


def test_readme_documents_every_option() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for option in SPEC.options:
        assert f"| `{option.name}` |" in readme
