#!/usr/bin/env python3
"""Write what each kernel's BTF says of the hooks that tcplat's probes name.

    python tests/vm/facts.py        # makes tests/unit/data/kernels.json

To be run when a hook is added, or a kernel to kernels.txt or more-kernels.txt. The kernels are
fetched as run.py does, and not booted: functions, their arguments and tracepoints are all in the
BTF. tests/unit/test_kernels.py holds every hook point against the file.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from tcplat_core.kernel.btf import Btf  # noqa: E402
from tcplat_core.kernel.core_hooks import CORE  # noqa: E402
from tcplat_core.kernel.host import SYSCALLS, Host  # noqa: E402
from tcplat_core.plugin.hookpoints import HookPoint  # noqa: E402 - wherever it is called from
from tcplat_core.registry.find import Plugins  # noqa: E402
from tests.vm.run import (  # noqa: E402
    KERNELS,
    MORE_KERNELS,
    Cache,
    VmError,
    default_cache,
    read_kernels,
)

DEMO = HERE.parent.parent / "demo" / "tcplat-retransmit"
TARGET = HERE.parent / "unit" / "data" / "kernels.json"
READ = ("bpf_rdonly_cast", "struct cgroup.ancestor_ids")
"""What the loader asks for beside hooks; see Host.fact()."""


def probes() -> dict[str, tuple[HookPoint, ...]]:
    """Name -> hook points, of all probes of this repository, and of the core itself."""
    sys.path.insert(0, str(DEMO))
    from tcplat_retransmit.plugin import POINTS  # noqa: PLC0415 - it is a project of its own

    plugins = Plugins.load()
    ours = [
        found.name
        for found in plugins.found
        if found.kind == "probe" and found.distribution == "tcplat"
    ]
    points = {name: tuple(plugins.probe(name).points) for name in sorted(ours)}
    return {"core": CORE, **points, "tcp_retransmit": POINTS}


def names() -> Iterator[str]:
    """All that is looked up in the BTF."""
    for points in probes().values():
        for point in points:
            for way in point.ways:
                yield from (hook.func for hook in way.hooks if way.mechanism != "xdp")
    yield from READ


def section(elf: bytes, name: str) -> bytes:
    """Return the content of a section of a 64-bit ELF file.

    Raises:
        VmError: There is none of this name.
    """
    # Elf64_Ehdr: e_shoff; e_shentsize, e_shnum, e_shstrndx. Elf64_Shdr: name, offset, size.
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, strings = struct.unpack_from("<3H", elf, 0x3A)
    headers = [struct.unpack_from("<I20xQQ", elf, table + n * size) for n in range(count)]
    for at, offset, length in headers:
        start = headers[strings][1] + at
        if elf[start : elf.index(b"\0", start)] == name.encode():
            return elf[offset : offset + length]
    raise VmError(f"the kernel has no section {name}")


def facts(btf: Btf) -> dict[str, list[str] | None]:
    """Name -> the arguments' names (functions) or types (tracepoints); None where there is none."""
    host = Host(btf=btf)
    found = {}
    for name in sorted(set(names())):
        # These are in tracefs alone; CONFIG_FTRACE_SYSCALLS is all that it takes.
        if not name.startswith(SYSCALLS):
            known = host.fact(name, is_tracepoint=":" in name)
            found[name] = None if known is None else known[1]
    return found


def as_text(kernels: dict[str, dict[str, Any]]) -> str:
    """JSON with a line for each fact."""
    made = '{"made by": "python tests/vm/facts.py", "kernels": {'
    parts = []
    for name, kernel in kernels.items():
        lines = [
            f"    {json.dumps(func)}: {json.dumps(args)}" for func, args in kernel["facts"].items()
        ]
        head = f'  {json.dumps(name)}: {{"package": {json.dumps(kernel["package"])}, "facts": {{\n'
        parts.append(head + ",\n".join(lines) + "\n  }}")
    return made + "\n" + ",\n".join(parts) + "\n}}\n"


def main() -> int:
    """Write the file."""
    kernels = read_kernels(KERNELS.read_text()) | read_kernels(MORE_KERNELS.read_text())
    trees = Cache(default_cache()).fetch(list(kernels.values()))
    found = {
        name: {
            "package": tree.name,
            "facts": facts(Btf.from_bytes(section((tree / "vmlinux").read_bytes(), ".BTF"))),
        }
        for name, tree in trees.items()
    }
    found = dict(sorted(found.items(), key=lambda one: list(map(int, one[0].split(".")))))
    TARGET.write_text(as_text(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
