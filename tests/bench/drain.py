"""Events drained per second of CPU, against bcc's own ring-buffer callback.

Both drain the same ring of the same records in the same run, in turns: the
machine's noise hits both. bcc's callbacks, from the least to the most that they do:

- tuned: copies the bytes, and returns 0 so that no exception is raised behind it;
- fields: `event()`, and 15 fields read, as its documentation has it;
- rows: all fields that a row of ours has, in the same form (addresses and names as text);
- json: the same as a line of JSON; printf: as a line of a table.

Of ours: records are tuples, rows what sinks get, jsonl and table what those sinks write.
An XDP program that is never attached fills the ring (BPF_PROG_TEST_RUN): 1,024 sockets.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from tcplat_core import RunInfo
from tcplat_core.deliver.fast.codec import Codec
from tcplat_core.deliver.fast.records import reorder_buffer
from tcplat_core.deliver.reorder import RingSource
from tcplat_core.deliver.ring import BATCH, Ring
from tcplat_core.deliver.router import Router
from tcplat_core.deliver.sequencer import Sequencer
from tcplat_core.event.fields import Event
from tcplat_core.event.record import Record
from tcplat_core.loader.cache import Cache
from tcplat_core.loader.compile import import_bcc, kernel_source
from tcplat_core.loader.kernel_tree import kernel_tree
from tcplat_core.registry.find import Plugins
from tcplat_core.run.drain import HELPING
from tcplat_core.run.probe_run import fired_by
from tests.bench import peers

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
    codec: Codec | None
    count: int = 0
    out: Any = None
    """Where bcc's callbacks print."""

    def rows(self, _context: Any, data: Any, _size: int) -> None:
        """Make a row as bcc's tools make theirs."""
        peers.row(self.module[b"events"].event(data), 0)
        self.count += 1

    def tuned_rows(self, context: Any, data: Any, size: int) -> int:
        """Do the same and return an int, which spares ctypes an exception."""
        self.rows(context, data, size)
        return 0

    def json(self, _context: Any, data: Any, _size: int) -> None:
        """Write the same as a line of JSON."""
        self.out.write(json.dumps(peers.row(self.module[b"events"].event(data), 0)) + "\n")
        self.count += 1

    def printf(self, _context: Any, data: Any, _size: int) -> None:
        """Print the columns of the table, as bcc's tools do."""
        row = peers.row(self.module[b"events"].event(data), 0)
        self.out.write(
            "%-7d %-15s %-2d %-15s %-5d %-15s %-5d %-16d %-24s %-15s %-15s %s\n"  # noqa: UP031
            % (
                *(row["pid"], row["comm"], row["ip"], row["saddr"], row["sport"]),
                *(row["daddr"], row["dport"], row["ts_ns"] // 1000, row["func"]),
                *(row["state"], row["desc"], row["connect_us"] or ""),
            )
        )
        self.count += 1

    def idiom(self, _context: Any, data: Any, _size: int) -> None:
        """Read fields as bcc's documentation has it."""
        event = self.module[b"events"].event(data)
        for field in FIELDS:
            getattr(event, field)
        self.count += 1

    def tuned(self, _context: Any, data: Any, size: int) -> int:
        """Do the least that a callback can, and return an int."""
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

    def to_sink(self, name: str) -> Callable[[], None]:
        """Drain through the router to a sink that writes to /dev/null, as a session does."""
        spec = Plugins.load().sink(name)
        options = {one.name: one.default for one in spec.options} | {"path": os.devnull}
        sink = spec.factory(options, RunInfo(("tcp_client",), lambda: False))
        source = RingSource(name, self.ring, self.decode, self.codec)
        sequencer = Sequencer(Router({name: sink}), reorder_buffer([source]))

        def drain() -> None:
            while self.ring.pending():
                sequencer.buffer.take(0, HELPING * BATCH, 0)
                sequencer.flush()
            sequencer.buffer.close()
            self.count += sequencer.router.total

        return drain

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
    with kernel_tree(["sock"], Cache.open()) as tree, kernel_source(tree):
        module = bcc.BPF(text=(record.c_struct() + SOURCE).encode())
    program = module.load_func(b"fill", bcc.BPF.XDP).fd
    spec = Plugins.load().probe("tcp_client")
    reading = (spec.name, fired_by(spec), str)
    decode, codec = record.decoder(*reading), Codec.of(record, *reading)
    ring = Ring(module[b"events"].map_fd, RING_BYTES, record.layout)
    out = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    return Contest(module, program, ring, decode, codec, out=out)


def main(rounds: int, *, as_json: bool) -> None:
    """Print events per CPU second of each, and the ratio."""
    gc.set_threshold(100_000, 50, 50)  # as a run of ours has it; good for bcc, too
    contest = prepare()
    # The two sides that are compared take adjacent turns.
    contestants: dict[str, Callable[[], Callable[[], None]]] = {
        "tcplat records": lambda: contest.to_records,
        "bcc tuned": lambda: contest.by(contest.tuned),
        "bcc fields": lambda: contest.by(contest.idiom),
        "bcc rows": lambda: contest.by(contest.rows),
        "tcplat rows": lambda: contest.to_rows,
        "bcc tuned rows": lambda: contest.by(contest.tuned_rows),
        "bcc json": lambda: contest.by(contest.json),
        "tcplat jsonl": lambda: contest.to_sink("jsonl"),
        "bcc printf": lambda: contest.by(contest.printf),
        "tcplat table": lambda: contest.to_sink("table"),
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, drain in contestants.items():
            rates[name].append(contest.rate(drain()))
    if as_json:
        print(json.dumps(rates))
    else:
        print(f"{'events drained per CPU second':32}{'median':>12}")
        for name, values in rates.items():
            print(f"{name:32}{statistics.median(values):12,.0f}")
    sys.stdout.flush()
    os._exit(0)  # bcc's own clean-up is of no use here


if __name__ == "__main__":
    numbers = [int(one) for one in sys.argv[1:] if one.isdigit()]
    main(*(numbers or [ROUNDS]), as_json="--json" in sys.argv)
