"""Peers of tcplat: bcc's callback idiom on the same events, and bcc's own tools."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from tcplat_core.event.fields import Event
from tcplat_core.event.record import Record
from tcplat_core.event.text import TCP_STATES
from tcplat_core.kernel import bpf
from tcplat_core.loader.cache import Cache
from tcplat_core.loader.compile import import_bcc, kernel_source
from tcplat_core.loader.kernel_tree import kernel_tree
from tests.vm import run as vm

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# The same two events as tcp_client's `send` and `send_short`, and the same fields; no look at
# who owns the socket, no filter but the pid, no books beyond one counter: less work than ours.
IDIOM = """
BPF_RINGBUF_OUTPUT(events, 4096);
BPF_ARRAY(lost, u64, 1);

static int report(struct sock *sk, u32 bytes, u8 hook)
{
	u64 who = bpf_get_current_pid_tgid();
	struct tcplat_event *e;
	int zero = 0;

	if (who >> 32 != PID)
		return 0;
	e = events.ringbuf_reserve(sizeof(*e));
	if (!e) {
		lost.increment(zero);
		return 0;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->ts_ns = bpf_ktime_get_ns();
	e->hook = hook;
	e->pid = who >> 32;
	e->tid = who;
	bpf_get_current_comm(e->comm, sizeof(e->comm));
	e->cpu = bpf_get_smp_processor_id();
	bpf_probe_read_kernel(e->saddr + 12, 4, &sk->__sk_common.skc_rcv_saddr);
	bpf_probe_read_kernel(e->daddr + 12, 4, &sk->__sk_common.skc_daddr);
	bpf_probe_read_kernel(&e->sport, 2, &sk->__sk_common.skc_num);
	bpf_probe_read_kernel(&e->dport, 2, &sk->__sk_common.skc_dport);
	e->ip = 4;
	e->state = 1;
	e->bytes = bytes;
	e->has = 3;
	events.ringbuf_submit(e, 1 /* BPF_RB_NO_WAKEUP */);
	return 0;
}

int on_send(struct bpf_raw_tracepoint_args *ctx)
{
	return report((struct sock *)ctx->args[0], 100, 0);
}

int on_short(struct bpf_raw_tracepoint_args *ctx)
{
	return report((struct sock *)ctx->args[0], 100, 1);
}
"""

POINTS = (("send", "tcp:tcp_sendmsg_locked"), ("send_short", "sock:sock_send_length"))


def row(event: Any, offset_ns: int) -> dict[str, Any]:
    """Make a row of tcplat in a callback, as bcc's tools make theirs."""
    point, func = POINTS[event.hook & 1]
    return {
        "v": 2,
        "ts_ns": event.ts_ns,
        "time_ns": event.ts_ns + offset_ns,
        "probe": "tcp_client",
        "point": point,
        "func": func,
        "attach": "tracepoint",
        "pid": event.pid,
        "tid": event.tid,
        "comm": event.comm.decode("utf-8", "replace"),
        "thread": None,
        "cpu": event.cpu,
        "netns": event.netns,
        "ip": event.ip,
        "saddr": socket.inet_ntop(socket.AF_INET, bytes(event.saddr)[12:]),
        "sport": event.sport,
        "daddr": socket.inet_ntop(socket.AF_INET, bytes(event.daddr)[12:]),
        "dport": event.dport,
        "state": TCP_STATES[event.state],
        "old_state": TCP_STATES[event.old_state],
        "desc": "message sent" if point == "send" else "not all taken",
        "seq": event.seq if event.has & 1 else None,
        "bytes": event.bytes if event.has & 2 else None,
        "flags": event.flags if event.has & 4 else None,
        "connect_us": event.connect_ns / 1000 if event.connect_ns else None,
        "ifname": None,
        "sock": event.sock,
    }


def idiom(pid: int, out: Path) -> None:
    """Do as bcc's documentation does: callback, row, json.dumps, a line in a file."""
    bcc = import_bcc()
    text = f"#define PID {pid}\n" + Record(Event).c_struct() + IDIOM
    with kernel_tree(["sock"], Cache.open()) as tree, kernel_source(tree):
        module = bcc.BPF(text=text.encode())
    module.attach_raw_tracepoint(tp=b"tcp_sendmsg_locked", fn_name=b"on_send")
    module.attach_raw_tracepoint(tp=b"sock_send_length", fn_name=b"on_short")
    events, count = module[b"events"], 0
    with out.open("w") as file:

        def callback(_context: Any, data: Any, _size: int) -> None:
            nonlocal count
            count += 1
            file.write(json.dumps(row(events.event(data), 0)) + "\n")

        events.open_ring_buffer(callback)
        print("ready", flush=True)
        done = threading.Event()

        def until_stdin_ends() -> None:
            sys.stdin.read()
            done.set()

        threading.Thread(target=until_stdin_ends, daemon=True).start()
        while not done.is_set():
            module.ring_buffer_consume()
            time.sleep(0.003)
        module.ring_buffer_consume()
    print(json.dumps({"events": count, "lost": module[b"lost"][0].value}), flush=True)
    os._exit(0)


def lossless(flood: Callable[[int, float], Any], seconds: float) -> float:
    """Return the highest rate without loss, events per second."""
    best = 0.0
    for rate in (20_000, 40_000, 60_000, 80_000, 100_000, 130_000, 160_000, 200_000, 300_000):
        out = Path("/dev/shm") / f"tcplat-bench-{os.getpid()}"  # noqa: S108 - memory, not a disk
        with flood(rate, seconds) as (pid, go):
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.bench.peers", str(pid), str(out)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert process.stdout
            process.stdout.readline()
            sent = go()
            figures = json.loads(process.communicate("")[0])
            out.unlink()
        if figures["lost"]:
            break
        best = 2 * sent["sends"] / sent["seconds"]
    return best


# So many lines of readiness, because they stay in a buffer until that is full: 8 KiB.
READY = 'BEGIN { unroll(100) { printf("%100s\\n%100s\\n", "ready", "ready"); } }\n'

# What tcp_client's rows have of send, recv and state, as far as the tracepoints have it.
PINGPONG = """
tracepoint:tcp:tcp_sendmsg_locked /comm == "pingpong"/
{
	printf("%llu send %d %d %s %d %llx %d\\n", nsecs, pid, tid, comm, cpu, args->skb_addr,
		args->msg_left);
}
tracepoint:sock:sock_recv_length /comm == "pingpong"/
{
	printf("%llu recv %d %d %s %d %llx %d\\n", nsecs, pid, tid, comm, cpu, args->sk, args->ret);
}
tracepoint:sock:inet_sock_set_state
{
	printf("%llu state %s %d %s %d %d %d\\n", nsecs, ntop(args->saddr), args->sport,
		ntop(args->daddr), args->dport, args->oldstate, args->newstate);
}
"""
# At any tracepoints: a line, or the time since the one before on this CPU, which is counted.
LINES = '{ printf("%llu %s %d %d %s %d\\n", nsecs, probe, pid, tid, comm, cpu); }'
COUNTS = "{ @ns[probe] = hist(nsecs - @at[cpu]); @at[cpu] = nsecs; }"


def pingpong_lines() -> AbstractContextManager[None]:
    """Bpftrace with one line per event of pingpong."""
    return bpftrace(PINGPONG)


def at_tracepoints(events: Iterable[str], action: str) -> AbstractContextManager[None]:
    """Bpftrace with one action at tracepoints, `sock:sock_recv_length`."""
    places = ",\n".join(f"tracepoint:{event}" for event in sorted(set(events)))
    return bpftrace(f"{places}\n{action}\n")


@contextmanager
def bpftrace(text: str) -> Iterator[None]:
    """Bpftrace, attached, with its lines in a file."""
    out = Path("/dev/shm") / f"tcplat-bench-{os.getpid()}.bpftrace"  # noqa: S108 - memory, not a disk
    process = subprocess.Popen(
        ["bpftrace", "-q", "-o", str(out), "-e", READY + text],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "BPFTRACE_PERF_RB_PAGES": "4096"},
    )
    assert process.stderr
    try:
        while not out.exists() or b"ready" not in out.read_bytes():
            if process.poll() is not None:
                raise SystemExit(f"bpftrace: {process.stderr.read().decode()}")
            time.sleep(0.01)
        yield
    finally:
        process.terminate()
        process.communicate()
        out.unlink(missing_ok=True)


@contextmanager
def tcpstates() -> Iterator[tuple[int, float]]:
    """Bcc's tool, running: its process id, and how long it took to start.

    It compiles against 6.1's headers, as there are none for most kernels: good for
    time and memory, not for truth.
    """
    known = vm.read_kernels(vm.KERNELS.read_text())
    headers = vm.Cache(vm.default_cache()).headers(known["6.1"])
    began = time.monotonic()
    process = subprocess.Popen(
        ["tcpstates-bpfcc", "-s"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "BCC_KERNEL_SOURCE": str(headers), "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout
    try:
        if not process.stdout.readline():
            raise SystemExit("tcpstates-bpfcc does not run here")
        yield process.pid, time.monotonic() - began
    finally:
        process.kill()
        process.communicate()


def forget_compiled() -> None:
    """So that the next start is a first one."""
    if root := Cache.open().root:
        shutil.rmtree(root, ignore_errors=True)


def boring_packets() -> dict[str, tuple[int, int]]:
    """Ns of a packet to another port, and of an empty program: the best of 40 turns each.

    The program looks for 32 ports, the most it can be asked for.
    """
    rig = importlib.import_module("plugins.xdp_port.tests.rig")
    made = importlib.import_module("plugins.xdp_port.tests.test_packets")
    segment, vlan = made.tcp(1000, dport=443), made.Dot1Q(vlan=1)
    frames = {
        "IPv4": made.raw(made.ether() / made.ip4() / segment),
        "IPv6": made.raw(made.ether() / made.ip6() / segment),
        "VLAN": made.raw(made.ether() / vlan / made.ip4() / segment),
        "UDP": made.raw(made.ether() / made.ip4() / made.UDP(sport=53, dport=53)),
    }
    runner = rig.Rig.load(port="+".join(str(9000 + port) for port in range(32))).runner
    empty = rig.Runner(bpf.program_load("empty", bpf.ProgramType.XDP, rig.RETURN_PASS))
    best = {}
    for name, frame in frames.items():
        turns = [(runner.cost_ns(frame), empty.cost_ns(frame)) for _ in range(40)]
        best[name] = min(ours for ours, _ in turns), min(base for _, base in turns)
    return best


@contextmanager
def reader(process: subprocess.Popen[str]) -> Iterator[Callable[[], list[int]]]:
    """Read rows from a pipe as they come; return ns from each event to its line."""
    assert process.stdout
    delays: list[int] = []

    def read() -> None:
        for line in process.stdout or ():
            now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            delays.append(now - json.loads(line).get("ts_ns", now))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()

    def end() -> list[int]:
        process.terminate()
        thread.join()
        return delays

    yield end


if __name__ == "__main__":
    idiom(int(sys.argv[1]), Path(sys.argv[2]))
