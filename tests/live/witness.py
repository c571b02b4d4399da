"""Witnesses: tcpdump, read by tshark; and the kernel's own record of its tracepoints."""

from __future__ import annotations

import os
import re
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

from tcplat_core.kernel.bpf import tracefs

from .harness import Puppet, Row, eventually, patience

Packet = tuple[object, ...]
"""saddr, daddr, sport, dport, seq, ack or None, flags, bytes of payload."""


@attrs.frozen
class Tcpdump:
    """A running tcpdump, and the file that it writes."""

    process: subprocess.Popen[bytes]
    path: Path

    def frames(self) -> Iterator[tuple[int, bytes]]:
        """Time in ns and bytes of each frame that it has written."""
        data = self.path.read_bytes()
        assert data[:4] == b"\x4d\x3c\xb2\xa1", "not a pcap file with nanoseconds"
        at = 24
        while at + 16 <= len(data):
            seconds, nanos, length, _ = struct.unpack_from("=IIII", data, at)
            at += 16 + length
            if at <= len(data):
                yield seconds * 10**9 + nanos, data[at - length : at]

    def count(self) -> int:
        """How many frames it has written."""
        return sum(1 for _ in self.frames())

    def packets(self) -> list[Packet]:
        """Return what it has seen."""
        names = ["ip.src", "ipv6.src", "ip.dst", "ipv6.dst", "tcp.srcport", "tcp.dstport"]
        names += ["tcp.seq_raw", "tcp.ack_raw", "tcp.flags", "tcp.len"]
        read = subprocess.run(
            [
                *("tshark", "-r", str(self.path), "-T", "fields"),
                *(word for name in names for word in ("-e", name)),
            ],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        found: list[Packet] = []
        for line in read.splitlines():
            src4, src6, dst4, dst6, *numbers = line.split("\t")
            sport, dport, seq, ack, flags, length = (int(number, 0) for number in numbers)
            acked = ack if flags & 16 else None
            found.append((src4 or src6, dst4 or dst6, sport, dport, seq, acked, flags, length))
        return found

    def stop(self) -> None:
        """End it; the file is whole then."""
        self.process.terminate()
        self.process.wait(patience())


@contextmanager
def tcpdump(
    path: Path,
    interface: str,
    what: str = "tcp",
    *,
    there: Puppet | None = None,
    only_in: bool = False,
) -> Iterator[Tcpdump]:
    """Tcpdump, listening.

    Args:
        path: The file it writes.
        interface: Where it listens.
        what: In its own language.
        there: The puppet that gives the network namespace; else the test's.
        only_in: Packets that the interface receives, and none that it sends.
    """
    said = path.with_suffix(".tcpdump")
    inside = ["nsenter", f"--net=/proc/{there.pid}/ns/net"] if there else []
    with said.open("wb") as stderr:
        process = subprocess.Popen(
            [
                *(*inside, "tcpdump", "-Z", "root", "-n", "-i", interface, "-w", str(path)),
                *("-U", "-s", "200", "-B", "65536", "--time-stamp-precision", "nano"),
                *("--immediate-mode", *(("-Q", "in") if only_in else ()), what),
            ],
            stderr=stderr,
        )
    one = Tcpdump(process, path)
    try:
        eventually(lambda: "listening on" in said.read_text(), "tcpdump was listening")
        yield one
    finally:
        one.stop()
    assert "0 packets dropped by kernel" in said.read_text()


_FLAGS = ("FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR")


def packet(row: Row) -> Packet:
    """Return a row of xdp_port as tcpdump prints it."""
    flags = sum(1 << _FLAGS.index(flag) for flag in row["flags"].split("|"))
    return (
        *(row["saddr"], row["daddr"], row["sport"], row["dport"]),
        *(row["seq"], row["ack"], flags, row["bytes"]),
    )


def by_direction(packets: list[Packet]) -> dict[object, list[Packet]]:
    """Return the packets of each direction of each connection, in order."""
    flows: dict[object, list[Packet]] = {}
    for one in packets:
        flows.setdefault(one[:4], []).append(one[4:])
    return flows


_CHANGES = ("sock/inet_sock_set_state", "tcp/tcp_destroy_sock")
_PORTS = re.compile(r"sport=(\d+) dport=(\d+)")


@contextmanager
def kept_from_programs(port: int) -> Iterator[Callable[[], set[int]]]:
    """Client ports of connections to `port` that changed on the time of process 1.

    Some kernels run no BPF program while a thread of process 1 runs, and softirq runs in the
    context of any process: rows of those connections may be missing from every BPF tracer.
    ftrace does see them.
    """
    tracing = tracefs()
    assert tracing
    instance = tracing / "instances" / f"tcplat-test-{os.getpid()}"
    threads = " || ".join(f"common_pid == {thread}" for thread in os.listdir("/proc/1/task"))
    instance.mkdir()
    events = [instance / "events" / event for event in _CHANGES]

    def ports() -> set[int]:
        found = _PORTS.findall((instance / "trace").read_text())
        return {int(end) for ends in found for end in ends} - {port}

    try:
        for event in events:
            (event / "filter").write_text(f"(sport == {port} || dport == {port}) && ({threads})")
            (event / "enable").write_text("1")
        yield ports
    finally:
        for event in events:
            (event / "enable").write_text("0")
        instance.rmdir()
