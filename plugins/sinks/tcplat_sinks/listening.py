"""Opens the msgpack socket at a path or address that other users cannot take over."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import stat

from tcplat_core import Place, RunInfo, UsageError, connect

_BACKLOG = 128


def connected(unix: str, tcp: tuple[str, int] | None, run: RunInfo) -> socket.socket:
    """Return a connection to a reader; one of `unix` and `tcp` is given."""
    if tcp:
        return connect(tcp, run.stopping)
    # In a folder that others can write to, another user's socket could receive the rows.
    with contextlib.closing(Place.find(unix)) as place, place.there() as address:
        return connect(address, run.stopping)


def listen_on(host: str, port: int, *, public: bool) -> socket.socket:
    """Return a listening TCP socket.

    Raises:
        UsageError: Other hosts reach the address, and `public` does not allow that.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    if not (public or ipaddress.ip_address(address[0]).is_loopback):
        raise UsageError(
            f"sink msgpack: every host that reaches {host} could read the rows; "
            "add public=1 to allow it"
        )
    made = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    made.setblocking(False)
    return made


def listen_at(path: str) -> tuple[socket.socket, tuple[Place, int, int]]:
    """Return a unix socket that its owner alone may use, and its place.

    A socket without a listener is replaced.

    Raises:
        UsageError: Something else is there, or another process listens.
    """
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(contextlib.closing(Place.find(path, follow=False)))
        made = stack.enter_context(socket.socket(socket.AF_UNIX))
        # Before bind(2), which copies the socket's mode to the file: no moment with a wider mode.
        os.fchmod(made.fileno(), 0o600)
        try:
            made.bind(place.address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _clear_away(place)
            made.bind(place.address)
        made.listen(_BACKLOG)
        made.setblocking(False)
        found = place.look()
        if found is None:
            raise UsageError(f"sink msgpack: {path} was removed at once; use another path")
        stack.pop_all()
        return made, (place, found.st_dev, found.st_ino)


def _clear_away(place: Place) -> None:
    found = place.look()
    if found is None:
        return
    if not stat.S_ISSOCK(found.st_mode):  # not a socket either: a symbolic link
        raise UsageError(f"sink msgpack: {place.path} is there already, and is no socket")
    place.judge(found)
    with socket.socket(socket.AF_UNIX) as other:
        other.setblocking(False)
        if other.connect_ex(place.address) != errno.ECONNREFUSED:
            raise UsageError(f"sink msgpack: another process listens at {place.path}")
    place.unlink()
