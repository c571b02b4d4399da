// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * TCP segments that are sent again, and those that were to be.
 *
 * RETRANSMIT_HZ: the kernel's HZ, in which it keeps the RTO; not defined where it is not known.
 * RETRANSMIT_MIN_RTO_US: rows of a shorter RTO are left out.
 */
#include <tcplat/owner.bpf.h>

#define TCP_FLAG_FIN 0x01
#define TCP_FLAG_SYN 0x02

static __always_inline u32 rto_us(const struct sock *sk)
{
#ifdef RETRANSMIT_HZ
	u64 jiffies = tcplat_get((const struct inet_connection_sock *)sk, icsk_rto);

	return jiffies * 1000000 / RETRANSMIT_HZ;
#else
	return 0;
#endif
}

/*
 * tcp:tcp_retransmit_skb: a timer or an acknowledgement led here, in softirq mostly,
 * so the current task is not its own. A socket that nothing is known of has a row, too.
 */
static __always_inline int
report(const struct sock *sk, const struct sk_buff *skb, int err, u8 hook)
{
	const struct tcp_skb_cb *segment = (const struct tcp_skb_cb *)&skb->cb;
	const struct tcp_sock *tp = (const struct tcp_sock *)sk;
	struct tcplat_sock *s = tcplat_lookup_or_create(sk);
	u32 rto = rto_us(sk), bytes;
	struct tcplat_event *e;

	if (!s || rto < RETRANSMIT_MIN_RTO_US)
		return 0;
	e = tcplat_reserve_for(sk, s, hook, bpf_ktime_get_ns());
	if (!e)
		return 0;
	e->flags = tcplat_get(segment, tcp_flags);
	e->seq = tcplat_get(segment, seq);
	bytes = tcplat_get(segment, end_seq) - e->seq;
	/* SYN and FIN have a number each, and are no bytes. */
	bytes -= !!(e->flags & TCP_FLAG_SYN) + !!(e->flags & TCP_FLAG_FIN);
	e->bytes = bytes;
	e->has = TCPLAT_HAS_SEQ | TCPLAT_HAS_BYTES | TCPLAT_HAS_FLAGS;
	/*
	 * The tracepoint comes before a timeout doubles it: what was waited for, not what will be.
	 */
	e->rto_us = rto;
	e->srtt_us = tcplat_get(tp, srtt_us) >> 3;
	e->segments = tcplat_get(segment, tcp_gso_segs);
	e->retransmits = tcplat_get(tp, total_retrans);
	/* A qdisc that drops gives a positive number, which is no errno. */
	if (err < 0)
		e->err = -err;
	tcplat_submit(e);
	return 0;
}

/* Since 6.17, with the outcome. */
int tp_sent_again(struct bpf_raw_tracepoint_args *ctx)
{
	if ((int)ctx->args[2])
		return 0;
	return report((const struct sock *)ctx->args[0], (const struct sk_buff *)ctx->args[1], 0,
		      HOOK_tp_sent_again);
}

int tp_not_sent(struct bpf_raw_tracepoint_args *ctx)
{
	int err = ctx->args[2];

	if (!err)
		return 0;
	return report((const struct sock *)ctx->args[0], (const struct sk_buff *)ctx->args[1], err,
		      HOOK_tp_not_sent);
}

/* Before, it fired for what was sent alone. */
int tp_sent_again_before_6_17(struct bpf_raw_tracepoint_args *ctx)
{
	return report((const struct sock *)ctx->args[0], (const struct sk_buff *)ctx->args[1], 0,
		      HOOK_tp_sent_again_before_6_17);
}
