#!/usr/bin/env python3
"""Runs a command under Debian's kernels, each in a virtual machine of its own.

    python tests/vm/run.py [--kernel 6.1] [--timeout 900] [--out DIR] -- COMMAND [ARGS]

The command finds this machine's file system at the same paths, may write everywhere (what it
writes is thrown away, save in `$TCPLAT_VM_OUT`), is root, starts in the current folder with HOME
and a PATH that begins with this Python's folder, and sees `TCPLAT_VM`, the kernel's name. Its
output comes line by line, prefixed with the kernel's name.

Exit status: the command's own (128 + N when signal N killed it), from the first kernel where it is
not 0; 124 when the time was up; 125 when the machine could not run it (the guest's last console
lines say why); 2 for a usage error.

`kernels.txt` lists the kernels, `more-kernels.txt` those that have to be named. Their packages are
fetched once, with apt, into `$XDG_CACHE_HOME/tcplat-vm`, beside a private apt configuration: this
machine's own package sources and lists stay as they are. KVM is not used, so it runs anywhere,
about ten times slower than the machine itself. The host must be x86-64; `--install` installs the
Debian packages that it needs.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import fnmatch
import lzma
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import FrameType

# All that the harness needs from Debian, beside what every Debian has.
PACKAGES = (
    *("busybox-static", "debian-archive-keyring", "kmod", "qemu-system-x86"),
    *("squashfs-tools", "zstd"),
)
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
KERNELS = Path(__file__).with_name("kernels.txt")
MORE_KERNELS = Path(__file__).with_name("more-kernels.txt")
# The cloud flavour cannot mount 9p; the real-time one is another scheduler's kernel.
UNWANTED_FLAVOURS = ("-cloud-", "-rt-")
MODULES = (
    *("virtio_pci", "virtio_console", "virtio_blk", "squashfs"),
    *("9pnet_virtio", "9p", "overlay"),
)
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

EXIT_TIMEOUT = 124
EXIT_FAILED = 125
CONSOLE_LINES = 60


class VmError(Exception):
    """The command could not be run; the message is one sentence for the user."""


# ---- which kernels


@dataclass(frozen=True)
class Kernel:
    """One line of kernels.txt.

    Attributes:
        name: What the user calls it.
        pattern: Shell pattern of the package's name.
        suite: The Debian suite that has the package.
    """

    name: str
    pattern: str
    suite: str

    def matches(self, package: str) -> bool:
        """Return whether a package is this kernel."""
        return fnmatch.fnmatchcase(package, self.pattern) and not any(
            flavour in package for flavour in UNWANTED_FLAVOURS
        )


def read_kernels(text: str) -> dict[str, Kernel]:
    """Parse kernels.txt.

    Args:
        text: The file's content.

    Returns:
        The kernels by name, in the file's order.

    Raises:
        VmError: When a line has not three words.
    """
    kernels = {}
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 3:
            raise VmError(f"kernels.txt: a line is NAME PACKAGE SUITE, not {line!r}")
        kernels[words[0]] = Kernel(*words)
    return kernels


def natural(text: str) -> list[int]:
    """Return a sort key for versions and package names: 6.1.0-9 comes before 6.1.0-10."""
    return [int(number) for number in re.findall(r"\d+", text)]


# ---- fetching them


def apt_config(folder: Path) -> str:
    """Write the private apt configuration.

    The machine's own configuration is read as well (proxies stand there), so everything that
    points to its sources, lists and hooks is replaced.

    Args:
        folder: Where apt keeps its lists and looks for `sources.list`.
    """
    return "\n".join(
        (
            f'Dir::State "{folder}/state";',
            'Dir::State::status "/dev/null";',
            f'Dir::Cache "{folder}/cache";',
            f'Dir::Etc::sourcelist "{folder}/sources.list";',
            'Dir::Etc::sourceparts "/dev/null";',
            'Dir::Etc::preferences "/dev/null";',
            'Dir::Etc::preferencesparts "/dev/null";',
            # The folder is the user's own: the unprivileged user that apt downloads as cannot
            # write there, and apt would say so at every call.
            'APT::Sandbox::User "root";',
            'APT::Architecture "amd64";',
            'Acquire::Languages "none";',
            "#clear APT::Update::Pre-Invoke;",
            "#clear APT::Update::Post-Invoke;",
            "#clear APT::Update::Post-Invoke-Success;",
            "",
        )
    )


def sources_list(kernels: Iterable[Kernel], repositories: Sequence[str]) -> str:
    """Write the private sources.list.

    Args:
        kernels: The kernels that give the suites.
        repositories: Addresses of the machine's package sources, from which Debian's two archives
            are picked.

    Raises:
        VmError: When the machine has no source for a suite.
    """
    lines = set()
    for kernel in kernels:
        archive = "debian-security" if kernel.suite.endswith("-security") else "debian"
        address = next((a for a in repositories if a.rstrip("/").endswith(f"/{archive}")), None)
        if address is None:
            raise VmError(
                f"no package source of this machine is a {archive} mirror: "
                f"name one with --mirror http://HOST/{archive}"
            )
        lines.add(f"deb [arch=amd64 signed-by={KEYRING}] {address} {kernel.suite} main\n")
    return "".join(sorted(lines))


def newest(madison: str, kernel: Kernel) -> str | None:
    """Pick a package from what `apt-cache madison` printed.

    Args:
        madison: Lines of `package | version | address suite/component ...`.
        kernel: What to look for.

    Returns:
        `package=version`, or None when the suite has none.
    """
    found = []
    for line in madison.splitlines():
        package, version, source = (field.strip() for field in line.split("|"))
        if kernel.matches(package) and f" {kernel.suite}/" in f" {source}":
            found.append((natural(version), f"{package}={version}"))
    return max(found)[1] if found else None


def output_of(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """Run a program and return its output.

    Raises:
        VmError: When it is missing or fails.
    """
    try:
        done = subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise VmError(f"{command[0]} is missing: run {sys.argv[0]} --install") from None
    if done.returncode:
        raise VmError(f"{shlex.join(map(str, command))} failed: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Cache:
    """The folder that keeps what was fetched.

    Attributes:
        root: Its path.
        mirrors: Addresses that come before the machine's own package sources.
    """

    root: Path
    mirrors: tuple[str, ...] = ()

    def find(self, kernel: Kernel) -> Path | None:
        """Return the newest unpacked package of a kernel, if there is one."""
        folder = self.root / "kernels"
        names = [path.name for path in folder.glob("*") if kernel.matches(path.name)]
        return folder / max(names, key=natural) if names else None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Let one process at a time fetch."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def fetch(self, kernels: Sequence[Kernel], *, update: bool = False) -> dict[str, Path]:
        """Unpack kernels into the cache where they are missing.

        Args:
            kernels: Which ones.
            update: Look for newer packages even when there is one already.

        Returns:
            Where each one is, by the kernel's name.
        """
        with self._locked():
            for stale in self.root.glob(".new-*"):
                shutil.rmtree(stale)
            missing = [kernel for kernel in kernels if update or self.find(kernel) is None]
            env = self._apt(missing) if missing else {}
            for kernel in missing:
                self._unpack(kernel, env)
            return {kernel.name: tree for kernel in kernels if (tree := self.find(kernel))}

    def headers(self, kernel: Kernel) -> Path:
        """Unpack a kernel's headers into the cache where they are missing.

        Returns:
            One tree, as programs that compile for a kernel want it; bcc's own tools find
            it by BCC_KERNEL_SOURCE.

        Raises:
            VmError: When the archive has them no more: it keeps those of the newest kernel only.
        """
        release = release_of(self.fetch([kernel])[kernel.name])
        target = self.root / "headers" / release
        with self._locked():
            if target.exists():
                return target
            env = self._apt([kernel])
            names = [f"linux-headers-{release.rpartition('-')[0]}-common"]
            names.append(f"linux-headers-{release}")
            say(f"[{kernel.name}] fetching {' '.join(names)}")
            target.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".new-", dir=self.root) as new:
                output_of("env", f"--chdir={new}", "apt-get", "download", "-q", *names, env=env)
                for archive in Path(new).glob("*.deb"):
                    output_of("dpkg", "-x", archive, new)
                tree = Path(new, "tree")
                # Both have links to the tools that build modules, which are not needed here.
                but = shutil.ignore_patterns("scripts", "tools")
                for name in names:
                    part = Path(new, "usr/src", name)
                    shutil.copytree(part, tree, symlinks=True, ignore=but, dirs_exist_ok=True)
                tree.rename(target)
        return target

    def _apt(self, kernels: Sequence[Kernel]) -> dict[str, str]:
        """Set apt up and update its lists; return the environment to call it with."""
        apt = self.root / "apt"
        for folder in ("state/lists/partial", "cache/archives/partial"):
            (apt / folder).mkdir(parents=True, exist_ok=True)
        own = output_of("apt-get", "indextargets", "--format", "$(REPO_URI)").split()
        (apt / "sources.list").write_text(sources_list(kernels, [*self.mirrors, *own]))
        (apt / "apt.conf").write_text(apt_config(apt))
        env = {**os.environ, "APT_CONFIG": str(apt / "apt.conf")}
        output_of("apt-get", "update", "-q", "--error-on=any", env=env)
        return env

    def _unpack(self, kernel: Kernel, env: dict[str, str]) -> None:
        names = output_of("apt-cache", "pkgnames", "linux-image-", env=env).split()
        names = [name for name in names if kernel.matches(name)]
        package = newest(output_of("apt-cache", "madison", *names, env=env), kernel)
        if package is None:
            raise VmError(f"{kernel.suite} has no package {kernel.pattern}")
        target = self.root / "kernels" / package.partition("=")[0]
        if target.exists():
            return
        say(f"[{kernel.name}] fetching {package}")
        target.parent.mkdir(exist_ok=True)
        # Its name matches no pattern, and the rename is the last act: `find` sees whole trees only.
        with tempfile.TemporaryDirectory(prefix=".new-", dir=self.root) as new:
            # `apt-get download` writes into the current folder, and has no option for another.
            output_of("env", f"--chdir={new}", "apt-get", "download", "-q", package, env=env)
            (archive,) = Path(new).glob("*.deb")
            tree = Path(new, "tree")
            output_of("dpkg", "-x", archive, tree)
            if not (tree / "boot").exists():
                self._unpack_parts(Path(new), tree, package.partition("=")[0], env)
            if (tree / "usr/lib/modules").exists():
                (tree / "lib").mkdir(exist_ok=True)
                (tree / "usr/lib/modules").rename(tree / "lib/modules")
            output_of(tool("depmod"), "-b", tree, release_of(tree))
            unpack_image(tree / "boot" / f"vmlinuz-{release_of(tree)}", tree / "vmlinux")
            tree.rename(target)
        for old in target.parent.glob("*"):
            if kernel.matches(old.name) and old != target:
                shutil.rmtree(old)

    def _unpack_parts(self, new: Path, tree: Path, package: str, env: dict[str, str]) -> None:
        """Unpacks what an image package only depends on: so Debian's are from 6.19 on.

        Args:
            new: Where to download to.
            tree: Gets the files, where older packages have them.
            package: The image package.
            env: For apt.
        """
        release = package.removeprefix("linux-image-")
        said = output_of("apt-cache", "depends", "--important", package, env=env).split()
        names = [word for word in said if word.startswith("linux-") and word.endswith(release)]
        names.remove(package)
        output_of("env", f"--chdir={new}", "apt-get", "download", "-q", *names, env=env)
        for archive in new.glob("*.deb"):
            output_of("dpkg", "-x", archive, tree)
        (tree / "boot").mkdir(exist_ok=True)
        for name in ("vmlinuz", "config"):
            beside_the_modules = tree / "usr/lib/modules" / release / name
            if beside_the_modules.exists():
                beside_the_modules.rename(tree / "boot" / f"{name}-{release}")


def unpack_image(image: Path, target: Path) -> None:
    """Unpack a kernel image, which takes the guest up to three seconds at every boot.

    Args:
        image: The compressed kernel, in x86's boot format.
        target: Where to write the ELF file; qemu starts it by way of its PVH note.

    Raises:
        VmError: When it is compressed in another way than Debian's kernels are.
    """
    data = image.read_bytes()
    # Documentation/arch/x86/boot.rst: setup_sects, payload_offset and payload_length.
    setup = 512 * (data[0x1F1] + 1)
    offset, length = struct.unpack_from("<II", data, 0x248)
    payload = data[setup + offset :][:length]
    if payload.startswith(b"\xfd7zXZ"):
        # Not lzma.decompress: the unpacked size follows, and is no stream.
        target.write_bytes(lzma.LZMADecompressor().decompress(payload))
    elif payload.startswith(b"\x28\xb5\x2f\xfd"):
        packed = target.with_suffix(".zst")
        packed.write_bytes(payload[:-4])
        output_of("zstd", "-d", "-q", "--rm", packed, "-o", target)
    else:
        raise VmError(f"{image.name} is compressed neither with xz nor with zstd")


def release_of(tree: Path) -> str:
    """Return the kernel's release, as in `uname -r`, of an unpacked package."""
    (image,) = (tree / "boot").glob("vmlinuz-*")
    return image.name.partition("-")[2]


def tool(name: str) -> str:
    """Find a system program, also for a user whose PATH lacks the sbin folders."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}")
    if path is None:
        raise VmError(f"{name} is missing: run {sys.argv[0]} --install")
    return path


# ---- the guest's first processes


# Debian's kernels have 9p, overlayfs and most of virtio as modules, hence an initramfs.
#
# cache=loose lets the guest keep pages and directory entries: what the host changes meanwhile may
# go unseen, and Python starts three times as fast as with 9p's default.
INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
set -e
mkdir -p /proc /sys /dev /host /rw /new /copied
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod /modules/$module; done
plan9=version=9p2000.L,trans=virtio,access=any,msize=512000
mount -t 9p -o ro,cache=loose,$plan9 root /host
lower=/host
if [ -e /dev/vda ]; then
    mount -t squashfs -o ro /dev/vda /copied
    lower=/copied:/host
fi
mount -t tmpfs -o size=75% rw /rw
mkdir /rw/upper /rw/work
mount -t overlay -o xino=off,lowerdir=$lower,upperdir=/rw/upper,workdir=/rw/work root /new
mount -t tmpfs -o mode=755 run /new/run
mkdir -p /new/lib/modules/{release} /new/boot
mount --bind /host{tree}/lib/modules/{release} /new/lib/modules/{release}
cp /host{tree}/boot/config-{release} /new/boot
{mount_out}
ln -s /proc/self/fd /dev/fd
for fd in 0:stdin 1:stdout 2:stderr; do ln -s /proc/self/fd/${{fd%:*}} /dev/${{fd#*:}}; done
mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf -o mode=700 bpf /sys/fs/bpf
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing
hostname vm
ifconfig lo 127.0.0.1 up
cp /supervise /command /new/run
for folder in proc sys dev; do /bin/busybox mount --move /$folder /new/$folder; done
exec switch_root /new /bin/sh /run/supervise
"""

# Process 1 of the guest. A virtio port takes one opener at a time, so a command that opens
# /dev/stdout would find it busy: the command gets a pipe, as it would on a host. What it leaves
# running holds that pipe open and is killed with its control group before the pipe is drained.
SUPERVISE = """\
for port in /sys/class/virtio-ports/*; do
    read -r name < "$port/name"
    eval "$name=/dev/${port##*/}"
done
mkfifo /run/output
cat /run/output > "$output" &
drain=$!
mkdir /sys/fs/cgroup/command
sh -c 'echo $$ > /sys/fs/cgroup/command/cgroup.procs; exec setsid sh /run/command' \
    < /dev/null > /run/output 2>&1
code=$?
# cgroup.kill came with 5.14 (661ee6280931).
if [ -e /sys/fs/cgroup/command/cgroup.kill ]; then
    echo 1 > /sys/fs/cgroup/command/cgroup.kill
else
    while pids=$(cat /sys/fs/cgroup/command/cgroup.procs) && [ "$pids" ]; do kill -9 $pids; done
fi
wait $drain
echo $code > "$status"
echo o > /proc/sysrq-trigger
while :; do sleep 60; done
"""


def command_script(command: Sequence[str], kernel: str, cwd: Path) -> str:
    """Write the script that becomes the command.

    It travels in the initramfs: a kernel's command line ends after 2,048 bytes.

    Args:
        command: The program and its arguments.
        kernel: The kernel's name.
        cwd: Where to start it.
    """
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{SYSTEM_PATH}",
        # Another user's qemu cannot look into /root.
        "HOME": "/root" if os.geteuid() == 0 else "/run",
        "USER": "root",
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "TCPLAT_VM": kernel,
        "TCPLAT_VM_OUT": "/run/out",
    }
    words = [f"{name}={value}" for name, value in environment.items()]
    return f"cd {shlex.quote(str(cwd))} && exec {shlex.join(['env', '-i', *words, *command])}\n"


def cpio(files: dict[str, bytes]) -> bytes:
    """Packs files into an archive in the format of an initramfs ("newc").

    Args:
        files: Content by path; folders are made as needed, and every file is executable.
    """
    folders = {str(folder) for name in files for folder in Path(name).parents} - {"."}
    entries = [(name, stat.S_IFDIR, b"") for name in sorted(folders)]
    entries += [(name, stat.S_IFREG, content) for name, content in files.items()]
    archive = bytearray()
    for number, (name, kind, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        path = os.fsencode(name) + b"\0"
        fields = [number, kind | 0o755, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0]
        archive += b"070701" + b"".join(b"%08x" % field for field in fields) + path
        archive += bytes(-len(archive) % 4) + content
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def modules(tree: Path) -> dict[str, bytes]:
    """Return the modules that the guest needs before it has a root, and the order to load them."""
    # -C: what this machine refuses to load does not concern the guest.
    query = (tool("modprobe"), "-C", "/dev/null", "-d", tree, "-S", release_of(tree))
    found: dict[str, bytes] = {}
    for module in MODULES:
        for line in output_of(*query, "--show-depends", module).splitlines():
            kind, _, path = line.strip().partition(" ")
            if kind != "insmod":
                continue
            name, content = Path(path).name, Path(path).read_bytes()
            if name.endswith(".xz"):
                name, content = name.removesuffix(".xz"), lzma.decompress(content)
            found.setdefault(name, content)
    return {
        **{f"modules/{name}": content for name, content in found.items()},
        "modules/order": "\n".join(found).encode(),
    }


def initramfs(tree: Path, command: str, *, out: bool) -> bytes:
    """Make the guest's first file system.

    Args:
        tree: The kernel's unpacked package.
        command: What `command_script` gave.
        out: Whether a folder of the host is to be mounted for results.
    """
    busybox = Path(tool("busybox")).read_bytes()
    if b"/ld-linux" in busybox:
        raise VmError(f"busybox needs shared libraries: run {sys.argv[0]} --install")
    mount = "mount -t 9p -o $plan9 out /new/run/out" if out else ""
    init = INIT.format(
        release=release_of(tree),
        tree=shlex.quote(str(tree)),
        mount_out=f"mkdir /new/run/out\n{mount}",
    )
    return cpio(
        {
            "init": init.encode(),
            "supervise": SUPERVISE.encode(),
            "command": os.fsencode(command),
            "bin/busybox": busybox,
            **modules(tree),
        }
    )


# ---- running it


def copy_in(paths: Sequence[Path], run: Path) -> None:
    """Make the image that the guest finds these files in, at their own paths.

    Before 5.13 9p reads a file page by page, each a request: libLLVM alone takes a minute.

    Args:
        paths: Files, and folders with all that is in them.
        run: The run's own folder, where the image goes.
    """
    words = [str(path.absolute()).lstrip("/") for path in paths]
    pack = ["tar", "-C", "/", "-c", "--exclude=.git", "--ignore-failed-read", "--", *words]
    # Nothing is compressed: the guest is slow.
    options = ("-tar", "-noI", "-noD", "-noF", "-noX", "-no-progress", "-quiet")
    with subprocess.Popen(pack, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as tar:
        done = subprocess.run(
            [tool("mksquashfs"), "-", str(run / "copied"), *options],
            stdin=tar.stdout,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise VmError(f"mksquashfs failed: {done.stderr.strip()}")


def qemu_command(qemu: str, tree: Path, run: Path, out: Path | None, *, memory: str) -> list[str]:
    """Return the command that starts the virtual machine.

    Args:
        qemu: The program.
        tree: The kernel's unpacked package.
        run: The run's own folder, with the initramfs in it, and what copy_in() made.
        out: A folder of the host that the guest may write, or None.
        memory: How much, as qemu takes it.
    """
    disk: tuple[str, ...] = ()
    if (run / "copied").exists():
        where = str(run / "copied").replace(",", ",,")
        disk = (
            *("-drive", f"file={where},if=none,id=copied,format=raw,readonly=on"),
            *("-device", "virtio-blk-pci,drive=copied"),
        )

    def share(tag: str, path: Path, *options: str) -> tuple[str, ...]:
        # In an option of qemu's, a comma is written twice.
        where = str(path).replace(",", ",,")
        model = ",".join(("security_model=none", "multidevs=remap", *options))
        return (
            *("-fsdev", f"local,id={tag},path={where},{model}"),
            *("-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"),
        )

    def port(name: str, path: str) -> tuple[str, ...]:
        return (
            *("-chardev", f"file,id={name},path={path.replace(',', ',,')}"),
            *("-device", f"virtserialport,chardev={name},name={name}"),
        )

    return [
        # The kernel ends qemu when this process dies, SIGKILL included.
        *("setpriv", "--pdeathsig", "KILL"),
        *(qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", "q35", "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", memory),
        *("-kernel", str(tree / "vmlinux")),
        *("-initrd", str(run / "initramfs")),
        # 5.10's FS-Cache complains of each file that is opened by two paths, and a serial line
        # is slow; a panic raises the level by itself.
        *("-append", "console=ttyS0 loglevel=3 panic=-1 oops=panic"),
        *("-serial", f"file:{run / 'console'}"),
        *share("root", Path("/"), "readonly=on"),
        *disk,
        *(share("out", out) if out else ()),
        *("-device", "virtio-serial-pci"),
        # Not qemu's stdio: it counts as unplugged once its input ends, and the guest's writes hang.
        *port("output", "/proc/self/fd/1"),
        *port("status", str(run / "status")),
    ]


@dataclass
class Guest:
    """A virtual machine that is running.

    Attributes:
        process: qemu, the leader of its own process group.
        timed_out: Whether it was ended because its time was up.
    """

    process: subprocess.Popen[bytes]
    timed_out: bool = False

    def kill(self) -> None:
        """Kill qemu, and what it may have started."""
        # Once waited for, the number could be another process's.
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def expire(self) -> None:
        """End the machine because its time is up."""
        self.timed_out = self.process.returncode is None
        self.kill()


@contextlib.contextmanager
def started(command: Sequence[str], timeout: float) -> Iterator[Guest]:
    """Start a virtual machine, and leave none behind.

    Args:
        command: What `qemu_command` gave.
        timeout: Seconds that it may take.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    guest = Guest(process)
    timer = threading.Timer(timeout, guest.expire)
    timer.daemon = True
    try:
        timer.start()
        yield guest
    finally:
        timer.cancel()
        guest.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def show(guest: Guest, prefix: bytes) -> None:
    """Copy what the guest prints to the standard output, line by line, until it ends."""
    for line in guest.process.stdout or ():
        sys.stdout.buffer.write(prefix + line.removesuffix(b"\n") + b"\n")
        sys.stdout.buffer.flush()


def exit_status(guest: Guest, run: Path) -> int | None:
    """Return the command's exit status, or None if the guest ended without one."""
    if guest.timed_out:
        return EXIT_TIMEOUT
    try:
        return int((run / "status").read_text())
    except (FileNotFoundError, ValueError):
        return None


def boot(kernel: Kernel, tree: Path, command: Sequence[str], options: argparse.Namespace) -> int:
    """Run the command under one kernel.

    Args:
        kernel: The kernel.
        tree: Its unpacked package.
        command: The program and its arguments.
        options: What the user said.

    Returns:
        The exit status, as the module's text explains it.
    """
    prefix = f"[{kernel.name}] "
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tcplat-vm-") as folder:
        run = Path(folder)
        out = None
        if options.out:
            out = (options.out / kernel.name).resolve()
            out.mkdir(parents=True, exist_ok=True)
        script = command_script(command, kernel.name, Path.cwd())
        (run / "initramfs").write_bytes(initramfs(tree, script, out=out is not None))
        if options.copy:
            copy_in(options.copy, run)
        start = qemu_command(tool(options.qemu), tree, run, out, memory=options.memory)
        with started(start, options.timeout) as guest:
            show(guest, prefix.encode())
            guest.process.wait()
        status = exit_status(guest, run)
        if status is None or guest.timed_out:
            for line in console_tail(run):
                say(f"{prefix}console: {line}")
        if status is None:
            say(f"{prefix}the guest ended without an exit status: it crashed, or never started")
            status = EXIT_FAILED
        elif guest.timed_out:
            say(f"{prefix}not done after {options.timeout:g} s: killed")
    say(f"{prefix}exit status {status} after {time.monotonic() - begin:.1f} s")
    return status


def console_tail(run: Path) -> list[str]:
    """Return the last lines of the guest's console, without what a terminal would act upon."""
    try:
        text = (run / "console").read_text(errors="replace")
    except FileNotFoundError:
        return []
    lines = ["".join(filter(str.isprintable, line)) for line in text.splitlines()]
    return [line for line in lines if line][-CONSOLE_LINES:]


# ---- the command line


def say(text: str) -> None:
    """Print a message to stderr; the standard output is the command's."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def install() -> None:
    """Installs the Debian packages that are missing."""
    query = ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *PACKAGES]
    # It fails when it knows nothing of a package, and prints the others nevertheless.
    known = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    missing = [package for package in PACKAGES if f"{package} installed" not in known]
    if not missing:
        return
    for step in (["update", "-q"], ["install", "-q", "-y", "--no-install-recommends", *missing]):
        if subprocess.run(["apt-get", *step], stdin=subprocess.DEVNULL, check=False).returncode:
            raise VmError(f"apt-get could not install {' '.join(missing)}")


def default_cache() -> Path:
    """Return the folder for fetched kernels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tcplat-vm"


def parse(
    arguments: Sequence[str], names: Iterable[str], more: Iterable[str] = ()
) -> argparse.Namespace:
    """Read the command line.

    Args:
        arguments: Without the program's name.
        names: The kernels that are meant where none is named.
        more: Others that can be named.
    """
    names = list(names)
    parser = argparse.ArgumentParser(
        description="Runs a command under other kernels, each in a virtual machine. "
        "Without a command, the kernels are fetched and no more.",
        usage="%(prog)s [options] -- COMMAND [ARGS]",
    )
    parser.add_argument(
        "--kernel",
        action="append",
        choices=[*names, *more],
        help=f"which kernel (repeatable; default: {', '.join(names)})",
    )
    parser.add_argument(
        "--timeout", type=float, default=900, help="seconds per kernel (default: %(default)s)"
    )
    parser.add_argument("--memory", default="2G", help="the guest's memory (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="keep what is written to $TCPLAT_VM_OUT in DIR/KERNEL",
    )
    parser.add_argument(
        "--copy",
        action="append",
        default=[],
        type=Path,
        metavar="PATH",
        help="have the guest read this faster (repeatable)",
    )
    parser.add_argument("--install", action="store_true", help="install missing Debian packages")
    parser.add_argument("--update", action="store_true", help="look for newer kernel packages")
    parser.add_argument(
        "--mirror", action="append", default=[], help="a Debian mirror, if apt here names none"
    )
    parser.add_argument("--cache", type=Path, default=default_cache(), help="default: %(default)s")
    parser.add_argument("--qemu", default="qemu-system-x86_64", help="default: %(default)s")
    # Not by argparse: what it makes of a second `--` depends on Python's version.
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:end])
    options.command = arguments[end + 1 :]
    options.kernel = list(dict.fromkeys(options.kernel or names))
    if options.timeout <= 0:
        parser.error("--timeout takes a positive number of seconds")
    return options


def interrupted(number: int, _frame: FrameType | None) -> NoReturn:
    """Turn a signal into an exception, so that cleanup runs on the way out."""
    raise SystemExit(128 + number)


def run(options: argparse.Namespace, known: dict[str, Kernel]) -> int:
    """Do what the command line says.

    Args:
        options: What `parse` gave.
        known: The kernels that there are.

    Returns:
        The exit status.
    """
    if options.install:
        install()
        if not options.command:
            return 0
    if platform.machine() != "x86_64":
        raise VmError("the guests run this machine's own programs, which must be x86-64")
    cache = Cache(options.cache.resolve(), tuple(options.mirror))
    kernels = [known[name] for name in options.kernel]
    trees = cache.fetch(kernels, update=options.update)
    if not options.command:
        return 0
    statuses = [boot(k, trees[k.name], options.command, options) for k in kernels]
    return next((status for status in statuses if status), 0)


def main(arguments: Sequence[str]) -> int:
    """Run the program.

    Args:
        arguments: Without the program's name.

    Returns:
        The exit status.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    try:
        known = read_kernels(KERNELS.read_text())
        more = read_kernels(MORE_KERNELS.read_text())
        return run(parse(arguments, known, more), known | more)
    except VmError as error:
        say(f"{Path(sys.argv[0]).name}: {error}")
        return EXIT_FAILED
    except BrokenPipeError:
        # The reader of the standard output is gone, and Python's last flush must not find that out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
