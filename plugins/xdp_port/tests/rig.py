"""xdp_port's program, loaded and attached nowhere: frames go through BPF_PROG_TEST_RUN."""

from __future__ import annotations

import ctypes
import operator
import os
import struct
from collections.abc import Callable, Sequence
from typing import Any, Self

import attrs
from tcplat_xdp_port.plugin import tcplat_register_probes

from tcplat_core.deliver.books import Books
from tcplat_core.deliver.ring import Ring
from tcplat_core.event.record import Record
from tcplat_core.kernel import bpf
from tcplat_core.kernel.host import choose
from tcplat_core.kernel.layout import possible_cpus
from tcplat_core.loader import xdp
from tcplat_core.loader.attach import Loader
from tcplat_core.loader.cache import Cache
from tcplat_core.loader.protocol import Request
from tcplat_core.plugin.options import read_options
from tcplat_core.run.probe_run import fired_by, probe_request

XDP_PASS = 2
RETURN_PASS = bytes.fromhex("b702000000000000b7000000020000009500000000000000")
"""r2 = 0; r0 = XDP_PASS; exit."""
SPEC = next(tcplat_register_probes())
RECORD = Record(SPEC.event)

Fields = tuple[int, bytes, bytes, int, int, int, int, int, int, int]
"""What the program says of a packet, in the order of FIELDS."""
FIELDS = ("ip", "saddr", "daddr", "sport", "dport", "seq", "ack", "flags", "bytes", "has")
HAS_ACK = 8
ALWAYS_HAS = 7
"""seq, bytes and flags."""

_RUN = 10
_ROOM = 1 << 17


@attrs.define(eq=False)
class Runner:
    """Run one program on frames."""

    program: int
    _in: bytearray = attrs.field(factory=lambda: bytearray(_ROOM), init=False)
    _out: bytearray = attrs.field(factory=lambda: bytearray(_ROOM), init=False)
    _attr: bytearray = attrs.field(factory=lambda: bytearray(80), init=False)
    _call: Callable[[], int] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        def address(of: bytearray) -> int:
            return ctypes.addressof(ctypes.c_char.from_buffer(of))

        # union bpf_attr, the struct named test: prog_fd, retval, data_size_in and _out,
        # data_in, data_out, repeat, duration; the rest stays zero.
        struct.pack_into(
            "=IIIIQQII",
            *(self._attr, 0),
            *(self.program, 0, 0, 0),
            *(address(self._in), address(self._out), 1, 0),
        )
        syscall, number = bpf._libc.syscall, bpf._SYSCALLS[os.uname().machine][0]
        arguments = (number, _RUN, ctypes.c_void_p(address(self._attr)), len(self._attr))
        self._call = lambda: int(syscall(*arguments))

    def run(self, frame: bytes, repeat: int = 1) -> int:
        """Return the verdict. Fails unless the frame comes out as it went in.

        Raises:
            OSError: The kernel does not take the frame at all.
        """
        size = len(frame)
        self._in[:size] = frame
        struct.pack_into("=II", self._attr, 8, size, _ROOM)
        struct.pack_into("=I", self._attr, 32, repeat)
        if self._call() < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        verdict, _, size_out = struct.unpack_from("=III", self._attr, 4)
        assert size_out == size, f"{size_out} bytes came out of {frame.hex()}"
        assert self._out[:size] == frame, f"{frame.hex()} was changed"
        return int(verdict)

    def cost_ns(self, frame: bytes, repeat: int = 100_000) -> int:
        """Mean time of one run, as the kernel measures it."""
        assert self.run(frame, repeat) == XDP_PASS
        return int(struct.unpack_from("=I", self._attr, 36)[0])


@attrs.define(eq=False)
class Rig:
    """The probe's program with a ring of its own, its gate open."""

    runner: Runner
    ring: Ring
    books: Books
    fds: Sequence[int]

    @classmethod
    def load(cls, *, ring_bytes: int = 1 << 20, **options: str) -> Self:
        """Compile it for these options and load it."""
        given = {"iface": "lo", "port": "9999", **options}
        request = probe_request(SPEC, read_options("xdp_port", SPEC.options, given))
        loader = Loader(Request(probes=(request,), ring_bytes=ring_bytes), Cache.open())
        bpf.lift_memory_limit()
        choice = choose(request.points, "auto", loader._why_not, request.name)
        module = loader._open(request, choice, 1024)
        program = xdp.load("tcplat_xdp_port", module.code("tcplat_xdp_port"))
        bpf.map_update(module.fd("tcplat_gate"), bytes(4), (1).to_bytes(4, "little"))
        return cls(
            Runner(program),
            Ring(module.fd("events"), ring_bytes, RECORD.packing),
            Books(module.fd("books"), possible_cpus(), len(fired_by(SPEC))),
            [program, *loader._fds],
        )

    def see(self, frame: bytes) -> Fields | None:
        """Return what it reports of a frame; the frame must pass."""
        assert self.runner.run(frame) == XDP_PASS
        found = self.seen()
        assert len(found) <= 1
        return found[0] if found else None

    def seen(self) -> list[Fields]:
        """Return what it has reported since the last call."""
        return [_fields(record) for record in self.records()]

    def records(self) -> list[tuple[Any, ...]]:
        """Return the same as whole records."""
        return [record for batch in self.ring.drain() for record in batch]

    def close(self) -> None:
        self.ring.close()
        self.books.close()
        for fd in self.fds:
            os.close(fd)


_MEMBERS = [member for member, _ in RECORD.members]
_fields: Callable[[tuple[Any, ...]], Fields] = operator.itemgetter(*map(_MEMBERS.index, FIELDS))


def member(record: tuple[Any, ...], name: str) -> Any:
    """One member of a record."""
    return record[_MEMBERS.index(name)]
