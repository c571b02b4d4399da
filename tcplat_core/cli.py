"""The command line. Thin: it turns words into values and errors into exit codes."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import attrs
import click

from . import kinds, texts
from .bar import Bar
from .commands import Commands
from .errors import (
    CannotRunError,
    EventsLostError,
    PluginError,
    ReaderGoneError,
    TcplatError,
    UsageError,
    blaming,
)
from .hookpoints import SKIPPED_FUNCS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .command import Command
    from .filters import Filter
    from .histogram import Aggregation
    from .model import Counted, ProbeReport, RunInfo, RunReport, Sink
    from .output import Output
    from .plugins import Plugins

# What a command needs is imported when it is called: `plugins list` and --help
# have to answer at once, and must not need what only `run` does.


class _Duration(click.ParamType[float]):
    name = "time"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, float):
            return value
        try:
            seconds = float(kinds.duration(value))
        except ValueError:
            seconds = 0
        if not seconds:
            self.fail(f"{value!r} is not a time; write 5, 500ms, 30s, 2m or 1h", param, ctx)
        return seconds


class _Size(click.ParamType[int]):
    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            number = int(kinds.size(value))
        except ValueError:
            number = 0
        if number & (number - 1) or not 1 << 12 <= number <= 1 << 30:
            self.fail(f"{value!r} is not a power of two from 4K to 1G", param, ctx)
        return number


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tcplat")
def cli() -> None:
    """Where does the time go in a TCP connection?

    \b
    sudo tcplat run --probe tcp_client -p PID
    sudo tcplat run --probe tcp_client --sink jsonl --duration 5 > out.jsonl
    sudo tcplat run --probe tcp_client -- curl -s http://127.0.0.1:9999/
    tcplat replay out.jsonl --port 443
    tcplat plugins list
    """  # noqa: D301 - \b is click's own


_SINKS = click.option(
    "--sink",
    "sinks",
    multiple=True,
    default=["table"],
    metavar="NAME[:k=v,...]",
    help="What becomes of the rows; repeatable.  [default: table]",
)
_COUNT = click.option(
    "-n", "--count", type=click.IntRange(min=1), default=None, help="End after so many rows."
)
_QUIET = click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors.")
_FILTER_OPTIONS = (
    click.option(
        "-p",
        "--pid",
        "pids",
        multiple=True,
        metavar="PID",
        help="Only sockets of this process; repeatable, or a list: 12,34 or 12+34.",
    ),
    click.option(
        "--comm",
        default=None,
        metavar="NAME",
        help="Only sockets of processes of this name; NAME* for a beginning.",
    ),
    click.option(
        "--port",
        "ports",
        multiple=True,
        metavar="PORT",
        help="Only this port, on either side; repeatable, or a list: 80,443 or 80+443.",
    ),
    click.option("--lport", "lports", multiple=True, metavar="PORT", help="Only this local port."),
    click.option("--rport", "rports", multiple=True, metavar="PORT", help="Only this remote port."),
    click.option(
        "--addr",
        "networks",
        multiple=True,
        metavar="CIDR",
        help="Only this address or network, on either side; repeatable.",
    ),
    click.option("-4", "ip4", is_flag=True, help="Only IPv4."),
    click.option("-6", "ip6", is_flag=True, help="Only IPv6."),
    click.option(
        "--min-latency",
        type=_Duration(),
        default=0.0,
        help="Leave out rows whose duration is shorter.",
    ),
)
"""What `run` has the kernel leave out, and `replay` leaves out itself."""


def _filter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_FILTER_OPTIONS):
        command = option(command)
    return command


@cli.command()
@click.option(
    "--probe",
    "probes",
    multiple=True,
    required=True,
    metavar="NAME[:k=v,...]",
    help="What to observe; repeatable.",
)
@_SINKS
@_filter_options
@click.option(
    "--cgroup",
    default="",
    metavar="PATH",
    help="Only sockets of processes in this cgroup (v2) or below it.",
)
@click.option(
    "--netns",
    default="",
    metavar="NS",
    help="Only this network namespace, interfaces too: a name, a process id or a path.",
)
@click.option(
    "--attach",
    type=click.Choice(["auto", "fentry", "kprobe", "tracepoint"]),
    default="auto",
    show_default=True,
    help="How to listen; anything but auto is mandatory.",
)
@click.option("-d", "--duration", type=_Duration(), default=0.0, help="End after so long.")
@_COUNT
@click.option("--ready-file", metavar="PATH", help="Made once everything is attached.")
@click.option(
    "--hold",
    type=_Duration(),
    default=0.003,
    help="How long a row waits for an older one that an interrupt delayed; "
    "more than the 3ms of the default on a slow virtual machine.",
)
@click.option(
    "--ring-size",
    type=_Size(),
    default=1 << 23,
    metavar="BYTES",
    help="Of each probe's ring, a power of two: 4K to 1G.  [default: 8M]",
)
@click.option("--fail-on-loss", is_flag=True, help="Exit 5 if an event was lost.")
@_QUIET
@click.option("--dry-run", is_flag=True, help="Compile, load, attach, detach; say by what.")
@click.option(
    "--debug",
    is_flag=True,
    help="Show the C as compiled, what compiler and verifier say, and our programs' own lines.",
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def run(**arguments: Any) -> None:
    """Attach probes and deliver what they see to sinks.

    After -- comes a command to trace, with its children: the run ends with it,
    and has its exit status.
    """
    from .filters import cgroup_path  # noqa: PLC0415 - see the top
    from .netns import inode  # noqa: PLC0415

    cgroup, netns = arguments.pop("cgroup"), arguments.pop("netns")
    wanted = _filter(arguments)
    if wanted.pids or arguments["command"]:
        from .pidns import require_ours  # noqa: PLC0415 - see the top

        require_ours()
    _check_pids(wanted.pids or ())
    wanted = attrs.evolve(
        wanted,
        cgroup=cgroup and cgroup_path(cgroup),
        cgroup_id=Path(cgroup).stat().st_ino if cgroup else 0,
        # Now, while we are root: another user's namespace is visible to nobody else.
        netns=inode(netns) if netns else 0,
        netns_at=netns,
    )
    sys.exit(_run(wanted, **arguments))


def _filter(arguments: dict[str, Any]) -> Filter:
    """What the options that `run` and `replay` share want; takes them from the arguments."""
    from .filters import Filter  # noqa: PLC0415 - see the top

    ip4, ip6 = arguments.pop("ip4"), arguments.pop("ip6")
    return Filter(
        pids=_numbers(arguments.pop("pids"), "-p", 1 << 22) or None,
        comm=_comm(arguments.pop("comm")),
        ports=_ports(arguments.pop("ports")),
        lports=_ports(arguments.pop("lports")),
        rports=_ports(arguments.pop("rports")),
        networks=_networks(arguments.pop("networks")),
        ip=0 if ip4 == ip6 else 4 if ip4 else 6,
        min_ns=round(arguments.pop("min_latency") * 1e9),
    )


def _run(
    wanted: Filter,
    *,
    probes: Sequence[str],
    sinks: Sequence[str],
    attach: str,
    duration: float,
    count: int | None,
    ready_file: str | None,
    hold: float,
    ring_size: int,
    fail_on_loss: bool,
    quiet: bool,
    dry_run: bool,
    debug: bool,
    command: Sequence[str],
) -> int:
    from .command import Command  # noqa: PLC0415 - see the top
    from .loader.process import LoaderProcess  # noqa: PLC0415
    from .signals import Signals  # noqa: PLC0415

    signals = Signals()
    signals.install()
    child = Command.fork(command) if command else None
    loader = None
    try:
        loader = LoaderProcess.start()
        # While it starts.
        from .loader.protocol import Request  # noqa: PLC0415
        from .model import RunInfo  # noqa: PLC0415
        from .plugins import Plugins  # noqa: PLC0415
        from .ready import ReadyFile  # noqa: PLC0415
        from .router import spare_the_collector  # noqa: PLC0415
        from .session import Session  # noqa: PLC0415
        from .trace import TracePipe  # noqa: PLC0415

        spare_the_collector()
        trace = TracePipe.open() if debug else None
        _give_up_root(say=_nothing if quiet else _say)
        # Third-party Python runs from here on, and root is gone.
        plugins = Plugins.load()
        chosen = _probes(plugins, probes)
        aggregation, events = _aggregation(plugins, sinks, chosen)
        if count and not events:
            raise UsageError("--count counts rows, and none are made without a sink for them")
        info = RunInfo(
            probes=tuple(spec.name for spec, _ in chosen),
            stopping=signals.stopping,
            events={spec.name: spec.event for spec, _ in chosen},
            say=_nothing if quiet else _say,
        )
        if ready_file:
            ReadyFile(ready_file).check()
        made, outputs = _sinks(plugins, sinks, info)
        session = Session(
            loader=loader,
            probes=chosen,
            sinks=made,
            outputs=outputs,
            request=Request(
                events=events,
                aggregation=aggregation,
                probes=(),
                attach=attach,
                filter=wanted if child is None else wanted.and_pid(child.pid),
                follow=child is not None,
                debug=debug,
                ring_bytes=ring_size,
            ),
            duration_s=duration,
            count=count or 0,
            ready_file=ready_file,
            hold_s=hold,
            dry=dry_run,
            trace=trace,
            command=child,
            signals=signals,
            say=_say,
        )
        report = session.run()
    except TcplatError as error:
        if debug:
            texts.write("\n".join(getattr(error, "__notes__", [])))
        raise
    finally:
        if loader:
            if debug:
                texts.write(loader.output())
            loader.close()
        if child:
            child.stop()
    _tell(report, dry_run=dry_run, quiet=quiet)
    # Of a command that did not end by itself, the status says no more than that.
    ended = child.status if child and not (child.stopped or signals.caught) else 0
    return _status(report, child, ended or 0, fail_on_loss=fail_on_loss)


@cli.command()
@click.argument("capture", metavar="FILE|unix:PATH|tcp:HOST:PORT|-")
@_SINKS
@click.option(
    "--probe", "probes", multiple=True, metavar="NAME", help="Only rows of this probe; repeatable."
)
@click.option(
    "--point", "points", multiple=True, metavar="NAME", help="Only rows of this point; repeatable."
)
@_filter_options
@click.option(
    "--netns", default="", metavar="NS", help="Only this network namespace: its number, or a name."
)
@_COUNT
@_QUIET
def replay(capture: str, **arguments: Any) -> None:
    """Feed a capture to sinks: JSON lines or msgpack, from a file, a pipe or a socket.

    Needs neither root nor a kernel. What is damaged is left out, and said.
    """
    from .filters import netns_recorded  # noqa: PLC0415 - see the top

    netns = arguments.pop("netns")
    wanted = attrs.evolve(_filter(arguments), netns=netns_recorded(netns) if netns else 0)
    sys.exit(_replay(capture, wanted, **arguments))


def _replay(
    where: str,
    wanted: Filter,
    *,
    sinks: Sequence[str],
    probes: Sequence[str],
    points: Sequence[str],
    count: int | None,
    quiet: bool,
) -> int:
    from .capture import Capture, Source  # noqa: PLC0415
    from .model import RunInfo  # noqa: PLC0415
    from .plugins import Plugins  # noqa: PLC0415
    from .replay import UNREAD, Replay  # noqa: PLC0415
    from .router import spare_the_collector  # noqa: PLC0415
    from .signals import NOTHING_REPLAYED, Signals  # noqa: PLC0415

    spare_the_collector()
    signals = Signals()
    signals.install()
    # As whoever we are: a capture of root's, a socket of another user's.
    try:
        source = Source.open(where, signals.stopping)
    except InterruptedError:
        if not quiet:
            _say(NOTHING_REPLAYED)
        return 0
    _give_up_root(say=_nothing if quiet else _say)
    plugins = Plugins.load()
    events = {name: spec.event for name, spec in plugins.probes.items()}
    say = _nothing if quiet else _say
    made, outputs = _sinks(plugins, sinks, RunInfo((), signals.stopping, live=False, say=say))
    one = Replay(
        source=source,
        capture=Capture(events, say),
        sinks=made,
        outputs=outputs,
        wanted=wanted,
        probes=probes,
        points=points,
        count=count or 0,
        stopping=signals.stopping,
        bar=Bar(source, shown=not quiet and sys.stderr.isatty()),
    )
    report = one.run()
    if not quiet:
        _summary(
            attrs.evolve(report, switched_off=one.router.switched_off),
            UNREAD,
        )
        for sentence in one.summary(report):
            _say(sentence)
        if signals.caught and not one.capture.read:
            _say(NOTHING_REPLAYED)
    return TcplatError.exit_code if one.router.switched_off else 0


def _status(report: RunReport, child: Command | None, ended: int, *, fail_on_loss: bool) -> int:
    if report.switched_off or (report.deaf and not child):
        return TcplatError.exit_code
    if fail_on_loss and report.dropped:
        raise EventsLostError(f"{report.dropped} events were lost; a larger --ring-size may help")
    return ended


def _numbers(texts: Sequence[str], option: str, top: int) -> tuple[int, ...]:
    """``("80,443", "8080+8081")`` as numbers from 1 to `top`; plugin options are written with +."""
    numbers = []
    for text in ",".join(texts).replace("+", ",").split(",") if texts else ():
        if not text.isdecimal() or not 1 <= int(text) <= top:
            raise UsageError(f"{option} {text!r} is not a number from 1 to {top}")
        numbers.append(int(text))
    return tuple(numbers)


def _ports(texts: Sequence[str]) -> tuple[int, ...]:
    return _numbers(texts, "port", 65535)


def _check_pids(pids: Sequence[int]) -> None:
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise UsageError(f"there is no process {pid}") from error
        process = int(status.split("Tgid:")[1].split()[0])
        if process != pid:
            raise UsageError(f"{pid} is a thread of process {process}: -p {process}")


def _comm(text: str | None) -> str:
    if text == "":
        raise UsageError("--comm '': a process has a name")
    text = text or ""
    if len(os.fsencode(text.rstrip("*"))) > 15:  # noqa: PLR2004 - TASK_COMM_LEN without its NUL
        raise UsageError(
            f"--comm {text!r}: the kernel keeps 15 bytes of a name; write their beginning and *"
        )
    if "*" in text[:-1]:
        raise UsageError(f"--comm {text!r}: a * may stand at the end only")
    return text


def _networks(texts: Sequence[str]) -> tuple[str, ...]:
    for text in texts:
        try:
            ipaddress.ip_network(text, strict=False)
        except ValueError as error:
            raise UsageError(f"--addr {text!r} is no address and no network: {error}") from error
    return tuple(texts)


def _probes(plugins: Plugins, texts: Sequence[str]) -> list[tuple[Any, Any]]:
    from .model import parse_choice, read_options  # noqa: PLC0415 - see the top

    chosen: list[tuple[Any, Any]] = []
    for text in texts:
        name, given = parse_choice(text)
        spec = plugins.probe(name)
        if any(other.name == name for other, _ in chosen):
            raise UsageError(f"--probe {name} is given twice")
        chosen.append((spec, read_options(f"probe {name}", spec.options, given)))
    return chosen


def _sinks(
    plugins: Plugins, texts: Sequence[str], run: RunInfo
) -> tuple[dict[str, Sink], list[Output]]:
    """The sinks, by what the user wrote, and the files that are held back until they begin."""
    from .output import held_back  # noqa: PLC0415 - see the top
    from .router import cancel  # noqa: PLC0415

    made: dict[str, Sink] = {}
    with held_back() as outputs:
        try:
            for text in texts:
                made[text] = _sink(plugins, text, run, made)
        except BaseException:
            cancel(made.values(), outputs)
            raise
    return made, outputs


def _sink(plugins: Plugins, text: str, run: RunInfo, others: Mapping[str, Sink]) -> Sink:
    from .model import parse_choice, read_options  # noqa: PLC0415 - see the top
    from .router import Unread  # noqa: PLC0415

    name, given = parse_choice(text)
    spec = plugins.sink(name)
    if text in others:
        raise UsageError(f"--sink {text} is given twice")
    if spec.aggregate and not run.live:
        raise UsageError(
            f"--sink {name} counts in the kernel while a run lasts; "
            "--sink stages has percentiles of a capture"
        )
    options = read_options(f"sink {name}", spec.options, given)
    with blaming(f"sink {name}: its factory"):
        try:
            sink = spec.factory(options, run)
        except ReaderGoneError:
            return Unread()
        for method in ("write", "lost", "close"):
            if not callable(getattr(sink, method, None)):
                raise PluginError(
                    f"sink {name}: what its factory made is no sink: "
                    f"{type(sink).__name__} has no {method}()"
                )
        return sink


def _aggregation(
    plugins: Plugins, texts: Sequence[str], probes: Sequence[tuple[Any, Any]]
) -> tuple[Aggregation | None, bool]:
    """What the sinks want counted in the kernel, and whether any of them wants rows."""
    from .model import parse_choice, read_options  # noqa: PLC0415 - see the top

    asked: list[tuple[str, Aggregation]] = []
    events = False
    for text in texts:
        name, given = parse_choice(text)
        spec = plugins.sink(name)
        if spec.aggregate is None:
            events = True
            continue
        options = read_options(f"sink {name}", spec.options, given)
        with blaming(f"sink {name}: aggregate()"):
            asked.append((name, spec.aggregate(options)))
    if not asked:
        return None, events
    if len(asked) > 1:
        raise UsageError(
            f"one sink can have the kernel count, and {' and '.join(name for name, _ in asked)} "
            "both want it"
        )
    able = ", ".join(sorted(name for name, spec in plugins.probes.items() if spec.histograms))
    for spec, _ in probes:
        if not spec.histograms:
            raise UsageError(
                f"--sink {asked[0][0]}: probe {spec.name} has no histograms "
                f"(of these: {able or 'none'}); give it a run of its own"
            )
    return asked[0][1], events


def _tell(report: RunReport, *, dry_run: bool, quiet: bool) -> None:
    """How the run went."""
    if dry_run:
        _attached(report)
    elif not quiet:
        _summary(report)
    if not (report.probes or quiet):
        from .signals import NOTHING_RECORDED  # noqa: PLC0415 - see the top

        _say(NOTHING_RECORDED)


def _attached(report: RunReport) -> None:
    for name, probe in report.probes.items():
        for hook in probe.hooks:
            texts.write(f"{name}: {hook.point} by {hook.attach}:{hook.func}")
        for point, reason in probe.missing.items():
            texts.write(f"{name}: no {point}: {reason}")


def _summary(report: RunReport, unread: str = "more were seen when the run ended") -> None:
    for name, probe in report.probes.items():
        for words in _probe_summary(probe, unread):
            _say(f"{name}: {words}")
    if report.late:
        _say(f"{report.late} rows came out of order")
    for sink, reason in report.switched_off.items():
        _say(f"sink {sink} was switched off: {reason}")


def _probe_summary(probe: ProbeReport, unread_words: str) -> Iterator[str]:
    if probe.counted is not None:
        yield from _counted_summary(probe.counted)
    if probe.counted is None or probe.delivered or probe.dropped:
        yield _rows_summary(probe)
    for what, reason in {**probe.uncounted, **_rows_missing(probe)}.items():
        yield f"no {what}: {reason}"
    for interface, reason in probe.silent.items():
        if interface not in probe.interfaces:  # else it was said when it went
            yield f"no rows from {interface}: {reason}"
    if probe.untracked:
        yield f"{probe.untracked} sockets could not be remembered; their rows are missing"
    funcs = {hook.func for hook in probe.hooks if hook.attach == "kprobe"} & SKIPPED_FUNCS
    if funcs:
        names = ", ".join(sorted(funcs))
        yield f"rows of {names} may be missing: the kernel skips a kprobe that interrupts another"
    for func, count in probe.skipped.items():
        yield f"{count} times the kernel skipped {func}: so many rows may be missing"
    unread = sum(hook.unread for hook in probe.hooks)
    if unread:
        yield f"{unread} {unread_words}"


def _rows_missing(probe: ProbeReport) -> dict[str, str]:
    return {f"{point} rows": reason for point, reason in probe.missing.items()}


def _rows_summary(probe: ProbeReport) -> str:
    by_point: dict[str, int] = {}
    for hook in probe.hooks:
        by_point[hook.point] = by_point.get(hook.point, 0) + hook.delivered
    points = ", ".join(f"{point} {n}" for point, n in by_point.items())
    return f"{probe.delivered} rows, {probe.dropped} lost ({points})"


def _counted_summary(counted: Mapping[str, Counted]) -> Iterator[str]:
    histograms = ", ".join(f"{name} {one.samples}" for name, one in counted.items())
    yield f"{sum(one.samples for one in counted.values())} counted ({histograms or 'none'})"
    for name, one in counted.items():
        if one.unmeasured:
            yield f"{name}: {one.unmeasured} more could not be measured"
        if one.rest:
            yield f"{name}: {one.rest} came when all groups were taken; groups= makes room"


def _nothing(_: str) -> None:
    """Say nothing: what -q makes of _say()."""


_say = texts.say


def _json(value: object) -> str:
    from .schema import cleaned  # noqa: PLC0415 - see the top

    return json.dumps(cleaned(value), indent=2)


@cli.group()
def plugins() -> None:
    """What there is to choose from."""


@plugins.command("list")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def plugins_list(give_up_root: Callable[[], None] | None, *, as_json: bool) -> None:
    """All probes, sinks and plugins' commands, broken ones included."""
    from . import commands  # noqa: PLC0415 - see the top
    from .plugins import Found, Plugins  # noqa: PLC0415

    if give_up_root:
        give_up_root()
    found = Plugins.load().found
    for entry, status, summary in commands.found(cli.commands):
        dist = entry.dist
        version, distribution = (dist.version, dist.name) if dist else ("?", "?")
        found.append(Found(entry.name, "command", version, distribution, status, summary))
    found.sort(key=lambda one: (one.kind, one.name))
    names = ("name", "kind", "version", "distribution", "status", "summary")
    rows = [{name: getattr(one, name) for name in names} for one in found]
    if as_json:
        click.echo(_json(rows))
        return
    widths = [max([len(name), *(len(row[name]) for row in rows)]) for name in names]
    for cells in (
        [name.upper() for name in names],
        *([row[name] for name in names] for row in rows),
    ):
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        click.echo(texts.printable(" ".join(padded).rstrip()))


@plugins.command("check")
@click.argument("choice", metavar="NAME[:k=v,...]")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def plugins_check(give_up_root: Callable[[], None] | None, choice: str, *, as_json: bool) -> None:
    """Whether a probe or sink keeps what plugins promise.

    Most of it needs no root. With root a probe is also loaded and attached, in a
    network namespace of its own. Exits with 1 if a check failed.
    """
    from .testing import conformance, trial  # noqa: PLC0415 - see the top

    with contextlib.ExitStack() as stack:
        privileged = trial.as_root()
        if privileged:
            stack.callback(privileged.close)
        if give_up_root:
            give_up_root()
        outcomes = list(conformance.check_plugin(choice, trial=lambda: privileged))
    if as_json:
        click.echo(_json(conformance.as_json(outcomes)))
    else:
        click.echo(texts.lines(conformance.as_text(outcomes)))
    failed = any(outcome.verdict == "failed" for _, outcome in outcomes)
    sys.exit(TcplatError.exit_code if failed else 0)


@plugins.command("show")
@click.argument("name")
@click.option(
    "--kind",
    type=click.Choice(["probe", "sink"]),
    help="Which, where a probe and a sink have one name.",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def plugins_show(
    give_up_root: Callable[[], None] | None, *, name: str, kind: str | None, as_json: bool
) -> None:
    """What a probe or sink is, and how this host would run it."""
    from . import show  # noqa: PLC0415 - see the top
    from .plugins import Plugins  # noqa: PLC0415

    sight = show.Sight.now()
    if give_up_root:
        give_up_root()
    several = Plugins.load().named(name, kind)
    if len(several) > 1:
        raise UsageError(f"there are a probe and a sink named {name!r}: --kind says which")
    told = show.as_json(*several[0], sight)
    click.echo(_json(told) if as_json else texts.lines(show.as_text(told)))


@plugins.command("new")
@click.argument("kind", type=click.Choice(["probe", "sink"]))
@click.argument("name")
@click.option("--dir", "folder", default=".", metavar="DIR", help="Where to.  [default: .]")
@click.pass_obj
def plugins_new(
    give_up_root: Callable[[], None] | None, *, kind: str, name: str, folder: str
) -> None:
    """A project of your own, tcplat-NAME, with a probe or sink that works."""
    from . import new  # noqa: PLC0415 - see the top

    if give_up_root:
        give_up_root()
    project, *files = new.create(kind, name, Path(folder))
    shown = texts.printable(str(project))
    click.echo(f"{shown}: {len(files)} files. Next:")
    click.echo(f"  pip install {shown if project.is_absolute() else f'./{shown}'}")
    click.echo(f"  tcplat plugins check {name}")
    run = f"--probe {name}" if kind == "probe" else f"--probe tcp_client --sink {name}"
    click.echo(f"  sudo tcplat run {run}")


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def doctor(*, as_json: bool) -> None:
    """What this host can run, and how to mend what it cannot."""
    from . import doctor as doctor_  # noqa: PLC0415 - see the top

    checks, probes = doctor_.examine()
    if as_json:
        click.echo(_json(doctor_.as_json(checks, probes)))
    else:
        click.echo(texts.lines(doctor_.as_text(checks, probes)))
    sys.exit(0 if doctor_.healthy(checks, probes) else CannotRunError.exit_code)


def _give_up_root(say: Callable[[str], None] = _say) -> None:
    """Give up root, and say where that is not the user behind sudo."""
    from . import privileges  # noqa: PLC0415 - see the top

    privileges.drop()
    uid = os.environ.get("SUDO_UID") or "0"
    if os.geteuid() == 0 and uid != "0":
        say(
            f"uid {uid} cannot read {sys.prefix}, so that tcplat stays uid 0, without capabilities:"
            " what it writes is root's; install it where everybody can read it, as in /opt/tcplat"
        )


def main() -> NoReturn:
    """Run the command line; every error that a user can cause is one sentence."""
    from .signals import unblock  # noqa: PLC0415 - see the top

    try:
        unblock()
        # Handed over here: whoever calls a command in his own process keeps his rights.
        cli.main(prog_name="tcplat", standalone_mode=False, obj=_give_up_root)
    except TcplatError as error:
        _say(str(error))
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        texts.write(error.format_message())
        sys.exit(UsageError.exit_code)
    except click.ClickException as error:
        _say(f"{error.format_message()} (tcplat --help)")
        sys.exit(UsageError.exit_code)
    except (click.Abort, KeyboardInterrupt):  # the latter: it had been blocked, and was pending
        from .signals import stopped_early  # noqa: PLC0415 - see the top

        sys.exit(stopped_early(sys.argv[1:]))
    sys.exit(0)
