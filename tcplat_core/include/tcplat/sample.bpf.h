// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * --sample: which connections have rows. TCPLAT_SAMPLE: it is one in so many; not defined without
 * the option.
 *
 * The two ends of a connection decide, so that every probe, on both hosts, decides alike. The
 * filters come first: what they do not let pass is not counted as left out.
 */
#ifdef TCPLAT_SAMPLE
#include <tcplat/hash.bpf.h>

/*
 * Whether the connection with this hash has no row at an instant. If so, the books count the row of
 * `hook` that is not made; ask once for each row that else would be.
 */
static __always_inline bool tcplat_leaves_out_hash(u32 hash, u8 hook, u64 ts_ns)
{
	u32 slot = TCPLAT_UNSAMPLED + bpf_get_smp_processor_id() * TCPLAT_UNSAMPLED_HOOKS + hook;
	u64 *count;

	if (tcplat_is_in_share(hash, TCPLAT_SAMPLE))
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
