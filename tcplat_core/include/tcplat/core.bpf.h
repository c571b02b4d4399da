// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* The core's own programs, pasted once per run: they keep the shared maps true. */

/* Attached after the probes, so that their handlers still find the socket. */
int tcplat_on_destroy(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];
	struct tcplat_sock *s = tcplat_lookup(sk);

	if (s)
		tcplat_delete_sock(sk, s);
	return 0;
}

/*
 * task:task_rename: exec(2), prctl(PR_SET_NAME), /proc/PID/comm. The task still has its old name.
 */
int tcplat_on_rename(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = (struct task_struct *)ctx->args[0];
	struct task_struct *leader = tcplat_get(task, group_leader);
	u32 pid = tcplat_pid(task), zero = 0;
	u64 *count = tcplat_renames.lookup(&zero);
	struct tcplat_name name = {};

	if (leader == task) {
		name.start_ns = tcplat_get(task, start_time);
		bpf_probe_read_kernel_str(name.comm, sizeof(name.comm), (void *)ctx->args[1]);
		tcplat_names.update(&pid, &name);
	}
	/*
	 * Behind the name: who sees the new count finds it. A thread's name is read where it calls.
	 */
	if (count)
		lock_xadd(count, 1);
	return 0;
}

/* sched:sched_process_exit: the pid may be given to another process from now on. */
int tcplat_on_exit(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = (struct task_struct *)ctx->args[0];
	struct signal_struct *signal = tcplat_get(task, signal);
	u32 pid = tcplat_pid(task), older = pid | TCPLAT_OLDER;

	/* do_exit() counts the thread out before it comes here. */
	if (tcplat_get(signal, live.counter))
		return 0;
	tcplat_listening.delete(&pid);
	tcplat_listening.delete(&older);
#ifdef TCPLAT_FILTER_PID
	tcplat_pids.delete(&pid);
#endif
	return 0;
}

#ifdef TCPLAT_FILTER_PID
/* sched:sched_process_fork: children of a traced command are traced too. */
int tcplat_on_fork(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *child = (struct task_struct *)ctx->args[1];
	u32 parent = tcplat_current() >> 32;
	u32 pid = tcplat_pid(child), one = 1;

	/* A new thread has its parent's tgid and is there already. */
	if (tcplat_pids.lookup(&parent))
		tcplat_pids.update(&pid, &one);
	return 0;
}
#endif

#ifdef TCPLAT_TRACK
/*
 * Packets have no process, and neither has a handler in softirq. To follow the
 * packets of a process, each of its connections must be known, by its addresses
 * too, whatever the probes trace. Attached before the probes, only if packets
 * are filtered by process, or a probe asks for it (ProbeSpec.track).
 */

static __always_inline void tcplat_track(const struct sock *sk, struct tcplat_sock *s)
{
	if (!s || s->in_flows)
		return;
	tcplat_read_addrs(&s->addrs, sk);
	if (s->addrs.sport && s->addrs.dport)
		tcplat_add_flow(s, tcplat_key(sk));
}

/* sock:inet_sock_set_state */
int tcplat_on_state(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];
	int old = ctx->args[1], new = ctx->args[2];

	if (sk->sk_protocol != IPPROTO_TCP)
		return 0;
	if (new == TCP_SYN_SENT)
		tcplat_set_role(sk, TCPLAT_ROLE_CLIENT);
	else if (new == TCP_LISTEN)
		tcplat_listen(sk);
	else if (new == TCP_ESTABLISHED && old == TCP_SYN_SENT)
		tcplat_track(sk, tcplat_lookup(sk));
	else if (new == TCP_ESTABLISHED && old == TCP_SYN_RECV)
		tcplat_inherit(sk, bpf_ktime_get_ns());
	return 0;
}

/* net:net_dev_queue: the SYN leaves, and with it the source port is known. */
int tcplat_on_queue(struct bpf_raw_tracepoint_args *ctx)
{
	struct sk_buff *skb = (struct sk_buff *)ctx->args[0];
	struct sock *sk = tcplat_sk(skb);

	if (sk && tcplat_get(sk, __sk_common.skc_state) == TCP_SYN_SENT)
		tcplat_track(sk, tcplat_lookup(sk));
	return 0;
}

/* sock:sock_recv_length, sock:sock_send_length: who uses it, owns it. */
int tcplat_on_use(struct bpf_raw_tracepoint_args *ctx)
{
	tcplat_claim((struct sock *)ctx->args[0]);
	return 0;
}

/* tcp_recvmsg(), tcp_sendmsg(): the same before 6.3, which has no such tracepoints. */
int tcplat_on_use_fentry(struct bpf_raw_tracepoint_args *ctx)
{
	tcplat_claim((struct sock *)tcplat_scalar((const void *)ctx->args[0]));
	return 0;
}

int tcplat_on_use_kprobe(struct pt_regs *ctx, struct sock *sk)
{
	tcplat_claim(sk);
	return 0;
}
#endif
