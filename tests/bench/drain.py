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
	e->sport = e->ts_ns;
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


def main() -> int:
    """Print events per CPU second of each, and the ratio."""
    bcc = import_bcc()
    record = Record(Event)
    with cached_tree(VMLINUX, ["sock"]) as tree, kernel_source(tree.folder):
        module = bcc.BPF(text=(record.c_struct() + SOURCE).encode())
    program = module.load_func(b"fill", bcc.BPF.XDP).fd
    spec = Plugins.load().probe("tcp_client")
    decode = record.decoder(spec.name, fired_by(spec), str)
    counted = [0]

    def idiom(_context: Any, data: Any, _size: int) -> None:
        event = module[b"events"].event(data)
        for field in FIELDS:
            getattr(event, field)
        counted[0] += 1

    def tuned(_context: Any, data: Any, size: int) -> int:
        ctypes.string_at(data, size)
        counted[0] += 1
        return 0

    def by_bcc() -> None:
        module.ring_buffer_consume()

    def to_records() -> None:
        for records in ring.drain():
            counted[0] += len(records)

    def to_rows() -> None:
        for records in ring.drain():
            counted[0] += len(decode(records, 0))

    results: dict[str, list[float]] = {
        "bcc idiom": [],
        "bcc tuned": [],
        "tcplat records": [],
        "tcplat rows": [],
    }
    events = module[b"events"]
    ring = Ring(events.map_fd, RING_BYTES, record.layout)
    for _ in range(ROUNDS):
        for name, callback, drain in (
            ("bcc idiom", idiom, by_bcc),
            ("bcc tuned", tuned, by_bcc),
            ("tcplat records", None, to_records),
            ("tcplat rows", None, to_rows),
        ):
            if callback:
                module._ringbuf_manager = None  # noqa: SLF001 - a manager per callback
                events.open_ring_buffer(callback)
            results[name].append(_rate(lambda: fill(program, PER_ROUND), drain, counted))
    base = statistics.median(results["bcc idiom"])
    print(f"{'events drained per CPU second':32}{'median':>12}{'÷ bcc idiom':>14}")
    for name, rates in results.items():
        median = statistics.median(rates)
        print(f"{name:32}{median:12,.0f}{median / base:14.1f}")
    ring.close()
    sys.stdout.flush()
    os._exit(0)


def _rate(produce: Callable[[], None], drain: Callable[[], None], counted: list[int]) -> float:
    produce()
    counted[0] = 0
    began = time.process_time()
    drain()
    took = time.process_time() - began
    if counted[0] != PER_ROUND:
        raise SystemExit(f"{counted[0]} events came out, {PER_ROUND} went in")
    return counted[0] / took


if __name__ == "__main__":
    main()
