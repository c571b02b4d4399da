// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * TCP packets that leave: each as it is handed to a device, behind every queue.
 *
 * PACKET_PORTS: as <tcplat/packet.bpf.h> has it.
 */
#include <tcplat/event.bpf.h>
#include <tcplat/owner.bpf.h>
#include <tcplat/skb.bpf.h>
#include <tcplat/packet.bpf.h>

/* Whose packet it is; the source is the local end. False if the filters do not want it. */
static __always_inline bool
find_owner(const struct sk_buff *skb, struct tcplat_addrs *ends, struct tcplat_seed *who)
{
	struct sock *sk = tcplat_sk(skb);
	struct tcplat_sock *s = sk ? tcplat_lookup(sk) : NULL;

	if (s) {
		tcplat_copy_owner(s, who);
		return who->wanted;
	}
	/* What answers a SYN has no socket of its own yet, what is forwarded never has. */
	if (tcplat_lookup_packet(ends, who))
		return who->wanted;
	return tcplat_wanted_unowned();
}

static __always_inline int report(const struct sk_buff *skb, const struct net_device *dev, u8 hook)
{
	u64 now = bpf_ktime_get_ns();
	const u8 *l3 = (const u8 *)tcplat_get(skb, head) + tcplat_get(skb, network_header);
	struct tcplat_segment segment = {};
	struct tcplat_seed who = {};
	struct tcplat_event *e;
	struct net *net;

	if (!tcplat_parse_ip(&segment, skb, l3))
		return 0;
	if (!tcplat_wanted_port(segment.addrs.sport) && !tcplat_wanted_port(segment.addrs.dport))
		return 0;
	net = tcplat_get(dev, nd_net.net);
	segment.addrs.netns = tcplat_get(net, ns.inum);
	if (!tcplat_wanted_addrs(&segment.addrs))
		return 0;
	/* Before the owner is looked for, unless a filter asks for that. */
	if (!TCPLAT_BY_TASK && tcplat_leaves_out(&segment.addrs, hook, now))
		return 0;
	if (!find_owner(skb, &segment.addrs, &who))
		return 0;
	if (TCPLAT_BY_TASK && tcplat_leaves_out(&segment.addrs, hook, now))
		return 0;
	e = tcplat_reserve(hook, now);
	if (!e)
		return 0;
	tcplat_fill_addrs(e, &segment.addrs);
	tcplat_fill_segment(e, &segment);
	e->pid = who.pid;
	__builtin_memcpy(e->comm, who.comm, sizeof(e->comm));
	bpf_probe_read_kernel(e->dev, sizeof(e->dev), dev->name);
	tcplat_fill_packet(e, segment.flags, segment.window, segment.ack);
	tcplat_submit(e);
	return 0;
}

int tp_start_xmit(struct bpf_raw_tracepoint_args *ctx)
{
	return report((const struct sk_buff *)ctx->args[0], (const struct net_device *)ctx->args[1],
		      HOOK_tp_start_xmit);
}

int tp_queue(struct bpf_raw_tracepoint_args *ctx)
{
	const struct sk_buff *skb = (const struct sk_buff *)ctx->args[0];

	return report(skb, tcplat_get(skb, dev), HOOK_tp_queue);
}
