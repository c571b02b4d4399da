"""Everything that a plugin may implement.

A plugin is a module named by an entry point in the group ``tcplat``. It implements at least
one of these hooks, marked with ``@hookimpl``. There is no hook per event: a pluggy call
costs more than all other processing of an event.

A plugin may declare the version of this specification that it was made for::

    tcplat_hookspec = "1.0"

Additions increment the second number; changes that break plugins increment the first. A plugin
for a newer first number is refused. Without a declaration, 1.0 is assumed.

Commands of a plugin need no hook. Each is a ``click.Command``, named by an entry point in the
group ``tcplat.commands``, such as ``count = "tcplat_count:count"``. It is imported when it is
called or listed, as an unprivileged user; ``run`` and ``replay`` never import it. It reports
errors to the user by ``click.ClickException`` or ``TcplatError``. Any other exception counts as
a bug of the plugin: it is reported in one sentence, with exit status 4. ``SystemExit`` keeps
its exit status.

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
"""Version of the hooks below, and of everything that ``tcplat_core`` exports."""

hookspec = pluggy.HookspecMarker("tcplat")
hookimpl = pluggy.HookimplMarker("tcplat")
"""Decorator of a function that implements a hook. A function without it is not a hook."""


@hookspec
def tcplat_register_probes() -> Iterable[ProbeSpec]:
    """Offer probes to ``tcplat run --probe NAME``.

    Called once, as an unprivileged user. Do not load or attach anything here.

    A probe that counts in the kernel names the arrays that its ``poll`` reads once a second. See
    :mod:`tcplat_core.plugin.maps` for what can be read, and include/tcplat/keyed.bpf.h for
    counting by key::

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

    Called once, as an unprivileged user. Do not open anything here.

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
