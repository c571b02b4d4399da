"""Links, files and pipes of other users cannot redirect an output path."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tcplat_core import Output, Place, ReaderGoneError, UsageError, whole_file
from tcplat_core.plugin.output import held_back
from tcplat_core.run.ready import ReadyFile

OTHER = 4711
"""The uid of another user."""


def never() -> bool:
    return False


def by_output(path: Path | str) -> None:
    output = Output.open(str(path), never)
    output.write(b"ours\n")
    output.close()


def by_whole_file(path: Path | str) -> None:
    with whole_file(str(path)) as file:
        file.write(b"ours\n")


def by_ready_file(path: Path | str) -> None:
    ready = ReadyFile(str(path))
    ready.check()
    ready.write()


WRITERS = (by_output, by_whole_file, by_ready_file)
Writer = Callable[[Path | str], None]
writers = pytest.mark.parametrize("write", WRITERS)

Give = Callable[[Path], None]


@pytest.fixture
def give() -> Give:
    """Give a file, link or folder to another user."""

    def to_another(path: Path) -> None:
        if os.geteuid() == 0:
            os.chown(path, OTHER, OTHER, follow_symlinks=False)
        else:
            pytest.skip("only root can give files away")

    return to_another


@pytest.fixture(params=[0o1777, 0o777, 0o775, 0o700], ids=oct)
def shared(tmp_path: Path, give: Give, request: pytest.FixtureRequest) -> Path:
    """Return a folder that other users can write to: by its mode, or by its owner."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(request.param)
    if request.param == 0o700:
        give(folder)
    return folder


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text("precious")
    return path


@writers
def test_symlink_of_another_user_is_not_followed(
    shared: Path, victim: Path, give: Give, write: Writer
) -> None:
    link = shared / "out"
    link.symlink_to(victim)
    give(link)
    with pytest.raises(UsageError, match="a symbolic link of another user"):
        write(link)
    assert victim.read_text() == "precious"
    assert link.is_symlink()


@writers
def test_dangling_symlink_of_another_user_is_not_followed(
    shared: Path, tmp_path: Path, give: Give, write: Writer
) -> None:
    link = shared / "out"
    link.symlink_to(tmp_path / "made")
    give(link)
    with pytest.raises(UsageError, match="a symbolic link of another user"):
        write(link)
    assert not (tmp_path / "made").exists()


@writers
def test_symlinked_folder_of_another_user_is_not_followed(
    shared: Path, victim: Path, tmp_path: Path, give: Give, write: Writer
) -> None:
    link = shared / "folder"
    link.symlink_to(tmp_path)
    give(link)
    with pytest.raises(UsageError, match=r"a symbolic link of another user .*: folder"):
        write(link / victim.name)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("write", [by_output, by_whole_file])
def test_file_with_a_second_hard_link_is_not_written(
    shared: Path, victim: Path, write: Writer
) -> None:
    (shared / "out").hardlink_to(victim)
    with pytest.raises(UsageError, match=r"file with more than one hard link"):
        write(shared / "out")
    assert victim.read_text() == "precious"


@writers
def test_file_of_another_user_is_not_written(tmp_path: Path, give: Give, write: Writer) -> None:
    tmp_path.chmod(0o1777)
    file = tmp_path / "out"
    file.write_text("theirs")
    give(file)
    with pytest.raises(UsageError, match=r"a file of another user \(uid 4711\)"):
        write(file)
    assert file.read_text() == "theirs"


@writers
def test_pipe_of_another_user_is_not_written(tmp_path: Path, give: Give, write: Writer) -> None:
    tmp_path.chmod(0o1777)
    pipe = tmp_path / "out"
    os.mkfifo(pipe)
    give(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(UsageError, match=r"a pipe of another user \(uid 4711\)"):
        write(pipe)
    assert os.read(reader, 1) == b""
    os.close(reader)


@writers
def test_own_files_in_a_shared_folder_are_written(
    shared: Path, tmp_path: Path, write: Writer
) -> None:
    write(shared / "new")
    write(shared / "new")
    (tmp_path / "mine").mkdir()
    (shared / "link").symlink_to(tmp_path / "mine")
    write(shared / "link" / "out")
    for path in (shared / "new", tmp_path / "mine" / "out"):
        assert path.read_text() in ("ours\n", f"{os.getpid()}\n")


@writers
def test_links_outside_shared_folders_are_followed(tmp_path: Path, write: Writer) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "c").symlink_to(tmp_path / "b" / ".." / "b" / "out")
    write(tmp_path / "c")
    assert (tmp_path / "c").is_symlink()
    assert (tmp_path / "a" / "out").read_text() in ("ours\n", f"{os.getpid()}\n")


def test_circular_symlinks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UsageError, match=re.escape(os.strerror(errno.ELOOP))):
        by_output(tmp_path / "a")


@pytest.mark.parametrize("path", ["/dev/stdout", "/proc/self/fd/1", "/dev/fd/1", "/dev/stderr"])
def test_dev_stdout_and_dev_fd_work(path: str, capfd: pytest.CaptureFixture[str]) -> None:
    by_output(Path(path))
    assert "ours\n" in "".join(capfd.readouterr())


def test_pipe_named_by_its_fd_is_written() -> None:
    reader, writer = os.pipe()
    by_output(Path(f"/dev/fd/{writer}"))
    by_whole_file(Path(f"/proc/self/fd/{writer}"))
    assert os.read(reader, 100) == b"ours\nours\n"
    os.close(reader)
    os.close(writer)


def test_terminal_is_written() -> None:
    main, terminal = os.openpty()
    by_output(Path(os.ttyname(terminal)))
    assert os.read(main, 100) == b"ours\r\n"
    os.close(main)
    os.close(terminal)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("", "No such file"),
        ("no/out", "No such file"),
        (".", "Is a directory"),
        ("x/", "No such file"),
        ("x" * 300, "File name too long"),
        ("a\0b", "null"),
        ("/dev/null/x", "Not a directory"),
        ("/proc/nothing", "No such file|Permission denied|Read-only"),
    ],
)
def test_impossible_path_is_refused_in_one_sentence(
    path: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = os.listdir("/proc/self/fd")
    for write in WRITERS:
        with pytest.raises(UsageError, match=f"^cannot write (the ready file )?.*({why})"):
            write(path)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_socket_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "s"))
        with pytest.raises(UsageError, match="it is a socket"):
            by_output(tmp_path / "s")


def test_missing_permission_is_reported_before_anything_is_created(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may everything")
    tmp_path.chmod(0o500)
    with held_back(), pytest.raises(UsageError, match="Permission denied"):
        by_output(tmp_path / "out")


def test_resolved_path_survives_a_rename_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    place = Place.find(str(tmp_path / "a" / "out"))
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "a").mkdir()
    os.close(place.create(place.name))
    assert (tmp_path / "b" / "out").exists()
    assert not (tmp_path / "a" / "out").exists()
    place.close()


# --- a file that takes the place of another


def test_private_file_stays_private_while_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that opens the new file before it has the old mode can read all later writes."""
    target = tmp_path / "out"
    target.write_bytes(b"secret")
    target.chmod(0o600)
    made: list[int] = []
    chmod = os.fchmod

    def first(fd: int, mode: int) -> None:
        made.append(stat.S_IMODE(os.fstat(fd).st_mode))
        chmod(fd, mode)

    monkeypatch.setattr(os, "fchmod", first)
    with whole_file(str(target)) as file:
        file.write(b"more")
    assert made == [0o600]


def test_whole_file_replaces_at_the_end_and_keeps_the_mode(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("old")
    target.chmod(0o640)
    with whole_file(str(target)) as file:
        file.write(b"new")
        file.flush()
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["out"]


def test_failed_write_keeps_the_old_file_alone(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(str(target)) as file:
        file.write(b"half" * (1 // 0))
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


# --- nothing before it begins


def test_held_back_file_is_unchanged_until_the_run_begins(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("yesterday's")
    with held_back() as outputs:
        first, second = (Output.open(str(path), never) for path in (old, new))
    first.look()
    first.write(b"early\n")
    assert old.read_text() == "yesterday's"
    assert not new.exists()
    for output in outputs:
        output.begin()
    assert (old.read_text(), new.read_text()) == ("early\n", "")
    second.write(b"a row\n")
    assert new.read_text() == "a row\n"
    first.close()
    second.close()


def test_held_back_file_is_unchanged_if_the_run_never_begins(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text("yesterday's")
    before = os.listdir("/proc/self/fd")
    with held_back():
        output = Output.open(str(old), never)
    output.write(b"early\n")
    output.close()
    assert old.read_text() == "yesterday's"
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_symlink_planted_while_held_back_is_not_followed(
    tmp_path: Path, victim: Path, give: Give
) -> None:
    tmp_path.chmod(0o1777)
    with held_back() as outputs:
        Output.open(str(tmp_path / "out"), never)
    (tmp_path / "out").symlink_to(victim)
    give(tmp_path / "out")
    with pytest.raises(UsageError):
        outputs[0].begin()
    assert victim.read_text() == "precious"


# --- the ready file


def test_ready_pipe_is_written_once_a_reader_opens_it(tmp_path: Path) -> None:
    pipe = tmp_path / "ready"
    os.mkfifo(pipe)
    ready = ReadyFile(str(pipe))
    ready.check()
    ready.write()
    assert not ready.written
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    ready.write()
    assert ready.written
    assert int(os.read(reader, 100)) == os.getpid()
    os.close(reader)


# --- a full disk: a small file system of our own


SCRIPT = """
import sys
from tcplat_core import Output, TcplatError
lines, how, size = sys.argv[1] == "lines", sys.argv[2], int(sys.argv[3])
if how == "path":
    output = Output.open("/mnt/out", lambda: False, lines=lines)
else:
    import os
    flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if how == "append" else 0)
    output = Output(os.open("/mnt/out", flags, 0o644), lambda: False, lines)
line = b"x" * (size - 1) + b"\\n"
try:
    while True:
        output.write(line * 7)
except TcplatError as error:
    print(error)
data = open("/mnt/out", "rb").read()
print(len(data) > 0, data.endswith(b"\\n"), len(data) % size, len(data) % (7 * size))
"""


@pytest.mark.parametrize("how", ["path", "stdout", "append"])
@pytest.mark.parametrize("size", [100, 1000, 5000])
def test_full_disk_leaves_whole_lines(how: str, size: int) -> None:
    assert on_a_full_disk("lines", how, size)[1:4] == ["True", "True", "0"]


def test_full_disk_leaves_whole_writes() -> None:
    shown = on_a_full_disk("no lines", "path", 1000)
    assert shown[-1] == "0"


def on_a_full_disk(kind: str, how: str, size: int) -> list[str]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")

    mount = 'mount -t tmpfs -o size=64k none /mnt && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mount, "sh", sys.executable, "-c", SCRIPT]
    ran = subprocess.run(
        [*command, kind, how, str(size)], capture_output=True, text=True, check=True
    )
    assert ran.stdout.startswith("writing failed: No space left on device\n")
    return ["", *ran.stdout.splitlines()[1].split()]


# --- pipes


def test_pipe_receives_whole_lines() -> None:
    """Whenever the run ends, the pipe has no partial line."""
    reader, writer = os.pipe()
    output = Output(writer, lambda: True)
    lines = b"".join(b"%d %s\n" % (number, b"x" * (number % 900)) for number in range(2000))
    with pytest.raises(Exception, match="its reader did not read"):
        output.write(lines)
    os.close(writer)
    with os.fdopen(reader, "rb") as got:
        data = got.read()
    assert data
    assert lines.startswith(data)
    assert data.endswith(b"\n")


def test_reader_that_closes_during_a_write_ends_the_output(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    output = Output.open(str(pipe), never)
    output.write(b"a row\n")
    os.close(reader)
    with pytest.raises(ReaderGoneError):
        output.write(b"another\n")
    output.close()
