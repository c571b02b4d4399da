"""Hook points of the core's own programs (include/tcplat/core.bpf.h)."""

from __future__ import annotations

from tcplat_core.plugin.hookpoints import HookPoint, Way, fenter, fentry, kentry, kprobe, tracepoint

_SOCK = "const struct sock *"
_USE = ("tcplat_on_use", "struct sock *", "int", "int")
_TOUCHED = ("tcp_recvmsg", "tcp_sendmsg")

DESTROY = HookPoint("destroy", (tracepoint("tcp:tcp_destroy_sock", "tcplat_on_destroy", _SOCK),))
EXIT = HookPoint(
    "exit", (tracepoint("sched:sched_process_exit", "tcplat_on_exit", "struct task_struct *"),)
)
FORK = HookPoint(
    "fork",
    (
        tracepoint(
            "sched:sched_process_fork",
            "tcplat_on_fork",
            *("struct task_struct *", "struct task_struct *"),
        ),
    ),
)
RENAME = HookPoint(
    "rename",
    (
        tracepoint(
            "task:task_rename", "tcplat_on_rename", *("struct task_struct *", "const char *")
        ),
    ),
)
STATE = HookPoint(
    "state",
    (tracepoint("sock:inet_sock_set_state", "tcplat_on_state", _SOCK, "const int", "const int"),),
)
QUEUE = HookPoint(
    "queue", (tracepoint("net:net_dev_queue", "tcplat_on_queue", "struct sk_buff *"),)
)
USE = HookPoint(
    "use",
    (
        # Came with 6.3 (6e6eda44b939).
        Way(
            "tracepoint",
            (
                *tracepoint("sock:sock_recv_length", *_USE).hooks,
                *tracepoint("sock:sock_send_length", *_USE).hooks,
            ),
        ),
        fentry(*(fenter(func, "tcplat_on_use_fentry", "sk", "msg") for func in _TOUCHED)),
        kprobe(*(kentry(func, "tcplat_on_use_kprobe", "sk", "msg") for func in _TOUCHED)),
    ),
    optional=True,
)
CORE = (DESTROY, EXIT, FORK, RENAME, STATE, QUEUE, USE)
"""All of them; tests/vm/facts.py checks them against other kernels' BTF."""
