// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * The life of a socket: it connects or listens, is the child of a listener, is accepted, and ends.
 */

/*
 * Distinguishes sockets that had the same address one after the other; 0 where no process has it
 * open.
 */
static __always_inline u32 tcplat_inode(const struct sock *sk)
{
	struct socket *socket = tcplat_get(sk, sk_socket);
	struct file *file = tcplat_get(socket, file);
	struct inode *inode = tcplat_get(file, f_inode);

	return tcplat_get(inode, i_ino);
}

/* Neither packets nor children find the socket any more by the addresses that it had. */
static __always_inline void tcplat_unindex(const struct sock *sk, struct tcplat_sock *s)
{
	struct tcplat_listener *listener;
	struct tcplat_addrs addrs;
	u64 cookie = s->cookie;
	u8 lane;

	if (!s->in_flows)
		return;
	lane = s->in_flows - 1;
	s->in_flows = 0;
	/*
	 * One that had a seed may never have been asked for them; its port may be given back by
	 * now.
	 */
	if (!s->addrs.sport)
		tcplat_read_addrs(&s->addrs, sk);
	if (!s->addrs.sport)
		s->addrs.sport = bpf_ntohs(tcplat_get((const struct inet_sock *)sk, inet_sport));
	if (s->role == TCPLAT_ROLE_LISTENER) {
		struct tcplat_port port = tcplat_port_of(sk, &s->addrs);

		listener = tcplat_listeners.lookup(&port);
		if (listener && !tcplat_remove_user(listener, port.port, s->owner.task >> 32))
			tcplat_listeners.delete(&port);
	} else {
		addrs = s->addrs;
		addrs.lane = lane;
		tcplat_flows.delete(&addrs);
	}
	/*
	 * Behind the flow: what has no seed any more may be replaced, and must not be deleted then.
	 */
	if (cookie) {
		s->cookie = 0;
		tcplat_seeds.delete(&cookie);
	}
}

static __always_inline void tcplat_delete_sock(const struct sock *sk, struct tcplat_sock *s)
{
	tcplat_unindex(sk, s);
	tcplat_delete_entry(tcplat_key(sk));
}

/*
 * A socket takes its role, in the process that gives it one. It was closed until now, and begins
 * with other addresses.
 */
static __always_inline struct tcplat_sock *tcplat_set_role(const struct sock *sk, u8 role)
{
	struct tcplat_sock *s = tcplat_lookup(sk);
	u64 key = tcplat_key(sk);
	u32 inode = tcplat_inode(sk);
	/*
	 * Another socket's, whose end no program saw: the kernel skips one that would interrupt
	 * itself. Or of this one's time before: with a seed, or as the child of a listener.
	 */
	bool other = s && s->inode != inode;

	if (s && (other || s->role != role || role == TCPLAT_ROLE_CLIENT)) {
		tcplat_unindex(sk, s);
		s->addrs.sport = s->addrs.dport = 0;
#ifdef TCPLAT_SAMPLE
		s->sample = 0;
#endif
	}
	if (other)
		tcplat_delete_entry(key);
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
	tcplat_set_owner(s, tcplat_current());
	return s;
}

/* A socket begins to listen, in the process that asks for it. */
static __always_inline struct tcplat_sock *tcplat_listen(const struct sock *sk)
{
	struct tcplat_sock *s = tcplat_set_role(sk, TCPLAT_ROLE_LISTENER);
	struct tcplat_listener *old, fresh = {};
	struct tcplat_port port;
	struct socket *socket;
	u32 pid;

	if (!s)
		return NULL;
	/*
	 * The kernel's own, or a part of one of MPTCP: no process will be seen to accept by this
	 * socket.
	 */
	socket = tcplat_get(sk, sk_socket);
	if (!s->inode || (u64)tcplat_get(socket, sk) != tcplat_key(sk))
		tcplat_write_owner(&s->owner, 0, fresh.comm);
	/* In the table already: more than one program may see this happen. */
	if (s->in_flows)
		return s;
	s->in_flows = 1;
	tcplat_read_sock(s, sk);
	port = tcplat_port_of(sk, &s->addrs);
	pid = s->owner.task >> 32;
	if (pid) {
		tcplat_listening.update(&pid, &s->start_ns);
		tcplat_add_service(s, port.port);
	}
	tcplat_set_served(port.port, tcplat_get(sk, __sk_common.skc_bound_dev_if)
					     ? TCPLAT_SERVED_BY_DEVICE
					     : TCPLAT_SERVED);
	old = tcplat_listeners.lookup(&port);
	if (old) {
		tcplat_count_user(old, pid, 1);
		tcplat_share(old, s);
		return s;
	}
	tcplat_count_user(&fresh, pid, 1);
	fresh.pid = tcplat_read_owner(&s->owner, fresh.comm) >> 32;
	fresh.start_ns = s->start_ns;
	fresh.wanted = s->wanted;
	fresh.asked = s->asked;
	tcplat_listeners.update(&port, &fresh);
	return s;
}

/*
 * A connection that came in is complete: the change from TCP_SYN_RECV to TCP_ESTABLISHED, the first
 * that identifies its socket, the child of a listener: until its own addresses are filled in it is
 * an exact copy of its parent. Its owner is the listener's, if there is one.
 */
static __always_inline struct tcplat_sock *tcplat_inherit(const struct sock *sk, u64 now)
{
	struct tcplat_sock *s = tcplat_lookup(sk), fresh = {.since_ns = now};
	char comm[16] __attribute__((aligned(8))) = {};
	struct tcplat_listener *from;
	u64 pid;

	/*
	 * No child: it called connect(), as the other end did. Or it was accepted before (RFC
	 * 7413).
	 */
	if (s && tcplat_get(sk, sk_socket))
		return s;
	tcplat_read_addrs(&fresh.addrs, sk);
	fresh.id = tcplat_new_id();
	if (s && tcplat_same_addrs(&s->addrs, &fresh.addrs)) {
		/* More than one program sees this happen. */
		if (s->role == TCPLAT_ROLE_SERVER)
			return s;
		/* All that tcplat_lookup_or_create() knew. */
		fresh.id = s->id;
	} else if (s) {
		/* Another socket's, as in tcplat_set_role(). */
		tcplat_delete_sock(sk, s);
	}
	fresh.role = TCPLAT_ROLE_SERVER;
	if (tcplat_is_open())
		fresh.unaccepted = TCPLAT_ACCEPT_UNSEEN;
	fresh.wanted = tcplat_wanted_unowned();
	tcplat_set_served(fresh.addrs.sport, TCPLAT_SERVED);
	from = tcplat_listener_at(&fresh.addrs);
	if (from) {
		fresh.wanted = from->wanted;
		fresh.asked = from->asked;
		fresh.unaccepted |= TCPLAT_INHERITED;
		fresh.start_ns = from->start_ns;
		pid = tcplat_listener_pid(from, fresh.addrs.sport, comm);
		tcplat_write_owner(&fresh.owner, pid << 32, comm);
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
	struct tcplat_sock *s = tcplat_claim(sk);

	if (s)
		tcplat_set_accepted(sk, s);
	return s;
}
