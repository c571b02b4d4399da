"""The demo's service: takes a message of 3,000 bytes, thinks, answers with the same."""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from pathlib import Path

PORT = int(os.environ.get("DEMO_PORT", "9999"))
SIZE = 3000
THINK_S = 0.002


def read_message(connection: socket.socket) -> bytes:
    """SIZE bytes, or fewer at the end of the stream."""
    message = b""
    while len(message) < SIZE and (part := connection.recv(SIZE - len(message))):
        message += part
    return message


def main() -> None:
    """Serve one client after the other; make the file of the first argument once we listen."""
    try:
        listener = socket.create_server(("127.0.0.1", PORT))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise SystemExit(
            f"demo: port {PORT} is in use (ss -ltnp 'sport = {PORT}' says by what): "
            "use another one, as in DEMO_PORT=10999 make demo"
        ) from error
    with listener:
        Path(sys.argv[1]).touch()
        while True:
            connection, _ = listener.accept()
            with connection:
                while message := read_message(connection):
                    time.sleep(THINK_S)
                    connection.sendall(message)


if __name__ == "__main__":
    main()
