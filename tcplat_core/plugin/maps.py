"""BPF maps that the Python side of a probe reads: arrays, mapped, because that needs no rights.

Root is dropped when probes are attached. Before 5.19 (c8644cd0efe7) bpf(2) then refuses even
lookups if kernel.unprivileged_bpf_disabled is set, as on Debian and Ubuntu. An array with
BPF_F_MMAPABLE (5.5) is mapped through its fd, which needs no rights, and no call per entry.
Hashes cannot be mapped: include/tcplat/keyed.bpf.h counts by key in arrays.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs

from tcplat_core.event.fields import Event


def mapped(fd: int, size: int) -> mmap.mmap:
    """Map an array of `size` bytes for reading."""
    return mmap.mmap(fd, size + -size % mmap.PAGESIZE, prot=mmap.PROT_READ)


@attrs.frozen
class ReadableMap:
    """A map of the probe's C that its poll() reads.

    In C it is an array that can be mapped:
    ``BPF_F_TABLE("array", u32, struct count, counts, 64, BPF_F_MMAPABLE)``.

    Args:
        name: Name in C.
        layout: Format of one entry for :mod:`struct`: ``"=QQ"``. Without ``=``, it has C's
            padding. The loader compares its size with the compiled one.
    """

    name: str
    layout: str

    @property
    def size(self) -> int:
        """Size of an entry in bytes."""
        return struct.calcsize(self.layout)


@attrs.define(eq=False)
class MapView(Sequence[tuple[Any, ...]]):
    """One array: index -> the current members of that entry, as a tuple.

    Handlers may change the array at the same time. A number of up to eight bytes is read
    atomically; an entry of several numbers is not.
    """

    fd: int
    layout: struct.Struct
    entries: int
    _memory: mmap.mmap = attrs.field(init=False)
    _stride: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._stride = self.layout.size + -self.layout.size % 8  # array_map_alloc()
        self._memory = mapped(self.fd, self._stride * self.entries)

    def __len__(self) -> int:
        return self.entries

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(self.entries))]
        if not -self.entries <= index < self.entries:
            raise IndexError(index)
        return self.layout.unpack_from(self._memory, index % self.entries * self._stride)

    def close(self) -> None:
        """Unmap. The caller closes the fd."""
        self._memory.close()


@attrs.define(eq=False)
class Maps:
    """What poll() gets: arrays, as in ``maps["counts"][3]``, and a way to make rows.

    Args:
        views: The arrays, by name.
        make_row: See row().
    """

    views: dict[str, MapView]
    make_row: Callable[..., Event]

    def __getitem__(self, name: str) -> MapView:
        return self.views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.views)

    def row(self, point: str, **fields: Any) -> Event:
        """Return a row of this instant.

        Args:
            point: Any name that is not a hook point.
            fields: Values of fields of the probe's event class; all others are null.
        """
        return self.make_row(point, **fields)

    def close(self) -> None:
        """Unmap all arrays."""
        for view in self.views.values():
            view.close()
