"""The sinks that tell where the time goes."""

from __future__ import annotations

from collections.abc import Iterator

from tcplat_core import SinkSpec, hookimpl


@hookimpl
def tcplat_register_sinks() -> Iterator[SinkSpec]:
    """Offer the sinks."""
    yield from ()
