// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Who listens at which port, and so owns what is not accepted yet.
 */

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
	u32 pid;      /* 0 if several processes accept: which one will is not known */
	u32 users;    /* sockets that listen there (SO_REUSEPORT) */
	u8 wanted;    /* whichever process accepts */
	u8 asked;     /* as in tcplat_sock */
	u8 inherited; /* 1: a process accepts that did not call listen() there */
	u8 pad[5];
	u64 pids;     /* of the users: the sum of the pids that called listen() ... */
	u64 squares;  /* ... and of their squares: together they show whether all are one process */
	u64 start_ns; /* when that process began; 0: it listened before the run */
	char comm[16] __attribute__((aligned(8)));
};

/*
 * Namespace, local address and port -> struct tcplat_listener.
 *
 * Inserted by tcplat_listen(), and by the loader for what listened before.
 * Deleted by tcplat_unindex() with the last user.
 */
BPF_TABLE("hash", struct tcplat_port, struct tcplat_listener, tcplat_listeners, 16384);

struct tcplat_served_by {
	u32 pid;
	u32 port;
};

struct tcplat_service {
	u64 start_ns; /* as in tcplat_listener */
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

/* What tcplat_served says: a service, and one that hears one device alone. */
#define TCPLAT_SERVED 1
#define TCPLAT_SERVED_BY_DEVICE 2

/*
 * Local port -> TCPLAT_SERVED, once a service was seen there, in whatever namespace: packets to
 * other ports are no service's. Set by tcplat_listen(), tcplat_inherit() and the loader; never
 * taken back.
 */
BPF_TABLE("array", u32, u8, tcplat_served, 65536);

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

static __always_inline bool tcplat_is_served(u16 port)
{
	u32 at = port;
	u8 *served = tcplat_served.lookup(&at);

	return served && *served;
}

static __always_inline void tcplat_set_served(u16 port, u8 how)
{
	u32 at = port;
	u8 *served = tcplat_served.lookup(&at);

	if (served && *served < how)
		*served = how;
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
static __always_inline u32 tcplat_remove_user(struct tcplat_listener *listener, u16 port, u32 pid)
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
	listener->start_ns = left->start_ns;
	listener->wanted = left->wanted;
	listener->asked = left->asked;
	*(volatile u32 *)&listener->pid = key.pid;
	/* Another has come, on another CPU, and may have cleared it before it was set. */
	if (*(volatile u32 *)&listener->users != users)
		*(volatile u32 *)&listener->pid = 0;
	return users;
}

/*
 * Another process at the same port: which one will accept is not known any more, nor whether it is
 * wanted, unless all of them are.
 */
static __always_inline void
tcplat_share(struct tcplat_listener *listener, const struct tcplat_sock *s)
{
	if (listener->pid == s->owner.task >> 32 && listener->start_ns == s->start_ns)
		return;
	listener->pid = 0;
	if (!s->wanted)
		listener->wanted = tcplat_wanted_unowned();
}

/* The owner of this socket, the current process, has called listen() at `port`. */
static __always_inline void tcplat_add_service(const struct tcplat_sock *s, u16 port)
{
	struct tcplat_served_by key = {.pid = s->owner.task >> 32, .port = port};
	struct tcplat_service service = {
		.start_ns = s->start_ns, .wanted = s->wanted, .asked = s->asked};

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
	return service->start_ns ? service->start_ns == s->start_ns
				 : !!tcplat_listening.lookup(&older);
}

/*
 * Who listens for what comes to this local end, as the kernel looks for it: the address itself
 * first.
 */
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
 * Of several that listen at different devices, the addresses do not show which one it is.
 */
static __always_inline u32 tcplat_listener_pid(const struct tcplat_listener *from, u16 port,
					       char *comm)
{
	u32 at = port;
	u8 *served = tcplat_served.lookup(&at);
	/*
	 * Once: tcplat_share() clears it, on another CPU, and tcplat_remove_user() may set another
	 * one's.
	 */
	u32 pid = *(volatile u32 *)&from->pid;

	if (!pid || (served && *served == TCPLAT_SERVED_BY_DEVICE))
		return 0;
	if (!tcplat_listens(pid, from->start_ns))
		return 0;
	__builtin_memcpy(comm, from->comm, sizeof(from->comm));
	if (*(volatile u32 *)&from->pid == pid)
		return pid;
	*(u64 *)comm = *(u64 *)(comm + 8) = 0;
	return 0;
}
