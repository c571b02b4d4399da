"""tcp_stats: the record and the descriptions; no root needed."""

from __future__ import annotations

import errno
from pathlib import Path

from tcplat_tcp_stats.plugin import StatsEvent, describe, tcplat_register_probes

from tcplat_core import Event, Moment
from tcplat_core.event.fields import FiredBy
from tcplat_core.event.record import Record
from tcplat_core.testing import make_record

SPEC = next(tcplat_register_probes())
OWN = [name for name in StatsEvent.__struct_fields__ if name not in Event.__struct_fields__]


def row_of(**members: int) -> StatsEvent:
    record = Record(StatsEvent)
    hooks = [FiredBy("stats", "tcp_set_state", "fentry", describe)]
    raw = make_record(StatsEvent, **members)
    (row,) = record.decoder("tcp_stats", hooks, str)(record.layout.iter_unpack(raw), 0)
    assert isinstance(row, StatsEvent)
    return row


def test_record_is_decoded_to_a_row() -> None:
    row = row_of(
        role=1, srtt_us=120, min_rtt_us=90, rto_us=200_120, retransmits=3, bytes_acked=2**40
    )
    assert (row.role, row.srtt_us, row.min_rtt_us, row.rto_us) == ("client", 120, 90, 200_120)
    assert (row.retransmits, row.bytes_acked, row.bytes_received) == (3, 2**40, 0)
    assert row_of(role=2).role == "service"


def test_unmeasured_round_trip_is_null() -> None:
    row = row_of(role=1)
    assert (row.srtt_us, row.min_rtt_us, row.rto_us, row.retransmits) == (None, None, None, 0)


def test_end_of_a_connection_is_described() -> None:
    assert describe(Moment("stats", "TCP_CLOSE", "TCP_LAST_ACK", 0, None)) == "closed"
    error = Moment("stats", "TCP_CLOSE", "TCP_ESTABLISHED", errno.ECONNRESET, None)
    assert describe(error) == "ECONNRESET"
    for number, words in ((errno.ECONNREFUSED, "refused"), (errno.ETIMEDOUT, "timed out")):
        assert describe(Moment("stats", "TCP_CLOSE", "TCP_SYN_SENT", number, None)) == words


def test_every_mechanism_serves_the_point() -> None:
    (point,) = SPEC.points
    assert [way.mechanism for way in point.ways] == ["fentry", "tracepoint", "kprobe"]


def test_readme_has_every_field() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for name in OWN:
        assert f"`{name}`" in readme
