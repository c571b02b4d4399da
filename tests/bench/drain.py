"""Events drained to rows per second of CPU, against bcc's own ring-buffer callback.

Both drain the same ring of the same records in the same run, in turns: the
machine's noise hits both. bcc gets its documented idiom, `event()` and 15 fields
read, and beside it a callback tuned as far as it goes (returns 0, copies bytes).
Of ours there are two figures: records are tuples of all fields, what bcc's idiom
gives; rows are the events that sinks get, addresses and names as text.
An XDP program that is never attached fills the ring (BPF_PROG_TEST_RUN).
"""

from __future__ import annotations

import ctypes
import os
import statistics
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

import attrs

from tcplat_core.loader.btf import VMLINUX
from tcplat_core.loader.compile import import_bcc, kernel_source
from tcplat_core.loader.kheaders import cached_tree
from tcplat_core.plugins import Plugins
from tcplat_core.ring import Ring
from tcplat_core.schema import Event, Record
from tcplat_core.session import fired_by

ROUNDS = 13
PER_ROUND = 100_000
RING_BYTES = 1 << 24
FIELDS = (
    "ts_ns", "sock", "connect_ns", "pid", "tid", "netns", "seq", "bytes", "sport", "dport",
    "cpu", "state", "saddr", "daddr", "comm",
)  # fmt: skip

SOURCE = """
BPF_RINGBUF_OUTPUT(events, 4096);

int fill(struct xdp_md *ctx)
{
	struct tcplat_event *e = events.ringbuf_reserve(sizeof(*e));

	if (!e)
		return 2;
	__builtin_memset(e, 0, sizeof(*e));
	e->ts_ns = bpf_ktime_get_ns();
	e->pid = e->tid = 4711;
	e->state = 1;
	e->ip = 4;
	e->dport = 9999;
	e->sport = 40000 + (bpf_get_prandom_u32() & 1023);
	e->comm[0] = 'x';
	e->saddr[10] = e->saddr[11] = e->daddr[10] = e->daddr[11] = 0xff;
	e->seq = e->ts_ns;
	e->bytes = 3000;
	e->has = 3;
	events.ringbuf_submit(e, 1);
	return 2;
}
"""


def fill(program: int, repeat: int) -> None:
    """Run the program `repeat` times on a made-up frame (bpf(2) BPF_PROG_TEST_RUN)."""
    frame = ctypes.create_string_buffer(64)
    attr = struct.pack("=IIIIQQII", program, 0, 64, 0, ctypes.addressof(frame), 0, repeat, 0).ljust(
        80, b"\0"
    )
    if ctypes.CDLL(None, use_errno=True).syscall(321, 10, attr, len(attr)):
        raise OSError(ctypes.get_errno(), "BPF_PROG_TEST_RUN")


@attrs.define(eq=False)
class Contest:
    """One ring, filled by one program, drained by each in turn."""

    module: Any
    program: int
    ring: Ring
    decode: Callable[[Any, int], list[Event]]
    count: int = 0

    def idiom(self, _context: Any, data: Any, _size: int) -> None:
        """Read fields as bcc's documentation has it."""
        event = self.module[b"events"].event(data)
        for field in FIELDS:
            getattr(event, field)
        self.count += 1

    def tuned(self, _context: Any, data: Any, size: int) -> int:
        """The least that a callback can do, and no exception behind it."""
        ctypes.string_at(data, size)
        self.count += 1
        return 0

    def by(self, callback: Callable[..., Any]) -> Callable[[], None]:
        """Drain with bcc."""

        def drain() -> None:
            self.module.ring_buffer_consume()

        self.module._ringbuf_manager = None  # a manager per callback
        self.module[b"events"].open_ring_buffer(callback)
        return drain

    def to_records(self) -> None:
        """Drain to tuples."""
        for records in self.ring.drain():
            self.count += len(records)

    def to_rows(self) -> None:
        """Drain to what sinks get."""
        for records in self.ring.drain():
            self.count += len(self.decode(records, 0))

    def rate(self, drain: Callable[[], None]) -> float:
        """Events per second of CPU."""
        fill(self.program, PER_ROUND)
        self.count = 0
        began = time.process_time()
        drain()
        took = time.process_time() - began
        if self.count != PER_ROUND:
            raise SystemExit(f"{self.count} events came out, {PER_ROUND} went in")
        return self.count / took


def prepare() -> Contest:
    """Compile the program that fills the ring."""
    bcc = import_bcc()
    record = Record(Event)
    with cached_tree(VMLINUX, ["sock"]) as tree, kernel_source(tree.folder):
        module = bcc.BPF(text=(record.c_struct() + SOURCE).encode())
    program = module.load_func(b"fill", bcc.BPF.XDP).fd
    spec = Plugins.load().probe("tcp_client")
    decode = record.decoder(spec.name, fired_by(spec), str)
    ring = Ring(module[b"events"].map_fd, RING_BYTES, record.layout)
    return Contest(module, program, ring, decode)


def main() -> None:
    """Print events per CPU second of each, and the ratio."""
    contest = prepare()
    contestants: dict[str, Callable[[], Callable[[], None]]] = {
        "bcc idiom": lambda: contest.by(contest.idiom),
        "bcc tuned": lambda: contest.by(contest.tuned),
        "tcplat records": lambda: contest.to_records,
        "tcplat rows": lambda: contest.to_rows,
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, drain in contestants.items():
            rates[name].append(contest.rate(drain()))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{'events drained per CPU second':32}{'median':>12}{'÷ bcc idiom':>14}")
    for name, median in medians.items():
        print(f"{name:32}{median:12,.0f}{median / medians['bcc idiom']:14.1f}")
    sys.stdout.flush()
    os._exit(0)  # bcc's own clean-up is of no use here


if __name__ == "__main__":
    main()
