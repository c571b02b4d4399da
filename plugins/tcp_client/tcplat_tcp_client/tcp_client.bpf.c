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

/* --- connect: the call that sends the SYN */

static __always_inline struct tcplat_sock *begin_connect(struct sock *sk, u64 now)
{
	struct tcplat_sock *s = tcplat_learn(sk, CLIENT);

	if (!s)
		return NULL;
	s->since_ns = now;
	/* What the socket sent in a connection before is no part of a call in this one. */
	s->send_tid = 0;
	return s;
}

static __always_inline void report_connect(struct sock *sk, struct tcplat_sock *s, u8 hook, u64 ts_ns)
{
	struct tcplat_event *e = tcplat_reserve_for(sk, s, hook, ts_ns);

	if (!e)
		return;
	e->state = TCP_SYN_SENT;
	tcplat_submit(e);
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
		report_connect(sk, s, HOOK_tp_connect, now);
	return 0;
}

#if defined(TCPLAT_KPROBE_connect) || defined(TCPLAT_FENTRY_connect)
/*
 * At the entry of tcp_v4_connect() no address is known; on loopback the handshake
 * is over at its return. So the row is made in between, at the change to
 * TCP_SYN_SENT, and stamped with the entry. The return tells of what never got there.
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
	struct tcplat_sock *s = tcplat_find(sk);
	u8 hook = hook_v4;

	if (state != TCP_SYN_SENT || !tcplat_is(s, CLIENT) || !s->since_ns)
		return 0;
	if (tcplat_get(sk, __sk_common.skc_family) == TCPLAT_AF_INET6)
		hook = hook_v6;
	report_connect(sk, s, hook, s->since_ns);
	return 0;
}

static __always_inline int leave_connect(struct sock *sk, int ret, u16 family, u8 hook)
{
	struct tcplat_sock *s = tcplat_find(sk);
	struct tcplat_event *e;
	u64 now = bpf_ktime_get_ns();

	if (!ret || tcplat_get(sk, __sk_common.skc_family) != family)
		return 0;
	/* A failure after the SYN has its row from the change of state. */
	if (!tcplat_is(s, CLIENT) || !s->since_ns)
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
 * The number of the first byte that the client sends tells which connection it is, where others have
 * the same addresses. A SYN that was acknowledged counts in bytes_acked (RFC 4898), as bytes do that
 * went along with it. Where none was sent, there is no number: snd_nxt is that of the last connection.
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
	struct tcplat_sock *s = tcplat_find(sk);
	struct tcplat_event *e;

	if (!tcplat_is(s, CLIENT))
		return 0;
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

#ifdef TCPLAT_KPROBE_state
int kp_tcp_set_state(struct pt_regs *ctx, struct sock *sk, int state)
{
	int old = sk->__sk_common.skc_state;

	report_state(sk, old, state, HOOK_kp_tcp_set_state);
	tcplat_tell(sk, CLIENT, state);
	return 0;
}

/* What the kprobe was skipped for. */
int tp_state_skipped(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];
	int new = ctx->args[2];

	if (sk->sk_protocol != IPPROTO_TCP)
		return 0;
	if (tcplat_is_told(sk, new))
		return 0;
	report_state(sk, ctx->args[1], new, HOOK_tp_state_skipped);
	tcplat_tell(sk, CLIENT, new);
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

/* --- send: what the program asks to send; send_short: what of it was not taken */

static __always_inline int report_send(struct sock *sk, u32 bytes, u32 flags, u8 hook)
{
	u64 me;
	struct tcplat_sock *s = tcplat_use(sk, &me, CLIENT);

	return s ? tcplat_report(tcplat_make_send(sk, s, me, bytes, flags, hook)) : 0;
}

int tp_send(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];
	struct msghdr *msg = (struct msghdr *)ctx->args[1];

	return report_send(sk, tcplat_get(msg, msg_iter.count), tcplat_get(msg, msg_flags), HOOK_tp_send);
}

int tp_send_short(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];

	return tcplat_report(tcplat_make_short(sk, CLIENT, ctx->args[1], HOOK_tp_send_short));
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

	return tcplat_report(tcplat_make_short(sk, CLIENT, ctx->args[3], HOOK_fx_tcp_sendmsg));
}

int fx_tcp_sendpage(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];

	return tcplat_report(tcplat_make_short(sk, CLIENT, ctx->args[5], HOOK_fx_tcp_sendpage));
}
#endif

/* --- recv: what the program was given */

static __always_inline int report_recv(struct sock *sk, int ret, u8 hook)
{
	u64 me;
	struct tcplat_sock *s;
	u64 now;

	if (ret < 0)
		return 0;
	s = tcplat_use(sk, &me, CLIENT);
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
static __always_inline int returned_recv(struct sock *sk, u64 flags, u64 ret, u8 hook)
{
	return flags & TCPLAT_NO_STREAM ? 0 : report_recv(sk, ret, hook);
}

/*
 * tcp_recvmsg() has four arguments since 7.1 (8341c989ac77), and had `nonblock` in front of
 * `flags` before 5.19 (ec095263a965). The result stands behind them.
 */
int fx_tcp_recvmsg4(struct bpf_raw_tracepoint_args *ctx)
{
	return returned_recv((struct sock *)ctx->args[0], ctx->args[3], ctx->args[4], HOOK_fx_tcp_recvmsg4);
}

int fx_tcp_recvmsg5(struct bpf_raw_tracepoint_args *ctx)
{
	return returned_recv((struct sock *)ctx->args[0], ctx->args[3], ctx->args[5], HOOK_fx_tcp_recvmsg5);
}

int fx_tcp_recvmsg6(struct bpf_raw_tracepoint_args *ctx)
{
	return returned_recv((struct sock *)ctx->args[0], ctx->args[4], ctx->args[6], HOOK_fx_tcp_recvmsg6);
}

/* splice(2) and sendfile(2) from a socket; they return what went into the pipe. */
int fx_tcp_splice_read(struct bpf_raw_tracepoint_args *ctx)
{
	struct socket *socket = (struct socket *)ctx->args[0];
	struct sock *sk = tcplat_sk(socket);

	return report_recv(sk, ctx->args[5], HOOK_fx_tcp_splice_read);
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
	if (!(flags & TCPLAT_NO_STREAM) && tcplat_is(tcplat_touch(sk), CLIENT))
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

#ifdef TCPLAT_KPROBE_send_short
/* pid_tgid -> the socket whose tcp_sendmsg() it is in; as recvs. */
BPF_HASH(sends, u64, u64, 16384);

static __always_inline int enter_send(struct sock *sk)
{
	u64 me = bpf_get_current_pid_tgid(), key = (u64)sk;

	if (tcplat_is(tcplat_find(sk), CLIENT))
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
	return tcplat_report(tcplat_make_short(sk, CLIENT, ret, hook));
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
	return tcplat_report(tcplat_make_close((struct sock *)ctx->args[0], CLIENT, HOOK_tp_close));
}

#ifdef TCPLAT_KPROBE_close
/* tcp_v6_destroy_sock() ends in this one as well. */
int kp_tcp_v4_destroy_sock(struct pt_regs *ctx, struct sock *sk)
{
	tcplat_report(tcplat_make_close(sk, CLIENT, HOOK_kp_tcp_v4_destroy_sock));
	tcplat_tell(sk, CLIENT, TCPLAT_TOLD_CLOSE);
	return 0;
}

int tp_close_skipped(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];

	if (tcplat_is_told(sk, TCPLAT_TOLD_CLOSE))
		return 0;
	return tcplat_report(tcplat_make_close(sk, CLIENT, HOOK_tp_close_skipped));
}
#endif

#ifdef TCPLAT_FENTRY_close
int fe_tcp_v4_destroy_sock(struct bpf_raw_tracepoint_args *ctx)
{
	return tcplat_report(tcplat_make_close((struct sock *)ctx->args[0], CLIENT, HOOK_fe_tcp_v4_destroy_sock));
}
#endif
