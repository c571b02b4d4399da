"""The text that is compiled, the code from the cache, and which bcc package is used."""

from __future__ import annotations

import errno
import os
import re
import struct
import sys
from pathlib import Path

import attrs
import msgpack
import pytest

from tcplat_core.errors import CannotRunError, PluginError
from tcplat_core.event.record import Record
from tcplat_core.kernel import bcc
from tcplat_core.kernel.bcc import find_bcc
from tcplat_core.loader import compile as compiling
from tcplat_core.loader.compile import Compiled, Map, kernel_source
from tcplat_core.loader.program_text import ALWAYS, program_text
from tcplat_core.loader.protocol import ProbeRequest
from tcplat_core.plugin.hookpoints import HookPoint, kentry, kprobe, kreturn, tracepoint
from tcplat_core.plugin.specs import ProbeSpec
from tcplat_core.run.probe_run import fired_by, probe_request

LAST_LINE = "int tp_send(void *ctx) { return HOOK_tp_send; }"
SOURCE = [*(f" #  include <tcplat/{name}> " for name in ALWAYS), '#include "own.h"', LAST_LINE]

SPEC = ProbeSpec(
    name="a_probe",
    summary="for tests",
    source="\n".join(SOURCE),
    points=(
        HookPoint(
            "send",
            (
                kprobe(
                    kentry("tcp_sendmsg", "kp_enter", quiet=True),
                    kreturn("tcp_sendmsg", "kr_send"),
                    kentry("tcp_sendpage", "kp_page"),
                ),
                tracepoint("tcp:tcp_sendmsg_locked", "tp_send"),
            ),
        ),
        HookPoint("close", (tracepoint("tcp:tcp_destroy_sock", "tp_close"),)),
        HookPoint("extra", (tracepoint("tcp:tcp_probe", "tp_extra"),), optional=True),
    ),
    defines=lambda _: {"PORT": 9999},
)
PROBE = probe_request(SPEC, {})
TEXT = program_text(
    PROBE,
    taken={"send": "kprobe", "close": "tracepoint"},
    defines={"TCPLAT_HOOKS": 5, "TCPLAT_BOOKS": 41},
)


def test_call_of_a_kfunc_is_patched_and_a_helpers_is_not() -> None:
    """Bcc compiles calls by number, as those of helpers; calls of helpers are unchanged."""
    instruction = struct.Struct("=BBhi")
    call = [0x85, 0, 0]
    code = instruction.pack(*call, compiling.KFUNC + 65475) + instruction.pack(*call, 5)
    patched = Compiled({"f": code}, ()).code("f", [])
    assert list(instruction.iter_unpack(patched)) == [(0x85, 0x20, 0, 65475), (0x85, 0, 0, 5)]


def defined(text: str = TEXT) -> dict[str, str]:
    """Return the constants that come before everything else."""
    return dict(
        re.findall(r"^#define (\w+) (.+)$", text.partition("struct tcplat_event")[0], re.MULTILINE)
    )


# --- the text


def test_hook_numbers_in_c_match_those_of_the_session() -> None:
    numbers = {name: int(value) for name, value in defined().items() if name.startswith("HOOK_")}
    assert numbers == {
        "HOOK_kr_send": 0,
        "HOOK_kp_page": 1,
        "HOOK_tp_send": 2,
        "HOOK_tp_close": 3,
        "HOOK_tp_extra": 4,
    }
    funcs = [hook.func for hook in fired_by(SPEC)]
    assert funcs == [
        "tcp_sendmsg",
        "tcp_sendpage",
        "tcp:tcp_sendmsg_locked",
        "tcp:tcp_destroy_sock",
        "tcp:tcp_probe",
    ]
    assert [hook.attach for hook in fired_by(SPEC)] == ["kprobe"] * 2 + ["tracepoint"] * 3


def test_program_shared_by_two_ways_has_one_number() -> None:
    shared = kentry("tcp_sendmsg", "on_send")
    spec = ProbeSpec(
        name="x",
        summary="s",
        source="",
        points=(HookPoint("send", (kprobe(shared), kprobe(shared, kentry("other", "on_other")))),),
    )
    text = program_text(probe_request(spec, {}), taken={}, defines={})
    assert {name: value for name, value in defined(text).items() if name.startswith("HOOK_")} == {
        "HOOK_on_send": "0",
        "HOOK_on_other": "1",
    }
    assert len(fired_by(spec)) == 2


def test_only_the_ways_taken_are_defined() -> None:
    assert {
        name for name in defined() if re.match("TCPLAT_(KPROBE|FENTRY|TRACEPOINT|XDP)_", name)
    } == {"TCPLAT_KPROBE_send", "TCPLAT_TRACEPOINT_close"}


def test_constants_of_core_and_probe_are_defined() -> None:
    assert defined()["TCPLAT_HOOKS"] == "5"
    assert defined()["TCPLAT_BOOKS"] == "41"
    assert defined()["PORT"] == "9999"


def test_no_constant_is_defined_twice() -> None:
    names = re.findall(r"^#define (\w+)", TEXT.partition("struct tcplat_event")[0], re.MULTILINE)
    assert len(names) == len(set(names))


def test_record_precedes_all_headers() -> None:
    struct_ = Record(SPEC.event).c_struct()
    assert TEXT.count(struct_) == 1
    assert TEXT.index(struct_) < TEXT.index("#line 1 ")


@pytest.mark.parametrize("name", ALWAYS)
def test_shared_header_that_the_probe_includes_is_pasted_once(name: str) -> None:
    assert TEXT.count(f'#line 1 "tcplat/{name}"') == 1
    assert not re.search(r"#\s*include\s*<tcplat/", TEXT)


@pytest.mark.parametrize("name", ALWAYS)
def test_shared_header_is_pasted_without_an_include(name: str) -> None:
    bare = ProbeRequest(name="b", source="", struct="", points=(), types=(), defines={})
    assert program_text(bare, taken={}, defines={}).count(f'#line 1 "tcplat/{name}"') == 1


def test_core_programs_come_last() -> None:
    last = max(TEXT.index(found[0]) for found in re.finditer('#line 1 "([^"]+)"', TEXT))
    assert TEXT[last:].startswith('#line 1 "tcplat/core.bpf.h"')
    assert TEXT.index(LAST_LINE) < last


def origin(text: str, line: str) -> tuple[str, int]:
    """File and number of a line, as the compiler reports them."""
    file, number = "", 0
    for each in text.splitlines():
        number += 1
        if found := re.fullmatch(r'#line (\d+) "(.+)"', each):
            file, number = found[2], int(found[1]) - 1
        elif each == line:
            return file, number
    raise AssertionError(line)


def test_compiler_reports_line_numbers_of_the_source_file() -> None:
    assert origin(TEXT, LAST_LINE) == ("a_probe.bpf.c", len(SOURCE))


def test_line_numbers_are_right_behind_an_optional_header() -> None:
    probe = attrs.evolve(PROBE, source=f"#include <tcplat/skb.bpf.h>\n\n{LAST_LINE}\n")
    text = program_text(probe, taken={}, defines={})
    assert '#line 1 "tcplat/skb.bpf.h"' in text
    assert origin(text, LAST_LINE) == ("a_probe.bpf.c", 3)


def test_other_includes_are_left_unchanged() -> None:
    assert TEXT.count('#include "own.h"') == 1


def test_unknown_shared_header_is_a_plugin_error() -> None:
    probe = ProbeRequest(
        name="b",
        source="#include <tcplat/evnt.bpf.h>",
        struct="",
        points=(),
        types=(),
        defines={},
    )
    with pytest.raises(PluginError, match=r"evnt\.bpf\.h"):
        program_text(probe, taken={}, defines={})


# --- the code


def load_64(number: int, source: int) -> bytes:
    """Return a 64-bit load in two instructions: BPF_LD_IMM64 into r1."""
    return struct.pack("=BBhi", 0x18, source << 4 | 1, 0, number) + bytes(8)


ADD = struct.pack("=BBhi", 0x07, 0x01, 0, 1)
EXIT = struct.pack("=BBhi", 0x95, 0, 0, 0)
MAPS = tuple(Map(name, 27, 0, 0, 4096, 0) for name in ("events", "books"))


def test_map_indices_are_replaced_by_fds() -> None:
    code = load_64(0, 1) + ADD + load_64(1, 1) + load_64(0, 1) + EXIT
    compiled = Compiled({"f": code, "g": EXIT}, MAPS)
    fds = [17, 1_000_000]
    assert compiled.code("f", fds) == (
        load_64(17, 1) + ADD + load_64(1_000_000, 1) + load_64(17, 1) + EXIT
    )
    assert compiled.code("g", fds) == EXIT
    assert compiled.functions["f"] == code  # for the next start


def test_constants_that_resemble_a_map_load_are_left_unchanged() -> None:
    code = load_64(0, 0) + load_64(1, 2) + struct.pack("=BBhi", 0xB7, 0x11, 0, 1)
    assert Compiled({"f": code}, MAPS).code("f", [17, 18]) == code


def test_compiled_programs_survive_packing() -> None:
    compiled = Compiled({"f": load_64(0, 1)}, MAPS)
    assert Compiled.unpack(msgpack.unpackb(msgpack.packb(compiled.pack()))) == compiled


# --- bcc


@pytest.fixture
def no_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide bcc from Python."""
    monkeypatch.setattr(bcc, "SYSTEM_FOLDERS", ())
    folders = [folder for folder in sys.path if not (Path(folder) / "bcc").is_dir()]
    monkeypatch.setattr(sys, "path", folders)
    monkeypatch.delitem(sys.modules, "bcc", raising=False)


def package(folder: Path, *modules: str) -> Path:
    """Make a package named bcc."""
    (folder / "bcc").mkdir(parents=True)
    for module in ("__init__", *modules):
        (folder / "bcc" / f"{module}.py").write_text("raise AssertionError('it was run')")
    return folder / "bcc"


@pytest.mark.usefixtures("no_system")
def test_missing_bcc_error_names_the_package() -> None:
    with pytest.raises(CannotRunError) as error:
        find_bcc()
    assert str(error.value) == (
        "bcc is not installed: apt install python3-bpfcc (Fedora: dnf install python3-bcc)"
    )


@pytest.mark.usefixtures("no_system")
def test_unrelated_bcc_package_of_pypi_is_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stray = package(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(CannotRunError) as error:
        find_bcc()
    assert str(error.value).startswith(f"the package bcc in {stray} is another project")
    assert "apt install python3-bpfcc" in str(error.value)


@pytest.mark.usefixtures("no_system")
def test_folder_without_libbcc_is_not_the_systems_bcc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path)
    monkeypatch.setattr(bcc, "SYSTEM_FOLDERS", (str(tmp_path),))
    with pytest.raises(CannotRunError, match="bcc is not installed"):
        find_bcc()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can own a system folder")


@needs_root
def test_first_system_folder_with_bcc_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / name for name in ("empty", "first", "second")]
    found = package(folders[1], "libbcc")
    package(folders[2], "libbcc")
    monkeypatch.setattr(bcc, "SYSTEM_FOLDERS", tuple(map(str, folders)))
    assert find_bcc() == found


@needs_root
@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
def test_bcc_writable_by_others_is_refused_as_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    package(tmp_path, "libbcc").chmod(mode)
    monkeypatch.setattr(bcc, "SYSTEM_FOLDERS", (str(tmp_path),))
    with pytest.raises(CannotRunError):
        find_bcc()


@needs_root
def test_bcc_of_another_user_is_refused_as_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.chown(package(tmp_path, "libbcc"), 65534, 65534)
    monkeypatch.setattr(bcc, "SYSTEM_FOLDERS", (str(tmp_path),))
    with pytest.raises(CannotRunError):
        find_bcc()


def test_compiling_restores_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler changes the working directory to the kernel tree."""
    monkeypatch.setenv("BCC_KERNEL_SOURCE", "/planted")
    here = os.getcwd()
    with kernel_source(tmp_path):
        assert os.environ["BCC_KERNEL_SOURCE"] == str(tmp_path)
        os.chdir(tmp_path)
    assert os.getcwd() == here


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("could not open bpf map: tcplat_taken, error: Too many open files\n", errno.EMFILE),
        ("could not open bpf map: books, error: Cannot allocate memory\n", errno.ENOMEM),
        ("could not open bpf map: books, error: Operation not permitted\n", errno.EPERM),
        ("fatal error: cannot open file 'x.h': Too many open files\n", errno.EMFILE),
        ("x.c:3: error: Operation not permitted\n", None),
        ("x.c:3:1: error: expected ';'\n", None),
    ],
)
def test_exhausted_resource_is_not_reported_as_a_compile_error(said: str, number: object) -> None:
    refused = compiling._refused(said)
    assert (refused and refused.errno) == number
