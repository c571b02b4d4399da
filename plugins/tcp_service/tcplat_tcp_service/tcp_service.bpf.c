// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * The accepting side of a TCP connection, from the packet to the process that reads it.
 *
 * One file, although it is long: the C of a probe is one text. One section per point, histograms
 * first. One body per point; below it a thin handler per mechanism. fentry hands its
 * arguments over as raw tracepoints do, so that one handler often serves both.
 */
#include <tcplat/event.bpf.h>
#include <tcplat/owner.bpf.h>
#include <tcplat/stream.bpf.h>
#include <tcplat/skb.bpf.h>
#include <tcplat/histogram.bpf.h>

#define SERVER TCPLAT_ROLE_SERVER
#define TCPLAT_ROLE SERVER
#define LISTENER TCPLAT_ROLE_LISTENER

/* --- histograms: how long bytes are on their way to the process */

#ifdef TCPLAT_HISTOGRAMS
#define ARRIVALS 65536

/*
 * Hash of ports and sequence number -> sequence number << 32 | when, in 16 ns.
 *
 * Made at rx_ip for each segment with payload for a service; replaced by the next
 * that has the same place, taken out by the ready that it leads to. One word, so
 * that no reader sees half of it. Its clock goes round in 68 s.
 *
 * A packet that is forwarded to its socket (a bridge, a container) comes by more than
 * once: the last time counts, which is that of the receiving stack.
 */
BPF_TABLE("array", u32, u64, arrivals, ARRIVALS);

struct wait {
	u64 ready_ns; /* when the reader was woken for them; 0: not known */
	u32 seq;      /* of the first of these bytes; the next wait's is where they end */
	u32 pad;
};

#define WAITS 8

struct unread {
	u64 sock;        /* whose it is: the kernel uses addresses again */
	u32 seq;         /* the byte after the last one that its reader was woken for */
	u32 first, next; /* the waits are waits[n % WAITS], first <= n < next */
	u32 pad;
	struct wait waits[WAITS];
};

/*
 * Place -> struct unread, of the socket whose entry is in tcplat_places.
 *
 * Made at the first ready, replaced when another socket has the place.
 */
BPF_TABLE("array", u32, struct unread, unreads, 1 << TCPLAT_PLACE_BITS);

/*
 * struct sock * -> struct unread, of sockets whose entry is in tcplat_socks.
 *
 * Made at the first ready, replaced when another socket has the address, and pushed out
 * by younger ones where there are too many: what it knew is then counted as not measured.
 */
BPF_TABLE("lru_hash", u64, struct unread, far_unreads, 65536);

/* What is known of its bytes, or of those of the one that was there before. */
static __always_inline struct unread *unread_of(const struct tcplat_sock *s, u64 key)
{
	u32 at = tcplat_at(key);
	struct unread *u;

	if (!s->place_key)
		return far_unreads.lookup(&key);
	u = unreads.lookup(&at);
	/* Barrier: clang would merge both lookups into one call, which the kernel cannot inline. */
	asm volatile("" : "+r"(u));
	return u;
}

static __always_inline struct unread *
begin_unread(const struct sock *sk, const struct tcplat_sock *s, u64 key)
{
	struct unread fresh = {.sock = s->id}, *u;

	fresh.seq = tcplat_get((const struct tcp_sock *)sk, copied_seq);
	if (!s->place_key)
		far_unreads.update(&key, &fresh);
	u = unread_of(s, key);
	if (u)
		*u = fresh;
	return u;
}

/* `theirs` is the port that the segment comes from. */
static __always_inline u32 arrival_at(u16 theirs, u16 ours, u32 seq)
{
	/* Knuth's multiplicative hash: the upper bits depend on all of them. */
	return ((seq ^ (u32)theirs << 16 ^ ours) * 2654435761u) >> 16;
}

static __always_inline void note_arrival(const struct tcplat_segment *g, u64 now)
{
	u32 seq = g->seq + (g->flags >> 1 & 1); /* a SYN has a number, too */
	u32 at = arrival_at(g->addrs.sport, g->addrs.dport, seq);
	u64 *arrival;

	if (!g->bytes)
		return;
	arrival = arrivals.lookup(&at);
	if (arrival)
		*arrival = (u64)seq << 32 | (u32)(now >> 4);
}

/* How long ago the segment that begins with `seq` came; false where that is not known. */
static __always_inline bool take_arrival(struct tcplat_sock *s, u32 seq, u64 now, u64 *took)
{
	u32 at = arrival_at(s->addrs.dport, s->addrs.sport, seq);
	u64 *arrival = arrivals.lookup(&at);
	u32 ago;

	if (!arrival || !*arrival || *arrival >> 32 != seq)
		return false;
	ago = (u32)(now >> 4) - (u32)*arrival;
	*arrival = 0;
	*took = (u64)ago << 4;
	return ago < 1u << 31; /* else it lies in the future: clocks of two CPUs */
}

/*
 * The reader is woken. If there are new bytes: how long ago did the segment come that
 * brought the first of them?  Calls for one socket do not overlap: its lock is held.
 */
static __always_inline void measure_ready(struct sock *sk, struct tcplat_sock *s, u64 now)
{
	u32 end = tcplat_get((struct tcp_sock *)sk, rcv_nxt), begin;
	struct unread *u;
	struct wait *wait;
	u64 key = tcplat_key(sk), took = 0;
	bool known = true;

	if (!s->addrs.sport)
		tcplat_read_addrs(&s->addrs, sk);
	/* A FIN has a number, and is no byte. */
	if (tcplat_get(sk, __sk_common.skc_flags) & (1UL << TCPLAT_SOCK_DONE))
		end--;
	u = unread_of(s, key);
	if (!u || u->sock != s->id) {
		u = begin_unread(sk, s, key);
		/* Bytes that were here before us are not new: a segment that we saw is proof. */
		known = false;
	}
	if (!u)
		return;
	begin = u->seq;
	if ((s32)(end - begin) <= 0)
		return;
	if (take_arrival(s, begin, now, &took)) {
		tcplat_sample(sk, s, HIST_rx_ready, took);
		known = true;
	} else {
		tcplat_unmeasured(sk, s, HIST_rx_ready);
	}
	u->seq = end;
	/* The last place is for bytes of which there are too many to know: all that follow. */
	if (u->next - u->first >= WAITS)
		return;
	if (u->next - u->first == WAITS - 1)
		known = false;
	wait = &u->waits[u->next & (WAITS - 1)];
	wait->seq = begin;
	wait->ready_ns = known ? now : 0;
	u->next++;
}

/* Bytes were read: how long ago was the reader woken for the first of them? */
static __always_inline void measure_recv(struct sock *sk, struct tcplat_sock *s, u32 bytes, u64 now)
{
	const struct tcp_sock *tp = (const struct tcp_sock *)sk;
	u32 begin, at, last = 0;
	bool found = false;
	u64 ready_ns = 0;
	struct unread *u;

	if (!bytes)
		return;
	u = unread_of(s, tcplat_key(sk));
	if (!u || u->sock != s->id) {
		tcplat_unmeasured(sk, s, HIST_ready_recv);
		return;
	}
	begin = tcplat_get(tp, copied_seq);
	/* No FIN is among the bytes that the reader was woken for. */
	if ((s32)(begin - u->seq) > 0)
		begin = tcplat_next_byte(tp, begin, tcplat_get(sk, __sk_common.skc_state));
	begin -= bytes;
	at = u->first;
	/* Where threads read at once, one may have put `first` back: begin anew. */
	if (u->next - at > WAITS)
		at = u->first = u->next;
	for (int i = 0; i < WAITS; i++) {
		struct wait *wait = &u->waits[at & (WAITS - 1)];
		u32 seq = wait->seq;

		/* Later bytes; or a place that another CPU has not filled in yet. */
		if (at == u->next || (s32)(begin - seq) < 0 || (found && (s32)(seq - last) <= 0))
			break;
		found = true;
		last = seq;
		ready_ns = wait->ready_ns;
		u->first = at++;
	}
	if (found && ready_ns && ready_ns <= now)
		tcplat_sample(sk, s, HIST_ready_recv, now - ready_ns);
	else
		tcplat_unmeasured(sk, s, HIST_ready_recv);
}
#else
static __always_inline void note_arrival(const struct tcplat_segment *g, u64 now)
{
}

static __always_inline void measure_ready(struct sock *sk, struct tcplat_sock *s, u64 now)
{
}

static __always_inline void measure_recv(struct sock *sk, struct tcplat_sock *s, u32 bytes, u64 now)
{
}
#endif

/* --- rx_ip: a packet for a service of this host reaches IP, or TCP's door */

static __always_inline int left_out_ack(void)
{
	tcplat_count_bare_ack();
	return 0;
}

static __always_inline int report_packet(struct sk_buff *skb, const u8 *l3, u8 hook)
{
	struct tcplat_segment segment = {};
	struct tcplat_addrs local = {};
	struct tcplat_seed who = {};
	struct tcplat_event *e;
	bool bare = false;
	u64 now;

	if (!tcplat_parse_ip(&segment, skb, l3) || !tcplat_is_served(segment.addrs.dport))
		return 0;
#ifdef TCPLAT_NO_EVENTS
	if (!segment.bytes)
		return 0;
#endif
	now = bpf_ktime_get_ns();
	note_arrival(&segment, now);
#ifdef TCPLAT_NO_EVENTS
	return 0;
#endif
#ifdef TCPLAT_NO_BARE_ACKS
	/* Half of all packets: the owner is not looked for, unless a filter asks whose they are. */
	bare = !segment.bytes && segment.flags == TCPLAT_TCP_ACK;
#endif
	segment.addrs.netns = tcplat_skb_netns(skb);
	/* As the receiving socket sees it: its own end first. */
	local.netns = segment.addrs.netns;
	local.ip = segment.addrs.ip;
	local.sport = segment.addrs.dport;
	local.dport = segment.addrs.sport;
	__builtin_memcpy(local.saddr, segment.addrs.daddr, 16);
	__builtin_memcpy(local.daddr, segment.addrs.saddr, 16);
	if (!tcplat_wanted_addrs(&local))
		return 0;
	if (bare && !TCPLAT_BY_TASK)
		return left_out_ack();
	if (!tcplat_lookup_packet(&local, &who) || !who.wanted)
		return 0;
	if (who.role != SERVER && who.role != LISTENER)
		return 0;
	if (bare)
		return left_out_ack();
	if (tcplat_leaves_out(&local, hook, now))
		return 0;
	e = tcplat_reserve(hook, now);
	if (!e)
		return 0;
	tcplat_fill_addrs(e, &segment.addrs);
	tcplat_fill_segment(e, &segment);
	e->pid = who.pid;
	__builtin_memcpy(e->comm, who.comm, sizeof(e->comm));
	return tcplat_report(e);
}

#ifdef TCPLAT_TRACEPOINT_rx_ip
/* The device layer has pulled its own header: the data begin with IP's. */
int tp_rx_ip(struct bpf_raw_tracepoint_args *ctx)
{
	struct sk_buff *skb = (struct sk_buff *)ctx->args[0];

	return report_packet(skb, tcplat_get(skb, data), HOOK_tp_rx_ip);
}
#else
/* TCP's door: the data begin with TCP's header, IP's stands before it. */
static __always_inline int report_at_tcp(struct sk_buff *skb, u8 hook)
{
	const u8 *head = tcplat_get(skb, head);

	return report_packet(skb, head + tcplat_get(skb, network_header), hook);
}
#endif

#ifdef TCPLAT_FENTRY_rx_ip
int fe_tcp_v4_rcv(struct bpf_raw_tracepoint_args *ctx)
{
	return report_at_tcp((struct sk_buff *)ctx->args[0], HOOK_fe_tcp_v4_rcv);
}

int fe_tcp_v6_rcv(struct bpf_raw_tracepoint_args *ctx)
{
	return report_at_tcp((struct sk_buff *)ctx->args[0], HOOK_fe_tcp_v6_rcv);
}
#endif

#ifdef TCPLAT_KPROBE_rx_ip
int kp_tcp_v4_rcv(struct pt_regs *ctx, struct sk_buff *skb)
{
	return report_at_tcp(skb, HOOK_kp_tcp_v4_rcv);
}

int kp_tcp_v6_rcv(struct pt_regs *ctx, struct sk_buff *skb)
{
	return report_at_tcp(skb, HOOK_kp_tcp_v6_rcv);
}
#endif

/* --- rx_tcp: the segment reaches its socket */

/* The record of a segment that a socket handles; the data begin with TCP's header. */
static __always_inline struct tcplat_event *
make_segment(struct sock *sk, struct sk_buff *skb, u8 hook)
{
	struct tcplat_sock *s = tcplat_lookup(sk);
	struct tcplat_segment segment = {};
	struct tcplat_event *e;
	bool known = false;
	u64 now;

	if (!s || (s->role != SERVER && s->role != LISTENER))
		return NULL;
	now = bpf_ktime_get_ns();
	/* A listener has no remote end; the segment has, and says which local address it is. */
	if (s->role == LISTENER) {
		const u8 *head = tcplat_get(skb, head);
		u16 l3 = tcplat_get(skb, network_header);

		known = tcplat_parse_ip(&segment, skb, head + l3);
	}
	if (!tcplat_parse_tcp(&segment, tcplat_get(skb, data), tcplat_get(skb, len)))
		return NULL;
	if (known) {
		tcplat_refresh(s);
		if (!s->wanted || !tcplat_passes(sk, s) ||
		    tcplat_leaves_out(&segment.addrs, hook, now))
			return NULL;
	}
	e = tcplat_reserve_for(sk, s, hook, now);
	if (!e)
		return NULL;
	tcplat_fill_segment(e, &segment);
	if (s->role == LISTENER)
		tcplat_fill_listener(e, sk, s);
	if (known) {
		e->ip = segment.addrs.ip;
		e->dport = segment.addrs.sport;
		__builtin_memcpy(e->saddr, segment.addrs.daddr, 16);
		__builtin_memcpy(e->daddr, segment.addrs.saddr, 16);
	}
	return e;
}

/* tcp:tcp_probe and fentry of tcp_v4_do_rcv() have the same two arguments. */
#if defined(TCPLAT_TRACEPOINT_rx_tcp)
int tp_rx_tcp(struct bpf_raw_tracepoint_args *ctx)
{
	return tcplat_report(make_segment((struct sock *)ctx->args[0],
					  (struct sk_buff *)ctx->args[1], HOOK_tp_rx_tcp));
}
#endif

/* tcp_v6_do_rcv() hands IPv4 packets of a dual-stack socket on to tcp_v4_do_rcv(). */
static __always_inline bool handed_on(struct sk_buff *skb)
{
	return tcplat_get(skb, protocol) == bpf_htons(TCPLAT_ETH_P_IP);
}

/*
 * What completes a handshake goes past tcp_v4_do_rcv(), data that come along with it
 * as well: to tcp_child_process(), while the child has no entry yet, so that the
 * row is its listener's. With a SYN cookie it comes by both ways: then the second counts.
 */
static __always_inline bool to_child(struct sock *sk, struct sk_buff *skb)
{
	const u8 *data = tcplat_get(skb, data);
	u8 flags = 0;

	if (tcplat_get(sk, __sk_common.skc_state) != TCP_LISTEN)
		return false;
	bpf_probe_read_kernel(&flags, 1, data + 13);
	return (flags & 0x16) == 0x10; /* ACK, without SYN and RST */
}

#ifdef TCPLAT_FENTRY_rx_tcp
int fe_tcp_child_process(struct bpf_raw_tracepoint_args *ctx)
{
	return tcplat_report(make_segment((struct sock *)ctx->args[0],
					  (struct sk_buff *)ctx->args[2],
					  HOOK_fe_tcp_child_process));
}

int fe_tcp_v4_do_rcv(struct bpf_raw_tracepoint_args *ctx)
{
	if (to_child((struct sock *)ctx->args[0], (struct sk_buff *)ctx->args[1]))
		return 0;
	return tcplat_report(make_segment((struct sock *)ctx->args[0],
					  (struct sk_buff *)ctx->args[1], HOOK_fe_tcp_v4_do_rcv));
}

int fe_tcp_v6_do_rcv(struct bpf_raw_tracepoint_args *ctx)
{
	struct sk_buff *skb = (struct sk_buff *)ctx->args[1];

	if (handed_on(skb) || to_child((struct sock *)ctx->args[0], skb))
		return 0;
	return tcplat_report(make_segment((struct sock *)ctx->args[0], skb, HOOK_fe_tcp_v6_do_rcv));
}
#endif

#ifdef TCPLAT_KPROBE_rx_tcp
int kp_tcp_child_process(struct pt_regs *ctx, struct sock *parent, struct sock *child,
			 struct sk_buff *skb)
{
	return tcplat_report(make_segment(parent, skb, HOOK_kp_tcp_child_process));
}

int kp_tcp_v4_do_rcv(struct pt_regs *ctx, struct sock *sk, struct sk_buff *skb)
{
	if (to_child(sk, skb))
		return 0;
	return tcplat_report(make_segment(sk, skb, HOOK_kp_tcp_v4_do_rcv));
}

int kp_tcp_v6_do_rcv(struct pt_regs *ctx, struct sock *sk, struct sk_buff *skb)
{
	if (handed_on(skb) || to_child(sk, skb))
		return 0;
	return tcplat_report(make_segment(sk, skb, HOOK_kp_tcp_v6_do_rcv));
}
#endif

/* --- accept: a process takes the connection */

static __always_inline int report_accept(struct sock *sk, u8 hook)
{
	u64 now = bpf_ktime_get_ns(), waited;
	struct tcplat_sock *s;
	struct tcplat_event *e;

	if (!sk)
		return 0;
	s = tcplat_accept(sk);
	if (!tcplat_is(s, SERVER) || s->unaccepted & TCPLAT_ACCEPT_TOLD)
		return 0;
	waited = s->since_ns ? now - s->since_ns : 0;
	s->since_ns = 0;
	if (waited)
		tcplat_sample(sk, s, HIST_accept, waited);
	else
		tcplat_unmeasured(sk, s, HIST_accept);
	if (waited && tcplat_too_fast(waited))
		return 0;
	e = tcplat_reserve_for(sk, s, hook, now);
	if (e)
		e->accept_ns = waited;
	return tcplat_report(e);
}

#ifdef TCPLAT_TRACEPOINT_accept
/* Layout of syscalls:sys_exit_*: common fields, number, result (tracefs events/.../format). */
struct syscall_exit {
	u64 common;
	s64 number;
	s64 result;
};

/* No tracepoint names the new socket; the caller's table of open files does. */
static __always_inline int report_accepted_fd(struct syscall_exit *ctx, u8 hook)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct files_struct *files = tcplat_get(task, files);
	struct fdtable *table = tcplat_get(files, fdt);
	struct file **open = (struct file **)tcplat_get(table, fd), *file = NULL;
	struct socket *socket;

	if (ctx->result < 0)
		return 0;
	bpf_probe_read_kernel(&file, sizeof(file), open + ctx->result);
	socket = (struct socket *)tcplat_get(file, private_data);
	return report_accept(tcplat_sk(socket), hook);
}

int tp_accept(struct syscall_exit *ctx)
{
	return report_accepted_fd(ctx, HOOK_tp_accept);
}

int tp_accept4(struct syscall_exit *ctx)
{
	return report_accepted_fd(ctx, HOOK_tp_accept4);
}
#endif

#ifdef TCPLAT_FENTRY_accept
/* inet_csk_accept() has two arguments since 6.10 (92ef0fd55ac8), four before. */
int fx_accept2(struct bpf_raw_tracepoint_args *ctx)
{
	return report_accept((struct sock *)ctx->args[2], HOOK_fx_accept2);
}

int fx_accept4(struct bpf_raw_tracepoint_args *ctx)
{
	return report_accept((struct sock *)ctx->args[4], HOOK_fx_accept4);
}
#endif

#ifdef TCPLAT_KPROBE_accept
/*
 * pid_tgid -> 1 while it is in inet_csk_accept().
 *
 * Inserted at entry, deleted at return; only to find out that a return was missed.
 */
BPF_HASH(accepting, u64, u8, 16384);

int kp_accept(struct pt_regs *ctx)
{
	u64 me = bpf_get_current_pid_tgid();
	u8 one = 1;

	if (accepting.lookup(&me))
		tcplat_missed(HOOK_kr_accept);
	accepting.update(&me, &one);
	return 0;
}

int kr_accept(struct pt_regs *ctx)
{
	u64 me = bpf_get_current_pid_tgid();

	accepting.delete(&me);
	return report_accept((struct sock *)PT_REGS_RC(ctx), HOOK_kr_accept);
}
#endif

#if defined(TCPLAT_TRACEPOINT_accept) || defined(TCPLAT_FENTRY_accept) ||                          \
	defined(TCPLAT_KPROBE_accept)
/*
 * Its `id`, of a connection whose accept() was not seen -> 1. Inserted once, by the first thread
 * that uses it; what was used least recently makes room.
 */
BPF_TABLE("lru_hash", u64, u8, used_unseen, 4096);

/* The hook of an accept row that is made at another point's: `hook`, known when compiled. */
static __always_inline u8 accepted_at(u8 hook)
{
	switch (hook) {
	case HOOK_tp_state:
		return HOOK_accepted_tp_state;
	case HOOK_tp_state_skipped:
		return HOOK_accepted_tp_state_skipped;
	case HOOK_kp_tcp_set_state:
		return HOOK_accepted_kp_tcp_set_state;
	case HOOK_fe_tcp_set_state:
		return HOOK_accepted_fe_tcp_set_state;
	case HOOK_tp_recv:
		return HOOK_accepted_tp_recv;
	case HOOK_kr_tcp_recvmsg:
		return HOOK_accepted_kr_tcp_recvmsg;
	case HOOK_kr_tcp_splice_read:
		return HOOK_accepted_kr_tcp_splice_read;
	case HOOK_fx_tcp_recvmsg4:
		return HOOK_accepted_fx_tcp_recvmsg4;
	case HOOK_fx_tcp_recvmsg5:
		return HOOK_accepted_fx_tcp_recvmsg5;
	case HOOK_fx_tcp_recvmsg6:
		return HOOK_accepted_fx_tcp_recvmsg6;
	case HOOK_fx_tcp_splice_read:
		return HOOK_accepted_fx_tcp_splice_read;
	case HOOK_kp_tcp_sendmsg:
		return HOOK_accepted_kp_tcp_sendmsg;
	case HOOK_kp_tcp_sendpage:
		return HOOK_accepted_kp_tcp_sendpage;
	case HOOK_fe_tcp_sendmsg:
		return HOOK_accepted_fe_tcp_sendmsg;
	case HOOK_fe_tcp_sendpage:
		return HOOK_accepted_fe_tcp_sendpage;
	case HOOK_tp_send:
		return HOOK_accepted_tp_send;
	default: /* no process uses a connection there */
		return hook;
	}
}

/*
 * Reports the accept of a connection at its first use by its owner, the current process. By
 * function, the return of a call is not seen that waited when the run began; system calls of 32-bit
 * programs, and io_uring, fire no sys_exit_accept. When it was accepted, and whether by this process
 * or by one that passed it on, is not known.
 */
static __always_inline void report_unseen(struct sock *sk, struct tcplat_sock *s, u64 now, u8 hook)
{
	u64 id = s->id;
	u8 one = 1;

	if (used_unseen.insert(&id, &one))
		return;
	s->unaccepted |= TCPLAT_ACCEPT_TOLD;
	s->since_ns = 0;
	tcplat_set_accepted(sk, s);
	tcplat_unmeasured(sk, s, HIST_accept);
	tcplat_report(tcplat_reserve_for(sk, s, accepted_at(hook), now));
}

/*
 * The same where its end is closed: by the process, as long as it has the socket. One that has been
 * accepted has a struct socket, which a part of one of MPTCP shares.
 */
static __always_inline void
claim_by_closing(struct sock *sk, struct tcplat_sock *s, int new, u64 now, u8 hook)
{
	struct socket *socket;

	if (!(s->unaccepted & TCPLAT_ACCEPT_UNSEEN))
		return;
	if (new != TCP_FIN_WAIT1 && new != TCP_LAST_ACK)
		return;
	socket = tcplat_get(sk, sk_socket);
	if (!socket || (u64)tcplat_get(socket, sk) != tcplat_key(sk))
		return;
	tcplat_set_owner(s, tcplat_current());
	report_unseen(sk, s, now, hook);
}
#else
static __always_inline void report_unseen(struct sock *sk, struct tcplat_sock *s, u64 now, u8 hook)
{
}

static __always_inline void
claim_by_closing(struct sock *sk, struct tcplat_sock *s, int new, u64 now, u8 hook)
{
}
#endif

/* As tcplat_claim_role(); reports an accept() that was not seen. */
static __always_inline struct tcplat_sock *claim(struct sock *sk, u64 *me, u8 hook)
{
	struct tcplat_sock *s = tcplat_lookup(sk);
	bool wanted;

	if (!tcplat_is(s, SERVER))
		return NULL;
	*me = tcplat_current();
	wanted = tcplat_set_owner(s, *me);
	if (s->unaccepted & TCPLAT_ACCEPT_UNSEEN)
		report_unseen(sk, s, bpf_ktime_get_ns(), hook);
	return wanted ? s : NULL;
}
#define TCPLAT_CLAIM_SENDING claim

/* --- state: a service begins to listen, a connection is complete, and so on to its end */

static __always_inline int report_state(struct sock *sk, int old, int new, u8 hook)
{
	const struct tcp_sock *tp = (const struct tcp_sock *)sk;
	u64 now = bpf_ktime_get_ns();
	struct tcplat_event *e;
	struct tcplat_sock *s;

	if (new == TCP_LISTEN)
		s = tcplat_listen(sk);
	else if (old == TCP_SYN_RECV && new == TCP_ESTABLISHED)
		s = tcplat_inherit(sk, now);
	else
		s = tcplat_lookup(sk);
	if (!s || (s->role != SERVER && s->role != LISTENER))
		return 0;
	claim_by_closing(sk, s, new, now, hook);
	s->state = new;
	e = tcplat_make_state(sk, s, old, new, hook, now);
	if (!e)
		return 0;
	/*
	 * The client's first byte, as in tcp_client: what came along with the SYN has been
	 * received.
	 */
	if (old == TCP_SYN_RECV && new == TCP_ESTABLISHED) {
		e->seq = tcplat_get(tp, rcv_nxt) - (u32)tcplat_get(tp, bytes_received);
		e->has |= TCPLAT_HAS_SEQ;
	}
	tcplat_submit(e);
	return 0;
}

int tp_state(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];

	if (sk->sk_protocol != IPPROTO_TCP)
		return 0;
	return report_state(sk, ctx->args[1], ctx->args[2], HOOK_tp_state);
}

/*
 * tcp_set_state() makes each transition but that to TCP_LISTEN, which
 * inet_csk_listen_start() makes by itself: the tracepoint reports that one.
 */
#if defined(TCPLAT_FENTRY_state) || defined(TCPLAT_KPROBE_state)
int tp_listen(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];

	if ((int)ctx->args[2] != TCP_LISTEN || sk->sk_protocol != IPPROTO_TCP)
		return 0;
	return report_state(sk, ctx->args[1], TCP_LISTEN, HOOK_tp_listen);
}

/* A segment that tcp_rcv_state_process() gets (RFC 9293, 3.10.7), before it changes the state. */
static __always_inline int report_handled(struct sock *sk, struct sk_buff *skb, u8 hook)
{
	return tcplat_report(make_segment(sk, skb, hook));
}
#endif

#ifdef TCPLAT_FENTRY_state
int fe_tcp_rcv_state_process(struct bpf_raw_tracepoint_args *ctx)
{
	return report_handled((struct sock *)ctx->args[0], (struct sk_buff *)ctx->args[1],
			      HOOK_fe_tcp_rcv_state_process);
}
#endif

#ifdef TCPLAT_KPROBE_state
int kp_tcp_rcv_state_process(struct pt_regs *ctx, struct sock *sk, struct sk_buff *skb)
{
	return report_handled(sk, skb, HOOK_kp_tcp_rcv_state_process);
}
#endif

/* --- ready: there is something to read, and the reader is woken */

static __always_inline int report_ready(struct sock *sk, u8 hook)
{
	struct tcplat_sock *s = tcplat_lookup(sk);
	struct tcplat_event *e;
	u32 copied;
	u64 now;

	if (!tcplat_is(s, SERVER))
		return 0;
	now = bpf_ktime_get_ns();
	measure_ready(sk, s, now);
	e = tcplat_reserve_for(sk, s, hook, now);
	if (!e)
		return 0;
	copied = tcplat_get((struct tcp_sock *)sk, copied_seq);
	tcplat_add_seq(e, copied, tcplat_get((struct tcp_sock *)sk, rcv_nxt) - copied);
	return tcplat_report(e);
}

int tp_ready(struct bpf_raw_tracepoint_args *ctx)
{
	return report_ready((struct sock *)ctx->args[0], HOOK_tp_ready);
}

#ifdef TCPLAT_FENTRY_ready
int fe_ready(struct bpf_raw_tracepoint_args *ctx)
{
	return report_ready((struct sock *)ctx->args[0], HOOK_fe_ready);
}
#endif

#ifdef TCPLAT_KPROBE_ready
int kp_ready(struct pt_regs *ctx, struct sock *sk)
{
	return report_ready(sk, HOOK_kp_ready);
}
#endif

/* --- recv: what the process was given, and how long it was inside */

int tp_recv(struct bpf_raw_tracepoint_args *ctx)
{
	struct sock *sk = (struct sock *)ctx->args[0];
	int ret = ctx->args[1];
	u64 me;
	struct tcplat_sock *s;
	u64 now;

	if (ret < 0 || ctx->args[2] & TCPLAT_NO_STREAM)
		return 0;
	s = claim(sk, &me, HOOK_tp_recv);
	if (!s)
		return 0;
	now = bpf_ktime_get_ns();
	measure_recv(sk, s, ret, now);
	return tcplat_report(tcplat_make_recv(sk, s, me, ret, HOOK_tp_recv, now));
}

#if defined(TCPLAT_KPROBE_recv) || defined(TCPLAT_FENTRY_recv)
struct recv_call {
	u64 sk;
	u64 began_ns;
};

/*
 * pid_tgid -> the tcp_recvmsg() or tcp_splice_read() it is in.
 *
 * Inserted at entry, deleted at return.
 */
BPF_HASH(recvs, u64, struct recv_call, 16384);

static __always_inline int enter_recv(struct sock *sk, int flags, u8 hook)
{
	u64 me = bpf_get_current_pid_tgid();
	struct recv_call call = {.sk = (u64)sk};
	struct tcplat_sock *s;

	/* So many blocked readers that the kernel could not probe the last return. */
	if (recvs.lookup(&me)) {
		tcplat_missed(hook);
		recvs.delete(&me);
	}
	if (flags & TCPLAT_NO_STREAM)
		return 0;
	s = tcplat_claim(sk);
	if (!tcplat_is(s, SERVER))
		return 0;
	call.began_ns = bpf_ktime_get_ns();
	if (s->unaccepted & TCPLAT_ACCEPT_UNSEEN)
		report_unseen(sk, s, call.began_ns, hook);
	recvs.update(&me, &call);
	return 0;
}

static __always_inline int leave_recv(int ret, u8 hook)
{
	u64 task = bpf_get_current_pid_tgid(), now, took;
	struct recv_call *call = recvs.lookup(&task);
	struct tcplat_event *e;
	struct tcplat_sock *s;
	u64 me;
	struct sock *sk;

	if (!call)
		return 0;
	sk = (struct sock *)call->sk;
	now = bpf_ktime_get_ns();
	took = now - call->began_ns;
	recvs.delete(&task);
	if (ret < 0)
		return 0;
	s = tcplat_claim_role(sk, &me, SERVER);
	if (!s)
		return 0;
	measure_recv(sk, s, ret, now);
	if (ret)
		tcplat_sample(sk, s, HIST_in_recv, took);
	if (tcplat_too_fast(took))
		return 0;
	e = tcplat_make_recv(sk, s, me, ret, hook, now);
	if (e)
		e->call_ns = took;
	return tcplat_report(e);
}
#endif

#ifdef TCPLAT_FENTRY_recv
/*
 * The entry knows the rest. How many arguments there are: <tcplat/handlers.bpf.h>, at the return.
 */
#define exit_recv(sk, flags, ret, hook) leave_recv(ret, hook)

int fe_tcp_recvmsg4(struct bpf_raw_tracepoint_args *ctx)
{
	return enter_recv((struct sock *)ctx->args[0], ctx->args[3], HOOK_fx_tcp_recvmsg4);
}

int fe_tcp_recvmsg5(struct bpf_raw_tracepoint_args *ctx)
{
	return enter_recv((struct sock *)ctx->args[0], ctx->args[3], HOOK_fx_tcp_recvmsg5);
}

int fe_tcp_recvmsg6(struct bpf_raw_tracepoint_args *ctx)
{
	return enter_recv((struct sock *)ctx->args[0], ctx->args[4], HOOK_fx_tcp_recvmsg6);
}

int fe_tcp_splice_read(struct bpf_raw_tracepoint_args *ctx)
{
	struct socket *socket = (struct socket *)ctx->args[0];

	return enter_recv(tcplat_sk(socket), 0, HOOK_fx_tcp_splice_read);
}

#endif

/* --- send, send_short, close; and what the mechanisms call of state and recv */

#include <tcplat/handlers.bpf.h>
