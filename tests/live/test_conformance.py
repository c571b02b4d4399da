"""The checks of the conformance kit that need root: loaded, attached, given packets, detached."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import attrs
import pytest

from tcplat_core import HookPoint, Interfaces, ProbeSpec, tracepoint, xdp
from tcplat_core.kernel import bpf
from tcplat_core.loader import trial
from tcplat_core.registry.find import Plugins
from tcplat_core.testing import conformance, trial_process
from tcplat_core.testing.check import Outcome, Subject
from tcplat_core.testing.conformance import checks, run

from .harness import TCPLAT, eventually, needs

PROBES = [
    found.name
    for found in Plugins.load().found
    if found.kind == "probe" and found.distribution == "tcplat"
]


ROOTS = ("attaches", "lets packets pass", "leaves nothing")
"""The checks that need root. All others are made in tests/unit/test_conformance.py."""
LENGTHY = ("compiles by kprobe", "compiles by fentry", "compiles with histograms", "programs")
"""Those that it leaves out for the built-in probes, unless TCPLAT_LONG=1."""


def made(subject: Subject, *more: str) -> dict[str, Outcome]:
    there = checks(subject)
    return {name: run(name, there[name], subject) for name in (*ROOTS, *more) if name in there}


@pytest.mark.parametrize("name", PROBES)
def test_built_in_probes_conform(name: str) -> None:
    (subject,) = conformance.subjects(name, trial=trial_process.as_root)
    assert isinstance(subject.spec, ProbeSpec)
    found = made(subject, *LENGTHY)
    assert {*ROOTS, "programs"} <= found.keys()
    if not any(way.mechanism == "xdp" for point in subject.spec.points for way in point.ways):
        passes = found.pop("lets packets pass")
        assert (passes.verdict, passes.why) == ("not checked", "it has no XDP program")
    assert {one.verdict for one in found.values()} == {"passed"}, found


PACKETS = ProbeSpec(
    name="packets",
    summary="each packet",
    source="""
int on_packet(struct xdp_md *ctx)
{
	struct tcplat_event *e = tcplat_reserve(HOOK_on_packet, bpf_ktime_get_ns());

	FAULT
	if (!e)
		return XDP_PASS;
	tcplat_submit(e);
	return XDP_PASS;
}
""",
    points=(HookPoint("nic_rx", (xdp("on_packet"),)),),
    interfaces=lambda _: Interfaces(names=("eth0",)),
)


WRITES = """
	u8 *at = (u8 *)(long)ctx->data;

	if ((void *)(at + 6) <= (void *)(long)ctx->data_end)
		at[5] ^= 1;
"""


def outcomes(spec: ProbeSpec) -> dict[str, Outcome]:
    """Of the checks that need root."""
    return made(Subject(spec=spec, given={}, trial=trial_process.as_root))


def with_fault(code: str) -> dict[str, Outcome]:
    fault = PACKETS.source.replace("FAULT", code)
    # A reserved record has to be submitted on every path, or the verifier refuses the program.
    return outcomes(attrs.evolve(PACKETS, source=fault))


def test_probe_used_for_fault_injection_conforms() -> None:
    assert {one.verdict for one in with_fault("").values()} == {"passed"}


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (
            "if (!e)\n return XDP_DROP;",
            r"when the ring is full is 1, not XDP_PASS; a probe has to return",
        ),
        (
            "if (ctx->data_end - ctx->data == 33) { if (e) tcplat_submit(e); return XDP_DROP; }",
            r"cut off at 33 bytes is 1, not XDP_PASS",
        ),
        (
            WRITES,
            r"it changes TCP over IPv4, port 443;",
        ),
    ],
    ids=["drops when its ring is full", "drops what is cut off", "writes to the packet"],
)
def test_program_that_drops_or_changes_packets_fails_the_check(code: str, sentence: str) -> None:
    found = with_fault(code)
    assert found["attaches"].verdict == "passed"
    assert found["lets packets pass"].verdict == "failed"
    assert sentence in found["lets packets pass"].why
    assert found["leaves nothing"].verdict == "passed"


def test_program_refused_by_the_verifier_fails_the_check() -> None:
    found = with_fault("bpf_trace_printk_((char *)0, 1);\nreturn *(int *)7;")
    assert found["attaches"].verdict == "failed"
    assert "the verifier refused on_packet" in found["attaches"].why
    assert found["lets packets pass"] == Outcome(
        "lets packets pass", "not checked", "it could not be attached"
    )


def test_hook_missing_from_this_kernel_fails_the_check() -> None:
    source = PACKETS.source.replace("on_packet(struct xdp_md", "on_packet(void").replace(
        "XDP_PASS", "0"
    )
    nowhere = HookPoint("gone", (tracepoint("tcp:tcp_no_such_thing", "on_packet"),))
    spec = attrs.evolve(
        PACKETS, source=source.replace("FAULT", ""), points=(nowhere,), interfaces=None
    )
    assert "this kernel has no tracepoint tcp:tcp_no_such_thing" in outcomes(spec)["attaches"].why


def test_leftover_program_and_map_are_found() -> None:
    """A program and a map that another fd still holds."""
    fd = bpf.program_load(
        "tcplat_left", bpf.ProgramType.XDP, bytes.fromhex("b7000000020000009500000000000000")
    )
    try:
        kind, number = bpf.identity(fd)
        assert (kind, bpf.exists(kind, number)) == ("prog", True)
        assert trial._still_there([(fd, kind, number)], patience_s=0.1) == [f"prog {number}"]
    finally:
        os.close(fd)
    assert trial._still_there([(fd, kind, number)]) == []


@pytest.mark.alone  # no program of another tcplat may be loaded meanwhile
def test_check_leaves_the_host_unchanged(tmp_path: Path) -> None:
    needs("bpftool", "ip")

    def host() -> tuple[str, set[str]]:
        links = subprocess.run(["ip", "link"], check=True, capture_output=True, text=True).stdout
        programs = subprocess.run(
            ["bpftool", "--json", "prog", "show"], check=True, capture_output=True
        ).stdout
        names = {str(one.get("name")) for one in json.loads(programs)}
        return links, {name for name in names if name.startswith("tcplat")}

    before = host()
    done = subprocess.run(
        [*TCPLAT, "plugins", "check", "xdp_port:iface=eth0,port=9999", "--json"],
        check=True,
        capture_output=True,
        cwd=tmp_path,
    )
    (one,) = json.loads(done.stdout)
    assert (one["failed"], one["not_checked"]) == (0, 0)
    # The kernel lets go of a program a little after its last user.
    eventually(lambda: host() == before, "the host was as before")
