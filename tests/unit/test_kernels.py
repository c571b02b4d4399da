"""Every hook point, checked against the functions and tracepoints in the BTF of each kernel.

data/kernels.json has the facts; `python tests/vm/facts.py` regenerates it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tcplat_core.cli import host_checks
from tcplat_core.errors import CannotRunError
from tcplat_core.kernel import host as host_module
from tcplat_core.kernel.host import SYSCALLS, Host, choose
from tcplat_core.plugin.hookpoints import Hook, HookPoint
from tcplat_core.registry.show import HostView
from tests.vm import facts, run

KERNELS: dict[str, dict[str, dict[str, list[str] | None]]] = json.loads(
    facts.TARGET.read_text(encoding="utf-8")
)["kernels"]
PROBES = facts.probes()
NAMES = set(facts.names())
POINTS = [(name, point) for name, points in PROBES.items() for point in points]

every_kernel = pytest.mark.parametrize("kernel", KERNELS)


def version(kernel: str) -> tuple[int, ...]:
    return tuple(map(int, kernel.split(".")))


@pytest.fixture
def host(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """Return a host with that kernel, kprobes, fentry and tracepoints of system calls."""
    monkeypatch.setattr(host_module, "KPROBE_PMU", tmp_path)
    known = KERNELS[kernel]["facts"]
    return Host(
        facts={name: None if args is None else (1, args) for name, args in known.items()},
        fentry="",
        syscalls=frozenset(NAMES),
    )


def hooks(point: HookPoint) -> list[Hook]:
    return [hook for way in point.ways for hook in way.hooks if hook.mechanism != "xdp"]


def test_kernels_json_has_every_booted_kernel() -> None:
    assert set(run.read_kernels(run.KERNELS.read_text())) <= set(KERNELS)
    assert set(run.read_kernels(run.MORE_KERNELS.read_text())) <= set(KERNELS)


@every_kernel
def test_kernels_json_has_every_hook(kernel: str) -> None:
    """If this fails: python tests/vm/facts.py."""
    asked = {name for name in NAMES if not name.startswith(SYSCALLS)}
    assert asked == set(KERNELS[kernel]["facts"])


def test_every_hook_names_the_arguments_it_reads() -> None:
    """Unnamed arguments are not checked. Returns and system calls have none."""
    for name, point in POINTS:
        for hook in hooks(point):
            bare = hook.mechanism == "kretprobe" or hook.func.startswith(SYSCALLS)
            # It only counts calls.
            assert bare or hook.args or hook.program == "kp_accept", (name, hook)


@every_kernel
def test_every_function_signature_of_each_kernel_is_supported(host: Host, kernel: str) -> None:
    """By one of the listed signatures: an unknown one would make the mechanism unusable."""
    known = KERNELS[kernel]["facts"]
    refusals: dict[tuple[str, str, str], list[str | None]] = {}
    for name, point in POINTS:
        for hook in hooks(point):
            if known.get(hook.func) is not None:
                key = (name, hook.func, hook.mechanism)
                refusals.setdefault(key, []).append(host.hook(hook))
    assert refusals
    assert {key: said for key, said in refusals.items() if None not in said} == {}


@every_kernel
def test_every_point_is_available(host: Host, kernel: str) -> None:
    for name, points in PROBES.items():
        choice = choose(points, "auto", host.way, name)
        # Before 6.17 the tracepoint fired for what was sent alone.
        lacks = name == "tcp_retransmit" and version(kernel) < (6, 17)
        assert list(choice.missing) == (["not_sent"] if lacks else [])


@every_kernel
@pytest.mark.parametrize("mechanism", ["fentry", "kprobe"])
def test_each_mechanism_serves_every_point(host: Host, mechanism: str) -> None:
    for name in ("tcp_client", "tcp_service", "tcp_stats"):
        choice = choose(PROBES[name], mechanism, host.way, name)
        assert not choice.missing
        assert {way.mechanism for way in choice.taken.values()} == {mechanism}


SINCE = {
    "send": (6, 16),  # tcp:tcp_sendmsg_locked
    "recv": (6, 3),  # sock:sock_recv_length
    "send_short": (6, 3),  # sock:sock_send_length
    "ready": (6, 3),  # sock:sk_data_ready
}
"""Point -> the first kernel that has a tracepoint for it; all others had theirs before 5.8."""


@every_kernel
def test_tracepoints_serve_the_points_listed(host: Host, kernel: str) -> None:
    for name in ("tcp_client", "tcp_service", "tcp_stats", "dev_xmit"):
        for point in PROBES[name]:
            if version(kernel) >= SINCE.get(point.point, (5, 8)):
                assert list(choose([point], "tracepoint", host.way, name).taken) == [point.point]
            else:
                with pytest.raises(CannotRunError, match="this kernel has no tracepoint"):
                    choose([point], "tracepoint", host.way, name)


@every_kernel
def test_socket_use_is_observed_on_every_kernel(host: Host, kernel: str) -> None:
    """By functions before 6.3, by tracepoints from then on."""
    (use,) = (point for point in PROBES["core"] if point.point == "use")
    taken = choose([use], "auto", host.way, "core").taken["use"]
    assert taken.mechanism == ("tracepoint" if version(kernel) >= (6, 3) else "fentry")


@every_kernel
def test_doctor_names_the_mechanism_for_socket_use(host: Host, kernel: str) -> None:
    check = host_checks._owners(HostView(host, as_root=True))
    assert check.ok is True
    by = "tracepoint:sock:sock_recv_length" if version(kernel) >= (6, 3) else "fentry:tcp_recvmsg+"
    assert f"by {by}" in check.found


@every_kernel
def test_doctor_reports_that_socket_use_is_not_observed(
    host: Host, kernel: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(host_module, "KPROBE_PMU", tmp_path / "none")
    policy = Host(facts=host.facts, fentry="this kernel refuses fentry programs (EPERM)")
    check = host_checks._owners(HostView(policy, as_root=True))
    if version(kernel) >= (6, 3):
        assert check.ok is True
    else:
        assert check.ok is None
        assert "this kernel has no tracepoint sock:sock_recv_length" in check.found
        assert "refuses fentry programs" in check.found
        assert check.mend


# ---- what closes a way


@pytest.fixture
def newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """Make a kernel whose function has one more argument, at the end."""
    monkeypatch.setattr(host_module, "KPROBE_PMU", tmp_path)
    return Host(facts={"tcp_f": (1, ["sk", "flags", "more"])}, fentry="")


def test_appended_argument_does_not_move_earlier_ones(newer: Host) -> None:
    for mechanism in ("fentry", "kprobe"):
        assert newer.hook(Hook("tcp_f", "p", mechanism, ("sk", "flags"))) is None


def test_appended_argument_moves_the_fexit_result(newer: Host) -> None:
    reason = newer.hook(Hook("tcp_f", "p", "fexit", ("sk", "flags")))
    assert reason == "tcp_f takes (sk, flags, more) here, not (sk, flags)"
    assert newer.hook(Hook("tcp_f", "p", "fexit", ("sk", "flags", "more"))) is None


def test_const_does_not_change_an_argument() -> None:
    host = Host(facts={"tcp:probe": (0, ["struct sock *", "struct sk_buff *"])})
    for skb in ("const struct sk_buff *", "struct sk_buff *"):
        assert host.hook(Hook("tcp:probe", "p", "tracepoint", ("struct sock *", skb))) is None
    wrong = Hook("tcp:probe", "p", "tracepoint", ("struct sk_buff *", "struct sock *"))
    assert host.hook(wrong) == (
        "tcp:probe takes (struct sock *, struct sk_buff *) here, "
        "not (struct sk_buff *, struct sock *)"
    )
