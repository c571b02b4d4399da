"""The probe, without root and without a kernel."""

from tcplat_core.testing import make_row

from tcplat_skeleton.plugin import defines, tcplat_register_probes

(SPEC,) = tcplat_register_probes()


def test_probe_is_registered_as_skeleton() -> None:
    assert SPEC.name == "skeleton"


def test_kernel_record_is_decoded_to_a_row() -> None:
    row = make_row(SPEC, "tp_end", comm="curl", daddr="192.0.2.1", srtt_us=250, resent=2)
    assert (row.point, row.func, row.attach) == ("end", "tcp:tcp_destroy_sock", "tracepoint")
    assert (row.comm, row.daddr, row.srtt_us, row.resent) == ("curl", "192.0.2.1", 250, 2)


def test_unmeasured_round_trip_is_null() -> None:
    assert make_row(SPEC, "tp_end", srtt_us=0).srtt_us is None


def test_description_says_how_the_connection_ended() -> None:
    assert make_row(SPEC, "tp_end").desc == "connection over"
    assert make_row(SPEC, "tp_end", err=104).desc == "ECONNRESET"


def test_option_becomes_a_constant_in_c() -> None:
    (option,) = SPEC.options
    assert defines({option.name: option.default}) == {"MIN_SRTT_US": 0}
    assert defines({option.name: option.convert("5ms")}) == {"MIN_SRTT_US": 5000}
    assert "MIN_SRTT_US" in SPEC.source
