// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* What a connection's socket has counted, read when it is closed: nothing is cleared by then. */
#include <tcplat/event.bpf.h>
#include <tcplat/owner.bpf.h>
#include <tcplat/stream.bpf.h>

#define UNMEASURED 0xffffffff /* min RTT of a connection on which none was taken */

static __always_inline int report(struct sock *sk, int old, int new, u8 hook)
{
	u64 now = bpf_ktime_get_ns();
	const struct tcp_sock *tp = (const struct tcp_sock *)sk;
	struct tcplat_event *e;
	struct tcplat_sock *s;
	u32 srtt, min;

	if (new != TCP_CLOSE || old == TCP_CLOSE || old == TCP_LISTEN)
		return 0;
	s = tcplat_lookup(sk);
	if (!s || s->role == TCPLAT_ROLE_LISTENER)
		return 0;
	e = tcplat_make_state(sk, s, old, new, hook, now);
	if (!e)
		return 0;
	srtt = tcplat_get(tp, srtt_us) >> 3;
	min = tcplat_get(tp, rtt_min.s[0].v);
	e->role = s->role;
	e->srtt_us = srtt;
	e->min_rtt_us = min == UNMEASURED ? 0 : min;
	/* __tcp_set_rto(), before it is rounded to jiffies, and what timeouts made of it. */
	if (srtt)
		e->rto_us = (srtt + tcplat_get(tp, rttvar_us))
			    << (tcplat_get(tp, inet_conn.icsk_backoff) & 15);
	e->retransmits = tcplat_get(tp, total_retrans);
	e->bytes_acked = tcplat_get(tp, bytes_acked);
	e->bytes_received = tcplat_get(tp, bytes_received);
	tcplat_submit(e);
	return 0;
}

int tp_stats(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];

	if (sk->sk_protocol != IPPROTO_TCP)
		return 0;
	return report(sk, ctx->args[1], ctx->args[2], HOOK_tp_stats);
}

#ifdef TCPLAT_FENTRY_stats
int fe_stats(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];

	return report(sk, sk->__sk_common.skc_state, ctx->args[1], HOOK_fe_stats);
}
#endif

#ifdef TCPLAT_KPROBE_stats
int kp_stats(struct pt_regs *ctx, struct sock *sk, int state)
{
	return report(sk, sk->__sk_common.skc_state, state, HOOK_kp_stats);
}
#endif
