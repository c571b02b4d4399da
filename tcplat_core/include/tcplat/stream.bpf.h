// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * What both ends of a connection have in common: state, send, recv, close.
 *
 * Each function makes a filled record for sockets of one role, or NULL where
 * there is nothing to report. The caller may add to it and must submit it.
 */

/*
 * The last byte of a send() with it is urgent: it has a number, but it is no byte of the stream
 * that the other end reads, unless that asked for it (SO_OOBINLINE). recv() with it reads that byte
 * alone.
 */
#define TCPLAT_MSG_OOB 1

/* recv() flags of calls that take nothing from the byte stream. */
#define TCPLAT_NO_STREAM (TCPLAT_MSG_OOB | 2 /* MSG_PEEK */ | 0x2000 /* MSG_ERRQUEUE */)

static __always_inline bool tcplat_is(const struct tcplat_sock *s, u8 role)
{
	return s && s->role == role;
}

#define TCPLAT_REPORTED_CLOSE 255

/*
 * The kernel skips a kprobe that hits while another's handler runs on the CPU:
 * in softirq that happens, and nothing counts it. So a tracepoint that comes
 * right after the kprobe asks whether its row was made, and makes it if not.
 */
static __always_inline bool tcplat_is_reported(const struct sock *sk, u8 what)
{
	struct tcplat_sock *s = tcplat_lookup(sk);

	return s && s->reported == what;
}

static __always_inline void tcplat_set_reported(const struct sock *sk, u8 role, u8 what)
{
	struct tcplat_sock *s = tcplat_lookup(sk);

	/* One probe reports services and their listeners. */
	if (tcplat_is(s, role) ||
	    (role == TCPLAT_ROLE_SERVER && tcplat_is(s, TCPLAT_ROLE_LISTENER)))
		s->reported = what;
}

static __always_inline void tcplat_add_seq(struct tcplat_event *e, u32 seq, u32 bytes)
{
	e->seq = seq;
	e->bytes = bytes;
	e->has |= TCPLAT_HAS_SEQ | TCPLAT_HAS_BYTES;
}

/*
 * The errno that ended a connect, where sk_err has none: an ICMP error that came during a system
 * call on the socket is kept in sk_err_soft (tcp_v4_err()), which getsockopt(SO_ERROR) clears. The
 * error queue has it until the socket is destroyed (5.9, 45af29ca761c).
 */
static __always_inline u32 tcplat_soft_error(const struct sock *sk)
{
	const struct sk_buff *skb = tcplat_get(sk, sk_error_queue.prev);
	const struct sock_exterr_skb *report;
	u32 err = tcplat_get(sk, sk_err_soft);

	if (err || (u64)skb == tcplat_key(sk) + __builtin_offsetof(struct sock, sk_error_queue))
		return err;
	report =
		(const struct sock_exterr_skb *)((u64)skb + __builtin_offsetof(struct sk_buff, cb));
	return tcplat_get(report, ee.ee_errno);
}

/* A change of state; `s` is the socket's entry. */
static __always_inline struct tcplat_event *
tcplat_make_state(const struct sock *sk, struct tcplat_sock *s, int old, int new, u8 hook, u64 now)
{
	struct tcplat_event *e = tcplat_reserve_for(sk, s, hook, now);

	if (!e)
		return NULL;
	e->old_state = old;
	e->state = new;
	/* A listener has no error but that of a connection which the same socket had before. */
	if (new == TCP_CLOSE && old != TCP_LISTEN) {
		e->err = tcplat_get(sk, sk_err);
		if (!e->err && old == TCP_SYN_SENT)
			e->err = tcplat_soft_error(sk);
	}
	return e;
}

/* What the program asks to send, with send()'s flags; `s` and `me` are tcplat_claim_role()'s. */
static __always_inline struct tcplat_event *
tcplat_make_send(const struct sock *sk, struct tcplat_sock *s, u64 me, u32 bytes, u32 flags,
		 u8 hook)
{
	u64 now = bpf_ktime_get_ns();
	struct tcplat_event *e;
	u32 seq;

	if (!bytes)
		return NULL;
	seq = tcplat_get((const struct tcp_sock *)sk, write_seq);
	/*
	 * The tracepoint sits in the copying loop; only the first round of a call
	 * counts. In a later one, what is left and what was queued make up the whole.
	 * (Two threads blocked in send() on one socket are one too many for this.)
	 */
	if (s->send_tid == (u32)me && bytes + (seq - s->send_seq) == s->send_bytes)
		return NULL;
	s->send_tid = me;
	s->send_seq = seq;
	s->send_bytes = bytes;
	s->send_urgent = flags & TCPLAT_MSG_OOB;
	bytes -= s->send_urgent;
	if (!bytes)
		return NULL;
	e = tcplat_reserve_wanted(sk, s, hook, now);
	if (!e)
		return NULL;
	tcplat_fill_caller(e, me);
	tcplat_add_seq(e, seq, bytes);
	return e;
}

/* What of it was not taken, once the call returns: the buffer is full, or an error. */
static __always_inline struct tcplat_event *
tcplat_make_short(const struct sock *sk, u8 role, int ret, u8 hook)
{
	struct tcplat_sock *s = tcplat_lookup(sk);
	u32 taken = ret > 0 ? ret : 0;
	struct tcplat_event *e;
	u32 bytes, urgent;
	u64 me;

	if (!tcplat_is(s, role) || !s->send_tid)
		return NULL;
	/*
	 * s->send_tid stays: no later call can look like a round of one that has taken all.
	 * With kTLS the socket carries more than the program sent: no comparison then.
	 */
	if (taken >= s->send_bytes)
		return NULL;
	s->send_tid = 0;
	me = tcplat_current();
	if (!tcplat_set_owner(s, me))
		return NULL;
	if (tcplat_get((const struct tcp_sock *)sk, write_seq) != s->send_seq + taken)
		return NULL;
	bytes = s->send_bytes - taken - (taken ? 0 : s->send_urgent);
	if (!bytes)
		return NULL;
	e = tcplat_reserve_wanted(sk, s, hook, bpf_ktime_get_ns());
	if (!e)
		return NULL;
	tcplat_fill_caller(e, me);
	/* Of what was taken the last byte is urgent, of what was not, none. */
	urgent = taken ? s->send_urgent : 0;
	tcplat_add_seq(e, s->send_seq + taken - urgent, bytes);
	if (ret < 0)
		e->err = -ret;
	return e;
}

#define TCPLAT_SOCK_DONE 1    /* enum sock_flags: a bit of skc_flags, set by tcp_fin() */
#define TCPLAT_RCV_SHUTDOWN 1 /* of sk_shutdown */

/*
 * Where the next byte to be read is; a FIN that was read has a number, too, but is no byte.
 * `state` is to be read after `copied`, the socket's copied_seq.
 */
static __always_inline u32 tcplat_next_byte(const struct tcp_sock *tp, u32 copied, u8 state)
{
	const struct sock *sk = (const struct sock *)tp;

	/* tcp_fin() leaves this state. */
	if (state == TCP_ESTABLISHED)
		return copied;
	if (!(tcplat_get(sk, __sk_common.skc_flags) & (1UL << TCPLAT_SOCK_DONE)))
		return copied;
	return copied == tcplat_get(tp, rcv_nxt) ? copied - 1 : copied;
}

/*
 * What the program was given; 0 bytes at the end of the stream. `s` and `me` are
 * tcplat_claim_role()'s.
 */
static __always_inline struct tcplat_event *
tcplat_make_recv(const struct sock *sk, struct tcplat_sock *s, u64 me, u32 bytes, u8 hook, u64 now)
{
	const struct tcp_sock *tp = (const struct tcp_sock *)sk;
	struct tcplat_event *e;
	u32 copied;

#ifdef TCPLAT_NO_EVENTS
	return NULL;
#endif
	/* Nothing was asked for: that is not the end of the stream. */
	if (!bytes && !(tcplat_get(sk, sk_shutdown) & TCPLAT_RCV_SHUTDOWN))
		return NULL;
	copied = tcplat_get(tp, copied_seq);
	e = tcplat_reserve_wanted(sk, s, hook, now);
	if (!e)
		return NULL;
	tcplat_fill_caller(e, me);
	tcplat_add_seq(e, tcplat_next_byte(tp, copied, e->state) - bytes, bytes);
	return e;
}

/* The kernel lets go of the socket. */
static __always_inline struct tcplat_event *
tcplat_make_close(const struct sock *sk, u8 role, u8 hook)
{
	struct tcplat_sock *s = tcplat_lookup(sk);

	return tcplat_is(s, role) ? tcplat_reserve_for(sk, s, hook, bpf_ktime_get_ns()) : NULL;
}

static __always_inline int tcplat_report(struct tcplat_event *e)
{
	if (e)
		tcplat_submit(e);
	return 0;
}
