// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* A TCP segment in an skb: addresses, ports, sequence numbers, flags. Needs sk_buff, net_device. */

#define TCPLAT_ETH_P_IP 0x0800
#define TCPLAT_MAX_EXT_HEADERS 8

struct tcplat_segment {
	struct tcplat_addrs addrs; /* source, then destination */
	u32 seq, ack;
	u32 bytes;  /* of TCP payload */
	u16 window; /* as in the header: not scaled */
	u8 flags;
};

/* Big-endian fields of a header that was copied to the stack. */
static __always_inline u16 tcplat_be16(const u8 *at)
{
	return at[0] << 8 | at[1];
}

static __always_inline u32 tcplat_be32(const u8 *at)
{
	return (u32)at[0] << 24 | at[1] << 16 | at[2] << 8 | at[3];
}

/*
 * The first 16 bytes of a TCP header, copied to the stack; `rest` is how many bytes the packet has
 * from it on. False where the header does not fit.
 */
static __always_inline bool tcplat_copied_tcp(struct tcplat_segment *to, const u8 *tcp, u32 rest)
{
	u32 length;

	if (rest < 20)
		return false;
	length = (tcp[12] >> 4) * 4;
	if (length < 20 || length > rest)
		return false;
	to->addrs.sport = tcplat_be16(tcp);
	to->addrs.dport = tcplat_be16(tcp + 2);
	to->seq = tcplat_be32(tcp + 4);
	to->ack = tcplat_be32(tcp + 8);
	to->flags = tcp[13];
	to->window = tcplat_be16(tcp + 14);
	to->bytes = rest - length;
	return true;
}

/* The same where it is. */
static __always_inline bool tcplat_parse_tcp(struct tcplat_segment *to, const u8 *l4, u32 rest)
{
	u8 tcp[16] __attribute__((aligned(8)));

	return tcplat_copy(tcp, sizeof(tcp), l4) && tcplat_copied_tcp(to, tcp, rest);
}

/* How many bytes the packet has from `at` on. */
static __always_inline u32 tcplat_rest(const struct sk_buff *skb, const u8 *at)
{
	return tcplat_get(skb, len) - (u32)(at - (const u8 *)tcplat_get(skb, data));
}

/*
 * The IP packet at `l3`, in `skb`.
 * False where it is no TCP, a later fragment, or damaged.
 */
static __always_inline bool
tcplat_parse_ip(struct tcplat_segment *to, const struct sk_buff *skb, const u8 *l3)
{
	u8 ip[40] __attribute__((aligned(8))), ext[8] __attribute__((aligned(8)));
	u32 header, total, source, destination;
	u8 next;

	/* No TCP packet is shorter; where IPv4 has no options, TCP's header comes along. */
	if (!tcplat_copy(ip, sizeof(ip), l3))
		return false;
	if (ip[0] >> 4 == 4) {
		header = (ip[0] & 15) * 4;
		/* 0 in a GSO packet of more than 64 KB (BIG TCP). */
		total = tcplat_be16(ip + 2);
		if (!total)
			total = tcplat_rest(skb, l3);
		if (header < 20 || total < header || ip[9] != IPPROTO_TCP ||
		    tcplat_be16(ip + 6) & 0x1fff)
			return false;
		__builtin_memcpy(&source, ip + 12, 4);
		__builtin_memcpy(&destination, ip + 16, 4);
		to->addrs.ip = 4;
		tcplat_map_v4(to->addrs.saddr, source);
		tcplat_map_v4(to->addrs.daddr, destination);
		if (header == 20)
			return tcplat_copied_tcp(to, ip + 20, total - header);
		return tcplat_parse_tcp(to, l3 + header, total - header);
	}
	if (ip[0] >> 4 != 6)
		return false;
	header = 40;
	total = tcplat_be16(ip + 4) ? tcplat_be16(ip + 4) + 40 : tcplat_rest(skb, l3);
	next = ip[6];
	to->addrs.ip = 6;
	__builtin_memcpy(to->addrs.saddr, ip + 8, 16);
	__builtin_memcpy(to->addrs.daddr, ip + 24, 16);
#pragma unroll
	for (int i = 0; i < TCPLAT_MAX_EXT_HEADERS; i++) {
		if (next == IPPROTO_TCP)
			return total >= header && tcplat_parse_tcp(to, l3 + header, total - header);
		if (!tcplat_copy(ext, sizeof(ext), l3 + header))
			return false;
		if (next == 44 /* fragment */) {
			if (tcplat_be16(ext + 2) & 0xfff8)
				return false;
			header += 8;
		} else if (next == 51 /* authentication */) {
			header += (ext[1] + 2) * 4;
		} else if (next == 0 || next == 43 || next == 60 || next == 135) {
			header += (ext[1] + 1) * 8;
		} else {
			return false;
		}
		next = ext[0];
	}
	return false;
}

static __always_inline u32 tcplat_skb_netns(const struct sk_buff *skb)
{
	struct net_device *dev = tcplat_get(skb, dev);
	struct net *net = tcplat_get(dev, nd_net.net);

	return tcplat_get(net, ns.inum);
}

static __always_inline void
tcplat_fill_segment(struct tcplat_event *e, const struct tcplat_segment *g)
{
	e->seq = g->seq;
	e->bytes = g->bytes;
	e->flags = g->flags;
	e->has |= TCPLAT_HAS_SEQ | TCPLAT_HAS_BYTES | TCPLAT_HAS_FLAGS;
}
