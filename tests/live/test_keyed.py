"""Numbers for keys: each key has one, also when several CPUs request it concurrently."""

from __future__ import annotations

import ctypes
import os
import struct
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import attrs
import pytest

from tcplat_core.event.fields import Event
from tcplat_core.event.record import Record
from tcplat_core.kernel import bpf
from tcplat_core.kernel.host import choose
from tcplat_core.loader import xdp
from tcplat_core.loader.attach import Loader
from tcplat_core.loader.cache import Cache
from tcplat_core.loader.protocol import ProbeRequest, Request
from tcplat_core.plugin.maps import MapView

KEYS = 5000
TURNS = 8
"""How often each key is counted."""

SOURCE = f"""
#include <tcplat/event.bpf.h>
#include <tcplat/owner.bpf.h>

struct thing {{ u32 number, used; }};
#define TCPLAT_KEY struct thing
#define TCPLAT_KEYS {KEYS}
#include <tcplat/keyed.bpf.h>

BPF_F_TABLE("array", u32, u64, counts, TCPLAT_KEYS + 1, BPF_F_MMAPABLE);
BPF_TABLE("array", u32, u64, turn, 1);

int count_a_thing(struct xdp_md *ctx)
{{
	u32 zero = 0, number;
	struct thing key = {{.used = 1}};
	u64 *turns = turn.lookup(&zero), *count;

	if (!turns)
		return 2;
	/* Read, then add: CPUs that run side by side come to a new key at the same time. */
	key.number = *turns / {TURNS};
	lock_xadd(turns, 1);
	number = tcplat_number(&key);
	count = counts.lookup(&number);
	if (count)
		lock_xadd(count, 1);
	return 2;
}}
"""


@attrs.define
class Program:
    """The program, and the arrays that it fills."""

    fd: int
    keys: MapView
    counts: MapView

    def run(self, cpu: int, times: int) -> None:
        """Run it so often on one CPU (BPF_PROG_TEST_RUN)."""
        os.sched_setaffinity(0, [cpu])
        frame = ctypes.create_string_buffer(64)
        attr = struct.pack(
            "=IIIIQQII", self.fd, 0, 64, 0, ctypes.addressof(frame), 0, times, 0
        ).ljust(80, b"\0")
        number = {"x86_64": 321, "aarch64": 280}[os.uname().machine]
        if ctypes.CDLL(None, use_errno=True).syscall(number, 10, attr, len(attr)):
            raise OSError(ctypes.get_errno(), "BPF_PROG_TEST_RUN")


@pytest.fixture
def program() -> Iterator[Program]:
    event = Record(Event).c_struct()
    request = ProbeRequest(
        name="keyed", source=SOURCE, struct=event, points=(), types=(), defines={}
    )
    loader = Loader(Request(probes=(request,)), Cache.open())
    bpf.lift_memory_limit()
    choice = choose(request.points, "auto", loader._why_not, request.name)
    module = loader._open(request, choice, 1024)
    fd = xdp.load("count_a_thing", module.code("count_a_thing"))
    keys = MapView(module.fd("keys"), struct.Struct("=II"), KEYS + 1)
    counts = MapView(module.fd("counts"), struct.Struct("=Q"), KEYS + 1)
    yield Program(fd, keys, counts)
    keys.close()
    counts.close()
    for one in (fd, *loader._fds):
        os.close(one)


def counted(program: Program) -> Counter[int]:
    """Key -> how often it was counted; fails where a key has two numbers that are in use."""
    found: Counter[int] = Counter()
    for (key, used), (count,) in list(zip(program.keys, program.counts, strict=True))[1:]:
        if count:
            assert used == 1
            assert key not in found, f"{key} has two numbers"
            found[key] = count
    return found


def test_concurrent_cpus_give_each_key_one_number(program: Program) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    # CPUs that request a key at the same instant each allocate a number for it.
    keys = KEYS // len(cpus)
    times = keys * TURNS // len(cpus)
    with ThreadPoolExecutor(len(cpus)) as pool:
        list(pool.map(lambda cpu: program.run(cpu, times), cpus))
    found = counted(program)
    assert found.total() == times * len(cpus)
    assert program.counts[0] == (0,)
    assert len(found) > keys / 2


def test_keys_beyond_the_last_number_count_under_0(program: Program) -> None:
    cpu = min(os.sched_getaffinity(0))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(program.run, cpu, (KEYS + 100) * TURNS).result()
    found = counted(program)
    assert found == Counter(dict.fromkeys(range(KEYS), TURNS))
    assert program.counts[0] == (100 * TURNS,)
