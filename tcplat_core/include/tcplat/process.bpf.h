// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Processes: their names, which of them listen, and the record of one that owns a socket.
 *
 * "pid" is the process, "tid" the thread.
 */

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
	/* The process's name: that of its group leader. */
	char comm[16] __attribute__((aligned(8)));
	/* The thread's; empty if that is the group leader. */
	char thread[16] __attribute__((aligned(8)));
};

struct tcplat_name {
	u64 start_ns; /* when the process began: its pid is given away again */
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

/*
 * Of a key of tcplat_listening: a process that listened before the run; when it began is not known.
 */
#define TCPLAT_OLDER 0x80000000

/*
 * pid -> when that process began, of those that called listen(); and pid | TCPLAT_OLDER -> 0.
 *
 * A listener that a child has inherited outlives who called listen(). Inserted by tcplat_listen(),
 * and by the loader for what listened before; deleted by tcplat_on_exit.
 */
BPF_TABLE("hash", u32, u64, tcplat_listening, 16384);

/* Of names and pids whose parts got mixed up it is another, but by a chance of 2^-64. */
static __always_inline u64 tcplat_owner_sum(u32 pid, const char *comm)
{
	u64 first = *(const u64 *)comm, last = *(const u64 *)(comm + 8);

	return first ^ (last << 1 | last >> 63) ^ pid * 0x9e3779b97f4a7c15ULL;
}

static __always_inline void tcplat_write_name(struct tcplat_owner *to, u32 pid, const char *comm)
{
	*(volatile u64 *)to->comm = *(const u64 *)comm;
	*(volatile u64 *)(to->comm + 8) = *(const u64 *)(comm + 8);
	*(volatile u64 *)&to->sum = tcplat_owner_sum(pid, comm);
}

/* Writes the process; the thread stays unknown until tcplat_write_thread(). */
static __always_inline void tcplat_write_owner(struct tcplat_owner *to, u64 task, const char *comm)
{
	tcplat_write_name(to, task >> 32, comm);
	*(volatile u64 *)&to->task = task;
}

static __always_inline void
tcplat_write_thread(struct tcplat_owner *to, u32 tid, const char *thread)
{
	*(volatile u64 *)to->thread = *(const u64 *)thread;
	*(volatile u64 *)(to->thread + 8) = *(const u64 *)(thread + 8);
	*(volatile u64 *)&to->thread_sum = tcplat_owner_sum(tid, thread);
}

/*
 * The name of `tid`, the current thread: empty where it is the group leader, whose is the
 * process's.
 */
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

/*
 * The name that a process took since the run began, or NULL. `start_ns` 0: whichever has the pid.
 */
static __always_inline struct tcplat_name *tcplat_new_name(u32 pid, u64 start_ns)
{
	struct tcplat_name *name = tcplat_names.lookup(&pid);

	return name && (!start_ns || start_ns == name->start_ns) ? name : NULL;
}

/* The name of the current task's process, `pid`; when it began. */
static __always_inline u64 tcplat_process_name(u32 pid, char *comm)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct task_struct *leader = tcplat_get(task, group_leader);
	u64 start_ns = tcplat_get(leader, start_time);
	/* First: its tracepoint comes before the kernel writes the name. */
	struct tcplat_name *name = tcplat_new_name(pid, start_ns);

	*(u64 *)comm = *(u64 *)(comm + 8) = 0;
	if (name)
		__builtin_memcpy(comm, name->comm, sizeof(name->comm));
	else /* Nothing is written behind its end: what is there would part equal names. */
		bpf_probe_read_kernel_str(comm, 16, (const void *)&leader->comm);
	return start_ns;
}

/* Whether a process that listens is still there. While it ends, which closes its sockets, it is. */
static __always_inline bool tcplat_listens(u32 pid, u64 start_ns)
{
	u32 key = start_ns ? pid : pid | TCPLAT_OLDER;
	u64 *known = tcplat_listening.lookup(&key);

	return (known && *known == start_ns) || pid == tcplat_current() >> 32;
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
static __always_inline u64 tcplat_read_owner(const struct tcplat_owner *from, char *comm)
{
	u64 task = *(volatile u64 *)&from->task;

	*(u64 *)comm = *(volatile u64 *)from->comm;
	*(u64 *)(comm + 8) = *(volatile u64 *)(from->comm + 8);
	if (*(volatile u64 *)&from->sum == tcplat_owner_sum(task >> 32, comm))
		return task;
	*(u64 *)comm = *(u64 *)(comm + 8) = 0;
	return 0;
}
