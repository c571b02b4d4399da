"""The small kernel tree that bcc compiles against.

bcc compiles against kernel headers, which most hosts lack. It needs little of them: with the types
that a program reads and a dozen tiny files, it compiles anything. `BCC_KERNEL_SOURCE` names the
folder.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tcplat_core.kernel.btf import Btf

from .cache import digest, identity
from .kernel_types import generate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from .cache import Cache


@contextlib.contextmanager
def kernel_tree(
    wanted: Iterable[str], cache: Cache, read: Callable[[], Btf] = Btf.from_file
) -> Iterator[Path]:
    """Yield a kernel tree with these types, in a folder that is removed after the block.

    Args:
        wanted: As for `generate`.
        cache: Where the types may be, as C, and otherwise are put.
        read: What gives the kernel's types, where they may have been read before.

    Raises:
        BtfError: As `generate`.
        OSError: The folder cannot be written.
    """
    header = types_as_c(wanted, cache, read)
    with tempfile.TemporaryDirectory(prefix="tcplat-", ignore_cleanup_errors=True) as folder:
        write_tree(Path(folder), header)
        yield Path(folder)


def types_as_c(wanted: Iterable[str], cache: Cache, read: Callable[[], Btf] = Btf.from_file) -> str:
    """Return what `generate` does, from the cache when it was made before.

    Raises:
        BtfError: As `generate`.
    """
    entries = sorted(set(wanted))
    name = f"{digest(identity().encode(), *map(str.encode, entries))}.types"
    known = cache.read(name)
    if isinstance(known, str):
        return known
    text = generate(read(), entries)
    cache.write(name, text)
    return text


def write_tree(folder: Path, types: str) -> None:
    """Write the files that bcc includes.

    Args:
        folder: Where; made if missing. It becomes BCC_KERNEL_SOURCE.
        types: What `generate` returned. Programs get it without any #include.

    Raises:
        OSError: The folder cannot be written.
    """
    files = {**_fixed_files(), "generated/tcplat_kernel.h": types}
    for name, text in files.items():
        path = folder / "include" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


_TYPES_H = """\
#ifndef TCPLAT_LINUX_TYPES_H
#define TCPLAT_LINUX_TYPES_H
typedef signed char __s8;
typedef unsigned char __u8;
typedef short __s16;
typedef unsigned short __u16;
typedef int __s32;
typedef unsigned int __u32;
typedef long long __s64;
typedef unsigned long long __u64;
typedef __s8 s8;
typedef __u8 u8;
typedef __s16 s16;
typedef __u16 u16;
typedef __s32 s32;
typedef __u32 u32;
typedef __s64 s64;
typedef __u64 u64;
typedef __s8 int8_t;
typedef __u8 uint8_t;
typedef __s16 int16_t;
typedef __u16 uint16_t;
typedef __s32 int32_t;
typedef __u32 uint32_t;
typedef __s64 int64_t;
typedef __u64 uint64_t;
typedef __u16 __le16, __be16, __sum16;
typedef __u32 __le32, __be32, __wsum;
typedef __u64 __le64, __be64;
typedef __u64 __aligned_u64 __attribute__((aligned(8)));
typedef __SIZE_TYPE__ size_t;
typedef long ssize_t;
typedef __UINTPTR_TYPE__ uintptr_t;
typedef int pid_t;
#if !defined(__STDC_VERSION__) || __STDC_VERSION__ < 202311L
typedef _Bool bool;
enum { false, true };
#endif
#ifndef NULL
#define NULL ((void *)0)
#endif
#endif
"""

_KCONFIG_H = """\
#ifndef TCPLAT_LINUX_KCONFIG_H
#define TCPLAT_LINUX_KCONFIG_H
#define CONFIG_BPF_SYSCALL 1
#include <linux/types.h>
#include <generated/tcplat_kernel.h>
#endif
"""

_VERSION_H = """\
#ifndef TCPLAT_LINUX_VERSION_H
#define TCPLAT_LINUX_VERSION_H
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + ((c) > 255 ? 255 : (c)))
#define LINUX_VERSION_CODE KERNEL_VERSION({major}, {minor}, {patch})
#endif
"""

_PAGE_H = f"""\
#ifndef TCPLAT_ASM_PAGE_H
#define TCPLAT_ASM_PAGE_H
#define PAGE_SIZE {os.sysconf("SC_PAGE_SIZE")}
#endif
"""

# Included by bcc, or habitually by programs; their content is defined already.
_EMPTY = (
    "linux/bpf.h",
    "linux/bpf_common.h",
    "linux/compiler.h",
    "linux/log2.h",
    "linux/ptrace.h",
    "linux/stddef.h",
    "uapi/linux/bpf.h",
    "uapi/linux/if_ether.h",
    "uapi/linux/if_packet.h",
    "uapi/linux/ptrace.h",
    "uapi/linux/types.h",
)


def _fixed_files() -> dict[str, str]:
    """Return the tree's files below include/ that do not depend on the wanted types."""
    release = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", os.uname().release)
    major, minor, patch = release.groups(default="0") if release else ("0", "0", "0")
    return {
        "linux/kconfig.h": _KCONFIG_H,
        "linux/types.h": _TYPES_H,
        "linux/version.h": _VERSION_H.format(major=major, minor=minor, patch=patch),
        "asm/page.h": _PAGE_H,
        **dict.fromkeys(_EMPTY, "/* Empty on purpose. */\n"),
    }
