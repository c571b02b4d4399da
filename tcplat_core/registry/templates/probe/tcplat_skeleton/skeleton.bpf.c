// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * One row for each TCP connection, when it ends.
 *
 * MIN_SRTT_US: connections with a shorter round-trip time are left out.
 */
#include <tcplat/owner.bpf.h>

int tp_end(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];
	struct tcp_sock *tp = (struct tcp_sock *)sk;
	u32 srtt_us = tp->srtt_us >> 3; /* the kernel stores 8 * srtt */
	struct tcplat_sock *s = tcplat_lookup_or_create(sk);
	struct tcplat_event *e;

	/* Without a remote port, the socket listened or was never connected. */
	if (!s || !sk->__sk_common.skc_dport || srtt_us < MIN_SRTT_US)
		return 0;
	/* NULL if the filters exclude the socket, or the ring is full, which is counted. */
	e = tcplat_reserve_for(sk, s, HOOK_tp_end, bpf_ktime_get_ns());
	if (!e)
		return 0;
	e->srtt_us = srtt_us;
	e->resent = tp->total_retrans;
	e->err = sk->sk_err;
	tcplat_submit(e);
	return 0;
}
