"""The checks of a sink's output: plain text, nothing held back, no silent failure."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable

from tcplat_core.errors import ReaderGoneError
from tcplat_core.event.text import text
from tcplat_core.plugin.specs import Sink

from .check import Fault, NotChecked, Subject
from .fake_rows import make_event
from .sink_rows import LOSS, REPORT, counted, end_run, stream
from .sink_trial import (
    NO_OUTPUT,
    at_socket,
    gone_reader,
    is_silent,
    try_sink,
    until_more,
    written,
)

_SOON_S = 2.0
"""How long a reader at a socket may wait for what write() was given; a run polls meanwhile."""
_TEXTS = ("comm", "desc", "ifname")


def every_byte(subject: Subject) -> None:
    """Check that no byte of a text breaks its lines, or reaches the terminal as a control."""
    plain = _output_with(subject, lambda _: "-")
    if not plain:
        raise NotChecked(NO_OUTPUT if is_silent(subject) else "it shows no single rows")
    # Escaped, as the core does with the name of a process; and raw, as a capture written by hand
    # may have it: then ESC and the like must not reach the terminal.
    for what, odd, harmful in (
        ("an escaped", lambda byte: text(bytes([byte])), "\x9f"),
        ("a raw", chr, "\x1f"),
    ):
        shown = _output_with(subject, odd)
        before, after = _control(plain), _control(shown)
        if before is None:
            continue  # it writes no text
        if after is None:
            raise Fault(f"{what} byte in a text makes its output invalid UTF-8")
        broken = _unbroken(plain) - _unbroken(shown)
        if broken:
            name, byte = min(broken)
            raise Fault(
                f"{what} byte ({byte:#04x} in {name}) breaks its lines: escape what is not "
                "printable (tcplat_core.printable)"
            )
        strange = sorted(char for char in after.keys() - before.keys() if char <= harmful)
        if strange:
            raise Fault(
                f"{what} byte ({strange[0]!r}) gets through to the terminal: escape what is not "
                "printable (tcplat_core.printable)"
            )


def _output_with(subject: Subject, odd: Callable[[int], str]) -> bytes:
    """Return the output of 256 rows, each with another odd byte in each of its texts."""
    rows = []
    for byte in range(256):
        texts = {name: odd(byte).join(_marks(name, byte)) for name in _TEXTS}
        rows.append(make_event(sock=byte + 1, **texts))

    def play(sink: Sink) -> None:
        sink.write(rows)
        sink.aggregates(counted(1, [row.comm or "" for row in rows]))
        sink.close(REPORT)

    return try_sink(subject, play).fine().output


def _marks(name: str, byte: int) -> tuple[str, str]:
    """Return what stands before and after an odd byte."""
    return f"{name[0]}{byte}{name[0]}", f"{name[0].upper()}{byte}{name[0].upper()}"


def _unbroken(output: bytes) -> set[tuple[str, int]]:
    """Return the fields and bytes whose two marks are in one line."""
    lines = output.decode().split("\n")
    marks = {_marks(name, byte): (name, byte) for name in _TEXTS for byte in range(256)}
    return {
        what
        for (before, behind), what in marks.items()
        if any(behind in line.partition(before)[2] for line in lines)
    }


def _control(output: bytes) -> Counter[str] | None:
    """Return the number of each control character in a text; None if it is not UTF-8."""
    try:
        shown = output.decode()
    except UnicodeDecodeError:
        return None
    return Counter(char for char in shown if unicodedata.category(char) == "Cc")


def flushes(subject: Subject) -> None:
    """Check that write() returns with whole lines written and nothing buffered."""
    soon = _SOON_S if at_socket(subject) else 0

    def play(sink: Sink) -> list[int]:
        # What each reader gets first, a header say, is no row.
        sink.write([])
        sizes = [until_more(sink, 0, soon / 10)]
        # A sink whose `joins` is true may need further rows before it writes anything.
        joins = sink.joins
        for batch in (stream(999 if joins else 1), stream(1000, 999)):
            sink.aggregates(counted(len(batch), final=False))
            sink.write(batch)
            sizes.append(until_more(sink, sizes[-1], soon))
        end_run(sink)
        return [*sizes, written(), joins]

    ran = try_sink(subject, play).fine()
    before, first, second, last, joins = ran.returned
    if not (last or ran.output):
        raise NotChecked(NO_OUTPUT)
    if second == before:
        raise NotChecked("it writes nothing before close()")
    if first == before and joins:
        raise NotChecked("it summarizes many rows at once, and has waited for more of them")
    if first == before:
        raise Fault(
            "a row is not in its output when write() returns: it has a buffer, "
            "which has to be flushed (tcplat_core.Output has none)"
        )
    if _control(ran.output) is not None and ran.output[second - 1 : second] != b"\n":
        raise Fault("when write() returns its output ends within a line: write whole ones")


def full_device(subject: Subject) -> None:
    """Check that it reports what it could not write."""
    if at_socket(subject):
        raise NotChecked("it writes to a socket, not to a device")
    if is_silent(subject):
        raise NotChecked(NO_OUTPUT)
    ran = try_sink(subject, _everything, "/dev/full")
    if not ran.error:
        raise Fault(
            "its output is on a full device, and no error is raised: let write() and close() "
            "raise the error of the operating system"
        )
    _check_is_error(ran.error)


def reader_gone(subject: Subject) -> None:
    """Check that it reports a reader that has gone, unless others may still come."""
    if at_socket(subject):
        gone = try_sink(subject, _everything, readers=gone_reader)
        if gone.error:
            raise Fault(
                f"a reader has closed its socket, and it raises {gone.error}: other readers may "
                "connect, so let the run go on"
            )
        return
    if is_silent(subject):
        raise NotChecked("it does not write to standard output")
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ran = try_sink(subject, _everything, writer)
    finally:
        os.close(writer)
    if not ran.error.startswith(ReaderGoneError.__name__):
        raise Fault(
            f"the reader of its output has gone, and it raises {ran.error or 'nothing'}: "
            "raise ReaderGoneError, as tcplat_core.Output does"
        )


def _everything(sink: Sink) -> None:
    sink.write(stream(1000))
    sink.lost(LOSS)
    end_run(sink)


def _check_is_error(error: str) -> None:
    if error.startswith(("SystemExit", "KeyboardInterrupt")):
        raise Fault(f"it raises {error}, which ends the whole run: raise an error of its own")
