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
#define TCPLAT_ROLE_LISTENER 3

/*
 * Whose a socket is. Softirq on another CPU reads while its process writes, and two processes may
 * write at once; no lock is to be had in a tracing program. So the parts carry a sum, without which
 * they are not believed: pid and name are of one process, or nothing is known at that instant.
 * The thread and its name likewise.
 */
struct tcplat_owner {
	u64 task; /* process << 32 | thread, as tcplat_current() has it; 0: not known */
	u64 sum;  /* tcplat_owner_sum() of the process and its name */
	u64 thread_sum;
	char comm[16] __attribute__((aligned(8)));   /* the process's name: that of its group leader */
	char thread[16] __attribute__((aligned(8))); /* empty where the thread is the group leader */
};

/* Bits of `unaccepted`. The owner is the listener's, unless a thread of it is known, too. */
#define TCPLAT_INHERITED 1
/* Complete since events are wanted, and its accept() was not seen. */
#define TCPLAT_ACCEPT_UNSEEN 2
/* Its use has made the row, and accept() makes no other one. */
#define TCPLAT_ACCEPT_TOLD 4

struct tcplat_sock {
	u64 near;       /* its address, where the entry is in tcplat_places; 0 in tcplat_socks */
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
	u8 wanted;      /* its owner passes the filters */
	u8 asked;       /* the same without --comm: a process may change its name */
	u8 in_flows;    /* 1 + the lane of tcplat_flows that has its addresses; 1: tcplat_listeners has its port */
	u8 state;       /* what it is in, or 0: nobody has seen it change yet */
	u8 told;        /* by kprobe: the last state that has its row, or TCPLAT_TOLD_CLOSE */
	u8 unaccepted;  /* TCPLAT_INHERITED and so on */
	u32 renames;    /* tcplat_renamed() when the owner's name was looked at last */
	u32 thread_renames; /* the same of its thread's: that is done where it calls alone */
	u64 born_ns;    /* when the owner began, for its pid is given away again; 0: not known */
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
	struct tcplat_addrs addrs; /* once the source port is chosen: the kernel forgets it first */
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
#define TCPLAT_BIRTHS_BITS 34

struct tcplat_place {
	/*
	 * Bits 20 to 49 of an address, and 34 of the count of births at which that socket had no entry
	 * and no seed: most sockets of a busy host are nobody's business. 0: nothing is known.
	 */
	u64 stranger;
	struct tcplat_sock sock; /* of the socket that came here first; sock.near is its address, or 0 */
};

/*
 * Place -> struct tcplat_place: what is known without a look into a hash.
 *
 * `sock` is inserted by tcplat_insert(): by tcplat_learn() when a socket begins to connect, by
 * tcplat_find() when a seeded one is seen for the first time, by tcplat_inherit() and by
 * tcplat_meet(). Deleted by tcplat_on_destroy, which runs after every probe's handlers; where no
 * program saw the end, when the next socket has the address.
 * `stranger` is made by tcplat_find() once the gate is open, and replaced by the next one's.
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
 * Inserted by the loader, from sock_diag and /proc, before the gate opens. tcplat_find() makes
 * the socket's entry of it when the socket first stirs; from then on it leads packets there, and
 * tcplat_withdraw() deletes it.
 */
BPF_TABLE("hash", u64, struct tcplat_seed, tcplat_seeds, 1024);

/* Slot 0 -> how often a socket got an entry. Counted after the fact, by tcplat_insert(). */
BPF_TABLE("array", u32, u64, tcplat_births, 1);

/* Of both families: a wildcard address that takes IPv4 as well. */
#define TCPLAT_IP_BOTH 0

struct tcplat_port {
	u8 addr[16]; /* where it listens; the wildcard of its family */
	u32 netns;
	u16 port;
	u8 ip; /* 4, 6, or TCPLAT_IP_BOTH */
	u8 pad;
} __attribute__((aligned(8)));

struct tcplat_listener {
	u32 pid;      /* 0 where several processes accept: nobody can know which one will */
	u32 users;    /* sockets that listen there (SO_REUSEPORT) */
	u8 wanted;    /* whoever accepts */
	u8 asked;     /* as in tcplat_sock */
	u8 inherited; /* 1: a process accepts that did not call listen() there */
	u8 pad[5];
	u64 pids;    /* of the users: the sum of the pids that called listen() ... */
	u64 squares; /* ... and of their squares: together they tell whether all are one process */
	u64 born_ns; /* when that process began; 0: it listened before the run */
	char comm[16] __attribute__((aligned(8)));
};

/*
 * Namespace, local address and port -> struct tcplat_listener.
 *
 * Inserted by tcplat_listen(), and by the loader for what listened before.
 * Deleted by tcplat_withdraw() with the last user.
 */
BPF_TABLE("hash", struct tcplat_port, struct tcplat_listener, tcplat_listeners, 16384);

struct tcplat_served_by {
	u32 pid;
	u32 port;
};

struct tcplat_service {
	u64 born_ns; /* as in tcplat_listener */
	u8 wanted;
	u8 asked;
	u8 pad[6];
	char comm[16] __attribute__((aligned(8)));
};

/*
 * Process and port -> struct tcplat_service, of processes that called listen() there.
 *
 * Who of a group of SO_REUSEPORT is left when the others have gone. Inserted by tcplat_listen(),
 * and by the loader for what listened before. Never deleted: the one that was used least recently
 * makes room, and then the owner stays unknown.
 */
BPF_TABLE("lru_hash", struct tcplat_served_by, struct tcplat_service, tcplat_services, 4096);

/* Of a key of tcplat_listening: a process that listened before the run; when it began is not known. */
#define TCPLAT_OLDER 0x80000000

/*
 * pid -> when that process began, of those that called listen(); and pid | TCPLAT_OLDER -> 0.
 *
 * A listener that a child has inherited outlives who called listen(). Inserted by tcplat_listen(),
 * and by the loader for what listened before; deleted by tcplat_on_exit.
 */
BPF_TABLE("hash", u32, u64, tcplat_listening, 16384);

/* What tcplat_served says: a service, and one that hears one device alone. */
#define TCPLAT_SERVED 1
#define TCPLAT_SERVED_BY_DEVICE 2

/*
 * Local port -> TCPLAT_SERVED, once a service was seen there, in whatever namespace: packets to
 * other ports are no service's. Set by tcplat_listen(), tcplat_inherit() and the loader; never
 * taken back.
 */
BPF_TABLE("array", u32, u8, tcplat_served, 65536);

struct tcplat_name {
	u64 born_ns; /* when the process began: its pid is given away again */
	char comm[16] __attribute__((aligned(8)));
};

/*
 * pid -> struct tcplat_name, of processes that changed theirs since the run began.
 *
 * Inserted by tcplat_on_rename: exec(2), prctl(PR_SET_NAME), /proc/PID/comm. Never deleted: the
 * one that was used least recently makes room. Then a name is learnt where the process calls.
 */
BPF_TABLE("lru_hash", u32, struct tcplat_name, tcplat_names, 16384);

/* Slot 0 -> how often a task of this host changed its name. Counted by tcplat_on_rename. */
BPF_TABLE("array", u32, u64, tcplat_renames, 1);

/* Where an address pair leads: to a socket's entry, or to tcplat_seeds. */
struct tcplat_flow {
	u64 key; /* the socket's address, or 0 */
	u64 id;  /* its entry's, which it must still have; where `key` is 0 the seed's cookie */
};

#define TCPLAT_LANES 2

/* skc_reuse takes four bits of its byte, skc_reuseport one. */
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define TCPLAT_IPV6ONLY 0x20
#else
#define TCPLAT_IPV6ONLY 0x04
#endif

/*
 * Addresses of a socket, local first, and a lane -> struct tcplat_flow.
 *
 * A socket that was reset or gave up may be open for long after its addresses are another's, and
 * TIME_WAIT ends early where a port is used again. So who finds an entry in the way takes the next
 * lane, and the younger of two counts.
 *
 * Inserted, and never replaced while its socket is there, by tcplat_add_flow(), and by the loader
 * for older sockets. Deleted by tcplat_withdraw() of the same socket: it ends, or connects anew.
 */
BPF_TABLE("hash", struct tcplat_addrs, struct tcplat_flow, tcplat_flows, 1024);

/* Slot 0 -> 1 once a lane other than the first was used: until then no look is worth while. */
BPF_TABLE("array", u32, u8, tcplat_lanes, 1);

/* Of names and pids whose parts got mixed up it is another, but by a chance of 2^-64. */
static __always_inline u64 tcplat_owner_sum(u32 pid, const char *comm)
{
	u64 first = *(const u64 *)comm, last = *(const u64 *)(comm + 8);

	return first ^ (last << 1 | last >> 63) ^ pid * 0x9e3779b97f4a7c15ULL;
}

static __always_inline void tcplat_set_name(struct tcplat_owner *to, u32 pid, const char *comm)
{
	*(volatile u64 *)to->comm = *(const u64 *)comm;
	*(volatile u64 *)(to->comm + 8) = *(const u64 *)(comm + 8);
	*(volatile u64 *)&to->sum = tcplat_owner_sum(pid, comm);
}

/* A process, and no thread, unless tcplat_set_thread() has said which. */
static __always_inline void tcplat_set_owner(struct tcplat_owner *to, u64 task, const char *comm)
{
	tcplat_set_name(to, task >> 32, comm);
	*(volatile u64 *)&to->task = task;
}

static __always_inline void tcplat_set_thread(struct tcplat_owner *to, u32 tid, const char *thread)
{
	*(volatile u64 *)to->thread = *(const u64 *)thread;
	*(volatile u64 *)(to->thread + 8) = *(const u64 *)(thread + 8);
	*(volatile u64 *)&to->thread_sum = tcplat_owner_sum(tid, thread);
}

/* The name of `tid`, the current thread: empty where it is the group leader, whose is the process's. */
static __always_inline void tcplat_thread_name(u32 pid, u32 tid, char *thread)
{
	*(u64 *)thread = *(u64 *)(thread + 8) = 0;
	if (tid != pid)
		bpf_get_current_comm(thread, 16);
}

static __always_inline u32 tcplat_renamed(void)
{
	u32 zero = 0;
	u64 *count = tcplat_renames.lookup(&zero);

	return count ? *(volatile u64 *)count : 0;
}

/* The name that a process took since the run began, or NULL. `born_ns` 0: of whoever has the pid. */
static __always_inline struct tcplat_name *tcplat_new_name(u32 pid, u64 born_ns)
{
	struct tcplat_name *name = tcplat_names.lookup(&pid);

	return name && (!born_ns || born_ns == name->born_ns) ? name : NULL;
}

/* The name of the current task's process, `pid`; when it began. */
static __always_inline u64 tcplat_process_name(u32 pid, char *comm)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct task_struct *leader = tcplat_get(task, group_leader);
	u64 born_ns = tcplat_get(leader, start_time);
	/* First: its tracepoint comes before the kernel writes the name. */
	struct tcplat_name *name = tcplat_new_name(pid, born_ns);

	*(u64 *)comm = *(u64 *)(comm + 8) = 0;
	if (name)
		__builtin_memcpy(comm, name->comm, sizeof(name->comm));
	else /* Nothing is written behind its end: what is there would part equal names. */
		bpf_probe_read_kernel_str(comm, 16, (const void *)&leader->comm);
	return born_ns;
}

/* The owner may have another name by now. Any context. */
static __always_inline void tcplat_refresh(struct tcplat_sock *s)
{
	u32 renames = tcplat_renamed(), pid;
	struct tcplat_name *name;

	if (s->renames == renames)
		return;
	s->renames = renames;
	pid = s->owner.task >> 32;
	name = tcplat_new_name(pid, s->born_ns);
	if (!name)
		return;
	tcplat_set_name(&s->owner, pid, name->comm);
	s->wanted = s->asked && tcplat_wanted_name(name->comm);
	s->group = 0;
}

/* Whether a process that listens is still there. While it ends, which closes its sockets, it is. */
static __always_inline bool tcplat_listens(u32 pid, u64 born_ns)
{
	u32 key = born_ns ? pid : pid | TCPLAT_OLDER;
	u64 *known = tcplat_listening.lookup(&key);

	return (known && *known == born_ns) || pid == tcplat_current() >> 32;
}

#define TCPLAT_PF_KTHREAD 0x00200000 /* include/linux/sched.h */

/*
 * Whether the current task is a thread of the kernel that works for a process: those of nbd, and
 * of io_uring before 5.12 (3bfe6106693b). It is no owner where there is another.
 */
static __always_inline bool tcplat_is_worker(void)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();

	return tcplat_get(task, flags) & TCPLAT_PF_KTHREAD;
}

/* Process << 32 | thread, and the process's name; 0 where it is not known, or just changes. */
static __always_inline u64 tcplat_get_owner(const struct tcplat_owner *from, char *comm)
{
	u64 task = *(volatile u64 *)&from->task;

	*(u64 *)comm = *(volatile u64 *)from->comm;
	*(u64 *)(comm + 8) = *(volatile u64 *)(from->comm + 8);
	if (*(volatile u64 *)&from->sum == tcplat_owner_sum(task >> 32, comm))
		return task;
	*(u64 *)comm = *(u64 *)(comm + 8) = 0;
	return 0;
}

/*
 * The same of a socket's entry. What nobody has used since its listener was made has the owner that
 * called listen(): as long as that one is there.
 */
static __always_inline u64 tcplat_owner_now(const struct tcplat_sock *s, char *comm)
{
	u64 task = tcplat_get_owner(&s->owner, comm);

	if (s->role != TCPLAT_ROLE_LISTENER && (!(s->unaccepted & TCPLAT_INHERITED) || (u32)task))
		return task;
	if (!task || tcplat_listens(task >> 32, s->born_ns))
		return task;
	*(u64 *)comm = *(u64 *)(comm + 8) = 0;
	return 0;
}

/* The task of `task` becomes the owner: the current one. Whether it is wanted. */
static __always_inline bool tcplat_own_by(struct tcplat_sock *s, u64 task)
{
	struct tcplat_owner *owner = &s->owner;
	char comm[16] __attribute__((aligned(8)));
	u32 renames = tcplat_renamed();
	bool wanted;

	if (s->thread_renames != renames || owner->task != task ||
	    owner->thread_sum != tcplat_owner_sum(task, owner->thread)) {
		tcplat_thread_name(task >> 32, task, comm);
		tcplat_set_thread(owner, task, comm);
		s->thread_renames = renames;
	}
	/* Of one process already; of which thread, is one word of its own. */
	if (s->renames == renames && owner->task >> 32 == task >> 32 &&
	    owner->sum == tcplat_owner_sum(task >> 32, owner->comm)) {
		*(volatile u64 *)&owner->task = task;
		return s->wanted;
	}
	if (owner->task >> 32 && owner->task >> 32 != task >> 32 && tcplat_is_worker()) {
		*(volatile u64 *)&owner->task = owner->task >> 32 << 32 | (u32)task;
		tcplat_refresh(s);
		return s->wanted;
	}
	s->born_ns = tcplat_process_name(task >> 32, comm);
	s->renames = renames;
	tcplat_set_owner(owner, task, comm);
	s->asked = tcplat_wanted_caller();
	wanted = s->asked && tcplat_wanted_name(comm);
	s->group = 0;
	s->wanted = wanted;
	tcplat_debug("sock %llu belongs to pid %d, wanted %d", s->id, (u32)(task >> 32), wanted);
	return wanted;
}

/* The current task becomes the owner. Only where the socket's own process calls. */
static __always_inline bool tcplat_own(struct tcplat_sock *s)
{
	return tcplat_own_by(s, tcplat_current());
}

static __always_inline u64 tcplat_new_id(void)
{
	/* Two sockets cannot be born on one CPU within 2^bits ns. */
	return (bpf_ktime_get_ns() >> TCPLAT_CPU_BITS << TCPLAT_CPU_BITS) | bpf_get_smp_processor_id();
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

/* The socket that an skb or a struct socket names, as tcplat_find() and its like take it. */
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

static __always_inline struct tcplat_sock *tcplat_entry(u64 key)
{
	u32 at = tcplat_at(key);
	struct tcplat_place *place = tcplat_places.lookup(&at);

	return place && place->sock.near == key ? &place->sock : tcplat_socks.lookup(&key);
}

static __always_inline struct tcplat_sock *tcplat_insert(u64 key, struct tcplat_sock *fresh)
{
	u32 untracked = TCPLAT_BOOKS - 1, at = tcplat_at(key), zero = 0;
	struct tcplat_place *place = tcplat_places.lookup(&at);
	struct tcplat_sock *s;
	u64 *count;
	u8 one = 1;

	if (place && (place->sock.near == key || !tcplat_taken.insert(&at, &one))) {
		s = &place->sock;
		fresh->near = s->near;
		*s = *fresh;
		/* Last: who finds it must find all of it. */
		*(volatile u64 *)&s->near = key;
	} else {
		tcplat_socks.update(&key, fresh);
		s = tcplat_socks.lookup(&key);
	}
	/* There is something to find now for who has looked in vain before. */
	count = tcplat_births.lookup(&zero);
	if (count)
		lock_xadd(count, 1);
	count = s ? NULL : books.lookup(&untracked);
	if (count)
		lock_xadd(count, 1);
	return s;
}

static __always_inline void tcplat_remove(u64 key)
{
	u32 at = tcplat_at(key);
	struct tcplat_place *place = tcplat_places.lookup(&at);

	if (place && place->sock.near == key) {
		place->sock.near = 0;
		tcplat_taken.delete(&at);
	}
	/* Two CPUs may have made an entry at once. */
	tcplat_socks.delete(&key);
}

/* The entry of a socket, or NULL where nothing is known of it. Any context. */
static __always_inline struct tcplat_sock *tcplat_find(const struct sock *sk)
{
	u64 key = tcplat_key(sk), cookie = 0, *births, stranger;
	u32 at = tcplat_at(key), zero = 0;
	struct tcplat_place *place = tcplat_places.lookup(&at);
	struct tcplat_seed *seed;
	struct tcplat_sock *s;
	bool open;

	if (!place)
		return NULL;
	if (place->sock.near == key)
		return &place->sock;
	births = tcplat_births.lookup(&zero);
	if (!births)
		return NULL;
	/* Both are read before the look for an entry: one that is made meanwhile must not stay hidden. */
	stranger = key >> (6 + TCPLAT_PLACE_BITS) << TCPLAT_BIRTHS_BITS;
	stranger |= *(volatile u64 *)births & ((1ULL << TCPLAT_BIRTHS_BITS) - 1);
	if (*(volatile u64 *)&place->stranger == stranger)
		return NULL;
	open = tcplat_is_open();
	s = tcplat_entry(key);
	if (s)
		return s;
	/*
	 * sock_diag gave every older socket a cookie when the seeds were made. No seed is for ever: what
	 * comes to that address is younger than the seeds.
	 */
	if ((place->stranger ^ stranger) >> TCPLAT_BIRTHS_BITS)
		cookie = tcplat_get(sk, __sk_common.skc_cookie.counter);
	seed = cookie ? tcplat_seeds.lookup(&cookie) : NULL;
	if (!seed) {
		if (open)
			place->stranger = stranger;
		return NULL;
	}
	struct tcplat_sock fresh = {.id = tcplat_new_id()};
	/* Which thread it was, /proc does not tell. */
	tcplat_set_owner(&fresh.owner, (u64)seed->pid << 32, seed->comm);
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

/*
 * The socket's own process calls, and is the owner from here on: the entry, if it has that role
 * and somebody asked for the process. `me` is then the current task.
 */
static __always_inline struct tcplat_sock *
tcplat_use(const struct sock *sk, u64 *me, u8 role)
{
	struct tcplat_sock *s = tcplat_find(sk);

	if (!s || s->role != role)
		return NULL;
	*me = tcplat_current();
	return tcplat_own_by(s, *me) ? s : NULL;
}

/*
 * The same for handlers that report every socket: one that nothing is known of
 * gets an entry without an owner, wanted unless somebody in particular is.
 * Full sockets only: the entry is deleted when the kernel destroys the socket.
 */
static __always_inline struct tcplat_sock *tcplat_meet(const struct sock *sk)
{
	struct tcplat_sock *s = tcplat_find(sk);

	if (s)
		return s;
	struct tcplat_sock fresh = {.id = tcplat_new_id(), .wanted = tcplat_wanted_nobody()};

	return tcplat_insert(tcplat_key(sk), &fresh);
}

/*
 * What is known of a socket, as tcplat_find() has it, where the socket's own process calls: it is
 * the owner from here on. Of a new one nothing is known yet: tcplat_meet() makes its entry.
 */
static __always_inline struct tcplat_sock *tcplat_touch(const struct sock *sk)
{
	struct tcplat_sock *s = tcplat_find(sk);

	if (s)
		tcplat_own(s);
	return s;
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

/* Where a socket listens, from its own addresses. */
static __always_inline struct tcplat_port
tcplat_port_of(const struct sock *sk, const struct tcplat_addrs *own)
{
	struct tcplat_port port = {.netns = own->netns, .port = own->sport, .ip = own->ip};
	/* skc_ipv6only, which is a bit of the byte behind skc_state, has no address. */
	const u8 *flags = (const u8 *)&sk->__sk_common.skc_state + 1;
	u8 byte = 0;

	__builtin_memcpy(port.addr, own->saddr, 16);
	if (tcplat_is_mapped(port.addr)) {
		port.ip = 4;
	} else if (!((u64 *)port.addr)[0] && !((u64 *)port.addr)[1]) {
		bpf_probe_read_kernel(&byte, 1, flags);
		port.ip = byte & TCPLAT_IPV6ONLY ? 6 : TCPLAT_IP_BOTH;
	}
	return port;
}

/* A socket joins those that listen at a port, or leaves them (`sign` -1). */
static __always_inline void tcplat_count_user(struct tcplat_listener *listener, u64 pid, s64 sign)
{
	lock_xadd(&listener->pids, pid * sign);
	lock_xadd(&listener->squares, pid * pid * sign);
	/* Last: who sees the number sees the sums. */
	lock_xadd(&listener->users, (u32)sign);
}

/*
 * A socket does not listen at `port` any more. Where all that are left are one process's, that one
 * will accept. How many are left.
 */
static __always_inline u32 tcplat_leave(struct tcplat_listener *listener, u16 port, u32 pid)
{
	struct tcplat_served_by key = {.port = port};
	struct tcplat_service *left;
	u32 users;

	tcplat_count_user(listener, pid, -1);
	users = *(volatile u32 *)&listener->users;
	if (!users || listener->pid || listener->inherited)
		return users;
	key.pid = listener->pids / users;
	/* The mean of the squares is the square of the mean: all of them are equal. */
	if (!key.pid || listener->pids != (u64)key.pid * users ||
	    listener->squares != (u64)key.pid * key.pid * users)
		return users;
	left = tcplat_services.lookup(&key);
	if (!left)
		return users;
	__builtin_memcpy(listener->comm, left->comm, sizeof(listener->comm));
	listener->born_ns = left->born_ns;
	listener->wanted = left->wanted;
	listener->asked = left->asked;
	*(volatile u32 *)&listener->pid = key.pid;
	/* Another has come, on another CPU, and may have cleared it before it was set. */
	if (*(volatile u32 *)&listener->users != users)
		*(volatile u32 *)&listener->pid = 0;
	return users;
}

/* Neither packets nor children find the socket any more by the addresses that it had. */
static __always_inline void tcplat_withdraw(const struct sock *sk, struct tcplat_sock *s)
{
	struct tcplat_listener *listener;
	struct tcplat_addrs addrs;
	u64 cookie = s->cookie;
	u8 lane;

	if (!s->in_flows)
		return;
	lane = s->in_flows - 1;
	s->in_flows = 0;
	/* One that had a seed may never have been asked for them; its port may be given back by now. */
	if (!s->addrs.sport)
		tcplat_read_addrs(&s->addrs, sk);
	if (!s->addrs.sport)
		s->addrs.sport = bpf_ntohs(tcplat_get((const struct inet_sock *)sk, inet_sport));
	if (s->role == TCPLAT_ROLE_LISTENER) {
		struct tcplat_port port = tcplat_port_of(sk, &s->addrs);

		listener = tcplat_listeners.lookup(&port);
		if (listener && !tcplat_leave(listener, port.port, s->owner.task >> 32))
			tcplat_listeners.delete(&port);
	} else {
		addrs = s->addrs;
		addrs.lane = lane;
		tcplat_flows.delete(&addrs);
	}
	/* Behind the flow: what has no seed any more may be replaced, and must not be deleted then. */
	if (cookie) {
		s->cookie = 0;
		tcplat_seeds.delete(&cookie);
	}
}

static __always_inline void tcplat_forget(const struct sock *sk, struct tcplat_sock *s)
{
	tcplat_withdraw(sk, s);
	tcplat_remove(tcplat_key(sk));
}

/* What tells sockets apart that had the same address one after the other; 0 where no process has it open. */
static __always_inline u32 tcplat_inode(const struct sock *sk)
{
	struct socket *socket = tcplat_get(sk, sk_socket);
	struct file *file = tcplat_get(socket, file);
	struct inode *inode = tcplat_get(file, f_inode);

	return tcplat_get(inode, i_ino);
}

/*
 * A socket takes its role, in the process that gives it one. It was closed until now, and begins
 * with other addresses.
 */
static __always_inline struct tcplat_sock *tcplat_learn(const struct sock *sk, u8 role)
{
	struct tcplat_sock *s = tcplat_find(sk);
	u64 key = tcplat_key(sk);
	u32 inode = tcplat_inode(sk);
	/*
	 * Another socket's, whose end no program saw: the kernel skips one that would interrupt itself.
	 * Or of this one's time before: with a seed, or as the child of a listener.
	 */
	bool other = s && s->inode != inode;

	if (s && (other || s->role != role || role == TCPLAT_ROLE_CLIENT)) {
		tcplat_withdraw(sk, s);
		s->addrs.sport = 0;
	}
	if (other)
		tcplat_remove(key);
	if (!s || other) {
		struct tcplat_sock fresh = {.id = tcplat_new_id()};

		s = tcplat_insert(key, &fresh);
		if (!s)
			return NULL;
	}
	/* Another probe, or none, keeps its state from now on. */
	if (s->role != role)
		s->state = 0;
	s->role = role;
	s->group = 0;
	s->inode = inode;
	tcplat_own(s);
	return s;
}

static __always_inline void tcplat_fill_owner(struct tcplat_event *e, struct tcplat_sock *s)
{
	u64 task = tcplat_owner_now(s, (char *)e->comm);

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

#define TCPLAT_SAME_PLACE(member, first)                                                       \
	_Static_assert(__builtin_offsetof(struct tcplat_event, member) -                       \
			       __builtin_offsetof(struct tcplat_event, first) ==               \
		       __builtin_offsetof(struct tcplat_addrs, member) -                       \
			       __builtin_offsetof(struct tcplat_addrs, first),                 \
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

/* Whether the socket that made it is there no more, and no program saw its end. */
static __always_inline bool tcplat_is_stale(const struct tcplat_flow *flow)
{
	u64 key = flow->key, id = flow->id;
	struct tcplat_sock *s;

	if (!key)
		return !tcplat_seeds.lookup(&id);
	s = tcplat_entry(key);
	return !s || s->id != id;
}

/* Take a flow from a socket that is open, but has no connection any more. */
static __always_inline bool tcplat_take_flow(const struct tcplat_flow *flow)
{
	u64 key = flow->key, id = flow->id;
	struct tcplat_sock *s = key ? tcplat_entry(key) : NULL;

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
	 * this very instant, on another CPU, deletes what replaced its own: then the listener's owner
	 * stands in.
	 */
#pragma unroll
	for (u8 round = 0; round < 2 * TCPLAT_LANES; round++) {
		addrs.lane = round % TCPLAT_LANES;
		if (round == 1)
			tcplat_lanes.update(&zero, &one);
		if (tcplat_flows.insert(&addrs, &flow)) {
			other = tcplat_flows.lookup(&addrs);
			if (other && !tcplat_is_stale(other) &&
			    (round < TCPLAT_LANES || !tcplat_take_flow(other)))
				continue;
			tcplat_flows.update(&addrs, &flow);
		}
		s->in_flows = 1 + addrs.lane;
		return;
	}
}

/*
 * Another process at the same port: nobody knows any more who will accept, or whether it is
 * somebody who is wanted; unless all of them are.
 */
static __always_inline void
tcplat_share(struct tcplat_listener *listener, const struct tcplat_sock *s)
{
	if (listener->pid == s->owner.task >> 32 && listener->born_ns == s->born_ns)
		return;
	listener->pid = 0;
	if (!s->wanted)
		listener->wanted = tcplat_wanted_nobody();
}

static __always_inline bool tcplat_is_served(u16 port)
{
	u32 at = port;
	u8 *served = tcplat_served.lookup(&at);

	return served && *served;
}

static __always_inline void tcplat_serve(u16 port, u8 how)
{
	u32 at = port;
	u8 *served = tcplat_served.lookup(&at);

	if (served && *served < how)
		*served = how;
}

/* The owner of this socket, the current process, has called listen() at `port`. */
static __always_inline void tcplat_serves(const struct tcplat_sock *s, u16 port)
{
	struct tcplat_served_by key = {.pid = s->owner.task >> 32, .port = port};
	struct tcplat_service service = {.born_ns = s->born_ns, .wanted = s->wanted, .asked = s->asked};

	__builtin_memcpy(service.comm, s->owner.comm, sizeof(service.comm));
	tcplat_services.update(&key, &service);
}

/* Whether it has, if it is the current process that owns `s`, a connection which it accepted. */
static __always_inline bool tcplat_is_serving(const struct tcplat_sock *s)
{
	struct tcplat_served_by key = {.pid = s->owner.task >> 32, .port = s->addrs.sport};
	struct tcplat_service *service = tcplat_services.lookup(&key);
	u32 older = key.pid | TCPLAT_OLDER;

	if (!service)
		return false;
	return service->born_ns ? service->born_ns == s->born_ns : !!tcplat_listening.lookup(&older);
}

/* A socket begins to listen, in the process that asks for it. */
static __always_inline struct tcplat_sock *tcplat_listen(const struct sock *sk)
{
	struct tcplat_sock *s = tcplat_learn(sk, TCPLAT_ROLE_LISTENER);
	struct tcplat_listener *old, fresh = {};
	struct tcplat_port port;
	struct socket *socket;
	u32 pid;

	if (!s)
		return NULL;
	/* The kernel's own, or a part of one of MPTCP: no process will be seen to accept by this socket. */
	socket = tcplat_get(sk, sk_socket);
	if (!s->inode || (u64)tcplat_get(socket, sk) != tcplat_key(sk))
		tcplat_set_owner(&s->owner, 0, fresh.comm);
	/* In the table already: more than one program may see this happen. */
	if (s->in_flows)
		return s;
	s->in_flows = 1;
	tcplat_read_addrs(&s->addrs, sk);
	port = tcplat_port_of(sk, &s->addrs);
	pid = s->owner.task >> 32;
	if (pid) {
		tcplat_listening.update(&pid, &s->born_ns);
		tcplat_serves(s, port.port);
	}
	tcplat_serve(port.port, tcplat_get(sk, __sk_common.skc_bound_dev_if) ? TCPLAT_SERVED_BY_DEVICE :
								TCPLAT_SERVED);
	old = tcplat_listeners.lookup(&port);
	if (old) {
		tcplat_count_user(old, pid, 1);
		tcplat_share(old, s);
		return s;
	}
	tcplat_count_user(&fresh, pid, 1);
	fresh.pid = tcplat_get_owner(&s->owner, fresh.comm) >> 32;
	fresh.born_ns = s->born_ns;
	fresh.wanted = s->wanted;
	fresh.asked = s->asked;
	tcplat_listeners.update(&port, &fresh);
	return s;
}

/* Who listens for what comes to this local end, as the kernel looks for it: the address itself first. */
static __always_inline struct tcplat_listener *tcplat_listener_at(const struct tcplat_addrs *local)
{
	struct tcplat_port port = {.netns = local->netns, .port = local->sport, .ip = local->ip};
	struct tcplat_listener *found;

	__builtin_memcpy(port.addr, local->saddr, 16);
	found = tcplat_listeners.lookup(&port);
	if (found)
		return found;
	if (port.ip == 4)
		tcplat_map_v4(port.addr, 0);
	else
		__builtin_memset(port.addr, 0, 16);
	found = tcplat_listeners.lookup(&port);
	if (found)
		return found;
	__builtin_memset(port.addr, 0, 16);
	port.ip = TCPLAT_IP_BOTH;
	return tcplat_listeners.lookup(&port);
}

/*
 * Who accepts at this port, and its name; 0 where it is not known.
 * Of several that listen at different devices, the addresses do not tell which one it is.
 */
static __always_inline u32
tcplat_listener_pid(const struct tcplat_listener *from, u16 port, char *comm)
{
	u32 at = port;
	u8 *served = tcplat_served.lookup(&at);
	/* Once: tcplat_share() clears it, on another CPU, and tcplat_leave() may set another one's. */
	u32 pid = *(volatile u32 *)&from->pid;

	if (!pid || (served && *served == TCPLAT_SERVED_BY_DEVICE))
		return 0;
	if (!tcplat_listens(pid, from->born_ns))
		return 0;
	__builtin_memcpy(comm, from->comm, sizeof(from->comm));
	if (*(volatile u32 *)&from->pid == pid)
		return pid;
	*(u64 *)comm = *(u64 *)(comm + 8) = 0;
	return 0;
}

/* A segment that a listener gets: where several processes accept, nobody knows whose it will be. */
static __always_inline void
tcplat_fill_listener(struct tcplat_event *e, const struct sock *sk, const struct tcplat_sock *s)
{
	struct tcplat_port port = tcplat_port_of(sk, &s->addrs);
	struct tcplat_listener *listener = tcplat_listeners.lookup(&port);

	if (!listener || *(volatile u32 *)&listener->pid)
		return;
	e->pid = e->tid = 0;
	__builtin_memset((void *)e->comm, 0, sizeof(e->comm));
	__builtin_memset((void *)e->thread, 0, sizeof(e->thread));
}

static __always_inline bool tcplat_same_addrs(const struct tcplat_addrs *a, const struct tcplat_addrs *b)
{
	u64 differ = 0;

#pragma unroll
	for (int i = 0; i < sizeof(*a) / 8; i++)
		differ |= ((const u64 *)a)[i] ^ ((const u64 *)b)[i];
	return !differ;
}

/*
 * A connection that came in is complete: the change from TCP_SYN_RECV to TCP_ESTABLISHED, the first
 * that its socket, the child of a listener, can be told by: until its own addresses are filled in
 * it is an exact copy of its parent. Its owner is the listener's, if there is one.
 */
static __always_inline struct tcplat_sock *tcplat_inherit(const struct sock *sk, u64 now)
{
	struct tcplat_sock *s = tcplat_find(sk), fresh = {.since_ns = now};
	char comm[16] __attribute__((aligned(8))) = {};
	struct tcplat_listener *from;
	u64 pid;

	/* No child: it called connect(), as the other end did. Or it was accepted before (RFC 7413). */
	if (s && tcplat_get(sk, sk_socket))
		return s;
	tcplat_read_addrs(&fresh.addrs, sk);
	fresh.id = tcplat_new_id();
	if (s && tcplat_same_addrs(&s->addrs, &fresh.addrs)) {
		/* More than one program sees this happen. */
		if (s->role == TCPLAT_ROLE_SERVER)
			return s;
		/* All that tcplat_meet() knew. */
		fresh.id = s->id;
	} else if (s) {
		/* Another socket's, as in tcplat_learn(). */
		tcplat_forget(sk, s);
	}
	fresh.role = TCPLAT_ROLE_SERVER;
	if (tcplat_is_open())
		fresh.unaccepted = TCPLAT_ACCEPT_UNSEEN;
	fresh.wanted = tcplat_wanted_nobody();
	tcplat_serve(fresh.addrs.sport, TCPLAT_SERVED);
	from = tcplat_listener_at(&fresh.addrs);
	if (from) {
		fresh.wanted = from->wanted;
		fresh.asked = from->asked;
		fresh.unaccepted |= TCPLAT_INHERITED;
		fresh.born_ns = from->born_ns;
		pid = tcplat_listener_pid(from, fresh.addrs.sport, comm);
		tcplat_set_owner(&fresh.owner, pid << 32, comm);
	}
	s = tcplat_insert(tcplat_key(sk), &fresh);
	if (s)
		tcplat_add_flow(s, tcplat_key(sk));
	return s;
}

/* `s` is a connection that its owner, the current process, has taken over. */
static __always_inline void tcplat_set_accepted(const struct sock *sk, struct tcplat_sock *s)
{
	struct tcplat_listener *from;

	s->unaccepted &= ~TCPLAT_ACCEPT_UNSEEN;
	if (!s->addrs.sport)
		tcplat_read_addrs(&s->addrs, sk);
	from = tcplat_listener_at(&s->addrs);
	if (!from)
		return;
	/* First: who sees that it is shared sees why. */
	if (!from->inherited && from->pid != s->owner.task >> 32 && !tcplat_is_serving(s))
		from->inherited = 1;
	tcplat_share(from, s);
}

/* A process takes a connection over. */
static __always_inline struct tcplat_sock *tcplat_accept(const struct sock *sk)
{
	struct tcplat_sock *s = tcplat_touch(sk);

	if (s)
		tcplat_set_accepted(sk, s);
	return s;
}

/* The owner of a socket, as its entry has it. */
static __always_inline void tcplat_owner_of(struct tcplat_sock *s, struct tcplat_seed *who)
{
	tcplat_refresh(s);
	who->pid = tcplat_owner_now(s, who->comm) >> 32;
	who->role = s->role;
	who->wanted = s->wanted;
	who->asked = s->asked;
}

/* The name of an owner that has no entry may be another by now. */
static __always_inline void tcplat_refresh_seed(struct tcplat_seed *who)
{
	struct tcplat_name *name = who->pid ? tcplat_new_name(who->pid, 0) : NULL;

	if (!name)
		return;
	__builtin_memcpy(who->comm, name->comm, sizeof(who->comm));
	who->wanted = who->asked && tcplat_wanted_name(who->comm);
}

/* The socket that a flow leads to; false where that is gone. */
static __always_inline bool tcplat_follow(const struct tcplat_flow *flow, struct tcplat_seed *who)
{
	u64 key = flow->key, id = flow->id;
	struct tcplat_seed *seed = NULL;
	struct tcplat_sock *s;

	if (!key) {
		seed = tcplat_seeds.lookup(&id);
		if (!seed)
			return false;
		key = *(volatile u64 *)&seed->key;
	}
	if (!key) {
		*who = *seed;
		tcplat_refresh_seed(who);
		if (who->unaccepted & TCPLAT_INHERITED && who->pid && !tcplat_listens(who->pid, 0)) {
			who->pid = 0;
			__builtin_memset(who->comm, 0, sizeof(who->comm));
		}
		return true;
	}
	s = tcplat_entry(key);
	/* Its entry may be another socket's by now. */
	if (!s || (seed ? s->cookie : s->id) != id)
		return false;
	tcplat_owner_of(s, who);
	return true;
}

/*
 * Whose packet it is, from its addresses, local end first: of a connection, or
 * of whoever listens at its port. False where nobody is known.
 */
static __always_inline bool tcplat_whose(struct tcplat_addrs *local, struct tcplat_seed *who)
{
	struct tcplat_flow *flow = tcplat_flows.lookup(local), *second = NULL, *older;
	struct tcplat_listener *listener;
	u32 zero = 0;
	u8 *lanes = tcplat_lanes.lookup(&zero);

	if (lanes && *lanes) {
		local->lane = 1;
		second = tcplat_flows.lookup(local);
		local->lane = 0;
	}
	if (second) {
		/* A seed is older than any entry. */
		bool younger = !flow || (second->key && (!flow->key || second->id > flow->id));

		older = younger ? flow : second;
		if (tcplat_follow(younger ? second : flow, who))
			return true;
		flow = older;
	}
	if (flow && tcplat_follow(flow, who))
		return true;
	listener = tcplat_listener_at(local);
	if (!listener)
		return false;
	who->pid = tcplat_listener_pid(listener, local->sport, who->comm);
	who->role = TCPLAT_ROLE_LISTENER;
	who->wanted = listener->wanted;
	who->asked = listener->asked;
	tcplat_refresh_seed(who);
	return true;
}

/*
 * A record of the socket's, owner and addresses filled in, whoever wants the owner.
 *
 * NULL where nobody listens yet or the ring is full.
 */
static __always_inline struct tcplat_event *
tcplat_reserve_wanted(const struct sock *sk, struct tcplat_sock *s, u8 hook, u64 ts_ns)
{
	struct tcplat_event *e;

#ifdef TCPLAT_NO_EVENTS
	return NULL;
#endif
	if (!s->addrs.sport)
		tcplat_read_addrs(&s->addrs, sk);
	if (!tcplat_wanted_addrs(&s->addrs))
		return NULL;
	e = tcplat_reserve(hook, ts_ns);
	if (!e)
		return NULL;
	tcplat_fill_owner(e, s);
	tcplat_fill_addrs(e, &s->addrs);
	e->state = s->state ? s->state : tcplat_get(sk, __sk_common.skc_state);
	return e;
}

/* The same; NULL as well where nobody asked for this socket. */
static __always_inline struct tcplat_event *
tcplat_reserve_for(const struct sock *sk, struct tcplat_sock *s, u8 hook, u64 ts_ns)
{
	tcplat_refresh(s);
	return s->wanted ? tcplat_reserve_wanted(sk, s, hook, ts_ns) : NULL;
}
