// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * The handlers of both ends of a connection: hook points of stream_points(), for sockets of one
 * role.
 *
 * To be defined before the include:
 *   TCPLAT_ROLE           whose sockets: TCPLAT_ROLE_CLIENT or TCPLAT_ROLE_SERVER
 *   TCPLAT_CLAIM_SENDING  (sk, me, hook): as tcplat_claim_role(), if a send needs more than that
 *   report_state()        (sk, old, new, hook): a change of state
 *   enter_recv()          (sk, flags, hook): by kprobe, a call begins
 *   leave_recv()          (ret, hook): ... and returns
 *   exit_recv()           (sk, flags, ret, hook): by fexit, a call returns
 */

#ifndef TCPLAT_CLAIM_SENDING
#define TCPLAT_CLAIM_SENDING(sk, me, hook) tcplat_claim_role(sk, me, TCPLAT_ROLE)
#endif

/* --- state */

#ifdef TCPLAT_KPROBE_state
int kp_tcp_set_state(struct pt_regs *ctx, struct sock *sk, int state)
{
	int old = sk->__sk_common.skc_state;

	report_state(sk, old, state, HOOK_kp_tcp_set_state);
	tcplat_set_reported(sk, TCPLAT_ROLE, state);
	return 0;
}

/*
 * What the kprobe was skipped for; and the change to TCP_LISTEN, which inet_csk_listen_start()
 * makes without tcp_set_state().
 */
int tp_state_skipped(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];
	int new = ctx->args[2];

	if (sk->sk_protocol != IPPROTO_TCP)
		return 0;
	if (new != TCP_LISTEN && tcplat_is_reported(sk, new))
		return 0;
	report_state(sk, ctx->args[1], new, HOOK_tp_state_skipped);
	tcplat_set_reported(sk, TCPLAT_ROLE, new);
	return 0;
}
#endif

#ifdef TCPLAT_FENTRY_state
int fe_tcp_set_state(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];
	int old = sk->__sk_common.skc_state;

	return report_state(sk, old, ctx->args[1], HOOK_fe_tcp_set_state);
}
#endif

/* --- recv */

#ifdef TCPLAT_FENTRY_recv
/*
 * tcp_recvmsg() has four arguments since 7.1 (8341c989ac77), and had `nonblock` in front of
 * `flags` before 5.19 (ec095263a965). The result stands behind them.
 */
int fx_tcp_recvmsg4(struct bpf_raw_tracepoint_args *ctx)
{
	return exit_recv((struct sock *)ctx->args[0], ctx->args[3], ctx->args[4],
			 HOOK_fx_tcp_recvmsg4);
}

int fx_tcp_recvmsg5(struct bpf_raw_tracepoint_args *ctx)
{
	return exit_recv((struct sock *)ctx->args[0], ctx->args[3], ctx->args[5],
			 HOOK_fx_tcp_recvmsg5);
}

int fx_tcp_recvmsg6(struct bpf_raw_tracepoint_args *ctx)
{
	return exit_recv((struct sock *)ctx->args[0], ctx->args[4], ctx->args[6],
			 HOOK_fx_tcp_recvmsg6);
}

/* splice(2) and sendfile(2) from a socket; they return what went into the pipe. */
int fx_tcp_splice_read(struct bpf_raw_tracepoint_args *ctx)
{
	struct socket *socket = (struct socket *)ctx->args[0];

	return exit_recv(tcplat_sk(socket), 0, ctx->args[5], HOOK_fx_tcp_splice_read);
}
#endif

#ifdef TCPLAT_KPROBE_recv
int kp_tcp_recvmsg(struct pt_regs *ctx, struct sock *sk, struct msghdr *msg, size_t len, int flags)
{
	return enter_recv(sk, flags, HOOK_kr_tcp_recvmsg);
}

/* Before 5.19 (ec095263a965). */
int kp_tcp_recvmsg6(struct pt_regs *ctx, struct sock *sk, struct msghdr *msg, size_t len,
		    int nonblock, int flags)
{
	return enter_recv(sk, flags, HOOK_kr_tcp_recvmsg);
}

int kr_tcp_recvmsg(struct pt_regs *ctx)
{
	return leave_recv(PT_REGS_RC(ctx), HOOK_kr_tcp_recvmsg);
}

int kp_tcp_splice_read(struct pt_regs *ctx, struct socket *socket)
{
	return enter_recv(tcplat_sk(socket), 0, HOOK_kr_tcp_splice_read);
}

int kr_tcp_splice_read(struct pt_regs *ctx)
{
	return leave_recv(PT_REGS_RC(ctx), HOOK_kr_tcp_splice_read);
}
#endif

/* --- send: what the program asks to send; send_short: what of it was not taken */

static __always_inline int report_send(struct sock *sk, u32 bytes, u32 flags, u8 hook)
{
	u64 me;
	struct tcplat_sock *s = TCPLAT_CLAIM_SENDING(sk, &me, hook);

	return s ? tcplat_report(tcplat_make_send(sk, s, me, bytes, flags, hook)) : 0;
}

int tp_send(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];
	struct msghdr *msg = (struct msghdr *)ctx->args[1];

	return report_send(sk, tcplat_get(msg, msg_iter.count), tcplat_get(msg, msg_flags),
			   HOOK_tp_send);
}

int tp_send_short(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];

	return tcplat_report(tcplat_make_short(sk, TCPLAT_ROLE, ctx->args[1], HOOK_tp_send_short));
}

#ifdef TCPLAT_KPROBE_send
int kp_tcp_sendmsg(struct pt_regs *ctx, struct sock *sk, struct msghdr *msg, size_t size)
{
	return report_send(sk, size, tcplat_get(msg, msg_flags), HOOK_kp_tcp_sendmsg);
}

int kp_tcp_sendpage(struct pt_regs *ctx, struct sock *sk, void *page, int offset, size_t size)
{
	return report_send(sk, size, 0, HOOK_kp_tcp_sendpage);
}
#endif

#ifdef TCPLAT_FENTRY_send
int fe_tcp_sendmsg(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];
	struct msghdr *msg = (struct msghdr *)ctx->args[1];

	return report_send(sk, ctx->args[2], tcplat_get(msg, msg_flags), HOOK_fe_tcp_sendmsg);
}

int fe_tcp_sendpage(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];

	return report_send(sk, ctx->args[3], 0, HOOK_fe_tcp_sendpage);
}
#endif

#ifdef TCPLAT_FENTRY_send_short
int fx_tcp_sendmsg(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];

	return tcplat_report(tcplat_make_short(sk, TCPLAT_ROLE, ctx->args[3], HOOK_fx_tcp_sendmsg));
}

int fx_tcp_sendpage(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];

	return tcplat_report(
		tcplat_make_short(sk, TCPLAT_ROLE, ctx->args[5], HOOK_fx_tcp_sendpage));
}
#endif

#ifdef TCPLAT_KPROBE_send_short
/* pid_tgid -> the socket whose tcp_sendmsg() it is in: a return probe sees no arguments. */
BPF_HASH(sends, u64, u64, 16384);

static __always_inline int enter_send(struct sock *sk)
{
	u64 me = bpf_get_current_pid_tgid(), key = (u64)sk;

	if (tcplat_is(tcplat_lookup(sk), TCPLAT_ROLE))
		sends.update(&me, &key);
	return 0;
}

static __always_inline int leave_send(int ret, u8 hook)
{
	u64 me = bpf_get_current_pid_tgid();
	u64 *key = sends.lookup(&me);
	struct sock *sk;

	if (!key)
		return 0;
	sk = (struct sock *)*key;
	sends.delete(&me);
	return tcplat_report(tcplat_make_short(sk, TCPLAT_ROLE, ret, hook));
}

int kp_send_short(struct pt_regs *ctx, struct sock *sk)
{
	return enter_send(sk);
}

int kr_tcp_sendmsg(struct pt_regs *ctx)
{
	return leave_send(PT_REGS_RC(ctx), HOOK_kr_tcp_sendmsg);
}

int kp_page_short(struct pt_regs *ctx, struct sock *sk)
{
	return enter_send(sk);
}

int kr_tcp_sendpage(struct pt_regs *ctx)
{
	return leave_send(PT_REGS_RC(ctx), HOOK_kr_tcp_sendpage);
}
#endif

/* --- close: the kernel lets go of the socket */

int tp_close(struct bpf_raw_tracepoint_args *ctx)
{
	return tcplat_report(
		tcplat_make_close((struct sock *)ctx->args[0], TCPLAT_ROLE, HOOK_tp_close));
}

#ifdef TCPLAT_KPROBE_close
/* tcp_v6_destroy_sock() ends in this one as well. */
int kp_tcp_v4_destroy_sock(struct pt_regs *ctx, struct sock *sk)
{
	tcplat_report(tcplat_make_close(sk, TCPLAT_ROLE, HOOK_kp_tcp_v4_destroy_sock));
	tcplat_set_reported(sk, TCPLAT_ROLE, TCPLAT_REPORTED_CLOSE);
	return 0;
}

int tp_close_skipped(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];

	if (tcplat_is_reported(sk, TCPLAT_REPORTED_CLOSE))
		return 0;
	return tcplat_report(tcplat_make_close(sk, TCPLAT_ROLE, HOOK_tp_close_skipped));
}
#endif

#ifdef TCPLAT_FENTRY_close
int fe_tcp_v4_destroy_sock(struct bpf_raw_tracepoint_args *ctx)
{
	return tcplat_report(tcplat_make_close((struct sock *)ctx->args[0], TCPLAT_ROLE,
					       HOOK_fe_tcp_v4_destroy_sock));
}
#endif
