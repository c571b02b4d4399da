// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Whose a packet is, by its addresses.
 */

/* The owner of a socket, as its entry has it. */
static __always_inline void tcplat_copy_owner(struct tcplat_sock *s, struct tcplat_seed *who)
{
	tcplat_refresh(s);
	who->pid = tcplat_valid_owner(s, who->comm) >> 32;
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
static __always_inline bool
tcplat_lookup_flow(const struct tcplat_flow *flow, struct tcplat_seed *who)
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
		if (who->unaccepted & TCPLAT_INHERITED && who->pid &&
		    !tcplat_listens(who->pid, 0)) {
			who->pid = 0;
			__builtin_memset(who->comm, 0, sizeof(who->comm));
		}
		return true;
	}
	s = tcplat_lookup_entry(key);
	/* Its entry may be another socket's by now. */
	if (!s || (seed ? s->cookie : s->id) != id)
		return false;
	tcplat_copy_owner(s, who);
	return true;
}

/*
 * Whose packet it is, from its addresses, local end first: of a connection, or
 * of the listener at its port. False if no owner is known.
 */
static __always_inline bool
tcplat_lookup_packet(struct tcplat_addrs *local, struct tcplat_seed *who)
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
		if (tcplat_lookup_flow(younger ? second : flow, who))
			return true;
		flow = older;
	}
	if (flow && tcplat_lookup_flow(flow, who))
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
