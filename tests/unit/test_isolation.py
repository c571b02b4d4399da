"""The privileged compiler inherits nothing from its caller, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tcplat_core.errors import CannotRunError
from tcplat_core.loader import isolation
from tcplat_core.run import privileges

REAL_DROP = privileges.drop
"""Before conftest.py replaces it."""

BEGIN = """
import os, sys
from pathlib import Path
from typing import Any
from tcplat_core.loader import isolation
isolation.begin(int(sys.argv[1]))
"""


def python(code: str, *arguments: str, **how: Any) -> subprocess.Popen[str]:
    """Start a child, and let it run the code."""
    return subprocess.Popen(
        [sys.executable, "-I", "-c", BEGIN + code, str(os.getpid()), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        **how,
    )


def output(child: subprocess.Popen[str]) -> str:
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    return out.strip()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize(
    "start",
    [
        "from tcplat_core.run.loader_process import LoaderProcess as L; it = L.start().process",
        "from tcplat_core.testing.trial_process import Trial; it = Trial.start('compile').process",
    ],
)
def test_child_dies_with_its_parent_before_python_starts(start: str, tmp_path: Path) -> None:
    """Python is replaced by a program that does not watch its parent."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    code = f"import os, signal, sys; sys.executable = {str(program)!r}; {start}"
    code += "; print(it.pid, flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    assert select.select([pidfd], [], [], 10)[0]
    os.close(pidfd)


def test_callers_working_directory_and_umask_are_replaced(tmp_path: Path) -> None:
    child = python("print(os.getcwd(), os.umask(0))", cwd=tmp_path, umask=0)
    assert output(child) == f"/ {0o077}"


def test_deleted_working_directory_is_not_an_error(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()

    def enter() -> None:
        os.chdir(gone)
        gone.rmdir()

    assert output(python("print(os.getcwd())", preexec_fn=enter)) == "/"


def test_ignored_and_blocked_signals_are_not_inherited() -> None:
    def ignore_and_block() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())

    code = (
        "status = Path('/proc/self/status').read_text()\n"
        "print(*(int(status.split(f'Sig{name}:')[1].split()[0], 16) for name in ('Blk', 'Ign')))"
    )
    blocked, ignored = map(int, output(python(code, preexec_fn=ignore_and_block)).split())
    # The C library keeps 32 and 33 for itself: their inherited state cannot be changed.
    ours = sum(1 << number - 1 for number in signal.valid_signals())
    assert (blocked & ours, ignored & ours) == (
        0,
        1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1,
    )


def test_soft_limits_except_core_are_raised_to_the_hard_limits() -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CPU, (100, resource.RLIM_INFINITY))

    code = (
        "import resource as r\nprint(*(r.getrlimit(one)[0] for one in "
        "(r.RLIMIT_FSIZE, r.RLIMIT_CPU, r.RLIMIT_CORE)))"
    )
    assert output(python(code, preexec_fn=limit)) == "-1 -1 0"


def test_orphaned_child_exits_immediately() -> None:
    """The parent died before prctl(PR_SET_PDEATHSIG) was called."""
    child = subprocess.run(
        [sys.executable, "-I", "-c", BEGIN + "print('still here')", str(os.getpid() + 1)],
        stdout=subprocess.PIPE,
        check=False,
    )
    assert (child.returncode, child.stdout) == (1, b"")


def test_child_dies_with_its_parent() -> None:
    # The shell is its parent, and passes its own pid.
    script = '"$0" -I -c "$1" $$ <&- & echo $!; read -r line'  # $$ is the shell's own pid
    code = BEGIN + "import time\nprint('begun', flush=True)\ntime.sleep(600)"
    shell = subprocess.Popen(
        ["bash", "-c", script, sys.executable, code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert shell.stdout
    lines = {shell.stdout.readline().strip() for _ in range(2)}
    (pid,) = lines - {"begun"}
    shell.kill()
    shell.communicate()
    eventually(lambda: not alive(int(pid)))


def alive(pid: int) -> bool:
    """Return whether it exists and is not a zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


WORK = """
import tempfile
above = Path(sys.argv[2])
work = isolation.WorkFolder.enter(above)
print(os.getcwd(), oct(work.path.stat().st_mode & 0o777), tempfile.gettempdir())
print(isolation.scratch(above), isolation.scratch(Path("/usr")), flush=True)
"""


def test_work_folder_is_private_and_removed(tmp_path: Path) -> None:
    lines = output(python(WORK + "work.close()\nprint(os.getcwd())", str(tmp_path))).splitlines()
    folder, mode, temporary = lines[0].split()
    assert Path(folder).parent == tmp_path
    assert (mode, temporary) == ("0o700", folder)
    assert lines[1:] == [f"{folder} /usr", "/"]
    assert list(tmp_path.iterdir()) == []


def test_killed_child_leaves_no_work_folder(tmp_path: Path) -> None:
    code = "(work.path / 'below').mkdir()\nprint('made', flush=True)\nimport time\ntime.sleep(600)"
    child = python(WORK + code, str(tmp_path))
    assert child.stdout
    while child.stdout.readline() != "made\n":
        pass
    assert len(list(tmp_path.iterdir())) == 1
    child.kill()
    child.communicate()
    eventually(lambda: not list(tmp_path.iterdir()))


def test_unwritable_temporary_folder_is_passed_over(tmp_path: Path) -> None:
    lines = output(python(WORK + "work.close()", str(tmp_path / "missing"))).splitlines()
    folder = Path(lines[0].split()[0])
    assert folder.parent in isolation._TEMPORARY
    assert not folder.exists()


def test_full_temporary_folder_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, roomy = tmp_path / "full", tmp_path / "roomy"

    def fallocate(fd: int, _at: int, _bytes: int) -> None:
        if "/full/" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    for folder in (full, roomy):
        folder.mkdir()
    assert isolation._made([full / "work", roomy / "work"]) == roomy / "work"
    assert (list(full.iterdir()), list((roomy / "work").iterdir())) == ([], [])


def test_stale_work_folders_are_removed(tmp_path: Path) -> None:
    old, young = tmp_path / "tcplat-work-0", tmp_path / "tcplat-work-1"
    for folder in (old, young):
        (folder / "include").mkdir(parents=True)
    os.utime(old, (0, 0))
    output(python(WORK + "work.close()", str(tmp_path)))
    assert list(tmp_path.iterdir()) == [young]


def test_pytest_process_is_not_an_orphan() -> None:
    assert not isolation.orphaned()
    isolation.refuse_orphan()


@pytest.mark.parametrize(("given", "gid"), [("0", 65534), ("65534", 65534), ("4", 65534)])
def test_privileged_groups_of_the_caller_are_dropped(
    given: str, gid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(privileges, "_can_read_python", lambda *_: True)
    monkeypatch.setenv("SUDO_UID", "65534")
    monkeypatch.setenv("SUDO_GID", given)
    found = privileges._user_behind_sudo()
    assert found
    assert found[:2] == (65534, gid)
    assert not {0, 4} & set(found[2])


@pytest.mark.parametrize("value", ["-1", "4294967295", "x", "1e3", "²", " 5"])
@pytest.mark.parametrize("name", ["SUDO_UID", "SUDO_GID"])
def test_invalid_sudo_uid_or_gid_is_refused(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To setresuid(2), -1 means no change: so it is not a uid."""
    monkeypatch.setenv("SUDO_UID", "65534")
    monkeypatch.setenv(name, value)
    with pytest.raises(CannotRunError) as refused:
        privileges._user_behind_sudo()
    assert str(refused.value) == (f"{name}={value} is not a number as sudo sets it: unset {name}")


@pytest.mark.parametrize("name", ["SUDO_UID", "SUDO_GID"])
@pytest.mark.skipif(os.geteuid() != 0, reason="for others the variable means nothing")
def test_command_with_an_invalid_sudo_uid_or_gid_exits_with_3(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-m", "tcplat_core", "plugins", "list"],
        env={**os.environ, "SUDO_UID": "65534", name: "-1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.strip() == f"tcplat: {name}=-1 is not a number as sudo sets it: unset {name}"


@pytest.mark.parametrize(
    ("given", "left"),
    [
        pytest.param({"SUDO_UID": "1000", "HOME": "/root"}, None, id="sudo -E"),
        pytest.param({"HOME": "{folder}"}, None, id="su -m"),
        pytest.param({"HOME": "/"}, "/x", id="root's own"),
    ],
)
def test_remaining_uid_0_ignores_the_environment_of_another_user(
    given: Mapping[str, str], left: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSSL runs what OPENSSL_CONF names, with uid 0; where Python lies below /root it stays."""
    if os.geteuid():
        pytest.skip("takes uid 0")
    os.chown(tmp_path, 1000, 1000)
    given = {name: value.format(folder=tmp_path) for name, value in given.items()}
    monkeypatch.setattr(privileges, "_can_read_python", lambda *_: False)
    for change in ("_give_up_capabilities", "_check"):
        monkeypatch.setattr(privileges, change, lambda: None)
    monkeypatch.setattr(privileges, "_dropped", False)
    monkeypatch.setattr(privileges, "_given", None)
    monkeypatch.setattr(os, "environ", {**given, "OPENSSL_CONF": "/x", "LANG": "C.UTF-8"})
    privileges.hide_environment()
    REAL_DROP()
    assert os.environ.get("OPENSSL_CONF") == left
    assert os.environ["LANG"] == "C.UTF-8"
    assert privileges.environment()["OPENSSL_CONF"] == "/x"  # for the command after --
