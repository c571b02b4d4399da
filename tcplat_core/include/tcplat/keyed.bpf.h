// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Counting by key where the probe's Python side reads along.
 *
 * It cannot look into a hash on every kernel, but it can map arrays. So each key gets a
 * number, and what is counted stands in arrays (BPF_F_MMAPABLE) under that number.
 *
 * To be defined before the include:
 *   TCPLAT_KEY   a struct without holes (zero it first), of which no value in use is all zeros
 *   TCPLAT_KEYS  how many there may be
 *
 * A probe that needs numbers for another kind of keys as well includes it once more, with a
 * comment behind it that has nothing else in it: "as peer". Then it wants TCPLAT_KEY_peer and
 * TCPLAT_KEYS_peer, and has tcplat_peer_number() and the map peer_keys.
 */

/*
 * Number -> the key that has it; all zeros where none has, and always in entry 0.
 *
 * Filled in by tcplat_number(); never emptied. Python may map it: ReadableMap("keys", ...).
 */
BPF_F_TABLE("array", u32, TCPLAT_KEY, keys, TCPLAT_KEYS + 1, BPF_F_MMAPABLE);

/* Key -> its number. Inserted by tcplat_number(), never deleted. */
BPF_TABLE("hash", TCPLAT_KEY, u32, key_numbers, TCPLAT_KEYS);

/* Number -> 1. Inserted by the one CPU that may give it away; never deleted. */
BPF_TABLE("hash", u32, u8, key_given, TCPLAT_KEYS);

/* Slot 0 -> so many numbers have been given away, at least. */
BPF_TABLE("array", u32, u32, key_count, 1);

/* CPUs, and contexts on them, that may want a number for a new key at the same instant. */
#define TCPLAT_CONTENDERS 32

/*
 * The key's number, from 1 to TCPLAT_KEYS; 0 where all are given away.
 *
 * Where CPUs come with one new key at the same instant, each takes a number and
 * one of them is used: leave some room.
 */
static __always_inline u32 tcplat_number(TCPLAT_KEY *key)
{
	u32 zero = 0, number, *known = key_numbers.lookup(key), *count;
	TCPLAT_KEY *slot;
	u8 one = 1;

	if (known)
		return *known;
	count = key_count.lookup(&zero);
	if (!count)
		return 0;
	/* Only one can insert a number. No atomic instruction before 5.12 could decide it. */
	number = 0;
	for (int i = 0; i < TCPLAT_CONTENDERS; i++) {
		/*
		 * Anew each time: while we were kept waiting, others may have taken any number of
		 * them.
		 */
		u32 given = *(volatile u32 *)count;

		number = (given > number ? given : number) + 1;
		if (number > TCPLAT_KEYS)
			return 0;
		if (!key_given.insert(&number, &one))
			break;
		if (i == TCPLAT_CONTENDERS - 1)
			return 0;
	}
	lock_xadd(count, 1);
	slot = keys.lookup(&number);
	if (!slot)
		return 0;
	/* First the key: who finds the number must find it, too. */
	*slot = *key;
	if (!key_numbers.insert(key, &number))
		return number;
	/* Another CPU was faster with this key: our number stays unused. */
	__builtin_memset(slot, 0, sizeof(*slot));
	known = key_numbers.lookup(key);
	return known ? *known : 0;
}
