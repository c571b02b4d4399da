"""Finds plugins, loads them one by one, and reports the broken ones instead of failing."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.metadata
import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

import attrs
import pluggy

from tcplat_core.errors import PluginError, TerminatedError, message, named
from tcplat_core.plugin import hookspecs
from tcplat_core.plugin.specs import ProbeSpec, SinkSpec

GROUP = "tcplat"
_OURS = "tcplat"
"""The distribution whose plugin names others cannot override."""
_HOOKS = tuple(name for name in vars(hookspecs) if name.startswith("tcplat_"))


@attrs.frozen
class Found:
    """One line of ``tcplat plugins list``."""

    name: str
    kind: str
    """probe, sink or command; plugin if it failed before that was known."""
    version: str
    distribution: str
    status: str
    """ok, or broken."""
    summary: str
    """Its summary, or why it is broken."""


@attrs.define(eq=False)
class Plugins:
    """All plugins of this Python, broken ones included."""

    probes: dict[str, ProbeSpec] = attrs.field(factory=dict)
    sinks: dict[str, SinkSpec] = attrs.field(factory=dict)
    found: list[Found] = attrs.field(factory=list)
    manager: pluggy.PluginManager = attrs.field(init=False)
    """Holds the plugins that work."""

    @manager.default
    def _new_manager(self) -> pluggy.PluginManager:
        manager = pluggy.PluginManager("tcplat")
        manager.add_hookspecs(hookspecs)
        return manager

    @classmethod
    def load(cls, entry_points: Iterable[importlib.metadata.EntryPoint] | None = None) -> Plugins:
        """Load every entry point of the group ``tcplat``; failures are listed as broken."""
        if entry_points is None:
            entry_points = importlib.metadata.entry_points(group=GROUP)
        plugins = cls()
        by_name: dict[str, dict[str, importlib.metadata.EntryPoint]] = {}
        for entry in sorted(entry_points, key=_own_first):
            # A plugin may be installed twice: in tcplat's wheel and separately.
            by_name.setdefault(entry.name, {}).setdefault(entry.value, entry)
        with _stdout_is_stderr():
            for entries in by_name.values():
                plugins._load(list(entries.values()))
        plugins._settle_names()
        return plugins

    def probe(self, name: str) -> ProbeSpec:
        """Return the probe of this name, or raise PluginError."""
        return self.probes.get(name) or self._missing("probe", name, self.probes)

    def sink(self, name: str) -> SinkSpec:
        """Return the sink of this name, or raise PluginError."""
        return self.sinks.get(name) or self._missing("sink", name, self.sinks)

    def named(self, name: str, kind: str | None = None) -> list[tuple[Found, ProbeSpec | SinkSpec]]:
        """Return the probe and the sink of this name; raise PluginError if there is neither."""
        whole = [
            (found, self._of(found.kind)[name])
            for found in self.found
            if found.name == name and found.status == "ok" and kind in (None, found.kind)
        ]
        if not whole:
            self._missing(kind or "plugin", name, {**self.probes, **self.sinks})
        return whole

    def _missing(self, kind: str, name: str, have: Iterable[str]) -> NoReturn:
        broken = [found for found in self.found if found.status != "ok"]
        for found in broken:
            if found.name == name and (kind == "plugin" or found.kind in (kind, "plugin")):
                raise PluginError(
                    f"{found.kind} {name} (from {found.distribution} {found.version}) is broken: "
                    f"{found.summary}"
                )
        choice = ", ".join(sorted(have)) or "none"
        names = ", ".join(dict.fromkeys(found.name for found in broken))
        besides = f", and of what is broken: {names}" if names else ""
        raise PluginError(
            f"there is no {kind} named {name!r}; there is {choice}{besides} (tcplat plugins list)"
        )

    def _load(self, entries: Sequence[importlib.metadata.EntryPoint]) -> None:
        """Load the entry point of a name; for several of that name see :func:`_rivals`."""
        unread = [_found(entry, entry.name, "plugin") for entry in entries]
        keep, reason = _rivals("an entry point", unread)
        self.found += [attrs.evolve(one, summary=reason) for one in unread[keep:]]
        for entry in entries[:keep]:
            try:
                specs = list(self._specs(entry))
            except BaseException as error:
                if isinstance(error, TerminatedError):
                    raise
                self.found.append(attrs.evolve(unread[0], summary=_reason(error)))
                continue
            for kind, spec in specs:
                self._of(kind).setdefault(spec.name, spec)
                self.found.append(_found(entry, spec.name, kind, "ok", spec.summary))

    def _specs(self, entry: importlib.metadata.EntryPoint) -> Iterator[tuple[str, Any]]:
        """Register the plugin of an entry point, and yield what it offers; not if it is broken."""
        if not entry.pattern.match(entry.value):
            raise PluginError(
                f"its entry point {entry.name} = {entry.value!r} is not of the form module:object"
            )
        plugin = entry.load()
        _check_version(getattr(plugin, "tcplat_hookspec", "1.0"))
        _check_hooks(plugin)
        # Several entry points may name one object.
        is_new = all(known is not plugin for _, known in self.manager.list_name_plugin())
        try:
            if is_new:
                self.manager.register(plugin, name=entry.name)
            yield from self._offers(plugin)
        except BaseException:
            if is_new and self.manager.get_name(plugin) is not None:
                self.manager.unregister(plugin)
            raise

    def _offers(self, plugin: object) -> Iterator[tuple[str, Any]]:
        """Call the hooks of one plugin alone, so that errors are attributed to it."""
        names = set()
        for kind, hook, cls in (
            ("probe", self.manager.hook.tcplat_register_probes, ProbeSpec),
            ("sink", self.manager.hook.tcplat_register_sinks, SinkSpec),
        ):
            for spec in _called(hook, plugin):
                if not isinstance(spec, cls):
                    raise PluginError(f"it offers a {type(spec).__name__} as a {kind}")
                if (kind, spec.name) in names:
                    raise PluginError(f"it registers two {kind}s named {spec.name!r}")
                names.add((kind, spec.name))
                yield kind, spec
        if not names:
            raise PluginError("it registers no probe and no sink")

    def _of(self, kind: str) -> dict[str, Any]:
        return self.probes if kind == "probe" else self.sinks

    def _settle_names(self) -> None:
        whole = [found for found in self.found if found.status == "ok"]
        for kind, name in dict.fromkeys((found.kind, found.name) for found in whole):
            several = [found for found in whole if (found.kind, found.name) == (kind, name)]
            keep, reason = _rivals(f"a {kind}", several)
            if not keep:
                del self._of(kind)[name]
            for loser in several[keep:]:
                at = next(index for index, found in enumerate(self.found) if found is loser)
                self.found[at] = attrs.evolve(loser, status="broken", summary=reason)


def _own_first(entry: importlib.metadata.EntryPoint) -> tuple[bool, str, str, str]:
    distribution, _ = _distribution(entry.dist)
    return distribution != _OURS, entry.name, entry.value, distribution


@functools.lru_cache(64)
def _distribution(dist: importlib.metadata.Distribution | None) -> tuple[str, str]:
    """Return name and version. Each of them parses all of METADATA, which has the README in it."""
    return (dist.name, dist.version) if dist else ("?", "?")


def _found(
    entry: importlib.metadata.EntryPoint,
    name: str,
    kind: str,
    status: str = "broken",
    summary: str = "",
) -> Found:
    distribution, version = _distribution(entry.dist)
    return Found(name, kind, version, distribution, status, summary)


def _rivals(what: str, several: Sequence[Found]) -> tuple[int, str]:
    """Return how many plugins of one name to keep, from the first, and why not the others.

    Of two third-party plugins neither is kept: the choice would be arbitrary. tcplat's own names
    cannot be taken.
    """
    if len(several) == 1:
        return 1, ""
    if several[0].distribution == _OURS:
        return 1, f"{_OURS} itself has {what} of this name"
    owners = " and ".join(f"{found.distribution} {found.version}" for found in several)
    return 0, f"{owners} both have {what} of this name: uninstall one of them"


@contextlib.contextmanager
def _stdout_is_stderr() -> Iterator[None]:
    """Send to stderr what a plugin prints while it is loaded, in Python or C: stdout is data."""
    if sys.stdout is not None:
        sys.stdout.flush()
    try:
        ours = os.dup(1)
    except OSError:  # it is closed
        ours = -1
    if ours >= 0:
        os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if ours >= 0:
            os.dup2(ours, 1)
            os.close(ours)


def _reason(error: BaseException) -> str:
    """Return the error in one line."""
    return message(error) if isinstance(error, PluginError) else named(error)


def _called(hook: pluggy.HookCaller, plugin: object) -> Iterator[Any]:
    """Yield what a plugin's own implementation of a hook returns."""
    for impl in hook.get_hookimpls():
        if impl.plugin is plugin and not (impl.wrapper or impl.hookwrapper):
            offered: Any = impl.function()
            yield from () if offered is None else offered


def _check_version(made_for: object) -> None:
    if not (isinstance(made_for, str) and re.fullmatch(r"\d+(\.\d+)?", made_for)):
        raise PluginError(f"tcplat_hookspec is {made_for!r}; write {hookspecs.HOOKSPEC_VERSION!r}")
    major, _, _ = hookspecs.HOOKSPEC_VERSION.partition(".")
    if int(made_for.partition(".")[0]) > int(major):
        raise PluginError(
            f"it was made for version {made_for} of the plugin hooks, and this tcplat has "
            f"{hookspecs.HOOKSPEC_VERSION}: upgrade tcplat"
        )


def _check_hooks(plugin: object) -> None:
    """Refuse a hook that is misspelt or not marked: pluggy would ignore it silently."""
    for name, function in inspect.getmembers(plugin, inspect.isroutine):
        marked = hasattr(function, "tcplat_impl")
        if name in _HOOKS and not marked:
            raise PluginError(f"{name} is not marked @hookimpl")
        if name not in _HOOKS and (marked or name.startswith("tcplat_register")):
            (close,) = difflib.get_close_matches(name, _HOOKS, 1, 0)
            raise PluginError(f"there is no hook {name}; it is {close}")
