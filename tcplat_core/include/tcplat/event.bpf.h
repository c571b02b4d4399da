// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * The record that a handler fills, and the books that are kept of it.
 *
 * struct tcplat_event, TCPLAT_HOOKS, TCPLAT_BOOKS and HOOK_<program> come in front
 * of this text: they are made from the probe's schema and hook points.
 * The text is pasted into the probe's own file, because bcc rewrites map calls
 * nowhere else.
 */

#ifndef __always_inline
#define __always_inline inline __attribute__((always_inline))
#endif
#ifndef IPPROTO_TCP
#define IPPROTO_TCP 6
#endif
#define TCPLAT_AF_INET 2
#define TCPLAT_AF_INET6 10
#define TCPLAT_TCP_ACK 0x10 /* a flag of TCP's header */

/* A line for --debug, at most three numbers: tcplat_debug("socket %llx", sk). */
#ifdef TCPLAT_DEBUG
/* bcc has its own way with bpf_trace_printk(), which does not work in a macro. */
#define tcplat_debug(words, ...)                                                                   \
	({                                                                                         \
		char _line[] = "tcplat: " words "\n";                                              \
		bpf_trace_printk_(_line, sizeof(_line), ##__VA_ARGS__);                            \
	})
#else
#define tcplat_debug(words, ...)
#endif

/* What the nullable fields of a record hold: bits of tcplat_event.has. */
#define TCPLAT_HAS_SEQ 1
#define TCPLAT_HAS_BYTES 2
#define TCPLAT_HAS_FLAGS 4

/* As the kernel has them, in rows. */
/* clang-format off */
enum {
	TCP_ESTABLISHED = 1, TCP_SYN_SENT, TCP_SYN_RECV, TCP_FIN_WAIT1, TCP_FIN_WAIT2,
	TCP_TIME_WAIT, TCP_CLOSE, TCP_CLOSE_WAIT, TCP_LAST_ACK, TCP_LISTEN, TCP_CLOSING,
	TCP_NEW_SYN_RECV,
};
/* clang-format on */

/*
 * A field of a kernel object, a number or a pointer, read safely. For static helpers: bcc
 * makes `sk->field` safe only in the handlers themselves.
 *
 * TCPLAT_CAST stands for bpf_rdonly_cast(), which came with 6.2 (a35b9af4ec2c). Where it is to be
 * had, the verifier takes our word for what a pointer points to, and lets us load from there:
 * a load costs a nanosecond, a call of bpf_probe_read_kernel() 60 to 90.
 */
#define tcplat_probed(ptr, field)                                                                  \
	({                                                                                         \
		__typeof__((ptr)->field) _value; /* zeroed if the read fails */                    \
		bpf_probe_read_kernel((void *)&_value, sizeof(_value),                             \
				      (const void *)&(ptr)->field);                                \
		_value;                                                                            \
	})
#ifdef TCPLAT_CAST
static void *(*tcplat_cast)(const void *ptr, u64 type) = (void *)TCPLAT_CAST;

#define TCPLAT_TYPE_ID(ptr) _Generic((ptr), TCPLAT_TYPE_IDS default: 0)
/*
 * Volatile: the verifier takes no load that the compiler has made of two. A fault yields 0.
 * The asm hides from bcc that it is a kernel's pointer, which it would probe.
 */
#define tcplat_loaded(ptr, field)                                                                  \
	({                                                                                         \
		__typeof__(ptr) _from;                                                             \
		const volatile __typeof__((ptr)->field) *_place;                                   \
		asm("" : "=r"(_from) : "0"(tcplat_cast(ptr, TCPLAT_TYPE_ID(ptr))));                \
		_place = &_from->field;                                                            \
		*_place;                                                                           \
	})
#define tcplat_get(ptr, field)                                                                     \
	__builtin_choose_expr(TCPLAT_TYPE_ID(ptr), tcplat_loaded(ptr, field),                      \
			      tcplat_probed(ptr, field))
#else
#define tcplat_get tcplat_probed
#endif

/*
 * Bytes from anywhere in the kernel, a constant multiple of eight, to where eight of them may be
 * written at once. Where they cannot be read: false, or, by TCPLAT_CAST, zeros.
 */
#ifdef TCPLAT_CAST
/*
 * A macro: in a function the loop is not unrolled. Any struct would do that begins with eight
 * bytes.
 */
/* clang-format takes the pragma for an operand. */
/* clang-format off */
#define tcplat_copy(to, size, from)                                                            \
	({                                                                                     \
		_Pragma("unroll") for (u32 _i = 0; _i < (size); _i += 8)                       \
			*(u64 *)((to) + _i) =                                                  \
				tcplat_get((const struct timespec64 *)((from) + _i), tv_sec);  \
		true;                                                                          \
	})
/* clang-format on */
#else
#define tcplat_copy(to, size, from) (!bpf_probe_read_kernel(to, size, from))
#endif

/*
 * The ring; the loader gives it its size (--ring-size). A record is submitted
 * without a wake-up, which would cost 5 us, but for the first after a silence:
 * while records come, the session looks at the ring by itself.
 */
BPF_RINGBUF_OUTPUT(events, 8);

/*
 * (cpu * hooks + hook) * 2 + {0: produced, 1: of these dropped} -> how many; hooks is
 * rounded up to whole cache lines (TCPLAT_HOOKS), so that no two CPUs write to the same.
 * TCPLAT_UNSAMPLED + cpu * TCPLAT_UNSAMPLED_HOOKS + hook -> rows that were not made, because
 * --sample leaves their connection out; these are not produced.
 * TCPLAT_ACK_SLOT + cpu * TCPLAT_ACK_SLOTS -> packets that only acknowledge, and have no row because
 * no sink uses it (TCPLAT_NO_BARE_ACKS).
 * The last entry -> sockets that were not tracked: tcplat_socks was full.
 *
 * All entries exist from the start. The session maps the array and reads it.
 */
BPF_F_TABLE("array", u32, u64, books, TCPLAT_BOOKS, BPF_F_MMAPABLE);

/*
 * Slot 0 -> 1 while events are wanted: set by the loader once the owners of older sockets are
 * known, cleared by the session (run/gate.py maps it) when the run ends, for all programs at one
 * instant.
 * Slot 1 -> 1 while the session sleeps, until tcplat_submit() wakes it.
 */
BPF_F_TABLE("array", u32, u32, tcplat_gate, 2, BPF_F_MMAPABLE);

/* Whether events are wanted: already, and still. */
static __always_inline bool tcplat_is_open(void)
{
	u32 zero = 0, *gate = tcplat_gate.lookup(&zero);

	return gate && *gate;
}

/*
 * A record to fill, or NULL while events are not wanted, or if the ring is full. It is made whatever
 * connection it is of: for a packet, ask tcplat_leaves_out() before.
 *
 * The caller must hand it to tcplat_submit() on every path. ts_ns is the
 * instant that the row will carry: normally bpf_ktime_get_ns().
 */
static __always_inline struct tcplat_event *tcplat_reserve(u8 hook, u64 ts_ns)
{
	u32 cpu = bpf_get_smp_processor_id();
	u32 slot = (cpu * TCPLAT_HOOKS + hook) * 2;
	struct tcplat_event *e;
	u64 *count;

#ifdef TCPLAT_NO_EVENTS
	return NULL;
#endif
	if (!tcplat_is_open())
		return NULL;
	e = events.ringbuf_reserve(sizeof(*e));
	/*
	 * Atomic: softirq may interrupt a handler on the same CPU. Behind the reserve, and before
	 * tcplat_submit() looks whether the session sleeps: that looks the other way round.
	 */
	count = books.lookup(&slot);
	if (count)
		lock_xadd(count, 1);
	if (!e) {
		slot++;
		count = books.lookup(&slot);
		if (count)
			lock_xadd(count, 1);
		return NULL;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->ts_ns = ts_ns;
	e->hook = hook;
	e->cpu = cpu;
	return e;
}

/* A packet that only acknowledges, and has no row. */
static __always_inline void tcplat_count_bare_ack(void)
{
	u32 slot = TCPLAT_ACK_SLOT + bpf_get_smp_processor_id() * TCPLAT_ACK_SLOTS;
	u64 *count = tcplat_is_open() ? books.lookup(&slot) : NULL;

	if (count)
		lock_xadd(count, 1);
}

/* An event that the kernel kept from us: in the books it is produced, and dropped. */
static __always_inline void tcplat_missed(u8 hook)
{
	u32 slot = (bpf_get_smp_processor_id() * TCPLAT_HOOKS + hook) * 2;
	u64 *count = books.lookup(&slot);

	if (count)
		lock_xadd(count, 1);
	slot++;
	count = books.lookup(&slot);
	if (count)
		lock_xadd(count, 1);
}

static __always_inline void tcplat_submit(struct tcplat_event *e)
{
	u32 one = 1, *asleep = tcplat_gate.lookup(&one);
	u64 flags = BPF_RB_NO_WAKEUP;

	if (asleep && *(volatile u32 *)asleep) {
		*asleep = 0;
		flags = BPF_RB_FORCE_WAKEUP;
	}
	events.ringbuf_submit(e, flags);
}

/* IPv4 addresses are kept as ::ffff:a.b.c.d, so that 16 bytes say all. */
static __always_inline void tcplat_map_v4(u8 *to, u32 addr_be)
{
	((u64 *)to)[0] = 0;
	((u32 *)to)[2] = bpf_htonl(0xffff);
	((u32 *)to)[3] = addr_be;
}

static __always_inline bool tcplat_is_mapped(const u8 *addr)
{
	const u64 *high = (const u64 *)addr;
	const u32 *middle = (const u32 *)(addr + 8);

	return !*high && *middle == bpf_htonl(0xffff);
}
