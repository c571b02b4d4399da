// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * The connecting side of a TCP connection: connect, each state, send, recv, close.
 *
 * One body per point; below it a thin handler per mechanism.
 */
#include <tcplat/event.bpf.h>
#include <tcplat/owner.bpf.h>
#include <tcplat/stream.bpf.h>
#include <tcplat/histogram.bpf.h>

/* What this probe reports is the sockets that called connect(). */
#define CLIENT TCPLAT_ROLE_CLIENT
#define TCPLAT_ROLE CLIENT

/* --- connect: the call that sends the SYN */

static __always_inline struct tcplat_sock *begin_connect(struct sock *sk, u64 now)
{
	struct tcplat_sock *s = tcplat_set_role(sk, CLIENT);

	if (!s)
		return NULL;
	s->since_ns = now;
	/* What the socket sent in a connection before is no part of a call in this one. */
	s->send_tid = 0;
#ifdef TCPLAT_SAMPLE
	s->connect_hook = s->syn_hook = 0;
#endif
	return s;
}

static __always_inline void
report_connect(struct sock *sk, struct tcplat_sock *s, u8 hook, u64 ts_ns)
{
	struct tcplat_event *e = tcplat_reserve_for(sk, s, hook, ts_ns);

	if (!e)
		return;
	e->state = TCP_SYN_SENT;
	tcplat_submit(e);
}

/*
 * With --sample the two ports decide whether a connection has rows, and the kernel chooses the
 * source port a moment after the change to TCP_SYN_SENT. So the rows of that moment are kept in the
 * entry until the SYN leaves, or until connect() returns, or fails. They have the time when it
 * happened, and in addition the port.
 */
static __always_inline void syn_is_sent(struct sock *sk, struct tcplat_sock *s, u8 hook, u64 ts_ns)
{
#ifdef TCPLAT_SAMPLE
	if (tcplat_awaits_port(sk, s)) {
		s->connect_hook = 1 + hook;
		return;
	}
#endif
	report_connect(sk, s, hook, ts_ns);
}

/* The port is chosen, or will never be. */
static __always_inline void report_waiting(struct sock *sk, struct tcplat_sock *s)
{
#ifdef TCPLAT_SAMPLE
	u8 connect = s->connect_hook, syn = s->syn_hook;

	s->connect_hook = s->syn_hook = 0;
	if (connect)
		report_connect(sk, s, connect - 1, s->since_ns);
	if (syn)
		tcplat_report(
			tcplat_make_state(sk, s, TCP_CLOSE, TCP_SYN_SENT, syn - 1, s->syn_ns));
#endif
}

/* tcp_v4_connect() has chosen the route by now, but not yet the source port. */
int tp_connect(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];
	u64 now = bpf_ktime_get_ns();
	struct tcplat_sock *s;

	if ((int)ctx->args[2] != TCP_SYN_SENT || sk->sk_protocol != IPPROTO_TCP)
		return 0;
	s = begin_connect(sk, now);
	if (s)
		syn_is_sent(sk, s, HOOK_tp_connect, now);
	return 0;
}

/* net:net_dev_queue, with --sample only: the SYN leaves. */
int tp_connect_port(struct bpf_raw_tracepoint_args *ctx)
{
#ifdef TCPLAT_SAMPLE
	struct sk_buff *skb = (struct sk_buff *)ctx->args[0];
	struct sock *sk = tcplat_sk(skb);
	struct tcplat_sock *s;

	if (!sk || tcplat_get(sk, __sk_common.skc_state) != TCP_SYN_SENT)
		return 0;
	s = tcplat_lookup(sk);
	if (tcplat_is(s, CLIENT))
		report_waiting(sk, s);
#endif
	return 0;
}

#if defined(TCPLAT_KPROBE_connect) || defined(TCPLAT_FENTRY_connect)
/*
 * At the entry of tcp_v4_connect() no address is known; on loopback the handshake
 * is over at its return. So the row is made in between, at the change to
 * TCP_SYN_SENT, and stamped with the entry. The return reports what never got there.
 */
static __always_inline int enter_connect(struct sock *sk, const u8 *uaddr, u16 family)
{
	struct tcplat_sock *s;
	u8 to[24];

	/* tcp_v6_connect() of a mapped address calls tcp_v4_connect(): the outer call counts. */
	if (tcplat_get(sk, __sk_common.skc_family) != family)
		return 0;
	s = begin_connect(sk, bpf_ktime_get_ns());
	/* Where there is no route, the socket never learns whom it was to call. */
	if (!s || bpf_probe_read_kernel(to, family == TCPLAT_AF_INET ? 8 : 24, uaddr))
		return 0;
	s->addrs.dport = to[2] << 8 | to[3];
	if (family == TCPLAT_AF_INET) {
		u32 addr;

		__builtin_memcpy(&addr, to + 4, 4);
		s->addrs.ip = 4;
		tcplat_map_v4(s->addrs.saddr, 0);
		tcplat_map_v4(s->addrs.daddr, addr);
	} else {
		__builtin_memset(s->addrs.saddr, 0, 16);
		__builtin_memcpy(s->addrs.daddr, to + 8, 16);
		s->addrs.ip = tcplat_is_mapped(s->addrs.daddr) ? 4 : 6;
	}
	return 0;
}

static __always_inline int send_syn(struct sock *sk, int state, u8 hook_v4, u8 hook_v6)
{
	struct tcplat_sock *s = tcplat_lookup(sk);
	u8 hook = hook_v4;

	if (state != TCP_SYN_SENT || !tcplat_is(s, CLIENT) || !s->since_ns)
		return 0;
	if (tcplat_get(sk, __sk_common.skc_family) == TCPLAT_AF_INET6)
		hook = hook_v6;
	syn_is_sent(sk, s, hook, s->since_ns);
	return 0;
}

static __always_inline int leave_connect(struct sock *sk, int ret, u16 family, u8 hook)
{
	struct tcplat_sock *s = tcplat_lookup(sk);
	struct tcplat_event *e;
	u64 now = bpf_ktime_get_ns();

	if (tcplat_get(sk, __sk_common.skc_family) != family || !tcplat_is(s, CLIENT))
		return 0;
	report_waiting(sk, s);
	/* A failure after the SYN has its row from the change of state. */
	if (!ret || !s->since_ns)
		return 0;
	tcplat_sample(sk, s, HIST_connect_failed, now - s->since_ns);
	e = tcplat_reserve_for(sk, s, hook, now);
	if (e) {
		e->err = -ret;
		e->connect_ns = now - s->since_ns;
	}
	s->since_ns = 0;
	return tcplat_report(e);
}
#endif

#ifdef TCPLAT_KPROBE_connect
/*
 * pid_tgid -> the socket whose tcp_v4_connect() or tcp_v6_connect() it is in.
 *
 * Inserted at entry, deleted at return: a return probe sees no arguments.
 */
BPF_HASH(connects, u64, u64, 16384);

static __always_inline int kp_enter(struct sock *sk, const u8 *uaddr, u16 family)
{
	u64 me = bpf_get_current_pid_tgid(), key = (u64)sk;

	connects.update(&me, &key);
	return enter_connect(sk, uaddr, family);
}

static __always_inline int kr_leave(int ret, u16 family, u8 hook)
{
	u64 me = bpf_get_current_pid_tgid();
	u64 *key = connects.lookup(&me);
	struct sock *sk;

	if (!key)
		return 0;
	sk = (struct sock *)*key;
	/* The inner call of a mapped address: the outer one still needs the entry. */
	if (tcplat_get(sk, __sk_common.skc_family) != family)
		return 0;
	connects.delete(&me);
	return leave_connect(sk, ret, family, hook);
}

int kp_tcp_v4_connect(struct pt_regs *ctx, struct sock *sk, u8 *uaddr)
{
	return kp_enter(sk, uaddr, TCPLAT_AF_INET);
}

int kp_tcp_v6_connect(struct pt_regs *ctx, struct sock *sk, u8 *uaddr)
{
	return kp_enter(sk, uaddr, TCPLAT_AF_INET6);
}

int kp_send_syn(struct pt_regs *ctx, struct sock *sk, int state)
{
	return send_syn(sk, state, HOOK_kp_tcp_v4_connect, HOOK_kp_tcp_v6_connect);
}

int kr_tcp_v4_connect(struct pt_regs *ctx)
{
	return kr_leave(PT_REGS_RC(ctx), TCPLAT_AF_INET, HOOK_kp_tcp_v4_connect);
}

int kr_tcp_v6_connect(struct pt_regs *ctx)
{
	return kr_leave(PT_REGS_RC(ctx), TCPLAT_AF_INET6, HOOK_kp_tcp_v6_connect);
}
#endif

#ifdef TCPLAT_FENTRY_connect
/* fentry hands its arguments over as raw tracepoints do. */
int fe_tcp_v4_connect(struct bpf_raw_tracepoint_args *ctx)
{
	return enter_connect((struct sock *)ctx->args[0], (u8 *)ctx->args[1], TCPLAT_AF_INET);
}

int fe_tcp_v6_connect(struct bpf_raw_tracepoint_args *ctx)
{
	return enter_connect((struct sock *)ctx->args[0], (u8 *)ctx->args[1], TCPLAT_AF_INET6);
}

int fe_send_syn(struct bpf_raw_tracepoint_args *ctx)
{
	return send_syn((struct sock *)ctx->args[0], ctx->args[1], HOOK_fe_tcp_v4_connect,
			HOOK_fe_tcp_v6_connect);
}

int fx_tcp_v4_connect(struct bpf_raw_tracepoint_args *ctx)
{
	return leave_connect((struct sock *)ctx->args[0], ctx->args[3], TCPLAT_AF_INET,
			     HOOK_fe_tcp_v4_connect);
}

int fx_tcp_v6_connect(struct bpf_raw_tracepoint_args *ctx)
{
	return leave_connect((struct sock *)ctx->args[0], ctx->args[3], TCPLAT_AF_INET6,
			     HOOK_fe_tcp_v6_connect);
}
#endif

/* --- state: each transition, and with it how long the connect took */

/*
 * The number of the first byte that the client sends identifies the connection, where others
 * have the same addresses. A SYN that was acknowledged counts in bytes_acked (RFC 4898), as bytes
 * do that went along with it. Where none was sent, there is no number: snd_nxt is that of the last
 * connection.
 */
static __always_inline void add_begin(struct tcplat_event *e, const struct sock *sk, int new)
{
	const struct tcp_sock *tp = (const struct tcp_sock *)sk;
	u32 next = tcplat_get(tp, snd_nxt), una = tcplat_get(tp, snd_una);

	if (new == TCP_CLOSE && (next == una || next != tcplat_get(tp, write_seq)))
		return;
	e->seq = una - (u32)tcplat_get(tp, bytes_acked) + 1;
	e->has |= TCPLAT_HAS_SEQ;
}

static __always_inline int report_state(struct sock *sk, int old, int new, u8 hook)
{
	u64 now = bpf_ktime_get_ns(), took = 0;
	struct tcplat_sock *s = tcplat_lookup(sk);
	struct tcplat_event *e;

	if (!tcplat_is(s, CLIENT))
		return 0;
	/*
	 * It was disconnected, and is no client any more. By fentry, that it listens is not seen, but
	 * that it does so no longer. A new child of a listener changes from TCP_LISTEN as well: there
	 * the entry is that of an older socket at its address.
	 */
	if (new == TCP_LISTEN || (old == TCP_LISTEN && new == TCP_CLOSE)) {
		tcplat_set_role(sk, TCPLAT_ROLE_LISTENER);
		return 0;
	}
#ifdef TCPLAT_SAMPLE
	if (new == TCP_SYN_SENT && tcplat_awaits_port(sk, s)) {
		s->state = new;
		s->syn_hook = 1 + hook;
		s->syn_ns = now;
		return 0;
	}
	report_waiting(sk, s);
#endif
	s->state = new;
	if (old == TCP_SYN_SENT && s->since_ns) {
		took = now - s->since_ns;
		s->since_ns = 0;
		if (new == TCP_ESTABLISHED)
			tcplat_sample(sk, s, HIST_connect, took);
		else if (new == TCP_CLOSE)
			tcplat_sample(sk, s, HIST_connect_failed, took);
		else /* both ends called at once: it is not over yet */
			tcplat_unmeasured(sk, s, HIST_connect);
		if (tcplat_too_fast(took))
			return 0;
	}
	e = tcplat_make_state(sk, s, old, new, hook, now);
	if (!e)
		return 0;
	e->connect_ns = took;
	if (old == TCP_SYN_SENT)
		add_begin(e, sk, new);
	tcplat_submit(e);
	return 0;
}

int tp_state(struct bpf_raw_tracepoint_args *ctx)
{
	return report_state((struct sock *)ctx->args[0], ctx->args[1], ctx->args[2], HOOK_tp_state);
}

/* --- recv: what the program was given */

static __always_inline int report_recv(struct sock *sk, int ret, u8 hook)
{
	u64 me;
	struct tcplat_sock *s;
	u64 now;

	if (ret < 0)
		return 0;
	s = tcplat_claim_role(sk, &me, CLIENT);
	if (!s)
		return 0;
	now = bpf_ktime_get_ns();
	return tcplat_report(tcplat_make_recv(sk, s, me, ret, hook, now));
}

int tp_recv(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];

	if (ctx->args[2] & TCPLAT_NO_STREAM)
		return 0;
	return report_recv(sk, ctx->args[1], HOOK_tp_recv);
}

#ifdef TCPLAT_FENTRY_recv
static __always_inline int exit_recv(struct sock *sk, u64 flags, u64 ret, u8 hook)
{
	return flags & TCPLAT_NO_STREAM ? 0 : report_recv(sk, ret, hook);
}
#endif

#ifdef TCPLAT_KPROBE_recv
/*
 * pid_tgid -> the socket whose tcp_recvmsg() or tcp_splice_read() it is in.
 *
 * Inserted at entry, deleted at return: a return probe sees no arguments.
 */
BPF_HASH(recvs, u64, u64, 16384);

static __always_inline int enter_recv(struct sock *sk, int flags, u8 hook)
{
	u64 me = bpf_get_current_pid_tgid(), key = (u64)sk;

	/* So many blocked readers that the kernel could not probe the last return. */
	if (recvs.lookup(&me)) {
		tcplat_missed(hook);
		recvs.delete(&me);
	}
	if (!(flags & TCPLAT_NO_STREAM) && tcplat_is(tcplat_claim(sk), CLIENT))
		recvs.update(&me, &key);
	return 0;
}

static __always_inline int leave_recv(int ret, u8 hook)
{
	u64 me = bpf_get_current_pid_tgid();
	u64 *key = recvs.lookup(&me);
	struct sock *sk;

	if (!key)
		return 0;
	sk = (struct sock *)*key;
	recvs.delete(&me);
	return report_recv(sk, ret, hook);
}
#endif

/* --- send, send_short, close; and what the mechanisms call of state and recv */

#include <tcplat/handlers.bpf.h>
