// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Which tasks and which addresses are wanted. Constants first, look-ups last:
 * the TCPLAT_FILTER_* that stand in front of this text are made by loader/filter.py.
 */

/* Both ends: of a socket local, then remote; of a packet source, then destination. */
struct tcplat_addrs {
	u8 saddr[16], daddr[16];
	u32 netns;
	u16 sport, dport;
	u8 ip;
	u8 lane; /* 0, but in keys of tcplat_flows */
	u8 pad[6];
} __attribute__((aligned(8)));

/*
 * pid -> 1, for each process that -p or the traced command names.
 *
 * Inserted by the loader, and by tcplat_on_fork for children of a command.
 * Deleted by tcplat_on_exit, so that a reused pid is not taken for the old one.
 */
BPF_TABLE("hash", u32, u32, tcplat_pids, 16384);

/* Whether the filters name processes: only then must an owner be known to decide. */
#ifdef TCPLAT_FILTER_TASK
#define TCPLAT_BY_TASK true
#else
#define TCPLAT_BY_TASK false
#endif

/* The owner is not known: wanted unless the filters name processes. */
static __always_inline bool tcplat_wanted_unowned(void)
{
	return !TCPLAT_BY_TASK;
}

#ifdef TCPLAT_FILTER_CGROUP
/* The id of the current task's cgroup, or of its ancestor, at the wanted depth; else 0. */
static __always_inline u64 tcplat_current_cgroup(void)
{
#ifdef TCPLAT_READ_CGROUPS
	/*
	 * Tracing programs may call the helper since 5.14 (95b861a7935b). What is read instead, the
	 * kernel had until 6.1 (7f203bc89eb6).
	 */
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct css_set *set = tcplat_get(task, cgroups);
	struct cgroup *cgroup = tcplat_get(set, dfl_cgrp);

	if (tcplat_get(cgroup, level) < TCPLAT_FILTER_CGROUP_LEVEL)
		return 0;
	return tcplat_get(cgroup, ancestor_ids[TCPLAT_FILTER_CGROUP_LEVEL]);
#else
	return bpf_get_current_ancestor_cgroup_id(TCPLAT_FILTER_CGROUP_LEVEL);
#endif
}
#endif

/*
 * Processes and threads by the numbers that they have where tcplat runs: in a PID namespace of its
 * own, TCPLAT_PIDNS, those that /proc shows there. One that is outside is the kernel's number, with
 * TCPLAT_OUTSIDE; no row has it.
 */
#ifdef TCPLAT_PIDNS
#define TCPLAT_OUTSIDE 0x80000000

static __always_inline u32 tcplat_pid_there(const struct task_struct *task)
{
	const struct pid *pid = tcplat_get(task, thread_pid);
	u32 level = tcplat_get(pid, level);

	/* One number for each namespace, the first's at first; 32 is MAX_PID_NS_LEVEL. */
	for (u32 i = 0; i <= 32 && i <= level; i++) {
		const u8 *numbers = (const u8 *)pid + __builtin_offsetof(struct pid, numbers);
		const struct upid *at = (const struct upid *)(numbers + i * sizeof(struct upid));
		const struct pid_namespace *ns = tcplat_get(at, ns);

		if (tcplat_get(ns, ns.inum) == TCPLAT_PIDNS)
			return tcplat_get(at, nr);
	}
	return TCPLAT_OUTSIDE | tcplat_get(task, pid);
}

/* A task's process. */
static __always_inline u32 tcplat_pid(const struct task_struct *task)
{
	return tcplat_pid_there(tcplat_get(task, group_leader));
}

/* The current process << 32 | the current thread. */
static __always_inline u64 tcplat_current(void)
{
	const struct task_struct *task = (const struct task_struct *)bpf_get_current_task();
	struct bpf_pidns_info known = {};

	/* Where the task is of that very namespace, and of none below it. */
	if (!bpf_get_ns_current_pid_tgid(TCPLAT_PIDNS_DEVICE, TCPLAT_PIDNS, &known, sizeof(known)))
		return (u64)known.tgid << 32 | known.pid;
	return (u64)tcplat_pid(task) << 32 | tcplat_pid_there(task);
}
#else
#define tcplat_pid(task) tcplat_get(task, tgid)
#define tcplat_current bpf_get_current_pid_tgid
#endif

/* --comm: by the process's name. */
static __always_inline bool tcplat_wanted_name(const char *comm)
{
#ifdef TCPLAT_FILTER_COMM
	return TCPLAT_FILTER_COMM(comm);
#else
	return true;
#endif
}

/* The current task, whatever its name. Only where the socket's own process calls. */
static __always_inline bool tcplat_wanted_caller(void)
{
#ifdef TCPLAT_FILTER_CGROUP
	if (tcplat_current_cgroup() != TCPLAT_FILTER_CGROUP)
		return false;
#endif
#ifdef TCPLAT_FILTER_PID
	u32 pid = tcplat_current() >> 32;

	if (!tcplat_pids.lookup(&pid))
		return false;
#endif
	return true;
}

/* The current task, whose process is called `comm`. Only where the socket's own process calls. */
static __always_inline bool tcplat_wanted_task(const char *comm)
{
	return tcplat_wanted_name(comm) && tcplat_wanted_caller();
}

#ifdef TCPLAT_FILTER_PORTS
/*
 * Port >> 6, behind the place where its list begins -> a bit for each of 64 ports.
 *
 * Lists of ports that are too long for comparisons. Filled by the loader.
 */
BPF_TABLE("array", u32, u64, tcplat_ports, TCPLAT_FILTER_PORTS);

static __always_inline bool tcplat_has_port(u32 list, u16 port)
{
	u32 at = list + (port >> 6);
	u64 *ports = tcplat_ports.lookup(&at);

	return ports && *ports >> (port & 63) & 1;
}
#endif

#ifdef TCPLAT_FILTER_NETWORKS
struct tcplat_network {
	u32 bits; /* how many of the address count */
	u8 addr[16];
};

/* Network -> 1: a list that is too long for comparisons. Filled and sized by the loader. */
BPF_F_TABLE("lpm_trie", struct tcplat_network, u8, tcplat_networks, 1, BPF_F_NO_PREALLOC);

static __always_inline bool tcplat_in_networks(const struct tcplat_addrs *a)
{
	struct tcplat_network network = {.bits = 128};

	__builtin_memcpy(network.addr, a->saddr, 16);
	if (tcplat_networks.lookup(&network))
		return true;
	__builtin_memcpy(network.addr, a->daddr, 16);
	return tcplat_networks.lookup(&network) != NULL;
}
#endif

/* Local end first. A source port that is not chosen yet is 0, and no filter names port 0. */
static __always_inline bool tcplat_wanted_addrs(const struct tcplat_addrs *a)
{
	return TCPLAT_FILTER_ADDRS(a);
}

/* --min-latency, for rows that carry a duration. */
static __always_inline bool tcplat_too_fast(u64 took_ns)
{
	return took_ns < TCPLAT_MIN_NS;
}
