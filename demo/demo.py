"""Starts the service, then tcplat on it and on the client, and prints what tcplat prints."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from service import PORT

HERE = Path(__file__).parent
TCPLAT = Path(sys.executable).parent / "tcplat"
PROBES = ("tcp_client", "tcp_service", f"xdp_port:iface=lo,port={PORT}")
LIMIT_S = 30


def main() -> int:
    """Run the demo; the status is tcplat's, which is the client's."""
    with tempfile.TemporaryDirectory() as folder:
        listening = Path(folder) / "listening"
        with subprocess.Popen([sys.executable, HERE / "service.py", listening]) as service:
            try:
                deadline = time.monotonic() + LIMIT_S
                while not listening.exists():
                    if service.poll() is not None:  # and has said why
                        return 1
                    if time.monotonic() > deadline:
                        print(f"the service could not start within {LIMIT_S} s", file=sys.stderr)
                        return 1
                    time.sleep(0.01)
                run = [str(TCPLAT), "run", "--sink", "table", "-p", str(service.pid)]
                probes = [word for probe in PROBES for word in ("--probe", probe)]
                client = ["--", sys.executable, str(HERE / "client.py")]
                return subprocess.run([*run, *probes, *client], check=False).returncode
            finally:
                service.terminate()


if __name__ == "__main__":
    sys.exit(main())
