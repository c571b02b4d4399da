"""Attaches XDP programs to interfaces by bpf_link; never replaces another program."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

import attrs

from tcplat_core.errors import CannotRunError, PluginError, UsageError
from tcplat_core.kernel import bpf, fdinfo, netdev, netns
from tcplat_core.kernel.netdev import Interface
from tcplat_core.plugin.hookpoints import Interfaces

from .protocol import MAX_FDS, Attached, ProbeRequest
from .refusal import refusal

_FLAGS = {"native": 1 << 2, "generic": 1 << 1}
"""XDP_FLAGS_DRV_MODE, XDP_FLAGS_SKB_MODE."""
_OLDEST = (5, 9)
"""The first kernel with XDP links (aa8d3a716b59)."""
_MOST = MAX_FDS - 100
"""Each interface uses one of the fds in the message to the session."""


def listen(
    probe: ProbeRequest, programs: Mapping[str, bytes], netns_at: str, fds: list[int]
) -> tuple[list[Attached], dict[str, str]]:
    """Attach a probe's programs to its interfaces.

    Args:
        probe: The probe.
        programs: Name -> code.
        netns_at: The network namespace of the interfaces, unless the probe names one.
        fds: Gets the fds of programs and links.

    Returns:
        The interfaces; and those that were skipped, with the reason.
    """
    if not programs:
        return [], {}
    if probe.interfaces is None:
        raise PluginError(f"probe {probe.name} has XDP programs and names no interfaces")
    attached = []
    interfaces = attrs.evolve(probe.interfaces, netns=probe.interfaces.netns or netns_at)
    with netns.inside(interfaces.netns):
        chosen, skipped = choose(interfaces, probe.name)
        for name, code in programs.items():
            try:
                program = load(name, code)
            except bpf.RefusedError as error:
                raise CannotRunError(refusal(name, error)) from error
            fds.append(program)
            for interface in chosen:
                one = attach(program, interface, interfaces.mode, probe.name)
                fds.append(one.link_fd)
                attached.append(one)
    return attached, skipped


def load(name: str, code: bytes) -> int:
    """Load a program and return its fd, with support for packets in several buffers if possible.

    Raises:
        bpf.RefusedError: The verifier refused it; or OSError.
    """
    try:
        return bpf.program_load(name, bpf.ProgramType.XDP, code, flags=bpf.XDP_HAS_FRAGS)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return bpf.program_load(name, bpf.ProgramType.XDP, code)


def choose(wanted: Interfaces, probe: str) -> tuple[list[Interface], dict[str, str]]:
    """Select interfaces of the current network namespace.

    Args:
        wanted: The probe's selection.
        probe: Its name, for the error.

    Returns:
        The interfaces, and interface -> why it was skipped.

    Raises:
        UsageError: There is no such interface, or there are too many.
        CannotRunError: A named interface carries no Ethernet frames.
    """
    have = {interface.name: interface for interface in netdev.interfaces()}
    where = f" in network namespace {wanted.netns}" if wanted.netns else ""
    for name in wanted.names:
        if name not in have:
            raise UsageError(f"there is no interface {name!r}{where}; there is {', '.join(have)}")
        if not have[name].is_ethernet:
            raise CannotRunError(f"probe {probe} cannot listen on {name}: {_NOT_ETHERNET}")
    chosen = [have[name] for name in wanted.names] or [one for one in have.values() if one.is_up]
    skipped = {one.name: _NOT_ETHERNET for one in chosen if not one.is_ethernet}
    chosen = [one for one in chosen if one.is_ethernet]
    if not chosen:
        raise UsageError(f"no interface{where} is up; there is {', '.join(have)}")
    if len(chosen) > _MOST:
        raise UsageError(f"{len(chosen)} interfaces selected; at most {_MOST} per run")
    return chosen, skipped


_NOT_ETHERNET = "it carries no Ethernet frames"


def attach(program: int, interface: Interface, mode: str, probe: str) -> Attached:
    """Attach a program to an interface of the current network namespace.

    Args:
        program: fd of the program.
        interface: The interface.
        mode: auto, native or generic.
        probe: Its name, for the error.

    Raises:
        CannotRunError: The interface has a program already, or the kernel refuses.
    """
    refusals = []
    for candidate in ("native", "generic") if mode == "auto" else (mode,):
        try:
            link = bpf.attach_xdp(program, interface.index, _FLAGS[candidate])
        except OSError as error:
            if error.errno in (errno.EBUSY, errno.EEXIST):
                raise CannotRunError(
                    f"probe {probe} cannot listen on {_taken(interface)}"
                ) from error
            refusals.append(f"{candidate} XDP: {error.strerror}")
        else:
            return Attached(
                name=interface.name,
                index=interface.index,
                mode=candidate,
                link_fd=link,
                silent=_silent(interface),
            )
    reason = "; ".join(refusals)
    release = platform.release()
    if tuple(int(part) for part in re.findall(r"\d+", release)[:2]) < _OLDEST:
        reason = f"kernel {release} has no XDP links, which need 5.9"
    elif mode == "native":
        reason += "; mode=generic works with every driver"
    raise CannotRunError(f"probe {probe} cannot listen on {interface.name}: {reason}")


def _silent(interface: Interface) -> str:
    if not interface.is_up:
        return f"it is down (ip link set dev {interface.name} up)"
    return "" if interface.has_carrier else "it has no carrier: a cable, or the peer, is down"


_OFF = {"native": "xdpdrv", "generic": "xdpgeneric", "offloaded": "xdpoffload"}
"""Mode -> its name for `ip link set dev NAME`, where plain `xdp` means native if supported."""


def _taken(interface: Interface) -> str:
    """Return which program is attached, what holds it, and how to detach it."""
    name = interface.name
    if not interface.xdp:
        return f"{name}: a device above or below it has an XDP program already"
    programs = ", ".join(f"{mode} {_program(number)}" for mode, number in interface.xdp.items())
    links: dict[int, int] = {}
    with contextlib.suppress(OSError):  # links cannot be listed here
        links = {program: link for link, program in bpf.xdp_links(interface.index)}
    mends = [
        _mend(name, mode, links.get(program)) for mode, program in sorted(interface.xdp.items())
    ]
    return (
        f"{name}: it has an XDP program already ({programs}), which tcplat does not replace; "
        f"{'; '.join(mends)}"
    )


def _mend(interface: str, mode: str, link: int | None) -> str:
    if link is None:
        return f"to remove it: ip link set dev {interface} {_OFF[mode]} off"
    # Netlink cannot detach a program on a link: the link's fds and pins hold it.
    by = ", ".join(_holders(link)) or "a pin in a bpffs"
    return f"link {link}, held by {by}, keeps it: end that, or: bpftool link detach id {link}"


def _holders(link: int) -> list[str]:
    """Return the processes that have a link open, as ``name (pid)``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            for fd in os.listdir(process / "fd"):
                target = os.readlink(process / "fd" / fd)
                is_link = target.startswith("anon_inode:") and "link" in target
                if is_link and fdinfo.number(fd, "link_id", process.name) == link:
                    comm = (process / "comm").read_text(encoding="utf-8", errors="replace")
                    found.append(f"{comm.strip()} (pid {process.name})")
                    break
    return found


def _program(number: int) -> str:
    name = ""
    with contextlib.suppress(OSError):  # it is gone, or may not be read
        name = bpf.program_name(number)
    return f"{name} id {number}".lstrip()
