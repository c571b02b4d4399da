"""Everything that a plugin may implement.

A plugin is a module named by an entry point in the group ``tcplat``, with at least
one of these hooks, marked ``@hookimpl``. There is no hook per event: a pluggy call
costs more than all the rest of an event's way.

A plugin may say which version of this specification it was made for::

    tcplat_hookspec = "1.0"

Additions raise the second number, and what breaks plugins raises the first. One
that was made for a newer first number is refused; one that says nothing counts
as made for 1.0.

Commands of a plugin have no hook: an entry point in the group ``tcplat.commands``, such as
``count = "tcplat_count:count"``, names each, and is a ``click.Command``. It is imported when
it is called or listed, as an unprivileged user; ``run`` and ``replay`` never import it. It tells
the user what is wrong by ``click.ClickException`` or ``TcplatError``; whatever else it raises is
its fault, told in one sentence, with exit status 4. An exit status of its own (``SystemExit``)
stays.

Example::

    import click

    from tcplat_core import Reader


    @click.command()
    @click.argument("capture")
    def count(capture):
        click.echo(sum(map(len, Reader.open(capture).batches())))
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from .specs import ProbeSpec, SinkSpec

HOOKSPEC_VERSION = "1.0"
"""Of the hooks below, and of all that ``tcplat_core`` exports."""

hookspec = pluggy.HookspecMarker("tcplat")
hookimpl = pluggy.HookimplMarker("tcplat")
"""Stands above a function that implements a hook; without it, tcplat does not take it for one."""


@hookspec
def tcplat_register_probes() -> Iterable[ProbeSpec]:
    """Offer probes to ``tcplat run --probe NAME``.

    Called once, as an unprivileged user. Nothing may be loaded or attached here.

    A probe that counts in the kernel, and tells once a second what it has counted, names
    the arrays that its ``poll`` reads. See :mod:`tcplat_core.plugin.maps` for what can be read,
    and include/tcplat/keyed.bpf.h for counting by key::

        from typing import Annotated

        class Calls(Event):
            calls: Annotated[int | None, Wire("u64", "calls of send() so far", has=True)]

        def poll(maps):
            for (pid, _), (calls,) in zip(maps["keys"], maps["counts"]):
                if calls:
                    yield maps.row("calls", pid=pid, calls=calls)

        @hookimpl
        def tcplat_register_probes():
            yield ProbeSpec(
                name="calls",
                summary="calls of send(), by process",
                source=files(__package__).joinpath("calls.bpf.c").read_text(),
                points=(HookPoint("calls", (tracepoint("tcp:tcp_sendmsg_locked", "tp_send"),)),),
                event=Calls,
                maps=(ReadableMap("keys", "=II"), ReadableMap("counts", "=Q")),
                poll=poll,
            )

    Example::

        @hookimpl
        def tcplat_register_probes():
            yield ProbeSpec(
                name="tcp_retransmit",
                summary="each segment that is sent again",
                source=files(__package__).joinpath("tcp_retransmit.bpf.c").read_text(),
                points=(HookPoint("again", (tracepoint("tcp:tcp_retransmit_skb", "tp_again"),)),),
            )
    """
    return ()


@hookspec
def tcplat_register_sinks() -> Iterable[SinkSpec]:
    """Offer sinks to ``tcplat run --sink NAME``.

    Called once, as an unprivileged user. Nothing may be opened here.

    Example::

        @hookimpl
        def tcplat_register_sinks():
            yield SinkSpec(
                name="count",
                summary="how many rows there were",
                factory=lambda options, run: Count(),
            )
    """
    return ()
