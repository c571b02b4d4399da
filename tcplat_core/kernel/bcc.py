"""The system's bcc: where it is, and which types its headers define. Only the loader imports it."""

from __future__ import annotations

import importlib.util
import stat
from pathlib import Path

from tcplat_core.errors import CannotRunError

SYSTEM_FOLDERS = (
    "/usr/lib/python3/dist-packages",
    *(f"/usr/lib/python3.{minor}/site-packages" for minor in range(9, 20)),
    *(f"/usr/lib64/python3.{minor}/site-packages" for minor in range(9, 20)),
)
"""Where Debian and Ubuntu, then Fedora and its kin, keep python3-bpfcc or python3-bcc."""
INSTALL = "apt install python3-bpfcc (Fedora: dnf install python3-bcc)"


def find_bcc() -> Path:
    """Return the folder of the system's bcc package, for any Python.

    Only folders that root alone can write are accepted, because the code runs as root.

    Raises:
        CannotRunError: Not found; the message says so if PyPI's bcc is there instead.
    """
    unsafe = ""
    for folder in SYSTEM_FOLDERS:
        package = Path(folder) / "bcc"
        if (package / "libbcc.py").is_file():
            if _only_roots(package):
                return package
            unsafe = unsafe or (
                f"bcc in {package} can be changed by others than root, and would run as root: "
                f"chown -R root:root {package} && chmod -R go-w {package}"
            )
    if unsafe:
        raise CannotRunError(unsafe)
    stray = importlib.util.find_spec("bcc")
    if stray is not None and stray.origin:
        raise CannotRunError(
            f"the package bcc in {Path(stray.origin).parent} is another project of that name "
            f"(PyPI's is about lattices), and the system's bcc is not installed: {INSTALL}"
        )
    raise CannotRunError(f"bcc is not installed: {INSTALL}")


def _only_roots(package: Path) -> bool:
    """Return whether root alone can change the folder and what is imported from it."""
    return all(
        there.st_uid == 0 and not there.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        for there in map(Path.stat, (package, *package.glob("*.py")))
    )


DEFINED_TAGS = frozenset(
    {
        "__sk_buff",
        "bpf_attr",
        "bpf_btf_info",
        "bpf_cgroup_dev_ctx",
        "bpf_cgroup_storage_key",
        "bpf_core_relo",
        "bpf_cpumap_val",
        "bpf_devmap_val",
        "bpf_dynptr",
        "bpf_fib_lookup",
        "bpf_flow_keys",
        "bpf_func_info",
        "bpf_insn",
        "bpf_iter_link_info",
        "bpf_iter_num",
        "bpf_line_info",
        "bpf_link_info",
        "bpf_list_head",
        "bpf_list_node",
        "bpf_lpm_trie_key",
        "bpf_lpm_trie_key_hdr",
        "bpf_lpm_trie_key_u8",
        "bpf_map_def",
        "bpf_map_info",
        "bpf_perf_event_value",
        "bpf_pidns_info",
        "bpf_prog_info",
        "bpf_raw_tracepoint_args",
        "bpf_rb_node",
        "bpf_rb_root",
        "bpf_redir_neigh",
        "bpf_refcount",
        "bpf_sk_lookup",
        "bpf_sock",
        "bpf_sock_addr",
        "bpf_sock_ops",
        "bpf_sock_tuple",
        "bpf_sockopt",
        "bpf_spin_lock",
        "bpf_stack_build_id",
        "bpf_stacktrace",
        "bpf_stacktrace_buildid",
        "bpf_sysctl",
        "bpf_task_work",
        "bpf_tcp_sock",
        "bpf_timer",
        "bpf_token_info",
        "bpf_tunnel_key",
        "bpf_wq",
        "bpf_xdp_sock",
        "bpf_xfrm_state",
        "btf_ptr",
        "sk_msg_md",
        "sk_reuseport_md",
        "xdp_md",
    }
)
"""Structs and unions that bcc's own copy of <linux/bpf.h> and helpers.h define (0.26, and what
later kernels' uapi added).

The loader's come first, so a second definition under the same name would not compile: one that is
requested by name is left to bcc, one that another type contains gets a new name.
"""
