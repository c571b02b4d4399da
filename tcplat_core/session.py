"""One run from start to end: loader, rings, router, sinks, and the books at the end."""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import attrs

from .clock import clock_offset_ns, kernel_ns
from .command import Command
from .errors import blaming, is_the_users, named
from .fast.codec import Codec
from .fast.records import FOREVER, Room
from .histogram import COUNTERS, Aggregates, Aggregation, Counters, Distribution
from .hookpoints import reporting
from .loader.process import LoaderProcess
from .loader.protocol import Answer, LoadedProbe, ProbeRequest, Request
from .maps import Maps, MapView
from .model import Counted, HookReport, Loss, ProbeReport, ProbeSpec, RunReport, Sink
from .netdev import is_cut
from .output import Output
from .ready import ReadyFile
from .ring import BATCH, Books, Ring, possible_cpus
from .router import Router
from .schema import Event, FiredBy, Moment, Record, row
from .signals import Signals
from .sleeper import Sleeper
from .texts import printable
from .trace import TracePipe

HOLD_S = 0.003
"""How long a row waits, unless told otherwise, for an older one that may still turn up."""
POLL_S = 0.003
"""Between two looks at the rings while events come. Handlers never wake us: that costs 5 µs."""
BUSY_POLL_S = 0.01
"""The same where a look brings MANY rows: to wake up costs as much as a hundred of them."""
MANY = 300
IDLE_POLL_S = 0.02
"""The same, at most, where nobody may sleep: a ring of 8 MiB takes 2.9 M events per second so long.

Elsewhere it is from here on that the session sleeps until a record wakes it.
"""
PATIENCE = 0.03
"""How fast that grows: by so much of the time since something came."""
LOOK_S = 1.0
"""Between two looks at whether interfaces are still there."""
GLANCE_S = 0.1
"""Between two looks at whether what is traced still lives."""
TICK_S = 0.25
"""How often sinks are told that time passes while nothing comes."""
LATE_S = 0.1
"""So late a row may come that was stamped before; by then, it is told that none is missing."""
LINGER_S = 0.1
"""How long the run outlives what it traces: closing handshakes go on without the process."""
SETTLE_S = 0.5
"""How long the last records may take after everything is detached: Ctrl-C has a second in all."""

HELPING = 8
"""Batches taken from one ring before the sinks get their turn: bounds memory under overload."""
_GUARD_NS = 1_000_000
"""Records in a ring are in order but for interrupts, which take less than this."""


@attrs.define(eq=False)
class ProbeRun:
    """One loaded probe: its ring, its books, and how to read them."""

    spec: ProbeSpec
    hooks: Sequence[FiredBy]
    ring: Ring
    books: Books
    decode: Callable[[Any, int], list[Event]]
    codec: Codec | None
    """Of fast/records.c, where that is to be had."""
    loaded: LoadedProbe
    said_lost: list[int]
    silent: dict[str, str]
    """Interface -> why no rows come from it, or no more."""
    maps: Maps
    """What poll() reads."""
    counters: Counters | None
    """What the kernel counts for a sink."""
    polled: Counter[str] = attrs.field(factory=Counter)
    """Rows that poll() made, by point."""
    poll_error: str = ""
    _counted_ns: int = attrs.field(default=0, init=False)
    """What was lost before this instant has been told."""
    _undrained: bool = attrs.field(default=True, init=False)
    """Nothing was drained since then: a ring that was full once is full still."""

    @classmethod
    def open(cls, spec: ProbeSpec, loaded: LoadedProbe, request: Request, cpus: int) -> Self:
        """Map what the loader handed over."""
        hooks = [attrs.evolve(one, describe=_guarded(one.describe)) for one in fired_by(spec)]
        record = Record(spec.event)
        reading = (spec.name, hooks, _ifname(loaded))
        return cls(
            spec,
            hooks,
            Ring(
                *(loaded.ring_fd, request.ring_bytes, record.layout),
                tag_at=record.offset("hook"),
                ts_at=record.offset("ts_ns"),
            ),
            Books(loaded.books_fd, cpus, len(hooks)),
            record.decoder(*reading),
            Codec.of(record, *reading),
            loaded,
            [0] * len(hooks),
            dict(loaded.skipped),
            _maps(spec, loaded),
            _counters(spec, loaded, request.aggregation, cpus),
        )

    def poll(self) -> list[Event]:
        """Rows that the probe's Python side makes of its maps."""
        if self.spec.poll is None or self.poll_error:
            return []
        try:
            rows = list(self.spec.poll(self.maps) or ())
            _check_rows(rows, self.spec.event)
        except BaseException as error:
            # A plugin's, SystemExit too: the run goes on without it.
            if is_the_users(error):
                raise
            self.poll_error = printable(named(error))
            return []
        self.polled.update(one.point for one in rows)
        return rows

    @property
    def deaf(self) -> bool:
        """It listened on interfaces alone, and all of them are gone."""
        names = {one.name for one in self.loaded.interfaces}
        return set(self.loaded.taken.values()) == {"xdp"} and names <= self.silent.keys()

    def skipped(self) -> dict[str, int]:
        """Function -> how often the kernel did not run our program there."""
        funcs = {
            hook.program: hook.func
            for point in self.spec.points
            for way in point.ways
            for hook in way.hooks
        }
        counts: Counter[str] = Counter()
        for program, fd in self.loaded.program_fds.items():
            counts[funcs[program]] += _misses(fd)
        return {func: count for func, count in counts.items() if count}

    def losses(self) -> list[Loss]:
        """What was lost since the last time, and between which instants."""
        now_ns = kernel_ns()
        full_ns = self.ring.full_since_ns() if self._undrained else 0
        since_ns, self._counted_ns, self._undrained = self._counted_ns, now_ns, True
        if self.books.dropped() == sum(self.said_lost):
            return []
        counts = [dropped for _, dropped in self.books.read()]
        place = max(since_ns, full_ns), kernel_ns()
        found = [
            Loss(self.spec.name, fired.point, count - said, *place)
            for fired, count, said in zip(self.hooks, counts, self.said_lost, strict=True)
            if count > said
        ]
        self.said_lost = counts
        return found

    def lost_none(self, now_ns: int) -> bool:
        """Whether the ring, which is empty, shows that nothing was lost up to an instant."""
        if self._undrained:
            self._counted_ns = now_ns
        return self._undrained

    def drained(self) -> None:
        """It may have been full since it was counted what was lost, and be so no more."""
        self._undrained = False

    def settled(self) -> bool:
        """Whether all that was produced is either dropped or here, and nothing is on its way."""
        # A record is counted after its place in the ring was taken, and before it is submitted.
        if self.ring.pending():
            return False
        return sum(made - lost for made, lost in self.books.read()) == self.ring.taken.total()

    def close(self) -> None:
        """Unmap, and close the loader's fds."""
        self.ring.close()
        self.books.close()
        self.maps.close()
        if self.counters:
            self.counters.close()
        links = {one.link_fd for one in self.loaded.interfaces}  # closed to detach
        for fd in self.loaded.fds:
            if fd not in links:
                os.close(fd)


def _check_rows(rows: Sequence[object], event: type[Event]) -> None:
    for one in rows:
        if not isinstance(one, event):
            raise TypeError(f"a {type(one).__name__} is no row: maps.row() makes them")


def _misses(program_fd: int) -> int:
    """How often the kernel did not run a program (bpf_prog_show_fdinfo()); 0 if it does not say."""
    try:
        info = Path(f"/proc/self/fdinfo/{program_fd}").read_text(encoding="ascii")
    except OSError:  # before 5.14 not for a process that has given up root
        return 0
    return int(info.partition("recursion_misses:")[2].split()[0]) if "recursion_" in info else 0


_ATTACH = {"kretprobe": "kprobe", "fexit": "fentry"}
"""What a row calls the hooks that are named otherwise."""


def fired_by(spec: ProbeSpec) -> list[FiredBy]:
    """What each hook number in a record stands for: hooks that report, over all ways."""
    return [
        FiredBy(
            point,
            hook.func,
            _ATTACH.get(hook.mechanism, hook.mechanism),
            spec.describe,
            hook.program,
        )
        for point, hook in reporting(spec.points)
    ]


def _guarded(describe: Callable[[Moment], str]) -> Callable[[Moment], str]:
    """The same, and the reason where it raises: a row whose words fail is a row still."""

    def described(moment: Moment) -> str:
        try:
            said: object = describe(moment)
        except BaseException as error:
            if is_the_users(error):
                raise
            return f"{moment.point} (describe() failed: {named(error)})"
        if isinstance(said, str):
            return said
        return f"{moment.point} (describe() gave a {type(said).__name__})"

    return described


POLLED = ("poll", "map")
"""What stands for function and mechanism in rows that poll() makes."""


def _maps(spec: ProbeSpec, loaded: LoadedProbe) -> Maps:
    func, attach = POLLED

    def make_row(point: str, **fields: Any) -> Event:
        fields.setdefault("ts_ns", kernel_ns())
        fields.setdefault("time_ns", fields["ts_ns"] + clock_offset_ns())
        fields.setdefault("desc", point)
        return row(spec.event, probe=spec.name, point=point, func=func, attach=attach, **fields)

    views = {}
    for one in spec.maps:
        found = loaded.maps[one.name]
        views[one.name] = MapView(found.fd, struct.Struct(one.layout), found.entries)
    return Maps(views, make_row)


def _counters(
    spec: ProbeSpec, loaded: LoadedProbe, aggregation: Aggregation | None, cpus: int
) -> Counters | None:
    if aggregation is None:
        return None
    return Counters(
        spec.name,
        spec.histograms,
        aggregation,
        aggregation.stripes(cpus, len(spec.histograms)),
        *(loaded.maps[name].fd for name in COUNTERS),
    )


def probe_request(
    spec: ProbeSpec,
    options: Mapping[str, Any],
    *,
    events: bool = True,
    aggregation: Aggregation | None = None,
) -> ProbeRequest:
    """What the loader needs of a probe.

    Args:
        spec: The probe.
        options: Its options.
        events: Some sink wants rows.
        aggregation: What some sink wants counted.
    """
    needed = {point for histogram in spec.histograms for point in histogram.points}
    maps = {one.name: one.size for one in spec.maps}
    with blaming(f"probe {spec.name}: defines()"):
        defines = spec.defines(options)
    with blaming(f"probe {spec.name}: interfaces()"):
        interfaces = spec.interfaces(options) if spec.interfaces else None
    return ProbeRequest(
        name=spec.name,
        source=spec.source,
        struct=Record(spec.event).c_struct(),
        points=spec.points,
        types=spec.types,
        defines=defines,
        interfaces=interfaces,
        track=spec.track,
        listen=None if events else tuple(sorted(needed)),
        maps=maps | COUNTERS if aggregation else maps,
        histograms=tuple(histogram.name for histogram in spec.histograms),
    )


def _ifname(loaded: LoadedProbe) -> Callable[[int], str]:
    """The names of interfaces: those in another network namespace only the loader can know."""
    names = {one.index: one.name for one in loaded.interfaces}

    def ifname(index: int) -> str:
        try:
            return names.get(index) or socket.if_indextoname(index)
        except OSError:  # it is gone by now
            return f"if{index}"

    return ifname


@attrs.define(eq=False)
class Session:
    """One run.

    Args:
        loader: Started before root was given up.
        probes: With their options.
        sinks: By name, opened.
        request: Everything but the probes.
        duration_s: End after so long; 0 for no limit.
        count: End after so many rows; 0 for no limit.
        ready_file: Made once everything is attached.
        hold_s: How long a row waits for an older one that may still turn up.
        dry: Attach, and end at once.
        trace: Where our programs' own lines come from.
        command: Let go then; the run ends with it.
        outputs: Files of the sinks that are to be made or emptied then, and not before.
        say: Tells the user what happens meanwhile.
    """

    loader: LoaderProcess
    probes: Sequence[tuple[ProbeSpec, Mapping[str, Any]]]
    sinks: dict[str, Sink]
    request: Request
    duration_s: float = 0
    count: int = 0
    ready_file: str | None = None
    hold_s: float = HOLD_S
    dry: bool = False
    trace: TracePipe | None = None
    command: Command | None = None
    signals: Signals = attrs.field(factory=Signals)
    say: Callable[[str], None] = lambda _: None
    outputs: Sequence[Output] = ()
    _end: float = attrs.field(default=math.inf, init=False)
    """When the loop is to end, on the clock of time.monotonic()."""
    _tick: float = attrs.field(default=math.inf, init=False)
    """When sinks are to be told next that time passes."""
    _watched: _Watched | None = attrs.field(default=None, init=False)
    _ready: ReadyFile | None = attrs.field(init=False)

    @_ready.default
    def _ready_file(self) -> ReadyFile | None:
        return ReadyFile(self.ready_file) if self.ready_file else None

    def run(self) -> RunReport:
        """Run until something ends it.

        Raises:
            TcplatError: It could not start, or a probe's ring is not readable.
        """
        router = Router(self.sinks, self.count, self.outputs)
        try:
            return self._run(router)
        except BaseException:
            router.cancel()
            raise

    def _ask(self) -> tuple[Request, Answer | None]:
        request = attrs.evolve(
            self.request,
            probes=tuple(
                probe_request(
                    *probe, events=self.request.events, aggregation=self.request.aggregation
                )
                for probe in self.probes
            ),
        )
        answer = self.loader.ask(request, self.signals.stopping)
        for sentence in answer.hidden if answer else ():
            self.say(sentence)
        return request, answer

    def _run(self, router: Router) -> RunReport:
        with ExitStack() as stack:
            request, answer = self._ask()
            if answer is None:
                router.cancel()
                return RunReport(probes={}, duration_s=0)
            links = [one.link_fd for probe in answer.probes.values() for one in probe.interfaces]
            held = _Fds([*answer.holding, *links])
            stack.callback(os.close, answer.gate_fd)
            stack.callback(held.close)
            cpus = possible_cpus()
            runs = []
            for spec, _ in self.probes:
                loaded = answer.probes[spec.name]
                run = ProbeRun.open(spec, loaded, request, cpus)
                stack.callback(run.close)
                runs.append(run)
            sleeper = Sleeper(answer.gate_fd, [run.ring.fd for run in runs])
            stack.callback(sleeper.close)
            router.room = Room.of([(run.ring, run.codec) for run in runs])
            if router.room:
                stack.callback(router.room.close)
            if self.command:
                self._watched = _Watched([self.command.pid])
            elif self.request.filter.pids is not None:
                self._watched = _Watched(list(self.request.filter.pids))
            if self._watched:
                stack.callback(self._watched.close)
            began = time.monotonic()
            self._say_silent(runs)
            if not self.dry:
                router.begin()
                self._begin()
                self._loop(runs, router, sleeper, began)
            sleeper.shut()
            self._look_at_interfaces(runs)
            held.close()
            if self.trace:
                self.trace.relay(self.say)
            _drain_rest(runs, router)
            self._poll(runs, router)
            router.flush()
            _aggregate(runs, router, began, final=True)
            report = _report(runs, router, time.monotonic() - began)
        if self.dry:
            router.cancel()
            return report
        router.close(report)
        # A sink may have failed in close(), too.
        return attrs.evolve(report, switched_off=dict(router.switched_off))

    def _say_silent(self, runs: Sequence[ProbeRun]) -> None:
        """Say through which interfaces no packet can come for now."""
        for run in runs:
            for one in run.loaded.interfaces:
                if one.silent:
                    self.say(f"{run.spec.name}: no rows from {one.name} for now: {one.silent}")

    def _begin(self) -> None:
        if self._ready:
            self._ready.tell()
        if self.command:
            self.command.go()

    def _loop(
        self, runs: Sequence[ProbeRun], router: Router, sleeper: Sleeper, began: float
    ) -> None:
        clock = _Clock()
        previous_ns = 0
        look = glance = 0.0
        self._tick = 0.0 if router.tells_time else math.inf
        came_at = began
        wanted = self.request.aggregation
        every_s = wanted.every_s if wanted else math.inf
        show = began + every_s
        self._end = began + self.duration_s if self.duration_s else math.inf
        while not (self.signals.stopping() or router.done):
            now_ns = kernel_ns()
            now = time.monotonic()
            looking = now >= look
            if looking:
                look = now + LOOK_S
                self._look(runs, router, now)
            if now >= show:
                show += every_s * ((now - show) // every_s + 1)
                _aggregate(runs, router, began)
            if now >= glance:
                glance = now + GLANCE_S
                self._glance(now)
            if now >= self._end:
                return
            pause = POLL_S + PATIENCE * (now - came_at)
            coming = any(run.ring.pending() for run in runs)
            if coming or looking or router.waiting:
                had = router.total
                settled_ns = min(previous_ns, now_ns - int(self.hold_s * 1e9))
                horizon_ns = _drain(runs, router, clock, settled_ns)
                router.flush(horizon_ns)
                if horizon_ns < settled_ns:  # there is more than one helping
                    router.poll()
                    continue
                if coming or router.total > had:
                    came_at = now
                    pause = POLL_S if router.total - had < MANY else BUSY_POLL_S
            router.poll()
            self._tell_time(router, now, now_ns, quiet=not coming)
            previous_ns = now_ns
            # While a pipe's reader is awaited that is to be told that we are ready.
            pending = now + GLANCE_S if self._ready and not self._ready.told else math.inf
            if pause < IDLE_POLL_S or router.waiting or router.serves or self.trace:
                time.sleep(max(0.0, min(pause, IDLE_POLL_S, self._end - now)))
            else:
                sleeper.sleep(min(look, show, self._tick, self._end, pending) - now, self._others())
                glance = 0.0

    def _tell_time(self, router: Router, now: float, now_ns: int, *, quiet: bool) -> None:
        """Where the rings are empty, tell the sinks up to when nothing is missing."""
        if quiet and now >= self._tick and not router.waiting:
            self._tick = now + TICK_S
            router.passed(now_ns - int(LATE_S * 1e9))

    def _look(self, runs: Sequence[ProbeRun], router: Router, now: float) -> None:
        """What is to be done once a second."""
        if self._look_at_interfaces(runs) and not self.command:
            self._end = now
        self._poll(runs, router)
        router.idle()

    def _glance(self, now: float) -> None:
        """What is to be done several times a second."""
        if self._end == math.inf and self._traced_ended():
            self._end = now + LINGER_S
        if self._ready and not self._ready.told:  # a pipe: does somebody read it by now?
            self._ready.tell()
        if self.trace:
            self.trace.relay(self.say)

    def _poll(self, runs: Sequence[ProbeRun], router: Router) -> None:
        """Have the probes' Python sides look at their maps, if anybody wants their rows."""
        for run in runs if self.request.events else ():
            working = not run.poll_error
            router.feed(run.poll())
            if working and run.poll_error:
                self.say(f"{run.spec.name}: its maps are not read any more: {run.poll_error}")

    def _look_at_interfaces(self, runs: Sequence[ProbeRun]) -> bool:
        """Say which interfaces have gone; whether there is nothing left to listen to."""
        for run in runs:
            for one in run.loaded.interfaces:
                if one.name not in run.silent and is_cut(one.link_fd):
                    run.silent[one.name] = "it is gone"
                    self.say(f"{run.spec.name}: no more rows from {one.name}: it is gone")
        return all(run.deaf for run in runs)

    def _others(self) -> list[int]:
        """What wakes us beside the rings: a signal, the end of what is traced."""
        fds = (self.signals.fd, self._watched.fd() if self._watched else None)
        return [fd for fd in fds if fd is not None]

    def _traced_ended(self) -> bool:
        if self.command:
            return self.command.ended()
        return self._watched is not None and self._watched.ended()


@attrs.define(eq=False)
class _Watched:
    """Processes that are traced; of one that still lives a pidfd is held (pidfd_open(2))."""

    pids: list[int]
    _fd: int | None = attrs.field(default=None, init=False)

    def ended(self) -> bool:
        """Whether all of them have, even if nobody has waited for them yet."""
        return self.fd() is None

    def fd(self) -> int | None:
        """What becomes readable when the one ends that is watched now; None: all have."""
        while True:
            if self._fd is None:
                if not self.pids:
                    return None
                with contextlib.suppress(ProcessLookupError):
                    self._fd = os.pidfd_open(self.pids.pop())
                continue
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            if not poll.poll(0):
                return self._fd
            self.close()

    def close(self) -> None:
        """Let go of it. Again it does nothing."""
        if self._fd is not None:
            os.close(self._fd)
        self._fd = None


def _drain_rest(runs: Sequence[ProbeRun], router: Router) -> None:
    """After detaching: what handlers have reserved must still turn up."""
    deadline = time.monotonic() + SETTLE_S
    clock = _Clock()
    while not router.done:
        horizon_ns = _drain(runs, router, clock, FOREVER)
        for run in runs:
            _tell_losses(run, router)
        settled = all(run.settled() for run in runs)
        if settled or time.monotonic() > deadline:
            router.flush()
            return
        router.flush(min(horizon_ns, kernel_ns() - _GUARD_NS))
        time.sleep(0 if horizon_ns < FOREVER else POLL_S)


def _drain(runs: Sequence[ProbeRun], router: Router, clock: _Clock, horizon_ns: int) -> int:
    """Feed the router one helping of each ring.

    What was lost is counted before a ring is drained: until then it was full, and everything
    behind its last record is missing. Then that is known by the instant.

    Returns:
        Up to which instant the rows are complete: `horizon_ns`, or earlier where a ring held
        more than one helping.
    """
    offset_ns = clock.offset_ns()
    for source, run in enumerate(runs):
        now_ns = kernel_ns()
        if not run.ring.pending():
            if not run.lost_none(now_ns):
                _tell_losses(run, router)
            continue
        crowded = run.ring.crowded
        _tell_losses(run, router)
        if router.room:
            router.room.offset_ns = offset_ns
            last_ns = router.room.take(source, HELPING * BATCH)
        else:
            last_ns = _feed(run, router, offset_ns)
        run.drained()
        if crowded:
            _tell_losses(run, router)
        if last_ns and run.ring.pending():
            horizon_ns = min(horizon_ns, last_ns - _GUARD_NS)
    return horizon_ns


def _tell_losses(run: ProbeRun, router: Router) -> None:
    for loss in run.losses():
        router.feed_loss(loss)


def _feed(run: ProbeRun, router: Router, offset_ns: int) -> int:
    """One helping, as rows; when the last was, or 0 where that was all."""
    for number, records in enumerate(run.ring.drain(), 1):
        with blaming(f"probe {run.spec.name}: making a row of a record"):
            rows = run.decode(records, offset_ns)
        router.feed(rows)
        if rows and number == HELPING:
            return rows[-1].ts_ns
    return 0


def _aggregate(
    runs: Sequence[ProbeRun], router: Router, began: float, *, final: bool = False
) -> None:
    """Show the sinks that asked for it what the kernel has counted."""
    counters = [run.counters for run in runs if run.counters]
    if not counters:
        return
    ts_ns = kernel_ns()
    router.aggregates(
        Aggregates(
            ts_ns=ts_ns,
            time_ns=ts_ns + clock_offset_ns(),
            elapsed_s=time.monotonic() - began,
            distributions=[found for one in counters for found in one.read()],
            final=final,
        )
    )


def _counted(found: Sequence[Distribution]) -> dict[str, Counted]:
    """The books of each histogram."""
    books = {}
    for name in dict.fromkeys(one.histogram.name for one in found):
        ours = [one for one in found if one.histogram.name == name]
        books[name] = Counted(
            samples=sum(one.count for one in ours),
            unmeasured=sum(one.unmeasured for one in ours),
            rest=sum(one.count + one.unmeasured for one in ours if one.group.rest),
        )
    return books


@attrs.define(eq=False)
class _Clock:
    """Unix time minus CLOCK_MONOTONIC, measured anew each second: NTP may slew one of them."""

    _offset_ns: int = 0
    _until: float = 0

    def offset_ns(self) -> int:
        now = time.monotonic()
        if now >= self._until:
            self._offset_ns, self._until = clock_offset_ns(), now + 1
        return self._offset_ns


def _report(runs: Sequence[ProbeRun], router: Router, duration_s: float) -> RunReport:
    probes = {}
    undelivered = router.undelivered()
    for run in runs:
        hooks = []
        consumed = run.ring.taken
        for number, (fired, (produced, dropped)) in enumerate(
            zip(run.hooks, run.books.read(), strict=True)
        ):
            if fired.program not in run.loaded.programs:
                continue
            # Where two hooks share point and func, which of them a row is from does not matter.
            lacking = undelivered[run.spec.name, fired.point, fired.func]
            delivered = max(0, consumed[number] - lacking)
            undelivered[run.spec.name, fired.point, fired.func] -= consumed[number] - delivered
            hooks.append(
                HookReport(fired.point, fired.func, fired.attach, produced, dropped, delivered)
            )
        func, attach = POLLED
        for point, made in run.polled.items():
            delivered = max(0, made - undelivered[run.spec.name, point, func])
            hooks.append(HookReport(point, func, attach, made, 0, delivered))
        probes[run.spec.name] = ProbeReport(
            hooks=tuple(hooks),
            missing=run.loaded.missing,
            untracked=run.books.untracked(),
            interfaces={one.name: one.mode for one in run.loaded.interfaces},
            skipped=run.skipped(),
            silent=run.silent,
            deaf=run.deaf,
            counted=_counted(run.counters.read()) if run.counters else None,
            uncounted=_uncounted(run) if run.counters else {},
            poll_error=run.poll_error,
        )
    return RunReport(
        probes=probes,
        duration_s=duration_s,
        late=router.late,
        switched_off=dict(router.switched_off),
        until_ns=0 if router.done else kernel_ns(),
    )


def _uncounted(run: ProbeRun) -> dict[str, str]:
    """Histogram -> why this host does not have it."""
    reasons = {
        one.name: one.missing(run.loaded.taken, run.loaded.missing) for one in run.spec.histograms
    }
    return {name: why for name, why in reasons.items() if why}


@attrs.define(eq=False)
class _Fds:
    """File descriptors that are closed once, on the way or at the end."""

    fds: list[int]

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())
