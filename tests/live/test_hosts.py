"""Hosts that refuse something: a run and ``tcplat doctor`` name the true reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from .harness import TCPLAT, needs

_REFUSE = """
import ctypes, os, struct, sys
number, errno_ = int(sys.argv[1]), int(sys.argv[2])
# struct sock_filter: load the call's number; where it is this one, SECCOMP_RET_ERRNO.
code = struct.pack("=" + "HBBI" * 4, 0x20, 0, 0, 0, 0x15, 0, 1, number,
                   0x06, 0, 0, 0x50000 | errno_, 0x06, 0, 0, 0x7FFF0000)
text = ctypes.create_string_buffer(code)
program = struct.pack("=HxxxxxxQ", 4, ctypes.addressof(text))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):
    raise OSError(ctypes.get_errno(), "seccomp")
os.execv(sys.argv[3], sys.argv[3:])
"""
_BPF = {"x86_64": 321, "aarch64": 280}
EPERM, ENOSYS = 1, 38


def refused(errno_: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run tcplat where a seccomp filter refuses bpf(2)."""
    number = str(_BPF[os.uname().machine])
    command = [sys.executable, "-I", "-c", _REFUSE, number, str(errno_), *TCPLAT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def checks(outcome: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return what ``doctor --json`` says, by the check's name."""
    return {one["name"]: one for one in json.loads(outcome.stdout)["checks"]}


@pytest.mark.parametrize(
    ("errno_", "words"),
    [(EPERM, "a seccomp filter is in force"), (ENOSYS, "a seccomp filter hides the call")],
)
def test_refused_bpf_call_is_not_a_compile_error(errno_: int, words: str) -> None:
    run = refused(errno_, "run", "--probe", "tcp_client", "--sink", "jsonl", "--duration", "1")
    assert run.returncode == 3
    assert "bpf(2) is refused here" in run.stderr
    assert words in run.stderr
    assert "compile" not in run.stderr
    doctor = refused(errno_, "doctor", "--json")
    assert doctor.returncode == 3
    assert checks(doctor)["bpf(2)"]["ok"] is False
    assert words in checks(doctor)["bpf(2)"]["mend"]


def test_missing_capabilities_are_not_blamed_on_the_kernel() -> None:
    needs("setpriv")
    command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *TCPLAT, "doctor"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 3
    assert "Operation not permitted" not in outcome.stdout
    assert "only root can test whether fentry works" in outcome.stdout
    assert "needs CAP_BPF and CAP_PERFMON" in outcome.stdout


_WITHOUT_FOLDER = "import os, sys, tempfile; d = tempfile.mkdtemp(); os.chdir(d); os.rmdir(d); \
os.execv(sys.argv[1], sys.argv[1:])"


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--probe", "tcp_client", "--sink", "jsonl", "--duration", "0.1"),
        ("doctor",),
        ("plugins", "list"),
        ("plugins", "show", "tcp_client"),
    ],
    ids=" ".join,
)
def test_deleted_working_directory_does_not_stop_a_run(arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-I", "-c", _WITHOUT_FOLDER, *TCPLAT, *arguments]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (outcome.returncode, "Error" in outcome.stderr) == (0, False), outcome.stderr
