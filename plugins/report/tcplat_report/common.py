"""What the commands share."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import click
from tcplat_stages.join import Joiner, Told

from tcplat_core import Reader, UsageError


def told(reader: Reader, joiner: Joiner) -> Iterator[Told]:
    """Exchanges and connections of a capture, as they are complete."""
    for batch in reader.batches():
        yield from joiner.feed(batch)
    yield from joiner.finish()


def remarks(reader: Reader, joiner: Joiner) -> Iterator[str]:
    """What a reader of the figures has to know."""
    yield from reader.remarks()
    for count, what in (
        (joiner.cut, "requests were under way when the capture began, and are left out"),
        (joiner.untimed, "messages are left out: one instant alone is known of each"),
        (joiner.given_up, "connections were given up for want of room"),
    ):
        if count:
            yield f"{reader.name}: {count} {what}"


def say(sentence: str) -> None:
    """A line on stderr."""
    click.echo(f"tcplat: {sentence}", err=True)


@contextlib.contextmanager
def written(path: str) -> Iterator[BinaryIO]:
    """A file that is there when it is whole, or not at all; ``-`` is standard output.

    Raises:
        UsageError: It cannot be written.
    """
    if path == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    target = Path(path)
    if target.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder; name a file in it")
    if target.exists() and not target.is_file():  # a pipe, a device
        with target.open("wb") as file:
            yield file
        return
    try:
        fd, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; name another path") from error
    try:
        umask = os.umask(0)
        os.umask(umask)
        os.fchmod(fd, 0o666 & ~umask)
        with os.fdopen(fd, "wb") as file:
            yield file
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink()
        raise
