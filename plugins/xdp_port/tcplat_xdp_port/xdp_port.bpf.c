// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * TCP packets of the chosen ports, as an interface receives them.
 *
 * Each packet passes, unchanged, whatever becomes of its row.
 *
 * PACKET_PORTS: as <tcplat/packet.bpf.h> has it.
 * XDP_SRC, XDP_DST: which of a packet's two ports is looked at.
 */
#include <tcplat/parse.bpf.h>
#include <tcplat/xdp.bpf.h>
#include <tcplat/packet.bpf.h>

static __always_inline bool is_chosen(const struct tcplat_tcp *tcp)
{
	return (XDP_SRC && tcplat_wanted_port(bpf_ntohs(tcp->sport))) ||
	       (XDP_DST && tcplat_wanted_port(bpf_ntohs(tcp->dport)));
}

static __always_inline void
report(struct xdp_md *ctx, const struct tcplat_packet *packet, u32 bytes)
{
	u64 now = bpf_ktime_get_ns();
	const struct tcplat_tcp *tcp = packet->tcp;
	struct tcplat_addrs ends = {};
	struct tcplat_event *e;

	ends.netns = tcplat_xdp_netns(ctx);
	ends.ip = packet->version;
	tcplat_copy_addresses(ends.saddr, ends.daddr, packet);
	ends.sport = bpf_ntohs(tcp->sport);
	ends.dport = bpf_ntohs(tcp->dport);
	if (!tcplat_wanted_packet(&ends) || tcplat_leaves_out(&ends, HOOK_tcplat_xdp_port, now))
		return;
	e = tcplat_reserve(HOOK_tcplat_xdp_port, now);
	if (!e)
		return;
	tcplat_fill_addrs(e, &ends);
	e->ifindex = ctx->ingress_ifindex;
	e->seq = bpf_ntohl(tcp->seq);
	e->bytes = bytes;
	e->flags = tcp->flags;
	e->has = TCPLAT_HAS_SEQ | TCPLAT_HAS_BYTES | TCPLAT_HAS_FLAGS;
	tcplat_fill_packet(e, tcp->flags, bpf_ntohs(tcp->window), bpf_ntohl(tcp->ack));
	tcplat_submit(e);
}

int tcplat_xdp_port(struct xdp_md *ctx)
{
	const void *data = (const void *)(long)ctx->data;
	const void *end = (const void *)(long)ctx->data_end;
	struct tcplat_packet packet;
	s64 bytes;

	if (tcplat_find_tcp(data, end, &packet) && is_chosen(packet.tcp)) {
		bytes = tcplat_payload(&packet, end);
		if (bytes >= 0)
			report(ctx, &packet, bytes);
	}
	return XDP_PASS;
}
