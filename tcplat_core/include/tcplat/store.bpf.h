// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * The entries of sockets, by address: an array of places, a hash for those whose place is taken, a
 * negative cache, and the seeds that the loader leaves for sockets which are older than the run.
 */

#define TCPLAT_ROLE_CLIENT 1
#define TCPLAT_ROLE_SERVER 2
#define TCPLAT_ROLE_LISTENER 3

/* Bits of `unaccepted`. The owner is the listener's, unless a thread of it is known, too. */
#define TCPLAT_INHERITED 1
/* Complete since events are wanted, and its accept() was not seen. */
#define TCPLAT_ACCEPT_UNSEEN 2
/* Its use has made the row, and accept() makes no other one. */
#define TCPLAT_ACCEPT_TOLD 4

struct tcplat_sock {
	u64 place_key;  /* its address, where the entry is in tcplat_places; 0 in tcplat_socks */
	u64 id;         /* the event's `sock`: when it was first seen, and on which CPU */
	u64 since_ns;   /* when the connect, or the wait to be accepted, began; else 0 */
	u32 send_tid;   /* the thread inside send(), else 0 */
	u32 send_seq;   /* where its bytes begin */
	u32 send_bytes; /* how many it asked to send */
	u32 group;      /* of histogram.bpf.h: which, and for which probe; 0: not worked out */
	u64 cookie;     /* of its seed, as long as that is there; else 0 */
	u32 inode;      /* of a socket that called connect() or listen(): tcplat_inode() */
	u8 send_urgent; /* 1: the last of these is urgent */
	u8 role;
	u8 wanted;     /* its owner passes the filters */
	u8 asked;      /* the same without --comm: a process may change its name */
	u8 in_flows;   /* 1 + the lane of its addresses in tcplat_flows; 1: in tcplat_listeners */
	u8 state;      /* what it is in, or 0: no change was seen yet */
	u8 reported;   /* by kprobe: the last state that has its row, or TCPLAT_REPORTED_CLOSE */
	u8 unaccepted; /* TCPLAT_INHERITED and so on */
	u32 renames;   /* tcplat_renamed() when the owner's name was looked at last */
	u32 thread_renames; /* the same of its thread's: that is done where it calls alone */
	u64 start_ns; /* when the owner began, for its pid is given away again; 0: not known */
#ifdef TCPLAT_SAMPLE
	u32 sample;      /* its connection's hash, once both ports are known; else 0 */
	u8 connect_hook; /* 1 + the hook of the row of its connect, which waits for the port; or 0 */
	u8 syn_hook;     /* the same of its change to TCP_SYN_SENT, ... */
	u8 pad[2];
	u64 syn_ns; /* ... and when that was */
#endif
	union {
		struct tcplat_owner owner; /* the process that used it last */
		struct {                   /* owner.task, for a probe that wants no name */
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
			u32 tid, pid;
#else
			u32 pid, tid;
#endif
		};
	};
	struct tcplat_addrs addrs; /* once the source port is chosen: the kernel clears it first */
};

/* What is known of a socket that is older than the run: filled in from user space. */
struct tcplat_seed {
	u64 key; /* the socket's address, once it has an entry, which counts from then on; else 0 */
	u32 pid;
	u8 role;
	u8 wanted;
	u8 asked;
	u8 unaccepted; /* as in tcplat_sock */
	char comm[16] __attribute__((aligned(8)));
};

/* A socket's place in arrays is given by bits 6 to 19 of its address. */
#ifndef TCPLAT_PLACE_BITS
#define TCPLAT_PLACE_BITS 14
#endif
#define TCPLAT_GENERATION_BITS 34

struct tcplat_place {
	/*
	 * The negative cache. Bits 20 to 49 of an address, and 34 of the generation at which that
	 * socket had no entry and no seed, as most sockets of a busy host. 0: nothing is known.
	 */
	u64 absent;
	/* Of the socket that came here first; sock.place_key is its address, or 0. */
	struct tcplat_sock sock;
};

/*
 * Place -> struct tcplat_place: what is known without a look into a hash.
 *
 * `sock` is inserted by tcplat_insert(): by tcplat_set_role() when a socket begins to connect, by
 * tcplat_lookup() when a seeded one is seen for the first time, by tcplat_inherit() and by
 * tcplat_lookup_or_create(). Deleted by tcplat_on_destroy, which runs after every probe's handlers;
 * where no program saw the end, when the next socket has the address.
 * `absent` is made by tcplat_lookup() once the gate is open, and replaced by the next one's.
 */
BPF_TABLE("array", u32, struct tcplat_place, tcplat_places, 1 << TCPLAT_PLACE_BITS);

/* Place -> 1. Inserted by the one CPU that may fill in its `sock`; deleted with it. */
BPF_TABLE("hash", u32, u8, tcplat_taken, 1 << TCPLAT_PLACE_BITS);

/*
 * struct sock * -> struct tcplat_sock, of sockets whose place was taken.
 *
 * Inserted and deleted as those of tcplat_places.
 */
BPF_TABLE("hash", u64, struct tcplat_sock, tcplat_socks, 1024);

/*
 * Socket cookie -> struct tcplat_seed.
 *
 * Inserted by the loader, from sock_diag and /proc, before the gate opens. tcplat_lookup() makes
 * the socket's entry of it when the socket first stirs; from then on it leads packets there, and
 * tcplat_unindex() deletes it.
 */
BPF_TABLE("hash", u64, struct tcplat_seed, tcplat_seeds, 1024);

/* Slot 0 -> how often a socket got an entry. Incremented behind that, by tcplat_insert(). */
BPF_TABLE("array", u32, u64, tcplat_generation, 1);

static __always_inline u64 tcplat_new_id(void)
{
	/* Two sockets cannot be born on one CPU within 2^bits ns. */
	return (bpf_ktime_get_ns() >> TCPLAT_CPU_BITS << TCPLAT_CPU_BITS) |
	       bpf_get_smp_processor_id();
}

static __always_inline u32 tcplat_at(u64 key)
{
	return key >> 6 & ((1 << TCPLAT_PLACE_BITS) - 1);
}

/* What is a pointer to the verifier must not be shifted; a sum is a number. */
static __always_inline u64 tcplat_scalar(const void *pointer)
{
	u64 sum = 0;

	lock_xadd(&sum, (u64)pointer);
	return sum;
}

/* The socket that an skb or a struct socket names, as tcplat_lookup() and its like take it. */
#define tcplat_sk(ptr) ((struct sock *)tcplat_scalar(tcplat_get(ptr, sk)))

/* The address of a socket: by fentry a pointer, by all else a number already. */
static __always_inline u64 tcplat_key(const struct sock *sk)
{
#ifdef TCPLAT_FENTRY
	return tcplat_scalar(sk);
#else
	return (u64)sk;
#endif
}

static __always_inline struct tcplat_sock *tcplat_lookup_entry(u64 key)
{
	u32 at = tcplat_at(key);
	struct tcplat_place *place = tcplat_places.lookup(&at);

	return place && place->sock.place_key == key ? &place->sock : tcplat_socks.lookup(&key);
}

static __always_inline struct tcplat_sock *tcplat_insert(u64 key, struct tcplat_sock *fresh)
{
	u32 untracked = TCPLAT_BOOKS - 1, at = tcplat_at(key), zero = 0;
	struct tcplat_place *place = tcplat_places.lookup(&at);
	struct tcplat_sock *s;
	u64 *count;
	u8 one = 1;

	if (place && (place->sock.place_key == key || !tcplat_taken.insert(&at, &one))) {
		s = &place->sock;
		fresh->place_key = s->place_key;
		*s = *fresh;
		/* Last: who finds it must find all of it. */
		*(volatile u64 *)&s->place_key = key;
	} else {
		tcplat_socks.update(&key, fresh);
		s = tcplat_socks.lookup(&key);
	}
	/* There is something to find now for who has looked in vain before. */
	count = tcplat_generation.lookup(&zero);
	if (count)
		lock_xadd(count, 1);
	count = s ? NULL : books.lookup(&untracked);
	if (count)
		lock_xadd(count, 1);
	return s;
}

static __always_inline void tcplat_delete_entry(u64 key)
{
	u32 at = tcplat_at(key);
	struct tcplat_place *place = tcplat_places.lookup(&at);

	if (place && place->sock.place_key == key) {
		place->sock.place_key = 0;
		tcplat_taken.delete(&at);
	}
	/* Two CPUs may have made an entry at once. */
	tcplat_socks.delete(&key);
}

/*
 * Whether it is a new child of a listener, and still an exact copy of it, the cookie included:
 * before 6.15 (a3a128f611a9), sock:inet_sock_set_state announces it so. It has no struct socket.
 */
static __always_inline bool tcplat_is_copy(const struct sock *sk)
{
	return tcplat_get(sk, __sk_common.skc_state) == TCP_LISTEN && !tcplat_get(sk, sk_socket);
}

/* The entry of a socket, or NULL where nothing is known of it. Any context. */
static __always_inline struct tcplat_sock *tcplat_lookup(const struct sock *sk)
{
	u64 key = tcplat_key(sk), cookie = 0, *generation, absent;
	u32 at = tcplat_at(key), zero = 0;
	struct tcplat_place *place = tcplat_places.lookup(&at);
	struct tcplat_seed *seed;
	struct tcplat_sock *s;
	bool open;

	if (!place)
		return NULL;
	if (place->sock.place_key == key)
		return &place->sock;
	generation = tcplat_generation.lookup(&zero);
	if (!generation)
		return NULL;
	/*
	 * Both are read before the look for an entry: one that is made meanwhile must not stay
	 * hidden.
	 */
	absent = key >> (6 + TCPLAT_PLACE_BITS) << TCPLAT_GENERATION_BITS;
	absent |= *(volatile u64 *)generation & ((1ULL << TCPLAT_GENERATION_BITS) - 1);
	if (*(volatile u64 *)&place->absent == absent)
		return NULL;
	open = tcplat_is_open();
	s = tcplat_lookup_entry(key);
	if (s)
		return s;
	/*
	 * sock_diag gave every older socket a cookie when the seeds were made. No seed is for ever:
	 * what comes to that address is younger than the seeds.
	 */
	if ((place->absent ^ absent) >> TCPLAT_GENERATION_BITS)
		cookie = tcplat_get(sk, __sk_common.skc_cookie.counter);
	seed = cookie ? tcplat_seeds.lookup(&cookie) : NULL;
	if (!seed || tcplat_is_copy(sk)) {
		if (open)
			place->absent = absent;
		return NULL;
	}
	struct tcplat_sock fresh = {.id = tcplat_new_id()};
	/* /proc does not show which thread it was. */
	tcplat_write_owner(&fresh.owner, (u64)seed->pid << 32, seed->comm);
	fresh.role = seed->role;
	fresh.wanted = seed->wanted;
	fresh.asked = seed->asked;
	fresh.unaccepted = seed->unaccepted;
	fresh.in_flows = 1;
	fresh.cookie = cookie;
	s = tcplat_insert(key, &fresh);
	if (s)
		seed->key = key;
	return s;
}
