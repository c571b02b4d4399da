"""The harness itself, without any virtual machine: qemu is replaced by a shell script."""

from __future__ import annotations

import lzma
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.vm import run
from tests.vm.run import VmError

if TYPE_CHECKING:
    from collections.abc import Callable

RELEASE = "6.1.0-9-amd64"
KERNEL = run.Kernel("6.1", "linux-image-6.1.*-amd64", "bookworm-security")
MIRRORS = ["http://mirror.example/debian/", "http://mirror.example/debian-security/"]

# Finds, as qemu would, where the harness expects the exit status and the console.
FAKE_QEMU = """\
#!/bin/sh
for word; do
    case $word in
        file,id=status,path=*) status=${word##*path=} ;;
        file:*) console=${word#file:} ;;
    esac
done
"""
# Like a machine that hangs, and with a child so that killing qemu alone would not be enough.
HANG = """\
sleep 1000 &
echo "$$ $! ready"
wait
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Make an unpacked package, as far as the harness looks at it."""
    folder = tmp_path / "cache/kernels" / f"linux-image-{RELEASE}"
    (folder / "boot").mkdir(parents=True)
    (folder / "boot" / f"vmlinuz-{RELEASE}").touch()
    return folder


@pytest.fixture
def fake_qemu(tmp_path: Path) -> Callable[[str], Path]:
    def make(body: str) -> Path:
        path = tmp_path / "qemu"
        path.write_text(FAKE_QEMU + body)
        path.chmod(0o755)
        return path

    return make


@pytest.fixture
def boot(
    tree: Path,
    fake_qemu: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., int]:
    """Run `main` for one kernel with a fake qemu."""
    monkeypatch.setattr(run, "initramfs", lambda *_, **__: b"")
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def call(body: str, *options: str) -> int:
        cache = str(tree.parent.parent)
        qemu = str(fake_qemu(body))
        words = ["--cache", cache, "--qemu", qemu, "--kernel", "6.1", *options]
        return run.main([*words, "--", "true"])

    return call


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def has_ended(pid: int) -> bool:
    """Return whether a process has ended; a zombie counts as ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state.rpartition(")")[2].split()[0] == "Z"


# ---- which kernels


def test_kernel_list_is_well_formed() -> None:
    kernels = run.read_kernels(run.KERNELS.read_text())
    assert {"5.10", "6.1", "6.12"} <= set(kernels)
    assert not set(kernels) & set(run.read_kernels(run.MORE_KERNELS.read_text()))


def test_kernel_is_one_line() -> None:
    kernels = run.read_kernels("# comment\n\n6.1 linux-image-6.1.*-amd64 bookworm-security # x\n")
    assert kernels == {"6.1": KERNEL}


def test_malformed_line_is_named() -> None:
    with pytest.raises(VmError, match=r"6\.1 linux"):
        run.read_kernels("6.1 linux\n")


@pytest.mark.parametrize(
    ("package", "expected"),
    [
        (f"linux-image-{RELEASE}", True),
        ("linux-image-6.1.0-9-cloud-amd64", False),
        ("linux-image-6.1.0-9-rt-amd64", False),
        ("linux-image-6.1.0-9-amd64-unsigned", False),
        ("linux-image-6.12.5+deb12-amd64", False),
    ],
)
def test_plain_flavour_alone_matches(package: str, *, expected: bool) -> None:
    assert KERNEL.matches(package) is expected


def test_newest_unpacked_package_is_found(tree: Path) -> None:
    newer = tree.with_name("linux-image-6.1.0-10-amd64")
    newer.mkdir()
    assert run.Cache(tree.parent.parent).find(KERNEL) == newer


def test_cached_kernel_is_not_fetched_again(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "output_of", lambda *_, **__: pytest.fail("a program was run"))
    assert run.Cache(tree.parent.parent).fetch([KERNEL]) == {"6.1": tree}


# ---- fetching


def test_apt_ignores_the_sources_and_lists_of_the_machine() -> None:
    config = run.apt_config(Path("/cache/apt"))
    assert 'Dir::Etc::sourcelist "/cache/apt/sources.list";' in config
    assert 'Dir::Etc::sourceparts "/dev/null";' in config
    assert 'Dir::State "/cache/apt/state";' in config
    assert 'Dir::Cache "/cache/apt/cache";' in config
    assert "#clear APT::Update::Post-Invoke;" in config


@pytest.mark.skipif(shutil.which("apt-config") is None, reason="no apt")
def test_generated_apt_configuration_is_valid(tmp_path: Path) -> None:
    (tmp_path / "apt.conf").write_text(run.apt_config(tmp_path))
    env = {**os.environ, "APT_CONFIG": str(tmp_path / "apt.conf")}
    dump = run.output_of("apt-config", "dump", env=env)
    assert f'Dir::Etc::sourcelist "{tmp_path}/sources.list";' in dump
    assert "APT::Update::Post-Invoke:: " not in dump


def test_suite_comes_from_its_archive_and_is_verified() -> None:
    backports = run.Kernel("6.12", "linux-image-6.12.*-amd64", "bookworm-backports")
    sign = f"[arch=amd64 signed-by={run.KEYRING}]"
    assert run.sources_list([KERNEL, KERNEL, backports], MIRRORS).splitlines() == [
        f"deb {sign} http://mirror.example/debian-security/ bookworm-security main",
        f"deb {sign} http://mirror.example/debian/ bookworm-backports main",
    ]


def test_missing_mirror_error_names_the_option() -> None:
    with pytest.raises(VmError, match="--mirror http://HOST/debian-security"):
        run.sources_list([KERNEL], MIRRORS[:1])


def test_newest_version_in_the_suite_is_taken() -> None:
    madison = """\
        linux-image-6.1.0-9-amd64 | 6.1.9-1 | http://m/debian-security bookworm-security/main amd64
       linux-image-6.1.0-10-amd64 | 6.1.10-1 | http://m/debian-security bookworm-security/main amd64
       linux-image-6.1.0-11-amd64 | 6.1.11-1 | http://m/debian bookworm/main amd64
 linux-image-6.1.0-12-cloud-amd64 | 6.1.12-1 | http://m/debian-security bookworm-security/main amd64
    """.strip()
    assert run.newest(madison, KERNEL) == "linux-image-6.1.0-10-amd64=6.1.10-1"
    assert run.newest("", KERNEL) is None


def kernel_image(payload: bytes) -> bytes:
    """Make a kernel in x86's boot format: a header with the place of the payload."""
    head = bytearray(3 * 512)
    head[0x1F1] = 2
    struct.pack_into("<II", head, 0x248, 100, len(payload))
    return bytes(head) + bytes(100) + payload + b"signature"


@pytest.mark.parametrize("packer", ["xz", "zstd"])
def test_kernel_image_is_unpacked(packer: str, tmp_path: Path) -> None:
    if packer == "xz":
        payload = lzma.compress(b"ELF")
    elif shutil.which("zstd"):
        payload = subprocess.run(["zstd"], input=b"ELF", capture_output=True, check=True).stdout
    else:
        pytest.skip("no zstd")
    (tmp_path / "vmlinuz").write_bytes(kernel_image(payload + struct.pack("<I", 3)))
    run.unpack_image(tmp_path / "vmlinuz", tmp_path / "vmlinux")
    assert (tmp_path / "vmlinux").read_bytes() == b"ELF"
    assert len(list(tmp_path.iterdir())) == 2


def test_unknown_compression_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "vmlinuz").write_bytes(kernel_image(b"\x1f\x8b"))
    with pytest.raises(VmError, match="vmlinuz"):
        run.unpack_image(tmp_path / "vmlinuz", tmp_path / "vmlinux")


def test_missing_program_error_names_the_package() -> None:
    with pytest.raises(VmError, match="--install"):
        run.output_of("no-such-program")
    with pytest.raises(VmError, match="--install"):
        run.tool("no-such-program")


def packed(folder: Path, package: str, files: dict[str, bytes]) -> None:
    """Make a Debian package of this name in a folder."""
    root = folder / "made"
    for name, content in {
        "DEBIAN/control": f"Package: {package}\nVersion: 1\nArchitecture: all\n"
        "Maintainer: x <x@example.org>\nDescription: x\n".encode(),
        **files,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    run.output_of("dpkg-deb", "-b", root, folder / f"{package}.deb")
    shutil.rmtree(root)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg")
def test_split_image_packages_become_one_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So Debian packs kernels from 6.19 on: vmlinuz and config are beside the modules."""
    release = "7.3.4-amd64"
    kernel = run.Kernel("7.3", "linux-image-7.3.*-amd64", "backports")
    modules = f"usr/lib/modules/{release}"
    parts = {
        f"linux-image-{release}": {},
        f"linux-base-{release}": {f"{modules}/config": b"config"},
        f"linux-binary-{release}": {f"{modules}/vmlinuz": kernel_image(lzma.compress(b"ELF"))},
        f"linux-modules-{release}": {f"{modules}/kernel/9p.ko": b"module"},
    }
    real = run.output_of

    def output_of(*command: str | Path, env: dict[str, str] | None = None) -> str:
        words = list(map(str, command))
        if "pkgnames" in words:
            return f"linux-image-{release}\n"
        if "madison" in words:
            return f"linux-image-{release} | 1 | http://m/debian backports/main amd64 Packages\n"
        if "depends" in words:
            return "".join(f"Depends: {part}\n" for part in ("linux-base", "dracut", *parts))
        if "download" in words:
            for name in words[words.index("-q") + 1 :]:
                package = name.partition("=")[0]
                packed(Path(words[1].partition("=")[2]), package, parts[package])
            return ""
        return "" if words[0].endswith("depmod") else real(*command, env=env)

    monkeypatch.setattr(run, "output_of", output_of)
    monkeypatch.setattr(run.Cache, "_apt", lambda *_: {})
    tree = run.Cache(tmp_path).fetch([kernel])["7.3"]
    assert (tree / "vmlinux").read_bytes() == b"ELF"
    assert (tree / f"boot/config-{release}").read_bytes() == b"config"
    assert (tree / f"lib/modules/{release}/kernel/9p.ko").read_bytes() == b"module"
    assert run.release_of(tree) == release


# ---- the guest's files


@pytest.mark.parametrize(
    "script",
    [run.INIT.format(release=RELEASE, tree="'/a b'", mount_out=""), run.SUPERVISE],
    ids=["init", "supervise"],
)
def test_guest_scripts_are_valid_shell(script: str) -> None:
    run.output_of("sh", "-n", "-c", script)


def test_command_keeps_its_arguments_and_working_directory(tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s a, "folder"'
    folder.mkdir()
    words = ["a b", "$HOME", "'", '"', "new\nline", "--", ""]
    script = run.command_script(["sh", "-c", 'pwd; printf "%s|" "$@"', "sh", *words], "6.1", folder)
    assert run.output_of("sh", "-c", script) == f"{folder}\n" + "".join(f"{w}|" for w in words)


def test_command_has_a_clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    lines = run.output_of("sh", "-c", run.command_script(["env"], "6.1", Path("/"))).splitlines()
    environment = dict(line.split("=", 1) for line in lines)
    assert environment["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    assert environment["HOME"] == ("/root" if os.geteuid() == 0 else "/run")
    assert environment["TCPLAT_VM"] == "6.1"
    assert "SECRET" not in environment


@pytest.mark.skipif(shutil.which("busybox") is None, reason="no busybox")
def test_initramfs_archive_can_be_unpacked(tmp_path: Path) -> None:
    files = {"init": b"#!x", "a/b/c": b"12345", "empty": b""}
    done = ["busybox", "cpio", "-i", "-d"]
    subprocess.run(done, input=run.cpio(files), cwd=tmp_path, capture_output=True, check=True)
    assert {name: (tmp_path / name).read_bytes() for name in files} == files
    assert os.access(tmp_path / "init", os.X_OK)


def test_commas_are_doubled_for_qemu(tree: Path, tmp_path: Path) -> None:
    command = run.qemu_command("qemu", tree, tmp_path, Path("/a,b"), memory="2G")
    assert any(word.startswith("local,id=out,path=/a,,b,") for word in command)
    assert any(word.endswith("readonly=on") and "id=root" in word for word in command)


@pytest.mark.skipif(shutil.which("mksquashfs") is None, reason="no squashfs-tools")
def test_copied_file_keeps_its_path(tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a, b"
    folder.mkdir()
    (folder / "file").write_text("content")
    machine = tmp_path / "run,1"
    machine.mkdir()
    run.copy_in([folder, tmp_path / "missing"], machine)
    command = run.qemu_command("qemu", tree, machine, None, memory="2G")
    assert any(f"file={tmp_path}/run,,1/copied," in word for word in command)
    path = str(folder / "file").lstrip("/")
    assert run.output_of("unsquashfs", "-cat", machine / "copied", path) == "content"


def test_nothing_is_copied_by_default(tree: Path, tmp_path: Path) -> None:
    assert "-drive" not in run.qemu_command("qemu", tree, tmp_path, None, memory="2G")


def test_console_output_is_escaped(tmp_path: Path) -> None:
    (tmp_path / "console").write_bytes(b"\x1b[2Jone\r\n\r\ntwo\xff\x07\r\n")
    assert run.console_tail(tmp_path) == ["[2Jone", "two\ufffd"]


# ---- running


@pytest.mark.parametrize("status", [0, 1, 7, 137, 255])
def test_harness_exits_with_the_commands_status(status: int, boot: Callable[..., int]) -> None:
    assert boot(f'echo {status} > "$status"\nexit 99') == status


def test_first_failing_status_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    known = run.read_kernels(run.KERNELS.read_text())
    statuses = dict(zip(known, [0, *range(3, 20)], strict=False))
    monkeypatch.setattr(run, "boot", lambda kernel, *_: statuses[kernel.name])
    monkeypatch.setattr(run.Cache, "fetch", lambda *_, **__: dict.fromkeys(known, Path("/")))
    assert run.run(run.parse(["--", "true"], known), known) == 3


def test_output_is_prefixed_with_the_kernel_name(
    boot: Callable[..., int], capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    boot("""printf 'one\\ntwo \\377\\nthree'; echo four >&2; echo 0 > "$status" """)
    assert capfdbinary.readouterr().out == b"[6.1] one\n[6.1] two \xff\n[6.1] threefour\n"


def test_crashed_guest_shows_its_console(
    boot: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert boot('echo "Kernel panic - not syncing" > "$console"') == run.EXIT_FAILED
    assert "[6.1] console: Kernel panic - not syncing\n" in capsys.readouterr().err


def test_garbled_status_is_a_crash(boot: Callable[..., int]) -> None:
    assert boot('echo > "$status"') == run.EXIT_FAILED


def test_missing_qemu_is_one_sentence(
    boot: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert boot("", "--qemu", "no-such-qemu") == run.EXIT_FAILED
    assert "no-such-qemu is missing" in capsys.readouterr().err


def test_results_are_kept_for_each_kernel(boot: Callable[..., int], tmp_path: Path) -> None:
    body = (
        'for word; do case $word in *id=out,path=*) echo "$word";; esac; done; echo 0 > "$status"'
    )
    assert boot(body, "--out", str(tmp_path / "out")) == 0
    assert (tmp_path / "out/6.1").is_dir()


def test_hung_guest_is_killed_with_its_children(
    fake_qemu: Callable[[str], Path],
) -> None:
    with run.started([str(fake_qemu(HANG))], timeout=1000) as guest:
        assert guest.process.stdout
        qemu, child = map(int, guest.process.stdout.readline().split()[:2])
        assert qemu == guest.process.pid
        guest.expire()
        assert guest.process.stdout.read() == b""
    assert guest.timed_out
    assert guest.process.returncode == -signal.SIGKILL
    wait_until(lambda: has_ended(child))


def test_time_limit_is_enforced(boot: Callable[..., int]) -> None:
    assert boot(HANG, "--timeout", "0.2") == run.EXIT_TIMEOUT


def test_guest_that_ended_in_time_is_not_a_timeout(fake_qemu: Callable[[str], Path]) -> None:
    with run.started([str(fake_qemu(""))], timeout=1000) as guest:
        guest.process.wait()
        guest.expire()
    assert not guest.timed_out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_signalled_harness_leaves_no_guest_or_file(
    number: signal.Signals, tree: Path, fake_qemu: Callable[[str], Path]
) -> None:
    words = ["--cache", str(tree.parent.parent), "--kernel", "6.1", "--qemu", str(fake_qemu(HANG))]
    program = textwrap.dedent(f"""\
        import sys
        from tests.vm import run
        run.initramfs = lambda *_, **__: b""
        sys.exit(run.main([*{words!r}, "--", "true"]))
    """)
    with tempfile.TemporaryDirectory() as temporary:
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "TMPDIR": temporary},
            stdout=subprocess.PIPE,
        )
        with process:
            assert process.stdout
            qemu, child = map(int, process.stdout.readline().split()[1:3])
            process.send_signal(number)
        wait_until(lambda: has_ended(qemu))
        if number == signal.SIGKILL:
            # No process was left to kill it; a real qemu has no children.
            os.kill(child, signal.SIGKILL)
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 128 + number
            assert not list(Path(temporary).iterdir())
        wait_until(lambda: has_ended(child))


# ---- the command line


def test_all_usual_kernels_are_the_default() -> None:
    assert run.parse(["--", "true"], ["a", "b"]).kernel == ["a", "b"]
    assert run.parse(["--kernel", "b", "--kernel", "b", "--", "true"], ["a", "b"]).kernel == ["b"]


def test_unusual_kernel_must_be_named() -> None:
    assert run.parse(["--", "true"], ["a"], ["b"]).kernel == ["a"]
    assert run.parse(["--kernel", "b", "--", "true"], ["a"], ["b"]).kernel == ["b"]


def test_arguments_behind_two_dashes_belong_to_the_command() -> None:
    options = run.parse(["--timeout", "5", "--", "x", "--timeout", "9", "--", "y"], ["a"])
    assert options.timeout == 5
    assert options.command == ["x", "--timeout", "9", "--", "y"]


@pytest.mark.parametrize(
    "arguments",
    [["--kernel", "9.9"], ["--timeout", "0"], ["--timeout", "x"], ["true"]],
)
def test_usage_error_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run.parse(arguments, ["6.1"])
    assert caught.value.code == 2


def test_cache_follows_xdg_cache_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert run.default_cache() == Path("/somewhere/tcplat-vm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert run.default_cache() == Path("/home/me/.cache/tcplat-vm")
