// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * A number for each connection, on which --sample decides; plugin/sampling.py has the same in
 * Python.
 *
 * Both ends and both hosts get the same one, whichever end they call the local one. No secret is in
 * it, and no random number: captures of several hosts would not fit together.
 */

/* The finalizer of MurmurHash3: every bit of the result depends on every bit. */
static __always_inline u64 tcplat_mixed(u64 h)
{
	h ^= h >> 33;
	h *= 0xff51afd7ed558ccdULL;
	h ^= h >> 33;
	h *= 0xc4ceb9fe1a85ec53ULL;
	return h ^ h >> 33;
}

/* 16 bytes of an address, aligned as u64, IPv4 as ::ffff:a.b.c.d; the port in host order. */
static __always_inline u64 tcplat_end_hash(const u8 *addr, u16 port)
{
	const u64 *half = (const u64 *)addr;

	return tcplat_mixed((half[0] * 0x9e3779b97f4a7c15ULL ^ half[1]) +
			    port * 0xd1b54a32d192ed03ULL);
}

/* Never 0. */
static __always_inline u32 tcplat_connection_hash(const u8 *saddr, u16 sport, const u8 *daddr,
						  u16 dport)
{
	/* A sum: which end comes first does not matter, and equal ends do not cancel each other. */
	u32 h = tcplat_mixed(tcplat_end_hash(saddr, sport) + tcplat_end_hash(daddr, dport)) >> 32;

	return h ? h : 1;
}

/*
 * Whether one connection in `one_in` has this hash, and it is among them. Who is in a smaller share
 * is in a larger one, too.
 */
static __always_inline bool tcplat_is_in_share(u32 hash, u64 one_in)
{
	return !(hash * one_in >> 32);
}
