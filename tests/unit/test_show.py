"""``tcplat plugins show``: what is known of a plugin, and what is not known of the host."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import attrs
import pytest

from tcplat_core.errors import CannotRunError
from tcplat_core.event.fields import Event, Wire, fields
from tcplat_core.kernel.host import Host
from tcplat_core.plugin.hookpoints import (
    HookPoint,
    Way,
    fenter,
    fentry,
    kentry,
    kprobe,
    tracepoint,
    tracepoints,
)
from tcplat_core.plugin.options import Option, boolean, choice, integer
from tcplat_core.plugin.specs import ProbeSpec, SinkSpec
from tcplat_core.registry import show
from tcplat_core.registry.find import Found, Plugins

FUNCTION = {"tcp_sendmsg": (1, ["sk", "msg", "size"]), "tcp_close": (2, ["sk"])}
TRACEPOINT = {"tcp:tcp_probe": (0, ["struct sock *"])}
BY_FENTRY = fentry(fenter("tcp_sendmsg", "fe_send"))
BY_KPROBE = kprobe(kentry("tcp_sendmsg", "kp_send"))
BY_TRACEPOINT = tracepoint("tcp:tcp_probe", "tp_send")
BY_SYSCALL = tracepoints(("syscalls:sys_exit_accept4", "tp_accept"))


@pytest.fixture(autouse=True)
def _kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No kprobes, no tracefs; what BTF says stands in the facts below."""
    monkeypatch.setattr("tcplat_core.kernel.host.KPROBE_PMU", tmp_path / "none")
    monkeypatch.setattr("tcplat_core.kernel.bpf.tracefs", lambda: None)
    monkeypatch.setattr(show, "tracefs", lambda: None)


def host(*, fentry: str = "") -> Host:
    """Make a kernel with these functions and this tracepoint; fentry is missing for a reason."""
    facts: dict[str, tuple[int, list[str]] | None] = {**FUNCTION, **TRACEPOINT, "tcp_nowhere": None}
    return Host(facts=facts, fentry=fentry)


def point(*ways: Way, view: show.HostView, optional: bool = False) -> tuple[Any, Any, Any]:
    shown = view.point(HookPoint("send", ways, optional=optional))
    return shown["takes"], shown["perhaps"], shown["why_not"]


def test_root_shows_the_mechanism_that_works() -> None:
    works = show.HostView(host(), as_root=True)
    assert point(BY_FENTRY, BY_TRACEPOINT, view=works) == ("fentry:tcp_sendmsg", None, None)
    refuses = show.HostView(host(fentry="this kernel refuses fentry programs"), as_root=True)
    assert point(BY_FENTRY, BY_TRACEPOINT, view=refuses) == (
        "tracepoint:tcp:tcp_probe",
        None,
        None,
    )


def test_fentry_is_uncertain_without_root() -> None:
    view = show.HostView(host())
    assert point(BY_FENTRY, BY_TRACEPOINT, view=view) == (
        "tracepoint:tcp:tcp_probe",
        "fentry:tcp_sendmsg",
        None,
    )
    assert point(BY_FENTRY, view=view) == (
        None,
        "fentry:tcp_sendmsg",
        "only root can test whether fentry works",
    )


def test_missing_function_is_not_uncertain_without_root() -> None:
    nowhere = fentry(fenter("tcp_nowhere", "fe_nowhere"))
    takes, perhaps, _ = point(nowhere, BY_TRACEPOINT, view=show.HostView(host()))
    assert (takes, perhaps) == ("tracepoint:tcp:tcp_probe", None)


def test_syscall_tracepoints_are_uncertain_without_root() -> None:
    assert point(BY_SYSCALL, view=show.HostView(host())) == (
        None,
        "tracepoint:syscalls:sys_exit_accept4",
        "only root can list the tracepoints of system calls",
    )


def test_unavailable_point_has_its_reason() -> None:
    view = show.HostView(host(), as_root=True)
    assert point(BY_KPROBE, view=view) == (
        None,
        None,
        "this kernel has no kprobes (CONFIG_KPROBE_EVENTS)",
    )


def test_kernel_without_btf_gives_a_reason_instead_of_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nothing(_: Host) -> None:
        raise CannotRunError("this kernel does not describe its types")

    monkeypatch.setattr(Host, "btf", property(nothing))
    takes, perhaps, why_not = point(BY_TRACEPOINT, view=show.HostView())
    assert (takes, perhaps) == (None, None)
    assert why_not == "this kernel does not describe its types"


class Own(Event):
    rto_us: Annotated[int | None, Wire("u32", "the timer, µs", nullable=True)]


PROBE = ProbeSpec(
    name="again",
    summary="each segment that is sent again",
    source="",
    points=(
        HookPoint("send", (BY_FENTRY, BY_TRACEPOINT)),
        HookPoint("accept", (BY_KPROBE,), optional=True),
    ),
    event=Own,
    options=(
        Option(name="iface", help="where", required=True, example="eth0", metavar="IFACE"),
        Option(name="most", help="how many", convert=integer(1, 9), default=3),
        Option(name="dir", help="which way", convert=choice("in", "out"), default="in"),
        Option(name="quick", help="not long", convert=boolean, default=False),
        Option(name="odd", help="a thing", default=(1, 2)),
        Option(name="path", help="a file"),
    ),
)
FOUND = Found("again", "probe", "2.5", "tcplat-again", "ok", PROBE.summary)


def test_json_of_a_probe_is_complete() -> None:
    shown = show.as_json(FOUND, PROBE, show.HostView(host()))
    assert list(shown) == [
        *("name", "kind", "version", "distribution", "summary", "options", "example"),
        *("points", "fields"),
    ]
    assert shown["example"] == "sudo tcplat run --probe again:iface=eth0"
    assert [one["point"] for one in shown["points"]] == ["send", "accept"]
    assert shown["fields"] == [attrs.asdict(field) for field in fields(Own)]
    assert [field["name"] for field in shown["fields"] if field["own"]] == ["rto_us"]
    assert shown["options"][2] == {
        "name": "dir",
        "type": "in|out",
        "choices": ["in", "out"],
        "default": "in",
        "required": False,
        "help": "which way",
    }
    assert [option["default"] for option in shown["options"]] == [
        None,
        3,
        "in",
        False,
        "1+2",
        None,
    ]


def test_text_of_a_probe_is_complete() -> None:
    text = show.as_text(show.as_json(FOUND, PROBE, show.HostView(host())))
    lines = text.splitlines()
    assert lines[:2] == [
        "again: each segment that is sent again",
        "probe, from tcplat-again 2.5",
    ]
    assert "  send    fentry:tcp_sendmsg if that works here, else tracepoint:tcp:tcp_probe" in lines
    assert "  accept  no: this kernel has no kprobes (CONFIG_KPROBE_EVENTS)" in lines
    assert "  to be sure, run as root: sudo tcplat plugins show again" in lines
    assert "  iface=IFACE   where  [required]" in lines
    assert "  most=N        how many  [default: 3]" in lines
    assert "  quick=yes|no  not long  [default: no]" in lines
    assert "  path=TEXT     a file" in lines
    (own,) = (line for line in lines if line.startswith("  *"))
    assert own.split() == ["*", "rto_us", "int", "or", "null", "us", "the", "timer,", "µs"]
    assert lines[-1] == "  sudo tcplat run --probe again:iface=eth0"


def test_probe_that_cannot_run_here_is_marked() -> None:
    spec = attrs.evolve(PROBE, points=(HookPoint("send", (BY_KPROBE,)),))
    text = show.as_text(show.as_json(FOUND, spec, show.HostView(host(), as_root=True)))
    assert "no kprobes (CONFIG_KPROBE_EVENTS); required" in text


def test_sink_has_neither_points_nor_fields() -> None:
    sink = SinkSpec(name="again", summary="s", factory=lambda _, __: pytest.fail("opened"))
    shown = show.as_json(attrs.evolve(FOUND, kind="sink"), sink, show.HostView(host()))
    assert not {"points", "fields"} & set(shown)
    assert shown["example"] == "sudo tcplat run --probe tcp_client --sink again"
    assert "no options" in show.as_text(shown)


def test_example_contains_the_required_options() -> None:
    msgpack = Plugins.load().sink("msgpack")
    shown = show.as_json(attrs.evolve(FOUND, kind="sink"), msgpack, show.HostView(host()))
    assert shown["example"].endswith("--sink msgpack:unix=/run/user/1000/tcplat.sock")
