"""Finds plugins, loads them one by one, and reports the broken ones instead of failing."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import attrs
import pluggy

from . import hookspecs
from .errors import PluginError
from .model import ProbeSpec, SinkSpec

GROUP = "tcplat"


@attrs.frozen
class Found:
    """One line of ``tcplat plugins list``."""

    name: str
    kind: str
    """probe, sink, command, or plugin where it broke before it could say."""
    version: str
    distribution: str
    status: str
    """ok, or broken."""
    summary: str
    """What it is for, or why it is broken."""


@attrs.define(eq=False)
class Plugins:
    """All plugins of this Python, broken ones included."""

    probes: dict[str, ProbeSpec] = attrs.field(factory=dict)
    sinks: dict[str, SinkSpec] = attrs.field(factory=dict)
    found: list[Found] = attrs.field(factory=list)

    @classmethod
    def load(cls, entry_points: Iterable[importlib.metadata.EntryPoint] | None = None) -> Plugins:
        """Load every entry point of the group ``tcplat``; what breaks is listed as broken."""
        if entry_points is None:
            entry_points = importlib.metadata.entry_points(group=GROUP)
        plugins = cls()
        # The same plugin may be installed twice: in tcplat's wheel and by itself.
        unique = {(entry.name, entry.value): entry for entry in entry_points}
        for _, entry in sorted(unique.items()):
            plugins._load_one(entry)
        return plugins

    def probe(self, name: str) -> ProbeSpec:
        """The probe of that name, or PluginError."""
        return self.probes.get(name) or self._missing("probe", name, self.probes)

    def sink(self, name: str) -> SinkSpec:
        """The sink of that name, or PluginError."""
        return self.sinks.get(name) or self._missing("sink", name, self.sinks)

    def _missing(self, kind: str, name: str, have: Iterable[str]) -> NoReturn:
        for found in self.found:
            if found.name == name and found.status != "ok":
                raise PluginError(
                    f"{found.kind} {name} (from {found.distribution}) is broken: {found.summary}"
                )
        choice = ", ".join(sorted(have)) or "none"
        broken = ", ".join(found.name for found in self.found if found.status != "ok")
        besides = f", and of what is broken: {broken}" if broken else ""
        raise PluginError(
            f"there is no {kind} named {name!r}; there is {choice}{besides} (tcplat plugins list)"
        )

    def _load_one(self, entry: importlib.metadata.EntryPoint) -> None:
        dist = entry.dist
        version, distribution = (dist.version, dist.name) if dist else ("?", "?")
        try:
            specs = list(_specs(entry))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a plugin raises
            summary = f"{type(error).__name__}: {error}".splitlines()[0]
            broken = Found(entry.name, "plugin", version, distribution, "broken", summary)
            self.found.append(broken)
            return
        for kind, spec in specs:
            taken: dict[str, Any] = self.probes if kind == "probe" else self.sinks
            if spec.name in taken:
                other = next(f.distribution for f in self.found if f.name == spec.name)
                status, summary = "broken", f"{other} already has a {kind} of this name"
            else:
                taken[spec.name] = spec
                status, summary = "ok", spec.summary
            self.found.append(Found(spec.name, kind, version, distribution, status, summary))


def _specs(entry: importlib.metadata.EntryPoint) -> Iterator[tuple[str, Any]]:
    """What one entry point offers, asked of it alone, so that no other is to blame."""
    manager = pluggy.PluginManager("tcplat")
    manager.add_hookspecs(hookspecs)
    manager.register(entry.load(), name=entry.name)
    manager.check_pending()
    for kind, hook, cls in (
        ("probe", manager.hook.tcplat_register_probes, ProbeSpec),
        ("sink", manager.hook.tcplat_register_sinks, SinkSpec),
    ):
        for offered in hook():
            for spec in offered:
                if not isinstance(spec, cls):
                    raise PluginError(f"it offers a {type(spec).__name__} as a {kind}")
                yield kind, spec
