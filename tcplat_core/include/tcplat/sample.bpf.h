// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * --sample and --max-overhead: which connections have rows. TCPLAT_SAMPLE: it is one in so many, or
 * with TCPLAT_ADAPTS one in so many at most; not defined without these options.
 *
 * The two ends of a connection decide, so that every probe, on both hosts, decides alike. The
 * filters come first: what they do not let pass is not counted as left out.
 */
#ifdef TCPLAT_SAMPLE
#include <tcplat/hash.bpf.h>

#ifdef TCPLAT_ADAPTS
/*
 * Slot 0 -> from when on the share is halved how often, in one word, so that no reader sees half of
 * it: the instant in ns, of which the 10 lowest bits are taken by the halvings before and after it,
 * 5 bits each. Written by the session (run/thinning.py maps it) some ms before that instant.
 */
BPF_F_TABLE("array", u32, u64, tcplat_thinning, 1, BPF_F_MMAPABLE);
#endif

/* Rows of this instant are made of one connection in so many. */
static __always_inline u64 tcplat_one_in(u64 ts_ns)
{
#ifdef TCPLAT_ADAPTS
	u32 zero = 0;
	u64 *share = tcplat_thinning.lookup(&zero), word = share ? *(volatile u64 *)share : 0;

	return (u64)TCPLAT_SAMPLE << ((ts_ns < word >> 10 << 10 ? word >> 5 : word) & 31);
#else
	return TCPLAT_SAMPLE;
#endif
}

/*
 * Whether the connection with this hash has no row at an instant. If so, the books count the row of
 * `hook` that is not made; ask once for each row that else would be.
 */
static __always_inline bool tcplat_leaves_out_hash(u32 hash, u8 hook, u64 ts_ns)
{
	u32 slot = TCPLAT_UNSAMPLED + bpf_get_smp_processor_id() * TCPLAT_UNSAMPLED_HOOKS + hook;
	u64 *count;

	if (tcplat_is_in_share(hash, tcplat_one_in(ts_ns)))
		return false;
	if (!tcplat_is_open())
		return true;
	count = books.lookup(&slot);
	if (count)
		lock_xadd(count, 1);
	return true;
}
#endif

/* The same of a packet's connection; or of a row with these two ends, in either order. */
static __always_inline bool tcplat_leaves_out(const struct tcplat_addrs *ends, u8 hook, u64 ts_ns)
{
#ifdef TCPLAT_SAMPLE
	u32 hash = tcplat_connection_hash(ends->saddr, ends->sport, ends->daddr, ends->dport);

	return tcplat_leaves_out_hash(hash, hook, ts_ns);
#else
	return false;
#endif
}
