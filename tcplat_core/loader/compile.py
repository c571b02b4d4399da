"""Finds the system's bcc, puts the C together, and compiles it against our own headers."""

from __future__ import annotations

import ctypes
import errno
import functools
import importlib.util
import os
import platform
import re
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import attrs

from tcplat_core.errors import CannotRunError, PluginError
from tcplat_core.filters import Filter
from tcplat_core.hookpoints import HookPoint, reporting
from tcplat_core.ring import books_hooks, books_slots, possible_cpus

from .bpf import CALL, INSTRUCTION, PSEUDO_KFUNC_CALL
from .protocol import ProbeRequest

SYSTEM_FOLDERS = (
    "/usr/lib/python3/dist-packages",
    *(f"/usr/lib/python3.{minor}/site-packages" for minor in range(9, 20)),
    *(f"/usr/lib64/python3.{minor}/site-packages" for minor in range(9, 20)),
)
"""Where Debian and Ubuntu, then Fedora and its kin, keep python3-bpfcc or python3-bcc."""

CORE_TYPES = (
    "sock",
    "inet_sock",
    "net:ns",
    "sk_buff:sk",
    "socket:file,sk",
    "file:f_inode",
    "inode:i_ino",
    "task_struct:tgid,signal,group_leader,start_time,flags,comm",
    "signal_struct:live",
    "pt_regs",
    "timespec64",
)
"""Kernel types that the shared headers use."""

CGROUP_TYPES = ("task_struct:cgroups", "css_set:dfl_cgrp", "cgroup:level,ancestor_ids")
"""And with TCPLAT_READ_CGROUPS."""

PIDNS_TYPES = ("task_struct:thread_pid,pid", "pid:level,numbers", "upid", "pid_namespace:ns")
"""And with TCPLAT_PIDNS."""

ALWAYS = ("event.bpf.h", "filter.bpf.h", "owner.bpf.h")
"""Headers that every probe gets: the shared maps are in them."""

SHARED_PREFIX = "tcplat_"
"""Maps of such a name are made once per run; every other map is its probe's own."""

_INSTALL = "apt install python3-bpfcc (Fedora: dnf install python3-bcc)"
_INCLUDE = re.compile(
    r"^[ \t]*#[ \t]*include[ \t]+<tcplat/([a-z_]+\.bpf\.h)>"
    r"(?:[ \t]*/\* as ([a-z]+) \*/)?[ \t\r]*$",
    re.MULTILINE,
)
_KEYED = "keyed.bpf.h"
_KEYED_NAMES = {
    "keys": "{}_keys",
    "key_numbers": "{}_numbers",
    "key_given": "{}_given",
    "key_count": "{}_count",
    "tcplat_number": "tcplat_{}_number",
    "TCPLAT_KEY": "TCPLAT_KEY_{}",
    "TCPLAT_KEYS": "TCPLAT_KEYS_{}",
}
"""What <tcplat/keyed.bpf.h> defines or wants defined, and its names where it is included `as`.

bcc rewrites no map call in a macro, so that a macro cannot give a map its name.
"""
_LOAD_64, _MAP_FD = 0x18, 1
"""BPF_LD | BPF_DW | BPF_IMM, and BPF_PSEUDO_MAP_FD in its source register."""
KFUNC = 1 << 30
"""bcc knows helpers alone: a call of KFUNC + n stands for that of the kfunc with BTF id n."""


@attrs.frozen
class Map:
    """A map as bcc compiled it: sizes in bytes."""

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
        """For the cache."""
        return attrs.asdict(self)

    @classmethod
    def unpack(cls, raw: dict[str, Any]) -> Compiled:
        """The inverse of pack()."""
        return cls(raw["functions"], tuple(Map(**one) for one in raw["maps"]))

    def code(self, function: str, fds: Sequence[int]) -> bytes:
        """The instructions of a function, with the maps' fds in place of their indices."""
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
        PluginError: It does not compile. The compiler's words are on standard error.
        CannotRunError: There is no bcc.
        OSError: It may compile, and something else ran out: files, memory, room on the disk.
    """
    bcc = import_bcc()
    with kernel_source(tree):
        before = _said_up_to()
        try:
            module = bcc.BPF(text=text.encode())
        except Exception as error:
            refused = _refused(_said_since(before))
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


def _said_up_to() -> int:
    """Where standard error, the loader's log, ends; -1 if it is no file."""
    try:
        return os.lseek(2, 0, os.SEEK_CUR)
    except OSError:
        return -1


def _said_since(before: int) -> str:
    if before < 0:
        return ""
    with suppress(OSError):  # not to be read
        return os.pread(2, 1 << 20, before).decode(errors="replace")
    return ""


def _refused(said: str) -> OSError | None:
    """What bcc ran out of, by its words: of a failure it tells nothing else.

    It creates maps while it compiles, and clang opens files.
    """
    for number in _RAN_OUT:
        if os.strerror(number) in said:
            return OSError(number, os.strerror(number))
    found = _MAP.search(said)
    for number in (errno.EPERM, errno.EACCES) if found else ():
        if found and found[1] == os.strerror(number):
            return OSError(number, f"bcc may create no map ({os.strerror(number)})")
    return None


@functools.cache
def compiler_identity() -> bytes:
    """What changes when the compiler does: bcc, its library, and the clang and LLVM below it."""
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
    except OSError:  # a link to nothing
        return path
    return f"{path} {status.st_ino} {status.st_size} {status.st_mtime_ns}"


def find_bcc() -> Path:
    """The folder of the system's bcc package, whatever Python this is.

    Only folders that root alone can write count: what is found runs as root.

    Raises:
        CannotRunError: There is none; the sentence tells PyPI's bcc apart.
    """
    unsafe = ""
    for folder in SYSTEM_FOLDERS:
        package = Path(folder) / "bcc"
        if (package / "libbcc.py").is_file():
            if _only_roots(package):
                return package
            unsafe = unsafe or (
                f"bcc in {package} can be changed by others than root, and would run as root: "
                f"chown -R root:root {package} && chmod -R go-w {package}"
            )
    if unsafe:
        raise CannotRunError(unsafe)
    stray = importlib.util.find_spec("bcc")
    if stray is not None and stray.origin:
        raise CannotRunError(
            f"the package bcc in {Path(stray.origin).parent} is another project of that name "
            f"(PyPI's is about lattices), and the system's bcc is not installed: {_INSTALL}"
        )
    raise CannotRunError(f"bcc is not installed: {_INSTALL}")


def _only_roots(package: Path) -> bool:
    """Return whether root alone can change the folder and what is imported from it."""
    return all(
        there.st_uid == 0 and not there.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        for there in map(Path.stat, (package, *package.glob("*.py")))
    )


def import_bcc() -> Any:
    """The bcc module, loaded by its path: a venv does not see the system's folders."""
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
    except OSError as error:
        raise CannotRunError(
            f"bcc's library libbcc.so.0 does not load ({error}): {_INSTALL}"
        ) from error
    except Exception as error:  # a package that is half there, or of another version of Python
        raise CannotRunError(
            f"bcc in {package} is broken ({type(error).__name__}: {error}): "
            "apt install --reinstall python3-bpfcc libbpfcc (Fedora: dnf reinstall python3-bcc bcc)"
        ) from error
    return module


def core_defines(points: Sequence[HookPoint], wanted: Filter) -> dict[str, int | str]:
    """The constants that the shared headers are compiled for."""
    hooks, cpus = len(reporting(points)), possible_cpus()
    return {
        "TCPLAT_HOOKS": books_hooks(hooks),
        "TCPLAT_BOOKS": books_slots(cpus, hooks),
        "TCPLAT_CPU_BITS": cpus.bit_length(),
        **wanted.defines(),
    }


def program_text(
    probe: ProbeRequest, *, taken: Mapping[str, str], defines: Mapping[str, int | str]
) -> str:
    """The whole C text of one probe, headers and the core's own programs pasted in.

    bcc rewrites map calls in the main file only, so a header cannot stay one.

    Args:
        probe: Its C and its record.
        taken: Point -> mechanism: becomes TCPLAT_<MECHANISM>_<point>, and TCPLAT_<MECHANISM>.
        defines: Constants.
    """
    numbers = {
        f"HOOK_{hook.program}": number for number, (_, hook) in enumerate(reporting(probe.points))
    }
    numbers |= {f"HIST_{name}": number for number, name in enumerate(probe.histograms)}
    chosen = {f"TCPLAT_{way.upper()}_{point}": 1 for point, way in taken.items()}
    chosen |= {f"TCPLAT_{way.upper()}": 1 for way in sorted(set(taken.values()))}
    head = [
        f"#define {name} {value}"
        for name, value in {**defines, **probe.defines, **numbers, **chosen}.items()
    ]
    prelude = "".join(map(_header, ALWAYS))
    name = f'#line 1 "{probe.name}.bpf.c"'

    def pasted(found: re.Match[str]) -> str:
        if found[1] in ALWAYS:
            return ""
        line = probe.source.count("\n", 0, found.end()) + 2
        return f'{_header(found[1], found[2])}#line {line} "{probe.name}.bpf.c"'

    body = _INCLUDE.sub(pasted, probe.source)
    return "\n".join([*head, probe.struct, prelude, name, body, _header("core.bpf.h")])


def _header(name: str, own: str | None = None) -> str:
    """The text of a header, with those that it includes; `own`: under names of its own."""
    try:
        text = files("tcplat_core").joinpath("include", "tcplat", name).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise PluginError(f"there is no header <tcplat/{name}>") from error

    def pasted(found: re.Match[str]) -> str:
        line = text.count("\n", 0, found.end()) + 2
        return f'{_header(found[1], found[2])}#line {line} "tcplat/{name}"'

    if own:
        if name != _KEYED:
            raise PluginError(f"<tcplat/{name}> cannot be included as {own}: <tcplat/{_KEYED}> can")
        for word, named in _KEYED_NAMES.items():
            text = re.sub(rf"\b{word}\b", named.format(own), text)

    return f'#line 1 "tcplat/{name}"\n{_INCLUDE.sub(pasted, text)}\n'


@contextmanager
def kernel_source(tree: Path) -> Iterator[None]:
    """Compile against `tree`, and come back to the folder that bcc leaves for it."""
    here = os.getcwd()
    os.environ["BCC_KERNEL_SOURCE"] = str(tree)
    try:
        yield
    finally:
        os.chdir(here)
