"""tcplat merge on real packets: two namespaces, each captured by a tcplat of its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .harness import TCPLAT, Puppet, Row, Tcplat, eventually, network
from .test_stages import objects_in

pytestmark = pytest.mark.alone  # it compares clocks: the bound is half a round trip

_PORT = 9999
_NEAR, _FAR = "10.82.0.1", "10.82.0.2"
_PAIR = """
link add va type veth peer name vb netns {pid}
link set va up
address add 10.82.0.1/24 dev va
"""
_OTHER = """
link set vb up
address add 10.82.0.2/24 dev vb
"""
_SERVE = f"""
listening = socket.create_server(({_FAR!r}, {_PORT}))
def serve():
    while True:
        peer, _ = listening.accept()
        while peer.recv(100, socket.MSG_WAITALL):
            time.sleep(0.0005)
            peer.sendall(bytes(2000))
        peer.close()
threading.Thread(target=serve, daemon=True).start()
"""
_ASK = f"""
for _ in range(10):
    with socket.create_connection(({_FAR!r}, {_PORT})) as s:
        for _ in range(20):
            s.sendall(bytes(100))
            s.recv(2000, socket.MSG_WAITALL)
            time.sleep(0.002)
"""
_REQUESTS = 10 * 20
_SHIFT_NS = 3_700_000_000
_PPM = 50


def shifted(ts_ns: int) -> int:
    """Return the time by a clock that is 3.7 s ahead and 50 ppm too fast."""
    return ts_ns + _SHIFT_NS + ts_ns * _PPM // 1_000_000


def rewrite(path: Path, out: Path, clock: Callable[[int], int]) -> Path:
    """Return the capture as another clock would have stamped it."""
    with path.open(encoding="utf-8") as source, out.open("w", encoding="utf-8") as target:
        for line in source:
            row = json.loads(line)
            if "ts_ns" in row:
                row["ts_ns"], row["time_ns"] = (
                    clock(row["ts_ns"]),
                    row["time_ns"] + clock(row["ts_ns"]) - row["ts_ns"],
                )
            target.write(json.dumps(row, separators=(",", ":"), ensure_ascii=False) + "\n")
    return out


def tcplat(*arguments: str) -> str:
    """Return what it says on stderr."""
    done = subprocess.run([*TCPLAT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def waterfall(capture: Path, out: Path) -> dict[tuple[int, int], Row]:
    """Exchanges by the client's port and their number."""
    tcplat("replay", str(capture), "--sink", f"waterfall:format=json,path={out}", "-q")
    return {(one["sport"], one["number"]): one for one in objects_in(out)}


def test_captures_with_two_clocks_are_merged(
    puppet: Callable[..., Puppet],
    start_tcplat: Callable[..., Tcplat],
    measured: Callable[[str], None],
    tmp_path: Path,
) -> None:
    client, server = puppet(alone=True), puppet(alone=True)
    network(client, script=_PAIR.format(pid=server.pid))
    network(server, script=_OTHER)
    server(_SERVE)
    runs = [
        start_tcplat(
            *("--netns", str(there.pid)),
            probes=(probe, f"dev_xmit:port={_PORT}", f"xdp_port:iface={device},port={_PORT}"),
        )
        for there, probe, device in ((client, "tcp_client", "va"), (server, "tcp_service", "vb"))
    ]
    for run in runs:  # both compile meanwhile
        run.wait_ready()
    client.tell(_ASK)
    client.answer()
    for run in runs:
        eventually(
            lambda run=run: sum(row["point"] == "close" for row in run.rows()) == 10,  # type: ignore[misc] # bound now
            "all connections were closed",
        )
    for run in runs:
        run.stop().check()
    near, far = (run.path for run in runs)

    # The truth: one clock stamped both, so that they need but be sorted.
    lines = [line for path in (near, far) for line in path.read_text().splitlines()]
    rows: list[dict[str, Any]] = [row for row in map(json.loads, lines) if "ts_ns" in row]
    rows.sort(key=lambda row: row["ts_ns"])
    joint = tmp_path / "joint"
    joint.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))
    true = waterfall(joint, tmp_path / "true")
    assert len(true) == _REQUESTS

    late = rewrite(far, tmp_path / "late", shifted)
    out = tmp_path / "merged"
    words = tcplat("merge", str(near), str(late), "-o", str(out))
    heads = [value["merge"] for value in map(json.loads, out.read_text().splitlines()[:2])]
    host = heads[1]
    first_ns = min(row["ts_ns"] for row in rows)
    # Where in the run the offset is taken for, matters by 50 ppm of its length.
    slack_ns = (rows[-1]["ts_ns"] - first_ns) * _PPM // 1_000_000
    assert abs(host["offset_ns"] - (shifted(first_ns) - first_ns)) <= host["bound_ns"] + slack_ns
    assert abs(host["drift_ppm"] - _PPM) <= host["drift_bound_ppm"]
    assert "wire times are right within that bound" in words
    # Half of the fastest round trip, and a bit.
    assert 0 < host["bound_ns"] < 200_000

    found = waterfall(out, tmp_path / "found")
    assert found.keys() == true.keys()
    worst = 0.0
    for key, one in found.items():
        expected = true[key]
        assert list(one["stages"]) == list(expected["stages"])
        assert (one["request_bytes"], one["reply_bytes"]) == (100, 2000)
        assert one["wire_bound_us"] == host["bound_ns"] / 1000
        assert abs(one["total_us"] - expected["total_us"]) < 0.01
        for stage, us in one["stages"].items():
            off = abs(us - expected["stages"][stage])
            if "wire" in stage:
                assert off <= one["wire_bound_us"], stage
                worst = max(worst, off)
            else:
                assert off <= 0.1 + us * 250e-6, stage
    measured(
        f"two clocks 3.7 s and 50 ppm apart: bound ± {host['bound_ns'] / 1000:.1f} µs by "
        f"{host['packets']} packets, wire times off by {worst:.1f} µs at most, "
        f"drift {host['drift_ppm']:+.1f} ± {host['drift_bound_ppm']:.1f} ppm"
    )
