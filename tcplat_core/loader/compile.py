"""Imports the system's bcc, and compiles C with it against a generated kernel tree."""

from __future__ import annotations

import ctypes
import errno
import functools
import importlib.util
import os
import platform
import re
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs

from tcplat_core.errors import (
    OUT_OF_MEMORY,
    CannotRunError,
    PluginError,
    TcplatError,
    lacks_memory,
)
from tcplat_core.kernel.bcc import INSTALL, find_bcc
from tcplat_core.kernel.bpf import CALL, INSTRUCTION, PSEUDO_KFUNC_CALL

SHARED_PREFIX = "tcplat_"
"""Prefix of maps that are created once per run; every other map belongs to one probe."""
_LOAD_64, _MAP_FD = 0x18, 1
"""BPF_LD | BPF_DW | BPF_IMM, and BPF_PSEUDO_MAP_FD in its source register."""
KFUNC = 1 << 30
"""bcc supports helpers only: a call of KFUNC + n means the kfunc with BTF id n."""


@attrs.frozen
class Map:
    """A map of a compiled text; sizes in bytes."""

    name: str
    kind: int
    key: int
    value: int
    entries: int
    flags: int


@attrs.frozen
class Compiled:
    """One text, compiled: needs nothing but the kernel it was compiled for.

    Args:
        functions: Name -> instructions, in which a map is named by its index in `maps`.
        maps: The maps.
    """

    functions: dict[str, bytes]
    maps: tuple[Map, ...]

    def pack(self) -> dict[str, Any]:
        """Return the value for the cache."""
        return attrs.asdict(self)

    @classmethod
    def unpack(cls, raw: dict[str, Any]) -> Compiled:
        """Return the inverse of pack()."""
        return cls(raw["functions"], tuple(Map(**one) for one in raw["maps"]))

    def code(self, function: str, fds: Sequence[int]) -> bytes:
        """Return the instructions of a function, with the maps' fds in place of their indices."""
        return _renumbered(self.functions[function], dict(enumerate(fds)))


def _renumbered(code: bytes, numbers: Mapping[int, int]) -> bytes:
    out = bytearray(code)
    for at in range(0, len(code), 8):
        op, registers, offset, number = INSTRUCTION.unpack_from(code, at)
        if op == _LOAD_64 and registers >> 4 == _MAP_FD:
            INSTRUCTION.pack_into(out, at, op, registers, offset, numbers[number])
        elif op == CALL and number >= KFUNC:
            INSTRUCTION.pack_into(out, at, op, PSEUDO_KFUNC_CALL << 4, offset, number - KFUNC)
    return bytes(out)


def compile_text(text: str, tree: Path) -> Compiled:
    """Compile with bcc, against the kernel tree.

    Raises:
        PluginError: It does not compile. The compiler's messages are on standard error.
        CannotRunError: There is no bcc.
        OSError: It may compile, and something else ran out: files, memory, room on the disk.
    """
    bcc = import_bcc()
    with kernel_source(tree):
        before = _log_end()
        try:
            module = bcc.BPF(text=text.encode())
        except Exception as error:
            refused = _refused(_log_since(before))
            if refused:
                raise refused from error
            raise PluginError("it does not compile; --debug shows the compiler's words") from error
    lib, handle = bcc.lib, module.module
    for query in ("num_functions", "num_tables"):
        getattr(lib, f"bpf_{query}").argtypes = [ctypes.c_void_p]
        getattr(lib, f"bpf_{query}").restype = ctypes.c_size_t
    queries = {
        "function_name": ctypes.c_char_p,
        "table_name": ctypes.c_char_p,
        "table_fd_id": ctypes.c_int,
        "table_type_id": ctypes.c_int,
        "table_key_size_id": ctypes.c_size_t,
        "table_leaf_size_id": ctypes.c_size_t,
        "table_max_entries_id": ctypes.c_size_t,
        "table_flags_id": ctypes.c_int,
    }
    for query, result in queries.items():
        getattr(lib, f"bpf_{query}").argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        getattr(lib, f"bpf_{query}").restype = result
    maps, index = [], {}
    for number in range(lib.bpf_num_tables(handle)):
        index[lib.bpf_table_fd_id(handle, number)] = number
        maps.append(
            Map(
                lib.bpf_table_name(handle, number).decode(),
                lib.bpf_table_type_id(handle, number),
                lib.bpf_table_key_size_id(handle, number),
                lib.bpf_table_leaf_size_id(handle, number),
                lib.bpf_table_max_entries_id(handle, number),
                lib.bpf_table_flags_id(handle, number),
            )
        )
    functions = {}
    for number in range(lib.bpf_num_functions(handle)):
        name = lib.bpf_function_name(handle, number)
        functions[name.decode()] = _renumbered(module.dump_func(name), index)
    module.cleanup()
    return Compiled(functions, tuple(maps))


_RAN_OUT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)
_MAP = re.compile(r"could not open bpf map: .*, error: (.+)")


def _log_end() -> int:
    """Return the end of standard error, the loader's log; -1 if it is not a file."""
    try:
        return os.lseek(2, 0, os.SEEK_CUR)
    except OSError:
        return -1


def _log_since(before: int) -> str:
    if before < 0:
        return ""
    with suppress(OSError):  # it cannot be read
        return os.pread(2, 1 << 20, before).decode(errors="replace")
    return ""


def _refused(log: str) -> OSError | None:
    """Return the error behind a failure of bcc, from its messages: it reports no errno.

    It creates maps while it compiles, and clang opens files.
    """
    for number in _RAN_OUT:
        if os.strerror(number) in log:
            return OSError(number, os.strerror(number))
    found = _MAP.search(log)
    for number in (errno.EPERM, errno.EACCES) if found else ():
        if found and found[1] == os.strerror(number):
            return OSError(number, f"bcc may create no map ({os.strerror(number)})")
    return None


@functools.cache
def compiler_identity() -> bytes:
    """Return a hash input that identifies bcc, its library, and their clang and LLVM."""
    named = re.compile(r"lib(bcc|bpf|clang-cpp|LLVM)\b.*\.so")
    parts = []
    for folder in ("/usr/lib", "/usr/lib64", f"/usr/lib/{platform.machine()}-linux-gnu"):
        with suppress(OSError), os.scandir(folder) as entries:
            parts += [_file_identity(one.path) for one in entries if named.match(one.name)]
    with suppress(CannotRunError):
        parts += [_file_identity(str(one)) for one in find_bcc().glob("*.py")]
    return "\n".join(sorted(parts)).encode()


def _file_identity(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError:  # a dangling link
        return path
    return f"{path} {status.st_ino} {status.st_size} {status.st_mtime_ns}"


def import_bcc() -> Any:
    """Import bcc by its path: a venv does not see the system's folders."""
    package = find_bcc()
    spec = importlib.util.spec_from_file_location(
        "bcc", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None  # noqa: S101 - find_bcc() saw the files
    assert spec.loader is not None  # noqa: S101
    module = importlib.util.module_from_spec(spec)
    sys.modules["bcc"] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        if _lacks_memory(error):
            raise TcplatError(OUT_OF_MEMORY) from error
        if not isinstance(error, OSError):  # an incomplete package, or for another Python
            raise CannotRunError(
                f"bcc in {package} is broken ({type(error).__name__}: {error}): apt install "
                "--reinstall python3-bpfcc libbpfcc (Fedora: dnf reinstall python3-bcc bcc)"
            ) from error
        raise CannotRunError(
            f"bcc's library libbcc.so.0 does not load ({error}): {INSTALL}"
        ) from error
    return module


def _lacks_memory(error: Exception) -> bool:
    """Return whether bcc could not be imported because memory ran out.

    The dynamic linker gives no errno. It says the same of a library on a file system that is
    mounted noexec.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    unmapped = limit != resource.RLIM_INFINITY and "failed to map segment" in str(error)
    return unmapped or lacks_memory(f"{type(error).__name__}: {error}")


@contextmanager
def kernel_source(tree: Path) -> Iterator[None]:
    """Compile against `tree`; restore the current folder, which bcc changes."""
    here = os.getcwd()
    os.environ["BCC_KERNEL_SOURCE"] = str(tree)
    try:
        yield
    finally:
        os.chdir(here)
