"""The mechanism that a hook point uses, and the reason where it has none."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tcplat_core.errors import CannotRunError
from tcplat_core.kernel.host import Host, choose
from tcplat_core.plugin.hookpoints import Hook, HookPoint, Way, kentry, kprobe, kreturn, tracepoint

FENTRY = Way("fentry", (Hook("tcp_sendmsg", "fe", "fentry"),))
KPROBE = kprobe(kentry("tcp_sendmsg", "kp"))
TRACEPOINT = tracepoint("tcp:tcp_sendmsg_locked", "tp")
XDP = Way("xdp", (Hook("xdp", "on_packet", "xdp"),))

SEND = HookPoint("send", (FENTRY, KPROBE, TRACEPOINT))


def closed(**reasons: str) -> Callable[[Way], str | None]:
    """Return a host where these mechanisms do not work."""
    return lambda way: reasons.get(way.mechanism)


# --- --attach auto


@pytest.mark.parametrize(
    ("host", "taken"),
    [
        (closed(), FENTRY),
        (closed(fentry="no"), KPROBE),
        (closed(kprobe="no"), FENTRY),
        (closed(fentry="no", kprobe="no"), TRACEPOINT),
    ],
)
def test_auto_takes_the_first_usable_way(host: Callable[[Way], str | None], taken: Way) -> None:
    assert choose([SEND], "auto", host, "p").taken == {"send": taken}


def test_cast_is_not_used_where_the_kernel_lacks_it() -> None:
    """bpf_rdonly_cast came with 6.2."""
    assert Host(facts={"bpf_rdonly_cast": None, "struct sock": (1, [])}).cast() == 0


def test_softirq_points_use_kprobes_last() -> None:
    """The kernel skips a kprobe that interrupts another one's handler: rows would be missing."""
    point = HookPoint("state", (FENTRY, TRACEPOINT, KPROBE))
    assert choose([point], "auto", closed(fentry="no"), "p").taken == {"state": TRACEPOINT}


def test_ways_of_one_mechanism_keep_the_probes_order() -> None:
    older, newer = tracepoint("tcp:old", "tp_old"), tracepoint("tcp:new", "tp_new")
    point = HookPoint("send", (newer, older))
    assert choose([point], "auto", closed(), "p").taken == {"send": newer}

    def no_newer(way: Way) -> str | None:
        return "too old" if way is newer else None

    assert choose([point], "auto", no_newer, "p").taken == {"send": older}


def test_mechanism_is_chosen_for_each_point() -> None:
    other = HookPoint("close", (TRACEPOINT,))
    choice = choose([SEND, other], "auto", closed(), "p")
    assert choice.taken == {"send": FENTRY, "close": TRACEPOINT}
    assert choice.missing == {}


# --- a mandatory mechanism


@pytest.mark.parametrize(
    ("attach", "taken"), [("fentry", FENTRY), ("kprobe", KPROBE), ("tracepoint", TRACEPOINT)]
)
def test_requested_mechanism_is_taken(attach: str, taken: Way) -> None:
    assert choose([SEND], attach, closed(), "p").taken == {"send": taken}


def test_requested_mechanism_is_mandatory() -> None:
    with pytest.raises(CannotRunError) as error:
        choose([SEND], "kprobe", closed(kprobe="this kernel has no kprobes"), "tcp_client")
    assert str(error.value) == (
        "probe tcp_client cannot listen at 'send': this kernel has no kprobes; "
        "--attach auto uses what is available"
    )


def test_point_without_the_requested_mechanism_is_named() -> None:
    with pytest.raises(
        CannotRunError, match="at 'close': it does not support kprobe; --attach auto"
    ):
        choose([HookPoint("close", (TRACEPOINT,))], "kprobe", closed(), "p")


def test_xdp_is_taken_whatever_mechanism_is_requested() -> None:
    point = HookPoint("nic_rx", (XDP,))
    assert choose([point], "kprobe", closed(), "p").taken == {"nic_rx": XDP}


# --- no way


def test_error_lists_every_reason_once_and_in_order() -> None:
    host = closed(fentry="no fentry", kprobe="nothing new", tracepoint="nothing new")
    with pytest.raises(CannotRunError) as error:
        choose([SEND], "auto", host, "tcp_client")
    assert str(error.value) == ("probe tcp_client cannot listen at 'send': no fentry; nothing new")


def test_optional_point_may_be_missing_with_a_reason() -> None:
    optional = HookPoint("extra", (KPROBE,), optional=True)
    choice = choose([SEND, optional], "auto", closed(kprobe="no kprobes"), "p")
    assert choice.taken == {"send": FENTRY}
    assert choice.missing == {"extra": "no kprobes"}


def test_optional_point_may_lack_the_requested_mechanism() -> None:
    optional = HookPoint("extra", (TRACEPOINT,), optional=True)
    choice = choose([SEND, optional], "kprobe", closed(), "p")
    assert choice.missing == {"extra": "it does not support kprobe"}


def test_point_without_any_mechanism_is_missing() -> None:
    choice = choose([HookPoint("never", (), optional=True)], "auto", closed(), "p")
    assert choice.missing == {"never": "it does not support auto"}


# --- what the kernel has: facts from before, so that no BTF is read

FACTS: dict[str, tuple[int, list[str]] | None] = {
    "tcp_recvmsg": (7, ["sk", "msg", "len", "nonblock", "flags", "addr_len"]),
    "tcp:tcp_destroy_sock": (0, ["struct sock *"]),
    "tcp_sendpage": None,
    "tcp:tcp_new": None,
}


OTHER_ARGUMENTS = (
    "tcp_recvmsg takes (sk, msg, len, nonblock, flags, addr_len) here, not (sk, msg, len, flags)"
)


@pytest.mark.parametrize(
    ("hook", "answer"),
    [
        (kentry("tcp_recvmsg", "kp"), None),
        (kentry("tcp_recvmsg", "kp", "sk", "msg", "len"), None),
        (
            kentry("tcp_recvmsg", "kp", "sk", "msg", "len", "flags"),
            OTHER_ARGUMENTS,
        ),
        (kreturn("tcp_recvmsg", "kr"), None),
        (kentry("tcp_sendpage", "kp"), "this kernel has no function tcp_sendpage"),
        (Hook("tcp:tcp_new", "tp", "tracepoint"), "this kernel has no tracepoint tcp:tcp_new"),
        (Hook("tcp:tcp_destroy_sock", "tp", "tracepoint", ("struct sock *",)), None),
        (
            Hook("tcp:tcp_destroy_sock", "tp", "tracepoint", ("struct sock *", "int")),
            "tcp:tcp_destroy_sock takes (struct sock *) here, not (struct sock *, int)",
        ),
    ],
)
def test_hook_is_usable_if_its_arguments_match(hook: Hook, answer: str | None) -> None:
    assert Host(facts=dict(FACTS)).hook(hook) == answer


def test_way_is_unusable_if_one_of_its_hooks_is() -> None:
    ways = (
        Way("tracepoint", (Hook("tcp:tcp_destroy_sock", "a", "tracepoint"),)),
        Way("tracepoint", (*TRACEPOINT.hooks, Hook("tcp:tcp_new", "b", "tracepoint"))),
    )
    host = Host(facts={**FACTS, "tcp:tcp_sendmsg_locked": (0, [])})
    assert [host.way(way) for way in ways] == [None, "this kernel has no tracepoint tcp:tcp_new"]
