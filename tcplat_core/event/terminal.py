"""Makes untrusted texts safe to print on a terminal.

Names of processes, files and hosts, arguments, plugins' descriptions and exception messages may
contain control sequences, which a terminal would execute. tcplat prints all of them through this
module. It imports only os and sys, so that a refusal is quick.
"""

from __future__ import annotations

import os
import sys


def printable(plain: str) -> str:
    r"""Replace every unprintable character by an escape: ``\x1b``, ``\u202e``.

    These are control characters, changes of the writing direction, line ends, and bytes that are
    not UTF-8: see `str.isprintable`. A backslash is kept, because it may begin an escape. So this
    is idempotent, and does not change the result of :func:`tcplat_core.event.text.text`.
    """
    if plain.isprintable():
        return plain
    return "".join(char if char == "\\" else escaped(char) for char in plain)


def escaped(char: str) -> str:
    """Return a character, or its escape if it is unprintable or a backslash."""
    if char.isprintable() and char != "\\":
        return char
    if "\udc80" <= char <= "\udcff":  # a byte that is not UTF-8, by surrogateescape
        return f"\\x{ord(char) - 0xDC00:02x}"
    if "\x80" <= char <= "\xff":  # \x80 is the byte, \u0080 the character
        return f"\\u{ord(char):04x}"
    return char.encode("unicode_escape").decode("ascii")


def lines(plain: str) -> str:
    """Escape a text of several lines: keep line ends, expand tabs to spaces."""
    return "\n".join(map(printable, plain.expandtabs().split("\n")))


def say(sentence: str) -> None:
    """Write a message to stderr, on a line of its own."""
    write(f"tcplat: {printable(sentence)}")


def write(text: str) -> None:
    """Write lines to stderr, escaped for a terminal.

    If that fails (closed pipe, full disk), stderr becomes /dev/null: a message that cannot be
    shown must not end the run.
    """
    import click  # noqa: PLC0415 - the loader prints nothing itself

    if sys.stderr is None:
        return
    try:
        click.echo(lines(text), err=True)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(null, 2)
        os.close(null)
