"""Real servers on 127.0.0.1, each at its limit: nginx, nginx as a proxy, Redis, iperf3."""

from __future__ import annotations

import csv
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

from tests.bench.running import CPUS

HERE = "127.0.0.1"
CONNECTIONS = 8 * len(CPUS)
"""Of wrk: so many that a worker of nginx always has a request, and few enough to show delays."""
PIPELINE = 16
"""Requests in flight of each client of Redis."""
ENDS_WITH_US = ("setpriv", "--pdeathsig", "TERM", "--")

NGINX = """
worker_processes {workers};
daemon off;
user root;
pid {folder}/pid;
error_log {folder}/log crit;
events {{ worker_connections 1024; }}
http {{
	access_log off;
	sendfile on;
	tcp_nopush on;
	open_file_cache max=10;
	keepalive_requests 1000000000;
	upstream files {{ server 127.0.0.1:{port}; keepalive 64; keepalive_requests 1000000000; }}
	server {{ listen 127.0.0.1:{port}; root {folder}; }}
	{proxy}
}}
"""
PROXY = """
	server {{
		listen 127.0.0.1:{port};
		location / {{
			proxy_pass http://files;
			proxy_http_version 1.1;
			proxy_set_header Connection "";
		}}
	}}
"""
# wrk's own text rounds; latency:percentile() is in microseconds.
DONE = """
done = function(summary, latency, requests)
	io.stderr:write(string.format('{"count": %d, "seconds": %f, "p99_us": %f, "errors": %d}',
		summary.requests, summary.duration / 1e6, latency:percentile(99),
		summary.errors.connect + summary.errors.read + summary.errors.write
		+ summary.errors.status + summary.errors.timeout))
end
"""


@attrs.frozen
class Block:
    """What one block of load came to."""

    count: float
    """Requests, or MB."""
    seconds: float
    p99_us: float | None = None

    @property
    def rate(self) -> float:
        """Per second."""
        return self.count / self.seconds


@attrs.frozen
class Server:
    """A server that listens, and the load that fills it."""

    ports: tuple[int, ...]
    load: Callable[[int], Block]
    """Run for so many seconds."""


def needed(*tools: str) -> None:
    """Refuse to go on without them."""
    for tool in tools:
        if not shutil.which(tool):
            raise SystemExit(f"{tool} is missing: make bench installs it")


def free_ports(count: int) -> list[int]:
    """Return ports at which there is no listener."""
    sockets = [socket.create_server((HERE, 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def listens(port: int) -> bool:
    """Whether a port has a listener, without a connection, which iperf3 would take for a test."""
    lines = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    here = f"{int.from_bytes(socket.inet_aton(HERE), 'little'):08X}:{port:04X}"
    return any(line.split()[1] == here and line.split()[3] == "0A" for line in lines)


@contextmanager
def daemon(command: tuple[str, ...], ports: tuple[int, ...]) -> Iterator[None]:
    """Run a server until the block ends, from when it listens."""
    process = subprocess.Popen(
        [*ENDS_WITH_US, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while not all(listens(port) for port in ports):
            if process.poll() is not None:
                raise SystemExit(f"{command[0]} does not start: {process.communicate()[0]}")
            time.sleep(0.01)
        yield
    finally:
        process.terminate()
        process.communicate()


def output(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a load to its end."""
    done = subprocess.run([*ENDS_WITH_US, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed: {done.stdout}{done.stderr}")
    return done


@contextmanager
def nginx(size: int, *, proxied: bool = False) -> Iterator[Server]:
    """Nginx with a worker for each CPU, and wrk with keep-alive; a file of `size` bytes."""
    needed("nginx", "wrk")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        folder.joinpath("file").write_bytes(os.urandom(size))
        folder.joinpath("done.lua").write_text(DONE)
        port, in_front = free_ports(2)
        ports = (in_front, port) if proxied else (port,)
        conf = folder / "nginx.conf"
        conf.write_text(
            NGINX.format(
                folder=folder,
                workers=len(CPUS),
                port=port,
                proxy=PROXY.format(port=in_front) if proxied else "",
            )
        )

        def load(seconds: int) -> Block:
            done = output(
                *("wrk", f"-t{len(CPUS)}", f"-c{CONNECTIONS}", f"-d{seconds}s"),
                *("-s", str(folder / "done.lua"), f"http://{HERE}:{ports[0]}/file"),
            )
            figures = json.loads(done.stderr)
            if figures.pop("errors"):
                raise SystemExit(f"wrk had errors: {done.stdout}")
            return Block(**figures)

        with daemon(("nginx", "-c", str(conf), "-p", name, "-e", f"{name}/log"), ports):
            yield Server(ports, load)


@contextmanager
def redis() -> Iterator[Server]:
    """Redis without persistence; redis-benchmark with 50 clients and 16 requests in flight each."""
    needed("redis-server", "redis-benchmark")
    (port,) = free_ports(1)
    pace = 50_000.0

    def load(seconds: int) -> Block:
        nonlocal pace
        count = int(pace * seconds)
        done = output(
            *("redis-benchmark", "-h", HERE, "-p", str(port), "-P", str(PIPELINE)),
            *("-t", "set", "-d", "100", "-n", str(count), "--csv"),
        )
        (line,) = csv.DictReader(done.stdout.splitlines())
        pace = float(line["rps"])
        return Block(count, count / pace, float(line["p99_latency_ms"]) * 1000)

    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as name,
        daemon(
            (
                *("redis-server", "--port", str(port), "--bind", HERE, "--dir", name),
                *("--save", "", "--appendonly", "no", "--loglevel", "warning"),
            ),
            (port,),
        ),
    ):
        yield Server((port,), load)


@contextmanager
def iperf3() -> Iterator[Server]:
    """One connection, as many bytes as it takes; in MB."""
    needed("iperf3")
    (port,) = free_ports(1)

    def load(seconds: int) -> Block:
        done = output("iperf3", "-c", HERE, "-p", str(port), "-t", str(seconds), "--json")
        received = json.loads(done.stdout)["end"]["sum_received"]
        return Block(received["bytes"] / 1e6, received["seconds"])

    with daemon(("iperf3", "-s", "-B", HERE, "-p", str(port)), (port,)):
        yield Server((port,), load)
