"""The demo, as far as it goes without root."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parents[2] / "demo/demo.py"


def test_port_in_use_is_one_sentence_with_a_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, DEMO],
            env={**os.environ, "DEMO_PORT": str(port)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == (
        f"demo: port {port} is in use (ss -ltnp 'sport = {port}' says by what): "
        "use another one, as in DEMO_PORT=10999 make demo\n"
    )
