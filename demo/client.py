"""The demo's client: two connections, two messages of 3,000 bytes on each."""

from __future__ import annotations

import socket

from service import PORT, SIZE, read_message

CONNECTIONS = 2
MESSAGES = 2


def main() -> None:
    """Send, wait for the answer, check it."""
    message = bytes(SIZE)
    for _ in range(CONNECTIONS):
        with socket.create_connection(("127.0.0.1", PORT), timeout=5) as connection:
            for _ in range(MESSAGES):
                connection.sendall(message)
                if read_message(connection) != message:
                    raise SystemExit("the service answered with something else")


if __name__ == "__main__":
    main()
