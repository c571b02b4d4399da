"""The few bpf(2) calls that a cached program needs: maps, programs, attaching.

bcc can load only what it has compiled in the same process, and compiling takes
nine tenths of the start. Layouts: union bpf_attr in include/uapi/linux/bpf.h and struct
perf_event_attr in include/uapi/linux/perf_event.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import resource
import struct
from collections.abc import Iterable, Sequence
from enum import IntEnum
from pathlib import Path

from tcplat_core.errors import TOO_MANY_FILES, CannotRunError

_SYSCALLS = {"x86_64": (321, 298), "aarch64": (280, 241)}
"""Machine -> numbers of bpf and perf_event_open."""

_MAP_CREATE, _MAP_UPDATE, _MAP_DELETE, _PROG_LOAD, _RAW_TRACEPOINT_OPEN, _MAP_UPDATE_BATCH = (
    0,
    2,
    3,
    5,
    17,
    26,
)
_NOEXIST = 1
"""BPF_NOEXIST, a flag of map updates."""
_PROG_TEST_RUN = 10
_PROG_GET_FD_BY_ID, _OBJ_GET_INFO_BY_FD, _LINK_CREATE = 13, 15, 28
_GET_FD_BY_ID = {"prog": _PROG_GET_FD_BY_ID, "map": 14, "link": 30}
_LINK_GET_NEXT_ID, _ENABLE_STATS = 31, 32
_LINK_TYPE_XDP = 6
"""BPF_LINK_TYPE_XDP, of enum bpf_link_type."""
_MOST_FRAME = 1 << 12
_XDP = 37
"""BPF_XDP, an attach type."""
_PERF_TYPE_TRACEPOINT = 2
_PERF_SET_BPF, _PERF_ENABLE = 0x40042408, 0x2400
_KPROBE_PMU = Path("/sys/bus/event_source/devices/kprobe")
_LOG_SIZE = 1 << 22

_libc = ctypes.CDLL(None, use_errno=True)


class ProgramType(IntEnum):
    """enum bpf_prog_type."""

    KPROBE = 2
    TRACEPOINT = 5
    XDP = 6
    RAW_TRACEPOINT = 17
    TRACING = 26


class AttachType(IntEnum):
    """enum bpf_attach_type; for TRACING programs. attach.py finds the member by mechanism."""

    NONE = 0
    FENTRY = 24
    FEXIT = 25


ARRAY = 2
"""BPF_MAP_TYPE_ARRAY."""
MMAPABLE = 1 << 10
"""BPF_F_MMAPABLE: an array that can be mapped through its fd (5.5)."""

INSTRUCTION = struct.Struct("=BBhi")
"""struct bpf_insn: code, source and destination register, offset, immediate."""
CALL, PSEUDO_KFUNC_CALL = 0x85, 2
"""BPF_JMP | BPF_CALL, and the value of its source register for a call of a kfunc."""
RETURN_0 = bytes.fromhex("b7000000000000009500000000000000")
"""r0 = 0; exit."""

XDP_HAS_FRAGS = 1 << 5
"""BPF_F_XDP_HAS_FRAGS, for programs: they accept packets in several buffers (5.18)."""


class RefusedError(OSError):
    """The verifier refused a program; `log` is its log."""

    def __init__(self, number: int, log: str) -> None:
        super().__init__(number, os.strerror(number))
        self.log = log


def refuse_other_machines() -> None:
    """Refuse a machine whose system call numbers and registers tcplat does not know.

    Raises:
        CannotRunError: The message names the supported machines.
    """
    machine = platform.machine()
    if machine not in _SYSCALLS:
        raise CannotRunError(f"tcplat runs on {' and '.join(_SYSCALLS)}; this machine is {machine}")


def _syscall(which: int, *arguments: object) -> int:
    refuse_other_machines()
    number = _SYSCALLS[platform.machine()][which]
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _bpf(command: int, attr: bytes) -> int:
    return _syscall(0, command, attr, len(attr))


def _pointer(data: bytes | ctypes.Array[ctypes.c_char]) -> int:
    """Return the address of an object that the caller keeps alive across the call."""
    return ctypes.cast(data, ctypes.c_void_p).value or 0  # type: ignore[arg-type]  # bytes do


def time_programs() -> int:
    """Have the kernel time all programs of the host; return the fd that ends it when closed.

    Raises:
        CannotRunError: Only CAP_SYS_ADMIN may (bpf_enable_stats(), 5.8).
    """
    try:
        return _bpf(_ENABLE_STATS, bytes(4))
    except PermissionError as error:
        raise CannotRunError(
            "--max-overhead needs CAP_SYS_ADMIN, to have the kernel time the programs: "
            "run it as root"
        ) from error


def lift_memory_limit() -> None:
    """Raise RLIMIT_MEMLOCK: before 5.11, maps counted as locked memory."""
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY,) * 2)
    except (ValueError, OSError):
        return  # not needed since 5.11; before, map_create() fails with EPERM


def map_create(name: str, kind: int, key: int, value: int, entries: int, flags: int) -> int:
    """Create a map and return its fd. Sizes are in bytes; `entries` of a ring is its size."""
    attr = struct.pack("=7I16s", kind, key, value, entries, flags, 0, 0, name.encode()[:15])
    return _bpf(_MAP_CREATE, attr)


def map_update(fd: int, key: bytes, value: bytes) -> None:
    """Set one entry."""
    attr = struct.pack("=IxxxxQQQ", fd, _pointer(key), _pointer(value), 0)
    _bpf(_MAP_UPDATE, attr)


def map_delete(fd: int, key: bytes) -> None:
    """Delete an entry, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        _bpf(_MAP_DELETE, struct.pack("=IxxxxQQQ", fd, _pointer(key), 0, 0))


def map_update_many(fd: int, pairs: Sequence[tuple[bytes, bytes]]) -> None:
    """Set many entries in one call."""
    if not pairs:
        return
    keys, values = b"".join(key for key, _ in pairs), b"".join(value for _, value in pairs)
    attr = struct.pack("=4Q2I2Q", 0, 0, _pointer(keys), _pointer(values), len(pairs), fd, 0, 0)
    _bpf(_MAP_UPDATE_BATCH, attr)


def map_insert_many(fd: int, pairs: Iterable[tuple[bytes, bytes]]) -> None:
    """Create entries, and keep existing ones. Not a batch, which would replace those.

    Raises:
        OSError: E2BIG: the map is full.
    """
    for key, value in pairs:
        attr = struct.pack("=IxxxxQQQ", fd, _pointer(key), _pointer(value), _NOEXIST)
        with contextlib.suppress(FileExistsError):
            _bpf(_MAP_UPDATE, attr)


def program_load(
    name: str,
    kind: ProgramType,
    code: bytes,
    attach_type: AttachType = AttachType.NONE,
    attach_btf_id: int = 0,
    flags: int = 0,
) -> int:
    """Load a program and return its fd.

    Args:
        name: At most 15 characters are kept.
        kind: Its type.
        code: Instructions, with the fds of maps filled in.
        attach_type: For TRACING.
        attach_btf_id: BTF id of the function that a TRACING program is attached to.
        flags: BPF_F_*.

    Raises:
        RefusedError: The verifier refused it; or OSError.
    """
    license_ = ctypes.create_string_buffer(b"Dual MIT/GPL")

    def load(level: int, log: ctypes.Array[ctypes.c_char] | None) -> int:
        attr = struct.pack(
            "=IIQQIIQII16sIIIIQIIQII",
            kind,
            len(code) // 8,
            _pointer(code),
            _pointer(license_),
            level,
            len(log) if log else 0,
            _pointer(log) if log else 0,
            0,
            flags,
            name.encode()[:15],
            0,
            attach_type,
            *(0,) * 7,
            attach_btf_id,
        )
        return _bpf(_PROG_LOAD, attr)

    try:
        return load(0, None)
    except OSError as error:
        if error.errno in TOO_MANY_FILES:
            raise
        # Again with a log, to report the reason.
        log = ctypes.create_string_buffer(_LOG_SIZE)
        try:
            return load(1, log)
        except OSError:
            raise RefusedError(error.errno or 0, log.value.decode(errors="replace")) from None


def attach_raw_tracepoint(program: int, tracepoint: str | None) -> int:
    """Attach and return a link's fd. `tracepoint` is None for TRACING programs."""
    name = None if tracepoint is None else ctypes.create_string_buffer(tracepoint.encode())
    attr = struct.pack("=QIxxxx", _pointer(name) if name else 0, program)
    return _bpf(_RAW_TRACEPOINT_OPEN, attr)


def attach_xdp(program: int, ifindex: int, flags: int) -> int:
    """Attach (since 5.9) in the current network namespace, and return the link's fd."""
    return _bpf(_LINK_CREATE, struct.pack("=4I", program, ifindex, _XDP, flags))


def program_name(number: int) -> str:
    """Return the name of the program with this id; empty if it has none."""
    fd = _bpf(_PROG_GET_FD_BY_ID, struct.pack("=4I", number, 0, 0, 0))
    try:
        info = _info(fd)  # struct bpf_prog_info up to its name
    finally:
        os.close(fd)
    return info[64:].split(b"\0", 1)[0].decode(errors="replace")


def program_type(fd: int) -> int:
    """Return a program's type, of enum bpf_prog_type."""
    return int(struct.unpack_from("=I", _info(fd))[0])


def identity(fd: int) -> tuple[str, int]:
    """Return kind (prog, map, link) and id of a BPF object; id 0 for other descriptors."""
    kind = os.readlink(f"/proc/self/fd/{fd}").removeprefix("anon_inode:").strip("[]")
    kind = kind.removeprefix("bpf-").removeprefix("bpf_").replace("raw-tracepoint", "link")
    if kind not in _GET_FD_BY_ID:
        return kind, 0
    # struct bpf_prog_info, bpf_map_info and bpf_link_info all begin with type and id.
    return kind, int(struct.unpack_from("=4xI", _info(fd))[0])


def exists(kind: str, number: int) -> bool:
    """Return whether the kernel has a prog, map or link of this id."""
    try:
        os.close(_bpf(_GET_FD_BY_ID[kind], struct.pack("=4I", number, 0, 0, 0)))
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        return False
    return True


def xdp_links(ifindex: int) -> list[tuple[int, int]]:
    """Return (link id, program id) of each XDP link on an interface of any network namespace.

    An ifindex is unique within its network namespace alone: compare the program's id.

    Raises:
        OSError: The kernel does not list links (before 5.8), or CAP_SYS_ADMIN is missing.
    """
    found: list[tuple[int, int]] = []
    number = 0
    while True:
        attr = ctypes.create_string_buffer(struct.pack("=3I", number, 0, 0))
        try:
            _syscall(0, _LINK_GET_NEXT_ID, attr, 12)
        except OSError as error:
            if error.errno == errno.ENOENT:  # that was the last one
                return found
            raise
        number = int(struct.unpack_from("=4xI", attr)[0])
        try:
            fd = _bpf(_GET_FD_BY_ID["link"], struct.pack("=3I", number, 0, 0))
        except OSError as error:
            if error.errno == errno.ENOENT:  # it has gone meanwhile
                continue
            raise
        try:
            # struct bpf_link_info: type, id, prog_id, padding, xdp.ifindex
            kind, _, program, where = struct.unpack_from("=3I4xI", _info(fd))
        finally:
            os.close(fd)
        if kind == _LINK_TYPE_XDP and where == ifindex:
            found.append((number, program))


def try_bpf() -> None:
    """Create a map and load a program that does nothing.

    Raises:
        CannotRunError: The kernel refuses; the message names the likely cause.
    """
    try:
        os.close(map_create("tcplat_try", ARRAY, 4, 4, 1, 0))
        os.close(program_load("tcplat_try", ProgramType.RAW_TRACEPOINT, RETURN_0))
    except OSError as error:
        if error.errno in TOO_MANY_FILES:
            raise
        raise CannotRunError(
            f"bpf(2) is refused here ({error.strerror}): {_refused_by(error.errno or 0)}"
        ) from error


def _refused_by(number: int) -> str:
    if number == errno.ENOSYS:
        return "this kernel has no CONFIG_BPF_SYSCALL, or a seccomp filter hides the call"
    if number == errno.ENOMEM:
        return "out of memory: raise the memory limit of this cgroup"
    status = Path("/proc/self/status").read_text(encoding="ascii")
    if "Seccomp:\t0" not in status:
        return (
            "a seccomp filter is in force; allow bpf and perf_event_open "
            "(docker, podman: --security-opt seccomp=unconfined)"
        )
    return "a security module or lockdown refuses it; dmesg may name which"


def test_run(program: int, frame: bytes) -> tuple[int, bytes]:
    """Run an XDP program on one frame, and return its verdict and the resulting frame.

    Raises:
        OSError: The kernel refuses the frame.
    """
    out = ctypes.create_string_buffer(_MOST_FRAME)
    # union bpf_attr, the struct named test: prog_fd, retval, data_size_in and _out, data_in,
    # data_out, repeat, duration; the rest stays zero.
    sizes = (program, 0, len(frame), len(out))
    attr = ctypes.create_string_buffer(
        struct.pack("=IIIIQQII40x", *sizes, _pointer(frame), _pointer(out), 1, 0), 80
    )
    _syscall(0, _PROG_TEST_RUN, attr, len(attr))
    verdict, _, size = struct.unpack_from("=III", attr, 4)
    return int(verdict), out.raw[:size]


def _info(fd: int) -> bytes:
    info = ctypes.create_string_buffer(80)  # the beginning of struct bpf_*_info
    _bpf(_OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", fd, len(info), _pointer(info)))
    return info.raw


TRACEFS_MOUNT = "mount -t tracefs tracefs /sys/kernel/tracing"


def tracefs() -> Path | None:
    """Return the folder of tracefs if its events can be read, else None."""
    folders = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
    # With effective ids: access(2) by the real uid ignores capabilities.
    return next(
        (one for one in folders if os.access(one / "events", os.R_OK, effective_ids=True)), None
    )


def tracefs_missing() -> tuple[str, str]:
    """Return why tracefs() is None, and the remedy."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
            _, folder, kind = line.split()[:3]
            if kind == "tracefs":
                remount = f"mount -o remount,mode=755 {folder}"
                return (
                    f"{folder} is not readable by uid {os.geteuid()}",
                    f"run it with sudo or CAP_DAC_READ_SEARCH, or: {remount}",
                )
    return "tracefs is not mounted", TRACEFS_MOUNT


def attach_tracepoint(program: int, number: int) -> int:
    """Open a perf event and return its fd; `number` is the tracepoint's id in tracefs."""
    return _perf_event(program, struct.pack("=IIQ96x", _PERF_TYPE_TRACEPOINT, 112, number))


def attach_kprobe(program: int, function: str, *, at_return: bool) -> int:
    """Open a perf event and return its fd: closing it detaches and leaves nothing in tracefs.

    Through the kprobe PMU, which came with 4.17 (e12f03d7031a).
    """
    kind = int((_KPROBE_PMU / "type").read_text())
    # format/retprobe is the bit of config that makes it a kretprobe: "config:0".
    bit = int((_KPROBE_PMU / "format" / "retprobe").read_text().strip().rpartition(":")[2])
    name = ctypes.create_string_buffer(function.encode())
    # type, size, config, sample_period, sample_type, read_format, flags, wakeup, bp_type,
    # config1 = name, config2 = offset; the rest of the 112 bytes is zero.
    attr = struct.pack(
        "=IIQQQQQIIQQ40x",
        kind,
        112,
        int(at_return) << bit,
        1,
        0,
        0,
        0,
        1,
        0,
        _pointer(name),
        0,
    )
    return _perf_event(program, attr)


def _perf_event(program: int, attr: bytes) -> int:
    event = _syscall(1, attr, -1, 0, -1, 8)  # every process, PERF_FLAG_FD_CLOEXEC
    try:
        fcntl.ioctl(event, _PERF_SET_BPF, program)
        fcntl.ioctl(event, _PERF_ENABLE, 0)
    except OSError:
        os.close(event)
        raise
    return event
