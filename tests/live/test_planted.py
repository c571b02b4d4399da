"""Whatever a user plants where tcplat may look, none of it runs with the rights that tcplat has.

Everything is planted at once by a user made for this, and tcplat started in each of these ways with
each of these commands. What is planted records the process that ran it: after root was given up, a
plugin of the user may run. A trap of C is an #error: what is compiled with it fails.
"""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import attrs
import pytest

from .harness import TCPLAT, free_port, needs, patience

USER = "tcplat-planted"
_PYTHON = "/usr/bin/python3"

PLACES = (
    "current folder: header",
    "current folder: modules",
    "PYTHONPATH: modules",
    "PYTHONPATH: sitecustomize",
    "PYTHONSTARTUP",
    "PYTHONHOME",
    "PYTHONUSERBASE",
    "user site: usercustomize",
    "user site: .pth",
    "user site: plugin",
    "HOME: start-up files",
    "ENV, BASH_ENV",
    "BCC_*",
    "CPATH, C_INCLUDE_PATH",
    "PATH: compilers and tools",
    "TMPDIR",
    "XDG_CACHE_HOME",
    "TCPLAT_*, _TCPLAT_COMPLETE",
    "LD_PRELOAD, LD_LIBRARY_PATH",
)
APART = ("PYTHONHOME", "PYTHONUSERBASE")
"""Python that honours these never gets to other places: so they are planted separately."""
C_TRAPS = ("current folder: header", "BCC_*", "CPATH, C_INCLUDE_PATH")
DATA_TRAPS = ("TMPDIR", "XDG_CACHE_HOME")
"""Folders in which nothing may be created with privileges."""
TOOLS = (
    "bash bpftool cc clang env gcc git id ip ld ldconfig less modprobe mount objdump python "
    "python3 readlink sh tar tty uname unxz xz"
)
LIBRARY = "LD_PRELOAD, LD_LIBRARY_PATH"

COMMANDS: Mapping[str, Sequence[str]] = {
    "run": ("run", "-q", "--probe", "tcp_client", "--sink", "jsonl", "--duration", "50ms"),
    "replay": ("replay", "-q", "{capture}", "--sink", "jsonl"),
    "doctor": ("doctor",),
    "plugins": ("plugins", "list"),
    "report": ("report", "-q", "{capture}", "-o", "-"),
}
TRIED = tuple(COMMANDS) if os.environ.get("TCPLAT_LONG") == "1" else ("run",)
"""`run` alone compiles, loads, forks and keeps rights for long; the others take TCPLAT_LONG=1."""
CAPABILITIES = "+bpf,+perfmon,+net_admin"


@attrs.frozen
class Planted:
    """A user with traps, and a tcplat that is readable to all.

    Args:
        root: All of it.
        user: The user.
    """

    root: Path
    user: pwd.struct_passwd

    @property
    def program(self) -> str:
        """The command tcplat."""
        return str(self.root / "venv/bin/tcplat")

    @property
    def capable(self) -> str:
        """The same, on an interpreter that has capabilities of its own."""
        return str(self.root / "capable/bin/tcplat")

    @property
    def folder(self) -> Path:
        """Where it is started."""
        return self.root / "cwd"

    def as_user(self, environment: Mapping[str, str], *rights: str) -> list[str]:
        """Return the prefix that runs the rest as the user, with the user's environment."""
        ids = (f"--reuid={self.user.pw_uid}", f"--regid={self.user.pw_gid}", "--clear-groups")
        return ["/usr/bin/setpriv", *ids, *rights, "/usr/bin/env", *assigned(environment)]

    def environment(self, *, apart: bool) -> dict[str, str]:
        """Return the user's environment."""
        root, home = self.root, self.user.pw_dir
        python = f"{root}/python"
        plain = {"HOME": home, "USER": USER, "LANG": "C.UTF-8", "PATH": os.environ["PATH"]}
        if apart:
            return plain | {
                "PYTHONHOME": f"{root}/pythonhome",
                "PYTHONUSERBASE": f"{root}/userbase",
            }
        return plain | {
            "PYTHONPATH": f"{python}:{root}/sitecustomize",
            "PYTHONSTARTUP": f"{root}/startup.py",
            "PYTHONINSPECT": "",
            "ENV": f"{root}/env.sh",
            "BASH_ENV": f"{root}/env.sh",
            "BCC_KERNEL_SOURCE": f"{root}/kernel",
            "BCC_LINUX_VERSION_CODE": "0",
            "BCC_SYMFS": f"{root}/kernel",
            "CPATH": f"{root}/include",
            "C_INCLUDE_PATH": f"{root}/include",
            "CPLUS_INCLUDE_PATH": f"{root}/include",
            "PATH": f"{root}/path:{plain['PATH']}",
            "TMPDIR": f"{root}/temporary",
            "XDG_CACHE_HOME": f"{root}/cache",
            "XDG_CONFIG_HOME": f"{home}/.config",
            "TCPLAT_LIBRARY": f"{root}/trap.so",
            "TCPLAT_CACHE": f"{root}/cache",
            "_TCPLAT_COMPLETE": "bash_source",
            "LD_PRELOAD": f"{root}/trap.so",
            "LD_LIBRARY_PATH": f"{root}/libraries",
        }

    def notes(self) -> list[Note]:
        """Return which process ran what since the last call."""
        found = []
        for path in (self.root / "notes").iterdir():
            found.append(Note.read(path))
            path.unlink()
        return found

    def changes(self) -> list[str]:
        """Return the user's folders in which files were created or removed since the last call."""
        found = []
        for name in ("temporary", "cache"):
            folder = self.root / name
            if folder.stat().st_mtime_ns:
                found.append(name)
            for one in folder.iterdir():
                shutil.rmtree(one) if stat.S_ISDIR(one.lstat().st_mode) else one.unlink()
            os.utime(folder, ns=(0, 0))
        return found


@attrs.frozen
class Note:
    """Something planted has run.

    Args:
        place: One of PLACES.
        privileged: With a uid or a capability that the user does not have.
        command: What the process was.
    """

    place: str
    privileged: bool
    command: str

    @classmethod
    def read(cls, path: Path) -> Note:
        status, _, command = path.read_text(errors="replace").partition("\0")
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        uids = {int(uid) for uid in fields["Uid"].split()}
        capabilities = int(fields["CapEff"], 16) | int(fields["CapPrm"], 16)
        place = PLACES[int(path.name.partition(".")[0])]
        # Without a user behind sudo, uid 0 stays, without capabilities.
        given_up = not capabilities and fields["NoNewPrivs"].strip() == "1"
        return cls(place, not given_up and (0 in uids or bool(capabilities)), command)


def python_trap(root: Path, place: str) -> str:
    """Return Python that records the process that runs it; one line, as a .pth file needs.

    Without open(): where `encodings` is imported there is none yet.
    """
    stem = f"{root}/notes/{PLACES.index(place)}"
    return (
        "import os; read = lambda name: os.read(os.open('/proc/self/' + name, 0), 4096); "
        f"to = os.open('{stem}.' + os.urandom(8).hex(), os.O_WRONLY | os.O_CREAT, 0o666); "
        "os.write(to, read('status') + bytes(1) + read('cmdline').replace(bytes(1), b' '))\n"
    )


def shell_trap(root: Path, place: str) -> str:
    """Return the same for a shell, in which no command is looked up on PATH."""
    target = f"{root}/notes/{PLACES.index(place)}.$$.sh"
    return (
        f"{{ while IFS= read -r line; do printf '%s\\n' \"$line\"; done </proc/$$/status; "
        f"printf '\\0%s' \"$0\"; }} >{target}\n"
    )


LIBRARY_TRAP = r"""
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>
static void copy(int to, const char *path) {
    char text[4096];
    int from = open(path, O_RDONLY);
    for (ssize_t n; (n = read(from, text, sizeof text)) > 0;)
        if (write(to, text, n) != n) break;
    close(from);
}
__attribute__((constructor)) static void note(void) {
    char path[512];
    snprintf(path, sizeof path, "%s.%d.%p", NOTE, (int)getpid(), (void *)path);
    int to = open(path, O_WRONLY | O_CREAT | O_EXCL, 0666);
    if (to < 0) return;
    copy(to, "/proc/self/status");
    if (write(to, "", 1) == 1) copy(to, "/proc/self/cmdline");
    close(to);
}
"""


def plant(root: Path, home: Path) -> None:
    """Lay all the traps."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"

    def write(path: Path, text: str, mode: int = 0o644) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    def trap(place: str) -> str:
        return python_trap(root, place)

    modules = ("attr", "attrs", "click", "msgspec", "pluggy", "pyroute2", "ctypes", "json", "bcc")
    for folder, place in (("cwd", "current folder: modules"), ("python", "PYTHONPATH: modules")):
        for name in (*modules, "tcplat_core", "tcplat_sinks", "tcplat_tcp_client"):
            write(root / folder / name / "__init__.py", trap(place))
    error = "#error planted\n"
    for name in (
        "linux/types.h",
        "linux/kconfig.h",
        "uapi/linux/bpf.h",
        "asm/page.h",
        "bcc/proto.h",
    ):
        write(root / "cwd" / name, error)
        write(root / "include" / name, error)
        write(root / "kernel/include" / name, error)
    write(root / "sitecustomize/sitecustomize.py", trap("PYTHONPATH: sitecustomize"))
    write(root / "startup.py", trap("PYTHONSTARTUP"))
    write(root / "env.sh", shell_trap(root, "ENV, BASH_ENV"))

    plant_standard_library(root, root / "pythonhome/lib" / version)
    site = Path("lib") / version / "site-packages"
    write(root / "userbase" / site / "trap.pth", trap("PYTHONUSERBASE"))
    users = home / ".local" / site
    write(users / "usercustomize.py", trap("user site: usercustomize"))
    write(users / "trap.pth", trap("user site: .pth"))
    write(users / "planted_plugin.py", trap("user site: plugin"))
    info = users / "planted-1.dist-info"
    write(info / "METADATA", "Metadata-Version: 2.1\nName: planted\nVersion: 1\n")
    entries = "[tcplat]\nplanted = planted_plugin\n[tcplat.commands]\nplanted = planted_plugin:x\n"
    write(info / "entry_points.txt", entries)

    for name in (".profile", ".bashrc", ".bash_profile", ".config/tcplat/config", ".tcplatrc"):
        write(home / name, shell_trap(root, "HOME: start-up files"))
    write(home / ".pythonrc.py", trap("HOME: start-up files"))
    tools = (
        "cc gcc clang ld ip bpftool bash sh env python python3 readlink ldconfig tar xz modprobe"
    )
    for name in (*tools.split(), "unxz", "objdump", "id", "uname", "mount", "tty", "less", "git"):
        text = "#!/bin/bash -p\n" + shell_trap(root, "PATH: compilers and tools")
        write(root / "path" / name, text, 0o755)
    for name in ("temporary", "cache"):
        (root / name).mkdir()

    plant_libraries(root)


def plant_libraries(root: Path) -> None:
    """Build one that records the process that loads it, under several names."""
    source = root / "trap.c"
    source.write_text(LIBRARY_TRAP)
    note = f'-DNOTE="{root}/notes/{PLACES.index(LIBRARY)}"'
    subprocess.run(
        ["cc", "-shared", "-fPIC", note, "-o", str(root / "trap.so"), str(source)], check=True
    )
    (root / "libraries").mkdir()
    for name in ("libbcc.so.0", "libLLVM-14.so.1", "libclang-cpp.so.14"):
        shutil.copy(root / "trap.so", root / "libraries" / name)


def plant_standard_library(root: Path, library: Path) -> None:
    """All of links, but for what is imported first."""
    real = Path(
        subprocess.run(
            [_PYTHON, "-I", "-c", "import os; print(os.path.dirname(os.__file__))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
    )
    library.mkdir(parents=True)
    for one in real.iterdir():
        if one.name != "encodings":
            (library / one.name).symlink_to(one)
    shutil.copytree(real / "encodings", library / "encodings")
    with (library / "encodings/__init__.py").open("a") as file:
        file.write(python_trap(root, "PYTHONHOME"))


def install(folder: Path, python: Path) -> None:
    """Make a venv that sees what a plain Python sees, the user's packages included."""
    options = ("--without-pip", "--system-site-packages")
    subprocess.run([_PYTHON, "-I", "-m", "venv", *options, str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    site = sysconfig.get_paths()["purelib"]
    (packages / "ours.pth").write_text(f"import site; site.addsitedir({site!r})\n")
    for one in (Path(TCPLAT[0]), Path(TCPLAT[0]).with_name("tcplat-start")):
        if one.exists():
            first, rest = one.read_text().split("\n", 1)
            # As an installer writes it, for this Python.
            first = f"#!{python}" if "python" in first else first
            (folder / "bin" / one.name).write_text(f"{first}\n{rest}")
            (folder / "bin" / one.name).chmod(0o755)


@pytest.fixture(scope="module")
def planted(_root: None) -> Iterator[Planted]:
    """Yield the user, the traps and the program; remove them afterwards."""
    needs("sudo", "useradd", "userdel", "setpriv", "setcap", "cc", _PYTHON)
    code = f"import sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
    if subprocess.run([_PYTHON, "-I", "-c", code], check=False).returncode:
        pytest.skip("the system's Python is of another version than that of the tests")
    with ExitStack() as stack:
        root = Path(tempfile.mkdtemp(prefix="tcplat-planted-", dir="/tmp"))
        stack.callback(shutil.rmtree, root)
        root.chmod(0o755)
        home = root / "home"
        subprocess.run(["useradd", "-M", "-d", str(home), "-s", "/bin/sh", USER], check=True)
        stack.callback(subprocess.run, ["userdel", USER], check=False, stderr=subprocess.DEVNULL)
        rule = Path("/etc/sudoers.d") / USER
        stack.callback(rule.unlink)
        rule.touch(mode=0o440)
        rule.write_text(f"{USER} ALL=(root) NOPASSWD:SETENV: ALL\n")
        user = pwd.getpwnam(USER)
        plant(root, home)
        for one in root.rglob("*"):
            os.lchown(one, user.pw_uid, user.pw_gid)
        (root / "notes").mkdir()
        (root / "notes").chmod(0o777)
        # Root's own, as the README wants it.
        install(root / "venv", root / "venv/bin/python")
        install(root / "capable", root / "capable/bin/python")
        interpreter = root / "capable/bin/python"
        interpreter.unlink()
        shutil.copy(Path(_PYTHON).resolve(), interpreter)
        words = CAPABILITIES.replace("+", "cap_")
        subprocess.run(["setcap", f"{words}+ep", str(interpreter)], check=True)
        made = Planted(root, user)
        tried = subprocess.run(
            [*made.as_user({}), made.program, "plugins", "list"], check=False, capture_output=True
        )
        if tried.returncode:
            pytest.skip("no other user can read this Python and its packages")
        capture(made)
        made.notes()
        made.changes()
        yield made


def capture(planted: Planted) -> None:
    """One connection, for `replay` and `report`."""
    port = free_port()
    traffic = textwrap.dedent(f"""
        import socket, threading
        l = socket.create_server(("127.0.0.1", {port}))
        threading.Thread(target=lambda: l.accept()[0].recv(9), daemon=True).start()
        s = socket.create_connection(("127.0.0.1", {port})); s.send(b"x"); s.close()
    """)
    made = subprocess.run(
        [
            *(*TCPLAT, "run", "-q", "--probe", "tcp_client", "--port", str(port)),
            *("--sink", "jsonl", "--", sys.executable, "-I", "-c", traffic),
        ],
        check=True,
        capture_output=True,
    )
    assert made.stdout.count(b"\n") > 3
    path = planted.root / "capture.jsonl"
    path.write_bytes(made.stdout)
    path.chmod(0o644)


Environment = Mapping[str, str]
SUDO = ("/usr/bin/sudo", "-n")


def sudo(planted: Planted, environment: Environment) -> list[str]:
    return [*planted.as_user(environment), *SUDO, planted.program]


def sudo_e(planted: Planted, environment: Environment) -> list[str]:
    return [*planted.as_user(environment), *SUDO, "-E", planted.program]


def sudo_kept(planted: Planted, environment: Environment) -> list[str]:
    """As with env_keep, each variable comes through: PYTHONPATH, too, which -E leaves out."""
    return [*planted.as_user(environment), *SUDO, *assigned(environment), planted.program]


def root_with_the_users_environment(planted: Planted, environment: Environment) -> list[str]:
    return ["/usr/bin/env", *assigned(environment), planted.program]


def capabilities_only(planted: Planted, environment: Environment) -> list[str]:
    given = (f"--inh-caps={CAPABILITIES}", f"--ambient-caps={CAPABILITIES}")
    return [*planted.as_user(environment, *given), planted.program]


def capable_interpreter(planted: Planted, environment: Environment) -> list[str]:
    return [*planted.as_user(environment), planted.capable]


def assigned(environment: Environment) -> list[str]:
    """As env(1) and sudo(8) take variables."""
    return [f"{name}={value}" for name, value in environment.items()]


MODES: Mapping[str, Callable[..., list[str]]] = {
    "sudo": sudo,
    "sudo -E": sudo_e,
    "sudo VARIABLE=": sudo_kept,
    "root, user's environment": root_with_the_users_environment,
    "capabilities": capabilities_only,
    "setcap": capable_interpreter,
}
KEEPS_LIBRARIES = ("sudo VARIABLE=", "root, user's environment", "capabilities")
"""The dynamic linker heeds LD_PRELOAD before any program runs: only sudo, and what gains rights by
being executed, are spared. There it must not get beyond what the user's caller started."""


@attrs.frozen
class Started:
    """Outcome of a start, and what ran."""

    notes: list[Note]
    made: list[str]
    """What a privileged process created in the user's folders."""


Start = Callable[[str, str, bool], Started]


@pytest.fixture(scope="module")
def started(planted: Planted) -> Start:
    """Start each command in each way once."""

    @cache
    def start(mode: str, command: str, apart: bool) -> Started:  # noqa: FBT001 - the cache's key
        environment = planted.environment(apart=apart)
        words = [word.format(capture=planted.root / "capture.jsonl") for word in COMMANDS[command]]
        if command == "run":
            # Never compiled before: no cache can spare the compiler.
            words += ["--min-latency", f"{1 << 30 | int.from_bytes(os.urandom(4), 'big')}ns"]
        done = subprocess.run(
            [*MODES[mode](planted, environment), *words],
            cwd=planted.folder,
            capture_output=True,
            check=False,
            timeout=patience(120),
        )
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        if command != "doctor":  # which says what capabilities do not suffice for
            assert done.returncode == 0, done.stderr.decode()
        assert done.stdout
        return Started(planted.notes(), planted.changes())

    return start


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", TRIED)
@pytest.mark.parametrize("mode", MODES)
def test_planted_code_never_runs_with_privileges(
    mode: str, command: str, place: str, started: Start
) -> None:
    outcome = started(mode, command, place in APART)
    if place in C_TRAPS:
        return  # it succeeded, so the compiler has met no #error
    if place in DATA_TRAPS:
        assert ("temporary" if place == "TMPDIR" else "cache") not in outcome.made
        return
    ran = [note.command for note in outcome.notes if note.place == place and note.privileged]
    if place == LIBRARY and mode in KEEPS_LIBRARIES:
        # The process that started it had it already; what tcplat starts with privileges has not.
        ran = [one for one in ran if "tcplat_core" in one]
    assert ran == []


def test_table_has_every_cell(measured: Callable[[str], None]) -> None:
    cells = len(PLACES) * len(MODES) * len(TRIED)
    assert len(PLACES) >= 15
    measured(
        f"{len(PLACES)} planted places x {len(MODES)} ways to start x {len(TRIED)} commands: "
        f"{cells} cells"
    )


def test_traps_are_triggered_without_isolation(planted: Planted) -> None:
    """Without privileges and without -I, the user triggers each of them."""
    python = str(planted.root / "venv/bin/python")
    caught: set[str] = set()
    runs = (
        (False, [python, "-c", "import click, planted_plugin"]),
        (False, [python, "-P", "-c", "import click"]),
        (False, [python, "-i"]),
        (False, [f"{planted.root}/path/cc"]),
        (False, ["/bin/bash", "-c", "."]),
        (False, ["/bin/bash", "--login", "-c", ":"]),
        (True, [python, "-c", "pass"]),
    )
    for apart, command in runs:
        environment = planted.environment(apart=apart)
        for variables in (environment, {**environment, "PYTHONPATH": "", "PYTHONHOME": ""}):
            plain = {key: value for key, value in variables.items() if value}
            subprocess.run(
                [*planted.as_user(plain), *command],
                cwd=planted.folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
            )
        caught |= {note.place for note in planted.notes()}
    assert caught >= {
        place
        for place in PLACES
        if place not in (*C_TRAPS, *DATA_TRAPS, "TCPLAT_*, _TCPLAT_COMPLETE")
    }
