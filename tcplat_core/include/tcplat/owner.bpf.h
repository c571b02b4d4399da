// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Which process owns a socket, and whether anybody asked for it.
 *
 * Most events of a socket happen in softirq, where the current task is whoever
 * was interrupted. So the owner is learnt where the socket's own process calls,
 * and looked up everywhere else. "pid" is the process, "tid" the thread.
 */

#define TCPLAT_ROLE_CLIENT 1
#define TCPLAT_ROLE_SERVER 2

/* Both ends, as a record has them: local, then remote. */
struct tcplat_addrs {
	u8 saddr[16], daddr[16];
	u32 netns;
	u16 sport, dport;
	u8 ip;
	u8 pad[7];
} __attribute__((aligned(8)));

struct tcplat_sock {
	u64 id;         /* the event's `sock`: when it was first seen, and on which CPU */
	u64 since_ns;   /* when the connect that is under way began, else 0 */
	u32 pid, tid;   /* the process that used it last, 0 where nobody can know */
	u32 send_tid;   /* the thread inside send(), else 0 */
	u32 send_seq;   /* where its bytes begin */
	u32 send_bytes; /* how many it asked to send */
	u8 role;
	u8 wanted;      /* its owner passes the filters */
	u8 pad[2];
	char comm[16] __attribute__((aligned(8)));
	struct tcplat_addrs addrs; /* once the source port is chosen: the kernel forgets it first */
};

/* What is known of a socket that is older than the run: filled in from user space. */
struct tcplat_seed {
	u32 pid;
	u8 role;
	u8 pad[3];
	char comm[16] __attribute__((aligned(8)));
};

/*
 * struct sock * -> struct tcplat_sock.
 *
 * Inserted by tcplat_learn() when a socket begins to connect, and by
 * tcplat_find() when a seeded one is seen for the first time.
 * Deleted by tcplat_on_destroy, which runs after every probe's handlers.
 */
BPF_TABLE("hash", u64, struct tcplat_sock, tcplat_socks, 1024);

/*
 * Socket cookie -> struct tcplat_seed.
 *
 * Inserted by the loader, from sock_diag and /proc, before the gate opens.
 * Deleted by tcplat_find() when the entry moves to tcplat_socks; the rest are
 * of sockets that never stir.
 */
BPF_TABLE("hash", u64, struct tcplat_seed, tcplat_seeds, 1024);

/*
 * pid -> 1, for each process that -p or the traced command names.
 *
 * Inserted by the loader, and by tcplat_on_fork for children of a command.
 * Deleted by tcplat_on_exit, so that a reused pid is not taken for the old one.
 */
BPF_TABLE("hash", u32, u32, tcplat_pids, 16384);

static __always_inline bool tcplat_wanted_pid(u32 pid)
{
#ifdef TCPLAT_FILTER_PID
	return tcplat_pids.lookup(&pid) != NULL;
#else
	return true;
#endif
}

/* The current task becomes the owner. Only where the socket's own process calls. */
static __always_inline void tcplat_own(struct tcplat_sock *s)
{
	u64 both = bpf_get_current_pid_tgid();

	s->tid = both;
	if (s->pid == both >> 32)
		return;
	s->pid = both >> 32;
	s->wanted = tcplat_wanted_pid(s->pid);
	bpf_get_current_comm(&s->comm, sizeof(s->comm));
}

static __always_inline u64 tcplat_new_id(void)
{
	/* Two sockets cannot be born on one CPU within 2^bits ns. */
	return (bpf_ktime_get_ns() >> TCPLAT_CPU_BITS << TCPLAT_CPU_BITS) | bpf_get_smp_processor_id();
}

static __always_inline struct tcplat_sock *tcplat_insert(u64 key, struct tcplat_sock *fresh)
{
	u32 untracked = TCPLAT_BOOKS - 1;
	struct tcplat_sock *s;
	u64 *count;

	tcplat_socks.update(&key, fresh);
	s = tcplat_socks.lookup(&key);
	if (!s) {
		count = books.lookup(&untracked);
		if (count)
			lock_xadd(count, 1);
	}
	return s;
}

/* The entry of a socket, or NULL where nothing is known of it. Any context. */
static __always_inline struct tcplat_sock *tcplat_find(const struct sock *sk)
{
	u64 key = (u64)sk;
	struct tcplat_sock *s = tcplat_socks.lookup(&key);
	struct tcplat_seed *seed;

	if (s)
		return s;
	/* sock_diag gave every older socket a cookie when the seeds were made. */
	u64 cookie = tcplat_get(sk, __sk_common.skc_cookie.counter);
	if (!cookie)
		return NULL;
	seed = tcplat_seeds.lookup(&cookie);
	if (!seed)
		return NULL;
	struct tcplat_sock fresh = {.id = tcplat_new_id(), .pid = seed->pid};
	/* Which thread it was, /proc does not tell: tid stays 0. */
	fresh.role = seed->role;
	fresh.wanted = tcplat_wanted_pid(seed->pid);
	__builtin_memcpy(fresh.comm, seed->comm, sizeof(fresh.comm));
	tcplat_seeds.delete(&cookie);
	return tcplat_insert(key, &fresh);
}

/* The same where the socket's own process calls: it is the owner from here on. */
static __always_inline struct tcplat_sock *tcplat_touch(const struct sock *sk)
{
	struct tcplat_sock *s = tcplat_find(sk);

	if (s)
		tcplat_own(s);
	return s;
}

/* A socket takes its role, in the process that gives it one. */
static __always_inline struct tcplat_sock *tcplat_learn(const struct sock *sk, u8 role)
{
	struct tcplat_sock *s = tcplat_find(sk);

	if (!s) {
		struct tcplat_sock fresh = {.id = tcplat_new_id()};

		s = tcplat_insert((u64)sk, &fresh);
		if (!s)
			return NULL;
	}
	s->role = role;
	tcplat_own(s);
	return s;
}

static __always_inline void tcplat_fill_owner(struct tcplat_event *e, struct tcplat_sock *s)
{
	e->sock = s->id;
	e->pid = s->pid;
	e->tid = s->tid;
	__builtin_memcpy(e->comm, s->comm, sizeof(e->comm));
}

/* The ends of a socket, as far as the kernel still knows: a failed connect forgets them. */
static __always_inline void tcplat_read_addrs(struct tcplat_addrs *to, const struct sock *sk)
{
	struct net *net = tcplat_get(sk, __sk_common.skc_net.net);
	u16 dport = tcplat_get(sk, __sk_common.skc_dport);

	if (!dport && to->dport)
		return;
	to->netns = tcplat_get(net, ns.inum);
	to->dport = bpf_ntohs(dport);
	/* skc_num is cleared before the change to TCP_CLOSE, inet_sport is not. */
	to->sport = tcplat_get(sk, __sk_common.skc_num);
	if (!to->sport)
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
 * A record of the socket's, owner and addresses filled in.
 *
 * NULL where nobody asked for this socket, nobody listens yet or the ring is full.
 */
static __always_inline struct tcplat_event *
tcplat_reserve_for(const struct sock *sk, struct tcplat_sock *s, u8 hook, u64 ts_ns)
{
	struct tcplat_event *e;

	if (!s->wanted)
		return NULL;
	if (!s->addrs.sport)
		tcplat_read_addrs(&s->addrs, sk);
	e = tcplat_reserve(hook, ts_ns);
	if (!e)
		return NULL;
	tcplat_fill_owner(e, s);
	e->netns = s->addrs.netns;
	e->ip = s->addrs.ip;
	e->sport = s->addrs.sport;
	e->dport = s->addrs.dport;
	__builtin_memcpy(e->saddr, s->addrs.saddr, 16);
	__builtin_memcpy(e->daddr, s->addrs.daddr, 16);
	e->state = tcplat_get(sk, __sk_common.skc_state);
	return e;
}
