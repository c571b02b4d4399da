// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Records of sockets: the owner, the addresses and the state are filled in.
 */

static __always_inline void tcplat_fill_owner(struct tcplat_event *e, struct tcplat_sock *s)
{
	u64 task = tcplat_valid_owner(s, (char *)e->comm);

	e->sock = s->id;
	e->pid = task >> 32;
	*(u64 *)e->thread = *(volatile u64 *)s->owner.thread;
	*(u64 *)(e->thread + 8) = *(volatile u64 *)(s->owner.thread + 8);
	if (s->owner.thread_sum == tcplat_owner_sum(task, (const char *)e->thread))
		e->tid = task;
	else
		*(u64 *)e->thread = *(u64 *)(e->thread + 8) = 0;
}

/*
 * A row of a call of `me`, the current task's: another process may have called since on another
 * CPU, and be the owner by now.
 */
static __always_inline void tcplat_fill_caller(struct tcplat_event *e, u64 me)
{
	if (e->tid != (u32)me) {
		e->tid = me;
		tcplat_thread_name(me >> 32, me, (char *)e->thread);
	}
	if (e->pid == me >> 32 || (e->pid && tcplat_is_worker()))
		return;
	e->pid = me >> 32;
	tcplat_process_name(e->pid, (char *)e->comm);
}

#define TCPLAT_SAME_PLACE(member, first)                                                           \
	_Static_assert(__builtin_offsetof(struct tcplat_event, member) -                           \
				       __builtin_offsetof(struct tcplat_event, first) ==           \
			       __builtin_offsetof(struct tcplat_addrs, member) -                   \
				       __builtin_offsetof(struct tcplat_addrs, first),             \
		       "the addresses of a record do not lie as in tcplat_addrs")
TCPLAT_SAME_PLACE(daddr, saddr);
TCPLAT_SAME_PLACE(sport, netns);
TCPLAT_SAME_PLACE(dport, netns);
TCPLAT_SAME_PLACE(ip, netns);

/* The two parts lie in the record as they do here, zeros of the padding included. */
static __always_inline void tcplat_fill_addrs(struct tcplat_event *e, const struct tcplat_addrs *a)
{
	__builtin_memcpy((void *)e->saddr, a->saddr, 32);
	__builtin_memcpy((void *)&e->netns, &a->netns, 16);
}

/*
 * A segment that a listener gets: its owner is that of the connection until it is accepted. If
 * several processes accept, it is not known.
 */
static __always_inline void
tcplat_fill_listener(struct tcplat_event *e, const struct sock *sk, const struct tcplat_sock *s)
{
	struct tcplat_port port = tcplat_port_of(sk, &s->addrs);
	struct tcplat_listener *listener = tcplat_listeners.lookup(&port);
	char comm[16] __attribute__((aligned(8)));

	if (listener && e->pid == tcplat_listener_pid(listener, port.port, comm))
		return;
	e->pid = e->tid = 0;
	__builtin_memset((void *)e->comm, 0, sizeof(e->comm));
	__builtin_memset((void *)e->thread, 0, sizeof(e->thread));
}

/*
 * Whether --sample leaves the socket's connection out. A socket that has no remote end is of no
 * connection, and not left out. One that has no port never gets there, or is asked too early: its
 * number decides, since no packet has its ports.
 */
static __always_inline bool tcplat_leaves_out_sock(struct tcplat_sock *s, u8 hook, u64 ts_ns)
{
#ifdef TCPLAT_SAMPLE
	const struct tcplat_addrs *a = &s->addrs;

	if (!s->sample && a->sport && a->dport)
		s->sample = tcplat_connection_hash(a->saddr, a->sport, a->daddr, a->dport);
	if (s->sample)
		return tcplat_leaves_out_hash(s->sample, hook, ts_ns);
	return a->dport && tcplat_leaves_out_hash(tcplat_mixed(s->id) >> 32, hook, ts_ns);
#else
	return false;
#endif
}

/* Whether its source port is still to be chosen. Where it calls connect(). */
static __always_inline bool tcplat_awaits_port(const struct sock *sk, struct tcplat_sock *s)
{
	if (!s->addrs.sport)
		tcplat_read_addrs(&s->addrs, sk);
	return !s->addrs.sport;
}

/* Whether its addresses pass the filters. */
static __always_inline bool tcplat_passes(const struct sock *sk, struct tcplat_sock *s)
{
	if (!s->addrs.sport)
		tcplat_read_sock(s, sk);
	return tcplat_wanted_addrs(&s->addrs);
}

/*
 * A record of the socket's, owner and addresses filled in, whether or not the owner is wanted.
 *
 * NULL while events are not wanted, if the ring is full, or if --sample leaves the connection out.
 */
static __always_inline struct tcplat_event *
tcplat_reserve_wanted(const struct sock *sk, struct tcplat_sock *s, u8 hook, u64 ts_ns)
{
	struct tcplat_event *e;

#ifdef TCPLAT_NO_EVENTS
	return NULL;
#endif
	if (!tcplat_passes(sk, s) || tcplat_leaves_out_sock(s, hook, ts_ns))
		return NULL;
	e = tcplat_reserve(hook, ts_ns);
	if (!e)
		return NULL;
	tcplat_fill_owner(e, s);
	tcplat_fill_addrs(e, &s->addrs);
	e->state = s->state ? s->state : tcplat_get(sk, __sk_common.skc_state);
	return e;
}

/* The same; NULL as well if the owner is not wanted. */
static __always_inline struct tcplat_event *
tcplat_reserve_for(const struct sock *sk, struct tcplat_sock *s, u8 hook, u64 ts_ns)
{
	tcplat_refresh(s);
	return s->wanted ? tcplat_reserve_wanted(sk, s, hook, ts_ns) : NULL;
}
