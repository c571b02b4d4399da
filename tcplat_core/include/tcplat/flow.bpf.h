// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * The two ends of a socket, and how they lead to its entry: a packet has no socket.
 */

#define TCPLAT_LANES 2

/* skc_reuse takes four bits of its byte, skc_reuseport one. */
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define TCPLAT_IPV6ONLY 0x20
#else
#define TCPLAT_IPV6ONLY 0x04
#endif

/* Where an address pair leads: to a socket's entry, or to tcplat_seeds. */
struct tcplat_flow {
	u64 key; /* the socket's address, or 0 */
	u64 id;  /* its entry's, which it must still have; where `key` is 0 the seed's cookie */
};

/*
 * Addresses of a socket, local first, and a lane -> struct tcplat_flow.
 *
 * A socket that was reset or gave up may be open for long after its addresses are another's, and
 * TIME_WAIT ends early where a port is used again. So who finds an entry in the way takes the next
 * lane, and the younger of two counts.
 *
 * Inserted, and never replaced while its socket is there, by tcplat_add_flow(), and by the loader
 * for older sockets. Deleted by tcplat_unindex() of the same socket: it ends, or connects anew.
 */
BPF_TABLE("hash", struct tcplat_addrs, struct tcplat_flow, tcplat_flows, 1024);

/* Slot 0 -> 1 once a lane other than the first was used: until then no look is worth while. */
BPF_TABLE("array", u32, u8, tcplat_lanes, 1);

/* The ends of a socket, as far as the kernel still has them: a failed connect clears them. */
static __always_inline void tcplat_read_addrs(struct tcplat_addrs *to, const struct sock *sk)
{
	struct net *net = tcplat_get(sk, __sk_common.skc_net.net);
	u16 dport = tcplat_get(sk, __sk_common.skc_dport);

	if (!dport && to->dport)
		return;
	to->netns = tcplat_get(net, ns.inum);
	to->dport = bpf_ntohs(dport);
	/*
	 * skc_num is cleared before the change to TCP_CLOSE, inet_sport is not. Where
	 * the socket is closed and begins anew, it is the one of the last time.
	 */
	to->sport = tcplat_get(sk, __sk_common.skc_num);
	if (!to->sport && tcplat_get(sk, __sk_common.skc_state) != TCP_CLOSE)
		to->sport = bpf_ntohs(tcplat_get((const struct inet_sock *)sk, inet_sport));
	if (tcplat_get(sk, __sk_common.skc_family) == TCPLAT_AF_INET) {
		to->ip = 4;
		tcplat_map_v4(to->saddr, tcplat_get(sk, __sk_common.skc_rcv_saddr));
		tcplat_map_v4(to->daddr, tcplat_get(sk, __sk_common.skc_daddr));
		return;
	}
	bpf_probe_read_kernel(to->saddr, 16, (const void *)&sk->__sk_common.skc_v6_rcv_saddr);
	bpf_probe_read_kernel(to->daddr, 16, (const void *)&sk->__sk_common.skc_v6_daddr);
	/* A dual-stack socket that speaks IPv4 has a mapped remote address. */
	to->ip = tcplat_is_mapped(to->daddr) ? 4 : 6;
}

/*
 * The same of a socket that has an entry. Of a listener that was a client before, the kernel still
 * has the remote address.
 */
static __always_inline void tcplat_read_sock(struct tcplat_sock *s, const struct sock *sk)
{
	struct tcplat_addrs *addrs = &s->addrs;

	tcplat_read_addrs(addrs, sk);
	if (s->role != TCPLAT_ROLE_LISTENER)
		return;
	if (tcplat_get(sk, __sk_common.skc_family) == TCPLAT_AF_INET) {
		tcplat_map_v4(addrs->daddr, 0);
		return;
	}
	__builtin_memset(addrs->daddr, 0, 16);
	addrs->ip = 6;
}

static __always_inline bool
tcplat_same_addrs(const struct tcplat_addrs *a, const struct tcplat_addrs *b)
{
	u64 differ = 0;

#pragma unroll
	for (int i = 0; i < sizeof(*a) / 8; i++)
		differ |= ((const u64 *)a)[i] ^ ((const u64 *)b)[i];
	return !differ;
}

/* Whether the socket that made it is there no more, and no program saw its end. */
static __always_inline bool tcplat_is_stale(const struct tcplat_flow *flow)
{
	u64 key = flow->key, id = flow->id;
	struct tcplat_sock *s;

	if (!key)
		return !tcplat_seeds.lookup(&id);
	s = tcplat_lookup_entry(key);
	return !s || s->id != id;
}

/* Take a flow from a socket that is open, but has no connection any more. */
static __always_inline bool tcplat_steal_flow(const struct tcplat_flow *flow)
{
	u64 key = flow->key, id = flow->id;
	struct tcplat_sock *s = key ? tcplat_lookup_entry(key) : NULL;

	if (!s || s->id != id)
		return false;
	if (tcplat_get((const struct sock *)key, __sk_common.skc_state) != TCP_CLOSE)
		return false;
	s->in_flows = 0;
	return true;
}

/* Let packets find the socket by its addresses, which must be complete. */
static __always_inline void tcplat_add_flow(struct tcplat_sock *s, u64 key)
{
	struct tcplat_flow flow = {.key = key, .id = s->id}, *other;
	struct tcplat_addrs addrs = s->addrs;
	u32 zero = 0;
	u8 one = 1;

	/*
	 * Where both lanes are taken, those of closed sockets are not waited for. One that ends at
	 * this very instant, on another CPU, deletes what replaced its own: then the listener's
	 * owner stands in.
	 */
#pragma unroll
	for (u8 round = 0; round < 2 * TCPLAT_LANES; round++) {
		addrs.lane = round % TCPLAT_LANES;
		if (round == 1)
			tcplat_lanes.update(&zero, &one);
		if (tcplat_flows.insert(&addrs, &flow)) {
			other = tcplat_flows.lookup(&addrs);
			if (other && !tcplat_is_stale(other) &&
			    (round < TCPLAT_LANES || !tcplat_steal_flow(other)))
				continue;
			tcplat_flows.update(&addrs, &flow);
		}
		s->in_flows = 1 + addrs.lane;
		return;
	}
}
