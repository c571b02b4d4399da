// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Durations counted in the kernel, for what is too fast for events: one histogram per
 * kind of duration (HIST_<name>, from the probe's spec) and group of sockets.
 *
 * TCPLAT_HISTOGRAMS is how many kinds the probe has, and is defined only where a sink
 * asked for them. Where no sink wants rows, TCPLAT_NO_EVENTS is defined as well.
 */
#ifdef TCPLAT_HISTOGRAMS
#include <tcplat/bucket.bpf.h>

/* Whose durations are counted together; members that --sink histogram:by= does not name are 0. */
struct tcplat_group {
	u8 addr[16];
	char comm[16];
	u32 pid;
	u16 port;
	u8 ip;
	u8 used; /* 1: the group without an owner is all zeros, too */
} __attribute__((aligned(8)));

#define TCPLAT_KEY_group struct tcplat_group
#define TCPLAT_KEYS_group TCPLAT_GROUPS
#include <tcplat/keyed.bpf.h> /* as group */

/* Per bucket, then what was longer, then what could not be measured. */
#define TCPLAT_CELLS (TCPLAT_BUCKETS + 2)

/*
 * ((stripe * (groups + 1) + group) * histograms + histogram) * TCPLAT_CELLS + cell -> how many.
 *
 * Group 0 is of all, or of those for which there was no number left. CPUs share a
 * stripe where one for each would take too much memory. All entries exist from the
 * start; the session maps the array and reads it.
 */
BPF_F_TABLE("array", u32, u64, durations,
	    (TCPLAT_GROUPS + 1) * TCPLAT_STRIPES * TCPLAT_HISTOGRAMS * TCPLAT_CELLS,
	    BPF_F_MMAPABLE);

/* Looked for once per owner and connection: the key is long. Each probe has numbers of its own. */
static __always_inline u32 tcplat_group_of(struct tcplat_sock *s)
{
#ifdef TCPLAT_BY_ALL
	return 0;
#else
	struct tcplat_group group = {.used = 1};
	u32 number;

	if (s->group >> 16 == TCPLAT_PROBE)
		return s->group & 0xffff;
#ifdef TCPLAT_BY_PROCESS
	group.pid = tcplat_read_owner(&s->owner, group.comm) >> 32;
#endif
#ifdef TCPLAT_BY_REMOTE
	group.ip = s->addrs.ip;
	__builtin_memcpy(group.addr, s->addrs.daddr, sizeof(group.addr));
	/* A client's port says nothing: it is another one for each connection. */
	if (s->role == TCPLAT_ROLE_CLIENT)
		group.port = s->addrs.dport;
#endif
#ifdef TCPLAT_BY_PORT
	group.port = s->role == TCPLAT_ROLE_CLIENT ? s->addrs.dport : s->addrs.sport;
#endif
	number = tcplat_group_number(&group);
	s->group = TCPLAT_PROBE << 16 | number;
	return number;
#endif
}

static __always_inline void
tcplat_count(const struct sock *sk, struct tcplat_sock *s, u32 histogram, u32 cell)
{
	u32 at = bpf_get_smp_processor_id() & (TCPLAT_STRIPES - 1);
	u64 *count;

	tcplat_refresh(s);
	if (!s->wanted || !tcplat_is_open())
		return;
	if (!s->addrs.sport)
		tcplat_read_addrs(&s->addrs, sk);
	if (!tcplat_wanted_addrs(&s->addrs))
		return;
	at = at * (TCPLAT_GROUPS + 1) + tcplat_group_of(s);
	at = (at * TCPLAT_HISTOGRAMS + histogram) * TCPLAT_CELLS + cell;
	count = durations.lookup(&at);
	/* Atomic: softirq may interrupt a handler on the same CPU. */
	if (count)
		lock_xadd(count, 1);
}

/* A duration of this socket's. */
static __always_inline void
tcplat_sample(const struct sock *sk, struct tcplat_sock *s, u32 histogram, u64 ns)
{
	tcplat_count(sk, s, histogram, tcplat_bucket(ns));
}

/* There was one, and its length cannot be known. */
static __always_inline void
tcplat_unmeasured(const struct sock *sk, struct tcplat_sock *s, u32 histogram)
{
	tcplat_count(sk, s, histogram, TCPLAT_BUCKETS + 1);
}
#else
static __always_inline void
tcplat_sample(const struct sock *sk, struct tcplat_sock *s, u32 histogram, u64 ns)
{
}

static __always_inline void
tcplat_unmeasured(const struct sock *sk, struct tcplat_sock *s, u32 histogram)
{
}
#endif
