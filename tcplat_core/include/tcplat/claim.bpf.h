// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * The owner of an entry: the process that calls, and what follows from that for the filters.
 */

/* The owner may have another name by now. Any context. */
static __always_inline void tcplat_refresh(struct tcplat_sock *s)
{
	u32 renames = tcplat_renamed(), pid;
	struct tcplat_name *name;

	if (s->renames == renames)
		return;
	s->renames = renames;
	pid = s->owner.task >> 32;
	name = tcplat_new_name(pid, s->start_ns);
	if (!name)
		return;
	tcplat_write_name(&s->owner, pid, name->comm);
	s->wanted = s->asked && tcplat_wanted_name(name->comm);
	s->group = 0;
}

/*
 * The same of a socket's entry. Until a process uses it, the owner of an accepted one is the
 * process that called listen(), as long as that lives.
 */
static __always_inline u64 tcplat_valid_owner(const struct tcplat_sock *s, char *comm)
{
	u64 task = tcplat_read_owner(&s->owner, comm);

	if (s->role != TCPLAT_ROLE_LISTENER && (!(s->unaccepted & TCPLAT_INHERITED) || (u32)task))
		return task;
	if (!task || tcplat_listens(task >> 32, s->start_ns))
		return task;
	*(u64 *)comm = *(u64 *)(comm + 8) = 0;
	return 0;
}

/* The task of `task` becomes the owner: the current one. Whether it is wanted. */
static __always_inline bool tcplat_set_owner(struct tcplat_sock *s, u64 task)
{
	struct tcplat_owner *owner = &s->owner;
	char comm[16] __attribute__((aligned(8)));
	u32 renames = tcplat_renamed();
	bool wanted;

	if (s->thread_renames != renames || owner->task != task ||
	    owner->thread_sum != tcplat_owner_sum(task, owner->thread)) {
		tcplat_thread_name(task >> 32, task, comm);
		tcplat_write_thread(owner, task, comm);
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
	s->start_ns = tcplat_process_name(task >> 32, comm);
	s->renames = renames;
	tcplat_write_owner(owner, task, comm);
	s->asked = tcplat_wanted_caller();
	wanted = s->asked && tcplat_wanted_name(comm);
	s->group = 0;
	s->wanted = wanted;
	tcplat_debug("sock %llu belongs to pid %d, wanted %d", s->id, (u32)(task >> 32), wanted);
	return wanted;
}

/*
 * The socket's own process calls, and is the owner from here on: the entry, if it has that role
 * and that process passes the filters. `me` is then the current task.
 */
static __always_inline struct tcplat_sock *
tcplat_claim_role(const struct sock *sk, u64 *me, u8 role)
{
	struct tcplat_sock *s = tcplat_lookup(sk);

	if (!s || s->role != role)
		return NULL;
	*me = tcplat_current();
	return tcplat_set_owner(s, *me) ? s : NULL;
}

/*
 * The same for handlers that report every socket: one that nothing is known of
 * gets an entry without an owner, wanted unless the filters name processes.
 * Full sockets only: the entry is deleted when the kernel destroys the socket.
 */
static __always_inline struct tcplat_sock *tcplat_lookup_or_create(const struct sock *sk)
{
	struct tcplat_sock *s = tcplat_lookup(sk);

	if (s)
		return s;
	struct tcplat_sock fresh = {.id = tcplat_new_id(), .wanted = tcplat_wanted_unowned()};

	return tcplat_insert(tcplat_key(sk), &fresh);
}

/*
 * What is known of a socket, as tcplat_lookup() has it, where the socket's own process calls: it is
 * the owner from here on. Of a new one nothing is known yet: tcplat_lookup_or_create() makes its
 * entry.
 */
static __always_inline struct tcplat_sock *tcplat_claim(const struct sock *sk)
{
	struct tcplat_sock *s = tcplat_lookup(sk);

	if (s)
		tcplat_set_owner(s, tcplat_current());
	return s;
}
