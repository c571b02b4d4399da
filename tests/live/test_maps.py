"""A third-party probe counts in maps of its own, and its Python side reads them without root."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tcplat_core.kernel import bpf
from tcplat_core.plugin.maps import mapped

from .harness import Puppet, Tcplat, at, eventually

NOBODY = 65534

PROBE = '''
from typing import Annotated

from tcplat_core import Event, HookPoint, ProbeSpec, ReadableMap, Wire, hookimpl, tracepoint

SOURCE = """
#include <tcplat/event.bpf.h>
#include <tcplat/owner.bpf.h>

struct caller { u32 pid, used; };
#define TCPLAT_KEY struct caller
#define TCPLAT_KEYS 64
#include <tcplat/keyed.bpf.h>

BPF_F_TABLE("array", u32, u64, counts, TCPLAT_KEYS + 1, BPF_F_MMAPABLE);
BPF_HASH(hidden, u32, u64, 64);

int tp_send(struct bpf_raw_tracepoint_args *ctx)
{
	struct caller who = {.pid = bpf_get_current_pid_tgid() >> 32, .used = 1};
	u32 number = tcplat_number(&who), hook = HOOK_tp_send;
	u64 *count = counts.lookup(&number);

	if (count && hook == HOOK_tp_send)
		lock_xadd(count, 1);
	hidden.increment(who.pid);
	return 0;
}
"""


class Calls(Event):
    calls: Annotated[int | None, Wire("u64", "calls of send() so far", has=True)]


def poll(maps):
    for (pid, _), (calls,) in zip(maps["keys"], maps["counts"], strict=True):
        if calls:
            yield maps.row("calls", pid=pid, calls=calls)


def broken(maps):
    return 1 / 0


def spec(name, poll=poll, maps=(("keys", "=II"), ("counts", "=Q"))):
    return ProbeSpec(
        name=name,
        summary="how often each process sends",
        source=SOURCE,
        points=(HookPoint("send", (tracepoint("sock:sock_send_length", "tp_send"),)),),
        event=Calls,
        maps=tuple(ReadableMap(*one) for one in maps),
        poll=poll,
    )


@hookimpl
def tcplat_register_probes():
    yield spec("calls")
    yield spec("broken", poll=broken)
    yield spec("hash", maps=(("hidden", "=Q"),))
    yield spec("narrow", maps=(("counts", "=I"),))
    yield spec("absent", maps=(("nothing", "=I"),))
'''

RUN = """
import sys
sys.path.append({folder!r})
from tcplat_core.__main__ import main
main()
"""


@pytest.fixture
def program(tmp_path: Path) -> tuple[str, ...]:
    """Tcplat where that probe is installed."""
    folder = tmp_path / "third_party"
    info = folder / "third_party-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tcplat]\nthird_party = third_party\n")
    (folder / "third_party.py").write_text(PROBE)
    return (sys.executable, "-I", "-c", RUN.format(folder=str(folder)))


@pytest.fixture
def start(start_tcplat: Callable[..., Tcplat], program: tuple[str, ...]) -> Callable[..., Tcplat]:
    return lambda probe: start_tcplat(probes=(probe,), program=program)


SENDS = """
ours, theirs = socket.socketpair()
one, other = socket.create_server(("127.0.0.1", 0)), socket.socket()
other.connect(one.getsockname())
for _ in range({times}):
    other.send(b"x")
"""


@pytest.mark.alone  # there are 64 numbers for the processes of the host
def test_keyed_counts_are_emitted_during_and_at_the_end(
    start: Callable[..., Tcplat], puppet: Callable[..., Puppet]
) -> None:
    many, few = puppet(), puppet()
    run = start("calls").wait_ready()
    many(SENDS.format(times=100))
    eventually(
        lambda: [row for row in run.rows() if (row["pid"], row["calls"]) == (many.pid, 100)],
        "what was sent was reported",
    )
    few(SENDS.format(times=3))
    outcome = run.stop()
    last = {row["pid"]: row["calls"] for row in at(outcome.rows, "calls")}
    assert (last[many.pid], last[few.pid]) == (100, 3)
    assert {(row["probe"], row["func"], row["attach"]) for row in outcome.rows} == {
        ("calls", "poll", "map")
    }
    (polled,) = (
        hook for hook in outcome.report["probes"]["calls"]["hooks"] if hook["point"] == "calls"
    )
    assert polled["delivered"] == polled["produced"] == len(outcome.rows)


def test_poll_that_raises_is_reported_once_and_the_run_continues(
    start: Callable[..., Tcplat],
) -> None:
    run = start("broken").wait_ready()
    what = "broken: its maps are no longer read: ZeroDivisionError"
    eventually(lambda: what in run.errors.read_text(), "the message was printed")
    outcome = run.stop()
    assert outcome.returncode == 0
    assert outcome.stderr.count("are no longer read") == 1
    assert outcome.report["probes"]["broken"]["poll_error"].startswith("ZeroDivisionError")


@pytest.mark.parametrize(
    ("probe", "sentence"),
    [
        ("hash", "the map hidden of probe hash cannot be read from outside"),
        ("narrow", "an entry of the map counts of probe narrow has 8 bytes in C and 4 in Python"),
        ("absent", "the C of probe absent has no map nothing"),
    ],
)
def test_unreadable_map_type_is_refused_in_one_sentence(
    probe: str, sentence: str, start: Callable[..., Tcplat]
) -> None:
    outcome = start(probe).wait()
    assert outcome.returncode == 4
    assert sentence in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_process_without_capabilities_cannot_map_an_array() -> None:
    """On every kernel. bpf(2) allows such a process a lookup since 5.19 only (c8644cd0efe7)."""
    knob = Path("/proc/sys/kernel/unprivileged_bpf_disabled")
    release = tuple(map(int, os.uname().release.split(".")[:2]))
    array = bpf.map_create("counts", bpf.ARRAY, 4, 8, 4, bpf.MMAPABLE)
    bpf.map_update(array, struct.pack("=I", 3), struct.pack("=Q", 4711))
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)  # drops all capabilities
            with mapped(array, 32) as memory:
                value = struct.unpack_from("=Q", memory, 24)[0]
            os.write(writer, struct.pack("=Qi", value, _look_up(array)))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    value, error = struct.unpack("=Qi", os.read(reader, mmap.PAGESIZE))
    os.close(reader)
    os.close(array)
    assert value == 4711
    refused = release < (5, 19) and knob.exists() and knob.read_text().strip() != "0"
    assert error == (errno.EPERM if refused else 0)


def _look_up(fd: int) -> int:
    """BPF_MAP_LOOKUP_ELEM of key 3: an errno, 0 for success."""
    key, value = ctypes.c_uint32(3), ctypes.c_uint64()
    attr = struct.pack("=IxxxxQQQ", fd, ctypes.addressof(key), ctypes.addressof(value), 0)
    libc = ctypes.CDLL(None, use_errno=True)
    number = {"x86_64": 321, "aarch64": 280}[os.uname().machine]
    return ctypes.get_errno() if libc.syscall(number, 1, attr, len(attr)) else 0
