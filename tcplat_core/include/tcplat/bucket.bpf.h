// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Which bucket of a histogram a duration falls into; plugin/aggregates.py has the same in Python.
 *
 * Up to 15 ns each has its own. From there on each power of two is cut into
 * 16 of equal width, so that the middle of a bucket is at most 1/32 off.
 */

/* 0 to TCPLAT_BUCKETS - 1; TCPLAT_BUCKETS for what is longer than they reach. */
static __always_inline u32 tcplat_bucket(u64 ns)
{
	u32 shift = 0, rest;

	if (ns >> TCPLAT_TOP_BITS)
		return TCPLAT_BUCKETS;
	/* Shift until the five highest bits are left: there is no instruction that counts zeros. */
	if (ns >> (TCPLAT_SUB_BITS + 1 + 16))
		shift = 16;
	if (ns >> (shift + TCPLAT_SUB_BITS + 1 + 8))
		shift += 8;
	if (ns >> (shift + TCPLAT_SUB_BITS + 1 + 4))
		shift += 4;
	if (ns >> (shift + TCPLAT_SUB_BITS + 1 + 2))
		shift += 2;
	if (ns >> (shift + TCPLAT_SUB_BITS + 1 + 1))
		shift += 1;
	if (ns >> (shift + TCPLAT_SUB_BITS + 1))
		shift += 1;
	rest = ns >> shift;
	return (shift << TCPLAT_SUB_BITS) + rest;
}
