// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* The core's own programs, pasted once per run: they keep the shared maps true. */

/* Attached after the probes, so that their handlers still find the socket. */
int tcplat_on_destroy(struct bpf_raw_tracepoint_args *ctx)
{
	u64 key = ctx->args[0];
	struct tcplat_sock *s = tcplat_find((struct sock *)key);
	struct tcplat_listener *listener;

	if (!s)
		return 0;
	if (s->in_flows) {
		struct tcplat_addrs addrs = s->addrs;

		tcplat_flows.delete(&addrs);
	}
	if (s->role == TCPLAT_ROLE_LISTENER) {
		struct tcplat_port port = {.netns = s->addrs.netns, .port = s->addrs.sport};

		listener = tcplat_listeners.lookup(&port);
		if (listener && --listener->users == 0)
			tcplat_listeners.delete(&port);
	}
	tcplat_socks.delete(&key);
	return 0;
}

/* sched:sched_process_fork: children of a traced command are traced too. */
int tcplat_on_fork(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *child = (struct task_struct *)ctx->args[1];
	u32 parent = bpf_get_current_pid_tgid() >> 32;
	u32 pid = tcplat_get(child, tgid), one = 1;

	/* A new thread has its parent's tgid and is there already. */
	if (tcplat_pids.lookup(&parent))
		tcplat_pids.update(&pid, &one);
	return 0;
}

/* sched:sched_process_exit: the pid may be given to another process from now on. */
int tcplat_on_exit(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = (struct task_struct *)ctx->args[0];
	struct signal_struct *signal = tcplat_get(task, signal);
	u32 pid = tcplat_get(task, tgid);

	/* do_exit() counts the thread out before it comes here. */
	if (tcplat_get(signal, live.counter) == 0)
		tcplat_pids.delete(&pid);
	return 0;
}
