"""One run from start to end: loader, rings, router, sinks, and the report."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import attrs

from tcplat_core.deliver.fast.records import reorder_buffer
from tcplat_core.deliver.router import Router
from tcplat_core.deliver.sequencer import Sequencer
from tcplat_core.event.clock import kernel_ns
from tcplat_core.kernel.fdinfo import is_cut
from tcplat_core.kernel.layout import possible_cpus
from tcplat_core.loader.protocol import Answer, Request
from tcplat_core.plugin.output import Output
from tcplat_core.plugin.report import RunReport
from tcplat_core.plugin.sampling import Sampled, Shares
from tcplat_core.plugin.specs import Chosen, ProbeSpec, SinkLike

from .bookkeeping import report_of
from .drain import Drain, show_counted
from .gate import Sleeper
from .loader_process import LoaderProcess
from .pace import HOLD_S, IDLE_POLL_S, LATE_S, Pace
from .probe_run import ProbeRun, probe_request
from .ready import ReadyFile
from .signals import Signals
from .thinning import Costs, Thinner
from .trace import TracePipe
from .traced_command import TracedCommand
from .watched import Watched


@attrs.define(eq=False)
class Session:
    """One run.

    Args:
        loader: Started before root was dropped.
        probes: The probes and their options.
        sinks: Open sinks, by name.
        request: The request to the loader, without the probes.
        used: The points whose rows some sink uses; empty for all.
        duration_s: End after so long; 0 for no limit.
        count: End after so many rows; 0 for no limit.
        ready_file: Created when everything is attached.
        hold_s: How long a row is held back for an older one, s.
        dry: Attach, and end at once.
        trace: The kernel's trace_pipe, for --debug.
        command: Started when everything is attached; the run ends with it.
        outputs: Files of the sinks, created or truncated when everything is attached.
        say: Prints a message to the user.
    """

    loader: LoaderProcess
    probes: Sequence[Chosen[ProbeSpec]]
    sinks: Mapping[str, SinkLike]
    request: Request
    used: frozenset[str] = frozenset()
    duration_s: float = 0
    count: int = 0
    ready_file: str | None = None
    hold_s: float = HOLD_S
    dry: bool = False
    trace: TracePipe | None = None
    command: TracedCommand | None = None
    signals: Signals = attrs.field(factory=Signals)
    say: Callable[[str], None] = lambda _: None
    outputs: Sequence[Output] = ()
    _shares: Shares = attrs.field(factory=Shares, init=False)
    _thinner: Thinner | None = attrs.field(default=None, init=False)
    _watched: Watched | None = attrs.field(default=None, init=False)
    _ready: ReadyFile | None = attrs.field(init=False)

    @_ready.default
    def _ready_file(self) -> ReadyFile | None:
        return ReadyFile(self.ready_file) if self.ready_file else None

    def run(self) -> RunReport:
        """Run to the end, and return the report.

        Raises:
            TcplatError: The run could not start, or a ring holds an invalid record.
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
                    *(one.spec, one.options),
                    events=self.request.events,
                    used=self.used,
                    aggregation=self.request.aggregation,
                )
                for one in self.probes
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
            for one in self.probes:
                loaded = answer.probes[one.spec.name]
                run = ProbeRun.open(one.spec, loaded, request, cpus)
                stack.callback(run.close)
                runs.append(run)
            sleeper = Sleeper(answer.gate_fd, [run.ring.fd for run in runs])
            stack.callback(sleeper.close)
            buffer = reorder_buffer([run.source for run in runs])
            stack.callback(buffer.close)
            sequencer = Sequencer(router, buffer)
            drain = Drain(runs, sequencer)
            self._watch(stack)
            if answer.share_fd is not None:
                self._thin(stack, answer.share_fd, answer)
            pace = self._pace(router)
            self._report_silent(runs)
            if not self.dry:
                router.begin()
                if self.request.sample > 1:
                    self._share(router, Sampled(self.request.sample))
                self._begin()
                self._loop(drain, sleeper, pace)
            sleeper.shut()
            ended_ns = kernel_ns()
            self._check_interfaces(runs)
            held.close()
            if self.trace:
                self.trace.relay(self.say)
            drain.rest(hurry=self.signals.stopping())
            self._poll(drain)
            sequencer.flush()
            show_counted(runs, router, pace.began, final=True)
            lasted_s = time.monotonic() - pace.began
            report = report_of(runs, sequencer, lasted_s, self._shares, ended_ns)
        if self.dry:
            router.cancel()
            return report
        router.close(report)
        # A sink may have failed in close(), too.
        return attrs.evolve(report, switched_off=dict(router.switched_off))

    def _pace(self, router: Router) -> Pace:
        wanted = self.request.aggregation
        return Pace(
            time.monotonic(),
            self.duration_s,
            wanted.every_s if wanted else math.inf,
            reports_time=router.reports_time,
        )

    def _report_silent(self, runs: Sequence[ProbeRun]) -> None:
        """Report interfaces that cannot receive packets at the moment."""
        for run in runs:
            for one in run.loaded.interfaces:
                if one.silent:
                    self.say(f"{run.spec.name}: no rows from {one.name} for now: {one.silent}")

    def _watch(self, stack: ExitStack) -> None:
        """Watch the traced processes, if there are any."""
        if self.command:
            self._watched = Watched([self.command.pid])
        elif self.request.filter.pids is not None:
            self._watched = Watched(list(self.request.filter.pids))
        if self._watched:
            stack.callback(self._watched.close)

    def _thin(self, stack: ExitStack, share_fd: int, answer: Answer) -> None:
        """Keep the cost below --max-overhead from now on."""
        stack.callback(os.close, share_fd)
        programs = (fd for one in answer.probes.values() for fd in one.program_fds.values())
        costs = Costs.of([*programs, *answer.holding])
        one_in, limit = self.request.sample, self.request.max_overhead
        self._thinner = Thinner(share_fd, one_in, limit, costs.share, self.say)
        stack.callback(self._thinner.close)

    def _share(self, router: Router, share: Sampled) -> None:
        self._shares.add(share)
        router.sampled(share)

    def _begin(self) -> None:
        if self._ready:
            self._ready.write()
        if self.command:
            self.command.go()

    def _loop(self, drain: Drain, sleeper: Sleeper, pace: Pace) -> None:
        sequencer, router = drain.sequencer, drain.sequencer.router
        previous_ns = 0
        while not (self.signals.stopping() or router.done):
            now_ns, now = kernel_ns(), time.monotonic()
            checking = pace.interfaces_due(now)
            if checking:
                self._check_each_second(drain, pace, now)
            if pace.histograms_due(now):
                show_counted(drain.runs, router, pace.began)
            if pace.tracees_due(now):
                self._check_often(pace, now)
            if now >= pace.end:
                return
            coming, had = drain.pending(), router.total
            if coming or checking or sequencer.waiting:
                settled_ns = min(previous_ns, now_ns - int(self.hold_s * 1e9))
                if not drain.deliver(settled_ns):
                    router.poll()
                    continue
            router.poll()
            quiet = not (coming or sequencer.waiting)
            if quiet and pace.time_due(now):
                router.passed(now_ns - int(LATE_S * 1e9))
            previous_ns = now_ns
            rows = router.total - had
            pause_s = pace.pause_s(now, rows if coming or rows else None)
            if pause_s < IDLE_POLL_S or sequencer.waiting or router.serves or self.trace:
                time.sleep(pace.nap_s(now, pause_s))
            else:
                sleeper.sleep(pace.sleep_s(now, pending=self._ready_pending), self._others())

    @property
    def _ready_pending(self) -> bool:
        """Return whether the ready file is a pipe that has no reader yet."""
        return self._ready is not None and not self._ready.written

    def _check_each_second(self, drain: Drain, pace: Pace, now: float) -> None:
        """Do what is due every INTERFACE_CHECK_S."""
        if self._check_interfaces(drain.runs) and not self.command:
            pace.end = now
        self._poll(drain)
        if self._thinner and (share := self._thinner.check()):
            self._shares.add(share)
            drain.sequencer.share(share)
        drain.sequencer.router.idle()

    def _check_often(self, pace: Pace, now: float) -> None:
        """Do what is due every TRACEE_CHECK_S."""
        if pace.end == math.inf and self._traced_ended():
            pace.traced_ended(now)
        if self._ready and self._ready_pending:
            self._ready.write()
        if self.trace:
            self.trace.relay(self.say)

    def _poll(self, drain: Drain) -> None:
        """Call poll() of the probes, if some sink uses rows."""
        for run in drain.runs if self.request.events else ():
            working = not run.poll_error
            drain.sequencer.buffer.feed(run.poll())
            if working and run.poll_error:
                self.say(f"{run.spec.name}: its maps are no longer read: {run.poll_error}")

    def _check_interfaces(self, runs: Sequence[ProbeRun]) -> bool:
        """Report interfaces that are gone; return whether no probe has any hook left."""
        for run in runs:
            for one in run.loaded.interfaces:
                if one.name not in run.silent and is_cut(one.link_fd):
                    run.silent[one.name] = "it is gone"
                    self.say(
                        f"{run.spec.name}: no more rows from {one.name}: the interface is gone"
                    )
        return all(run.interfaces_gone for run in runs)

    def _others(self) -> list[int]:
        """Return the fds, besides the rings, that end a sleep: a signal, the end of the tracee."""
        fds = (self.signals.fd, self._watched.fd() if self._watched else None)
        return [fd for fd in fds if fd is not None]

    def _traced_ended(self) -> bool:
        if self.command:
            return self.command.ended()
        return self._watched is not None and self._watched.ended()


@attrs.define(eq=False)
class _Fds:
    """File descriptors that are closed once: close() is idempotent."""

    fds: list[int]

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())
