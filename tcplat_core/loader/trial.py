"""Tries a probe in a separate process: compiles it and, as root, loads, attaches, detaches it.

``python -I -m tcplat_core.loader.trial PARENT compile|attach``: msgpack on standard input, and on
standard output. What crosses over is C text and data; no Python of the plugin's runs here.
Attached is in a network namespace that the process has to itself, so that no packet of
the host's meets a program on trial.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgpack

from tcplat_core.errors import CannotRunError, TcplatError
from tcplat_core.kernel import netns

from . import isolation
from .protocol import Request

if TYPE_CHECKING:
    from .cache import Cache

_LLVM_IR = 1
"""DEBUG_LLVM_IR of bcc: prints the compiled code on standard error."""
_PROGRAM = re.compile(r'^define [^\n]*section "\.bpf\.fn\.(\w+)"', re.MULTILINE)
_NO_MAPS = re.compile(
    r"^could not open bpf map: \w+, error: Operation not permitted$", re.MULTILINE
)
"""The last step of bcc, and the only one that needs rights."""
_GONE_S = 5.0
"""The kernel frees programs and maps a moment after their last fd is closed."""
XDP_PASS = 2
_FULL = "when the ring is full"


def compile_(raw: Mapping[str, Any], cache: Cache) -> dict[str, Any]:
    """Compile a text, as the loader does, but for what needs rights.

    Args:
        raw: `text`, and `types`: the kernel's types that it wants.
        cache: Where the answer may be from before, or the types, as C.

    Returns:
        `programs`: the names of what could be loaded; or `refusal`: the compiler's words.
    """
    from tcplat_core.kernel.btf import BtfError  # noqa: PLC0415
    from tcplat_core.kernel.host import BTF_PATH  # noqa: PLC0415

    # The other trial needs none of it.
    from .cache import digest, identity  # noqa: PLC0415
    from .compile import compiler_identity, import_bcc, kernel_source  # noqa: PLC0415
    from .kernel_tree import kernel_tree  # noqa: PLC0415

    try:
        bcc = import_bcc()
        if not os.access(BTF_PATH, os.R_OK):
            raise CannotRunError(f"there is no {BTF_PATH} to take the kernel's types from")  # noqa: TRY301
    except CannotRunError as error:
        return {"unable": str(error)}
    parts = (identity().encode(), compiler_identity(), raw["text"].encode())
    name = f"{digest(*parts, *map(str.encode, raw['types']))}.listing"
    known = cache.read(name)
    if isinstance(known, list):
        return {"programs": known}
    failed = False
    try:
        with kernel_tree(raw["types"], cache) as tree, _captured() as words, kernel_source(tree):
            try:
                bcc.BPF(text=raw["text"].encode(), debug=_LLVM_IR)
            except Exception:  # noqa: BLE001 - bcc raises this very class
                failed = True
    except BtfError as error:
        return {"refusal": str(error)}
    output = words()
    if failed and not _NO_MAPS.search(output):
        return {"refusal": output}
    programs = _PROGRAM.findall(output)
    cache.write(name, programs)
    return {"programs": programs}


@contextlib.contextmanager
def _captured() -> Iterator[Callable[[], str]]:
    """Collect the output of libbcc and clang, of both streams."""
    with tempfile.TemporaryFile() as file:
        kept = os.dup(1), os.dup(2)
        text = ""
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield lambda: text
        finally:
            for number, fd in zip((1, 2), kept, strict=True):
                os.dup2(fd, number)
                os.close(fd)
            file.seek(0)
            text = file.read().decode(errors="replace")


def attach(request: Request, cache: Cache) -> dict[str, Any]:
    """Load and attach a probe, give its XDP programs packets, and take everything off again.

    Returns:
        `refusal`: why it could not be attached; or `xdp`: program -> what it did to a packet
        that it should not, and `left`: what is still there afterwards.
    """
    from tcplat_core.kernel import bpf  # noqa: PLC0415 - the other trial needs none of it

    from .attach import Loader  # noqa: PLC0415

    bpf.lift_memory_limit()
    _make_interfaces(request)
    before = _open_fds()
    try:
        with _captured():
            answer = Loader(request, cache).run()
    except TcplatError as error:
        return {"refusal": str(error)}
    (probe,) = answer.probes.values()
    # A program that several hooks share is there once for each.
    objects = [(fd, *bpf.identity(fd)) for fd in dict.fromkeys(answer.fds)]
    programs = {
        bpf.program_name(number): fd
        for fd, kind, number in objects
        if kind == "prog" and bpf.program_type(fd) == bpf.ProgramType.XDP
    }
    ports = {int(word) for value in request.probes[0].defines.values() for word in _ports(value)}
    judged = {name: _judge(fd, probe.ring_fd, ports) for name, fd in programs.items()}
    for fd, _, _ in objects:
        os.close(fd)
    return {
        "xdp": judged,
        "left": [*_still_there(objects), *sorted(_open_fds() - before)],
    }


def _ports(value: int | str) -> list[str]:
    return [word for word in re.findall(r"\b\d{1,5}\b", str(value)) if 0 < int(word) < 1 << 16]


def _make_interfaces(request: Request) -> None:
    """In our own namespace: `lo`, and whatever interface the probe wants to listen on."""
    wanted = [one.interfaces.names for one in request.probes if one.interfaces]
    if not wanted:
        return
    run = ["ip", "link"]
    subprocess.run([*run, "set", "lo", "up"], check=True)
    for number, name in enumerate(name for names in wanted for name in names if name != "lo"):
        peer = ("peer", "name", f"tcplat-peer{number}")
        subprocess.run([*run, "add", name, "type", "veth", *peer], check=True)
        subprocess.run([*run, "set", name, "up"], check=True)


def _open_fds() -> set[str]:
    fds = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            target = os.readlink(f"/proc/self/fd/{fd}")
            if "bpf" in target or "perf_event" in target:
                fds.add(f"fd {fd}: {target}")
    return fds


def _still_there(objects: Sequence[tuple[int, str, int]], patience_s: float = _GONE_S) -> list[str]:
    """Return the programs, maps and links that the kernel has not freed."""
    from tcplat_core.kernel import bpf  # noqa: PLC0415 - see attach()

    there = {(kind, number) for _, kind, number in objects if number}
    deadline = time.monotonic() + patience_s
    while there and time.monotonic() < deadline:
        there = {one for one in there if bpf.exists(*one)}
        time.sleep(0.01)
    return [f"{kind} {number}" for kind, number in sorted(there)]


def _judge(program: int, ring: int, ports: set[int]) -> str:
    """Return how the program fails to pass a packet unchanged; empty if it passes it."""
    from tcplat_core.kernel import bpf  # noqa: PLC0415 - see attach()

    # Two pages, see ring.py: the positions of the reader and of the kernel.
    with (
        mmap.mmap(ring, mmap.PAGESIZE) as read,
        mmap.mmap(ring, mmap.PAGESIZE, prot=mmap.PROT_READ, offset=mmap.PAGESIZE) as written,
    ):
        for what, frame in frames(ports):
            try:
                verdict, out = bpf.test_run(program, frame)
            except OSError as error:
                if error.errno == errno.EINVAL:  # the kernel itself refuses such a frame
                    continue
                raise
            if verdict != XDP_PASS:
                return f"its verdict on {what} is {verdict}, not XDP_PASS"
            if out != frame:
                return f"it changes {what}"
            if not what.endswith(_FULL):
                read[:8] = written[:8]
    return ""


def frames(ports: set[int]) -> Iterator[tuple[str, bytes]]:
    """Packets in words and bytes: of every kind, whole and cut off anywhere, and then noise.

    Args:
        ports: TCP ports that a program may single out, besides the usual ones.
    """
    for port in sorted({9999, 443, *ports}):
        for source, destination in ((40_000, port), (port, 40_000)):
            tcp = struct.pack(">HHIIBBHHH", source, destination, 1, 2, 0x50, 0x18, 512, 0, 0)
            whole = dict(_whole(tcp, b"x" * 20))
            for what, frame in whole.items():
                yield f"{what}, port {port}", frame
                for length in range(14, len(frame)):
                    yield f"{what}, port {port}, cut off at {length} bytes", frame[:length]
            # Until its ring is full: then it must still pass packets.
            for _ in range(200):
                yield f"TCP over IPv4, port {port}, {_FULL}", whole["TCP over IPv4"]
    noise = random.Random(1)  # noqa: S311 - the same noise each time
    for number in range(1000):
        yield f"noise ({number})", noise.randbytes(noise.randrange(14, 200))


def _whole(tcp: bytes, data: bytes) -> Iterator[tuple[str, bytes]]:
    mac = bytes(range(12))

    def ipv4(protocol: int, body: bytes, options: bytes = b"", fragment: int = 0) -> bytes:
        head = 20 + len(options)
        ends = bytes([127, 0, 0, 1]) * 2
        total = head + len(body)
        fixed = struct.pack(">BBHHHBBH", 0x40 | head // 4, 0, total, 1, fragment, 64, protocol, 0)
        return b"\x08\x00" + fixed + ends + options + body

    def ipv6(following: int, body: bytes) -> bytes:
        ends = (bytes(15) + b"\x01") * 2
        return b"\x86\xdd" + struct.pack(">IHBB", 6 << 28, len(body), following, 64) + ends + body

    segment = tcp + data
    yield "TCP over IPv4", mac + ipv4(6, segment)
    yield "TCP over IPv6", mac + ipv6(6, segment)
    yield "TCP with IP options", mac + ipv4(6, segment, b"\x01" * 8)
    yield "a later fragment", mac + ipv4(6, segment, fragment=100)
    yield "TCP behind extension headers", mac + ipv6(0, bytes([6, 0, *bytes(6)]) + segment)
    yield "TCP in a VLAN", mac + b"\x81\x00\x00\x07" + ipv4(6, segment)
    yield "TCP in two VLANs", mac + b"\x88\xa8\x00\x07\x81\x00\x00\x08" + ipv4(6, segment)
    yield "UDP", mac + ipv4(17, segment)
    yield "ARP", mac + b"\x08\x06" + bytes(28)
    yield "an empty frame", mac + b"\x08\x00"


def main() -> None:
    """Try one request and write the outcome."""
    isolation.begin(int(sys.argv[1]))
    data = sys.stdin.buffer.read()
    if not data:  # the parent has ended
        return
    from .cache import Cache  # noqa: PLC0415 - takes time, and may not be needed

    cache = Cache.open()
    work = isolation.WorkFolder.enter(cache.root)
    try:
        if sys.argv[2] == "compile":
            answer = compile_(msgpack.unpackb(data), cache)
        else:
            netns.unshare()
            answer = attach(Request.unpack(data), cache)
    finally:
        work.close()
    sys.stdout.buffer.write(msgpack.packb(answer))
    sys.stdout.buffer.flush()
    # bcc's atexit handler has nothing to clean up here.
    os._exit(0)


if __name__ == "__main__":
    main()
