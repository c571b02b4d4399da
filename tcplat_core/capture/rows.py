"""Reads captures: JSON lines, or a stream of msgpack maps.

What is damaged or foreign is left out, counted and reported, and never ends the reading.
Memory is bounded by one chunk, whatever the capture holds.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, cast

import attrs
import msgspec

from tcplat_core.deliver.fast.lines import LineReader, line_reader
from tcplat_core.event.fields import READABLE, SCHEMA_VERSION, Count, Event, Wire, declared, fields
from tcplat_core.event.terminal import printable
from tcplat_core.event.text import LEAST, MOST, cleaned
from tcplat_core.event.validation import LARGEST_RECORD
from tcplat_core.plugin.report import RunReport
from tcplat_core.plugin.sampling import Sampled
from tcplat_core.plugin.specs import Item, Loss, Merge

from .formats import Damage, Format, Jsonl, format_of

_LONGEST_TEXT = 4 * LARGEST_RECORD
"""Most characters of a text: no member of a record is longer when escaped."""
_LONGEST_PLAIN = 1 << 12
"""Most bytes of a row for fast decoding; a longer one is checked in full."""
_MOST_CLASSES = 256
_MOST_FIELDS = 1024
"""Most sets of fields of probes that are not installed, and most fields of a set; rows beyond that
are left out."""
_MOST_PROBES = 1 << 12
"""Most probes whose rows are decoded fast."""
_MOST_HOSTS = 1 << 10
_MOST_HOOKS = 1 << 10
"""Most hooks that rows and losses name: counts are kept for each."""
_MOST_REPORTED = 16 << 20
"""Most bytes of reports, which are kept until the end."""
_MOST_EVENTS = (1 << 63) - 1
"""Most events in all reports and losses together: sums fit into 64 bits."""
_LOOK_EVERY = 256
"""Frames left out before control returns to the caller."""
_SAID = 3
"""Frames left out that are reported one by one; later ones are only counted."""
_BEGINNING = 64
"""Bytes needed to distinguish JSON lines from msgpack; no row is shorter."""

GAP = ("msgpack", "reader")
"""Probe and point of the loss that stands for rows that the msgpack sink did not send."""


_OWN = int | float | str | bool | None
"""Types of the values of a probe's own fields."""
_ABSENT = {
    field: None
    for field, source in declared(Event)
    if isinstance(source, Wire) and source.since > READABLE[0]
}
"""Fields that rows of older versions lack."""
_HOOK = operator.attrgetter("probe", "point", "func", "attach")
_TEXTS = operator.attrgetter(*(field.name for field in fields() if "str" in field.type))


class _InvalidFrameError(Exception):
    """A frame is not part of a capture; the message is the reason."""


@attrs.define(eq=False)
class Capture:
    """Decodes a capture.

    Args:
        events: The row's class of each installed probe, by name. Rows of other
            probes get one that is made from their keys.
        say: Called with what is left out, the first few one by one.
    """

    events: Mapping[str, type[Event]]
    say: Callable[[str], None] = lambda _: None
    reports: list[RunReport] = attrs.field(factory=list, init=False)
    """One, or several if captures were concatenated."""
    ended: bool = attrs.field(default=False, init=False)
    """Whether the last frame was a report."""
    read: int = attrs.field(default=0, init=False)
    """Rows, losses, hosts, headers and reports."""
    left_out: int = attrs.field(default=0, init=False)
    _shared: bool = attrs.field(default=False, init=False)
    """The rows are those of a part of the connections."""
    _run_over: bool = attrs.field(default=False, init=False)
    """Behind the report of such a run: what follows is of another one."""
    newer: str = attrs.field(default="", init=False)
    """The schema of a line that a newer tcplat has written."""
    noun: str = attrs.field(default="line", init=False)
    _number: int = attrs.field(default=0, init=False)
    _format: Format | None = attrs.field(default=None, init=False)
    _known: dict[bytes, Callable[[bytes], Event]] = attrs.field(factory=dict, init=False)
    """Probe -> decoder for its rows, of the latest set of fields."""
    _decoders: dict[type[Event], Callable[[bytes], Event]] = attrs.field(factory=dict, init=False)
    _own: dict[type[Event], list[str]] = attrs.field(factory=dict, init=False)
    """Names of the fields that a class adds to the common ones."""
    _numeric: set[type[Event]] = attrs.field(factory=set, init=False)
    """Classes whose own fields are not texts."""
    _kept: Counter[str] = attrs.field(factory=Counter, init=False)
    """Amounts of data kept in memory, by kind."""
    _classes: dict[tuple[str, ...], type[Event]] = attrs.field(factory=dict, init=False)
    _lines: LineReader | None = attrs.field(default=None, init=False)
    """Reads the lines that are as tcplat writes them."""
    _hooks: set[tuple[str, ...]] = attrs.field(factory=set, init=False)
    """Hooks of rows, and probe and point of losses."""

    def items(self, chunks: Iterator[bytes]) -> Iterator[Item | None]:
        """Yield batches of rows, losses and hosts in order; None if nothing comes for a while.

        A batch is empty after many frames that were left out, so that the caller is not blocked.
        """
        try:
            self._format, begun = None, b""
            for chunk in chunks:
                if not chunk:
                    yield None
                    continue
                if self._format is None:
                    begun += chunk
                    if len(begun) < _BEGINNING:
                        continue
                    chunk = begun  # noqa: PLW2901 - the first one that is long enough
                form = self._format or self._begin(begun)
                form.feed(chunk)
                yield from self._decode(form)
            if self._format is None:
                self._begin(begun).feed(begun)
            form = cast("Format", self._format)
            form.end()
            yield from self._decode(form)
        finally:
            # Here and not when it is collected: it refers to this object, as this one does to it.
            if self._lines:
                self._lines.close()
                self._lines = None

    def _begin(self, data: bytes) -> Format:
        form = self._format = format_of(data)
        self.noun = form.noun
        if isinstance(form, Jsonl):
            self._lines = line_reader(lambda hook: hook in self._hooks or self._learn({hook}))
        for probe, event in self.events.items():
            self._know(form, probe, event)
        return form

    def _know(self, form: Format, probe: str, event: type[Event]) -> None:
        if event not in self._decoders:
            self._decoders[event] = form.decoder(event)
            own = [field for field in fields(event) if field.own]
            self._own[event] = [field.name for field in own if field.type != "bool"]
            if not any("str" in field.type or field.type == "any" for field in own):
                self._numeric.add(event)
        if probe.encode() in self._known or len(self._known) < _MOST_PROBES:
            self._known[probe.encode()] = self._decoders[event]
            if self._lines:
                self._lines.know(probe, event, self._decoders[event])

    def _decode(self, form: Format) -> Iterator[Item]:
        plain, count = self._read_by_c(form), 0
        if plain is None and (taken := form.take_all()) is not None:
            plain, count = self._plain(form, *taken), len(taken[0])
        if plain is not None:
            self._number += count or len(plain)
            if plain:
                if self._run_over:
                    yield self._all_again()
                self.read += len(plain)
                self.ended = False
                yield plain
            return
        form.give_back()
        rows: list[Event] = []
        for item in self._each(form):
            if isinstance(item, Event):
                rows.append(item)
                continue
            if rows:
                yield rows
                rows = []
            yield item
        if rows:
            yield rows

    def _read_by_c(self, form: Format) -> Sequence[Event] | None:
        """Return the rows if all frames are lines as tcplat writes them; None without C."""
        if self._lines and isinstance(form, Jsonl):
            return form.take_data(self._lines.read)
        return None

    def _each(self, form: Format) -> Iterator[Event | Item]:
        """Yield the items of frames one by one; now and then an empty list if there are none."""
        while (frame := form.take()) is not None:
            self._number += 1
            try:
                if isinstance(frame, Damage):
                    raise _InvalidFrameError(frame.reason)  # noqa: TRY301 - one place says it
                # An empty line is nothing.
                item = self._one(form, frame) if frame.strip() else None
            except _InvalidFrameError as error:
                if not isinstance(frame, Damage):
                    form.reject()
                self._leave_out(self._number, "it is cut off" if form.torn else str(error))
                if self.left_out % _LOOK_EVERY == 0:
                    yield []
                continue
            if item is not None:
                if self._run_over and not isinstance(item, Sampled):
                    yield self._all_again()
                yield item

    def _all_again(self) -> Sampled:
        """Return that a run without --sample begins: captures were concatenated."""
        self._shared = self._run_over = False
        return Sampled(1)

    def _plain(self, form: Format, frames: Sequence[bytes], data: bytes) -> Sequence[Event] | None:
        """Return the rows if all frames are rows as tcplat writes them; else None."""
        head, known = form.head.match, self._known
        if max(map(len, frames), default=0) > _LONGEST_PLAIN:
            return None
        try:
            rows = [known[head(frame)[1]](frame) for frame in frames]  # type: ignore[index]
        # No row, or an unknown probe: the frames are decoded one by one, and errors reported.
        except (TypeError, KeyError, ValueError):
            return None
        # Equal bytes prove that there are no further keys.
        if not _are_sound(rows, self._own) or form.encode(rows) != data:
            return None
        hooks = set(map(_HOOK, rows)) - self._hooks
        if hooks and not self._learn(hooks):
            return None
        return rows if self._is_tidy(rows, data) else [_tidy(row) for row in rows]

    def _is_tidy(self, rows: Sequence[Event], data: bytes) -> bool:
        """Return whether all texts are printable; may be False for printable ones."""
        if data.isascii() and b"\\" not in data and b"\x7f" not in data:  # JSON
            return True
        texts = {text for of_row in set(map(_TEXTS, rows)) for text in of_row if text is not None}
        return all(map(str.isprintable, texts)) and self._numeric.issuperset(map(type, rows))

    def _one(self, form: Format, frame: bytes) -> Event | Loss | Merge | Sampled | None:
        """Decode a frame of any kind; return None for a header or a report.

        Raises:
            _InvalidFrameError: It is not part of a capture.
        """
        try:
            value = form.value(frame)
        # TypeError: a key that is not hashable.
        except (ValueError, TypeError, RecursionError, OverflowError) as error:
            raise _InvalidFrameError("it is damaged, or not part of a capture") from error
        if not isinstance(value, dict) or "v" not in value or set(map(type, value)) != {str}:
            raise _InvalidFrameError("it is not part of a capture")
        if value["v"] not in READABLE or value["v"] is True:
            version = printable(str(value["v"])[:20])
            readable = " and ".join(map(str, READABLE))
            if type(value["v"]) is int and value["v"] > max(READABLE):
                self.newer = version
            raise _InvalidFrameError(f"its schema is {version!r}, and this tcplat reads {readable}")
        try:
            item = self._item(form, cleaned(value), len(frame))
        except (ValueError, TypeError) as error:
            message = str(error).split(" - at")[0]
            raise _InvalidFrameError(
                f"it is not part of a capture: {printable(message)}"
            ) from error
        self.read += 1
        self.ended = "report" in value
        return item

    def _item(
        self, form: Format, value: dict[str, Any], size: int
    ) -> Event | Loss | Merge | Sampled | None:
        if "lost" in value:
            return self._counted(msgspec.convert(value["lost"], Loss))
        if "merge" in value:
            self._make_room("hosts", 1, _MOST_HOSTS)
            return msgspec.convert(value["merge"], Merge)
        if "sampled" in value:
            share = msgspec.convert(value["sampled"], Sampled)
            self._shared, self._run_over = share.one_in > 1, False
            return share
        if "gap" in value:
            return self._counted(Loss(*GAP, msgspec.convert(value["gap"], Count)))
        if "report" in value:
            report = RunReport.from_json(value["report"])
            self._make_room("events", _events(report), _MOST_EVENTS)
            self._make_room("reports", size, _MOST_REPORTED)
            self.reports.append(report)
            self._run_over = self._shared
        elif "schema" not in value:
            return self._row(form, value)
        return None

    def _counted(self, loss: Loss) -> Loss:
        self._require_hook((loss.probe, loss.point))
        self._make_room("events", loss.count, _MOST_EVENTS)
        return loss

    def _learn(self, hooks: AbstractSet[tuple[str, ...]]) -> bool:
        """Record hooks, if all of them are within the limit; return whether they were."""
        if len(self._hooks | hooks) > _MOST_HOOKS:
            return False
        self._hooks |= hooks
        return True

    def _require_hook(self, hook: tuple[str, ...]) -> None:
        if hook not in self._hooks and not self._learn({hook}):
            raise ValueError("the capture then has too many hooks")

    def _make_room(self, what: str, more: int, most: int) -> None:
        if self._kept[what] + more > most:
            raise ValueError(f"the capture then has too many {what}")
        self._kept[what] += more

    def _row(self, form: Format, value: dict[str, Any]) -> Event:
        probe = msgspec.convert(value.get("probe"), str)
        event = self.events.get(probe, Event)
        # Unknown fields of another version become fields of the probe; missing ones are null.
        value = {**_ABSENT, **value, "v": SCHEMA_VERSION}
        if set(value) != set(event.__struct_fields__):
            event = self._class(probe, [key for key in value if key not in Event.__struct_fields__])
        if any(isinstance(text, str) and len(text) > _LONGEST_TEXT for text in value.values()):
            raise ValueError("a text in it is too long")
        row = msgspec.convert(value, event)
        self._require_hook(_HOOK(row))
        self._know(form, probe, event)
        return row

    def _class(self, probe: str, extra: Sequence[str]) -> type[Event]:
        """Return a class for rows with these fields besides the common ones."""
        made = self._classes.get((probe, *extra))
        if made is None:
            if len(self._classes) >= _MOST_CLASSES or not all(map(_is_field, extra)):
                raise ValueError("it has fields that no probe has")
            self._make_room("fields", len(extra), _MOST_FIELDS)
            fields = [(key, _OWN) for key in extra]
            made = cast("type[Event]", msgspec.defstruct("Event", fields, bases=(Event,)))
            self._classes[probe, *extra] = made
        return made

    def skipped(self, name: str) -> str:
        """Return a sentence about the damaged lines or maps of the capture of this name."""
        count = f"1 {self.noun}" if self.left_out == 1 else f"{self.left_out} {self.noun}s"
        verb = "was" if self.left_out == 1 else "were"
        listed = f" (the first {_SAID} are listed)" if self.left_out > _SAID else ""
        return f"{count} of {name} {verb} skipped{listed}"

    def refusal(self, name: str) -> str:
        """Return why nothing of a file could be read as a capture."""
        if self.newer:
            readable = " and ".join(map(str, READABLE))
            return f"{name} has schema {self.newer}; this tcplat reads {readable}: upgrade tcplat"
        if not self.left_out:
            return f"{name} is empty"
        return f"{name} is not a tcplat capture, or holds no whole row"

    def _leave_out(self, number: int, reason: str) -> None:
        self.left_out += 1
        if self.left_out <= _SAID:
            self.say(f"{self.noun} {number} was skipped: {reason}")


def _are_sound(rows: Sequence[Event], own: Mapping[type[Event], Sequence[str]]) -> bool:
    """Return whether all numbers of the probes' own fields fit into a record.

    Those of the common fields are checked by the decoder.
    """
    return all(
        value is None or value.__class__ is str or LEAST <= value <= MOST
        for event in set(map(type, rows))
        for field in own[event]
        for value in [getattr(row, field) for row in rows if row.__class__ is event]
    )


def _events(report: RunReport) -> int:
    """Return the number of events that a report counts."""
    return report.late + sum(
        probe.untracked
        + sum(probe.skipped.values())
        + sum(hook.produced + hook.dropped + hook.delivered for hook in probe.hooks)
        + sum(one.samples + one.unmeasured + one.rest for one in (probe.counted or {}).values())
        for probe in report.probes.values()
    )


def _is_field(key: str) -> bool:
    return key.isidentifier() and not key.startswith("_") and not hasattr(Event, key)


def _tidy(row: Event) -> Event:
    """Return the row with every text escaped for a terminal: a capture is untrusted."""
    for field in row.__struct_fields__:
        value = getattr(row, field)
        if isinstance(value, str) and not value.isprintable():
            setattr(row, field, printable(value))
    return row
