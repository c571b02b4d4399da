// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * From an Ethernet frame to its TCP header, for programs that see packets.
 *
 * Whatever the frame claims is checked before it is believed, and the frame is
 * only read. What is no TCP, or not whole, is not found: a later fragment has no
 * ports, and a length that contradicts itself says nothing. Understood are up to
 * four VLAN tags, IPv4 options, and up to eight IPv6 extension headers. The
 * headers have to lie in the frame's first buffer, as all drivers see to.
 *
 * Types, with their natural layout: BPF reads at any alignment.
 */

#define TCPLAT_VLANS 4
#define TCPLAT_EXTENSIONS 8

#define TCPLAT_ETH_IPV4 0x0800
#define TCPLAT_ETH_IPV6 0x86dd

struct tcplat_eth {
	u16 to[3], from[3];
	u16 type;
};

struct tcplat_vlan {
	u16 tag;
	u16 type;
};

struct tcplat_ipv4 {
	u8 version_words; /* version, and the header's length in words of four bytes */
	u8 tos;
	u16 length; /* of header and all that follows */
	u16 id;
	u16 fragment; /* three flags, then the offset */
	u8 ttl;
	u8 protocol;
	u16 sum;
	u32 saddr, daddr;
};

struct tcplat_ipv6 {
	u8 version_class; /* version, and half of the traffic class */
	u8 flow[3];
	u16 length; /* of all that follows; 0 for a jumbogram */
	u8 next;
	u8 hops;
	u32 saddr[4], daddr[4];
};

/* The first eight bytes of an extension header: none is shorter. */
struct tcplat_ipv6_extension {
	u8 next;
	u8 length;
	union {
		u16 fragment; /* of a fragment header: the offset, then three flags */
		struct {
			u8 type, length;
		} option; /* of a hop-by-hop header: the first one */
	};
	u32 jumbo;
};

struct tcplat_tcp {
	u16 sport, dport;
	u32 seq, ack;
	u8 words; /* the header's length in words of four bytes, then four unused bits */
	u8 flags;
	u16 window;
	u16 sum;
	u16 urgent;
};

/* Where tcplat_find_tcp() found it. All in network order but for `length`. */
struct tcplat_packet {
	const struct tcplat_tcp *tcp;
	const void *ip;
	u32 length; /* from the TCP header to the packet's end, as the IP header says */
	u8 version; /* 4 or 6 */
};

static __always_inline bool tcplat_is_vlan(u16 type)
{
	/* 802.1Q, 802.1ad, and what QinQ used before there was 802.1ad. */
	return type == bpf_htons(0x8100) || type == bpf_htons(0x88a8) || type == bpf_htons(0x9100);
}

static __always_inline bool
tcplat_find_in_ipv4(const void *at, const void *end, struct tcplat_packet *to)
{
	const struct tcplat_ipv4 *ip = at;
	u32 header, length;

	if ((const void *)(ip + 1) > end)
		return false;
	if (ip->version_words >> 4 != 4 || ip->protocol != IPPROTO_TCP)
		return false;
	/* Only the first fragment has a TCP header. */
	if (ip->fragment & bpf_htons(0x1fff))
		return false;
	header = (ip->version_words & 15) * 4;
	length = bpf_ntohs(ip->length);
	if (header < sizeof(*ip) || length < header + sizeof(*to->tcp))
		return false;
	to->tcp = at + header;
	to->ip = ip;
	to->length = length - header;
	to->version = 4;
	return (const void *)(to->tcp + 1) <= end;
}

static __always_inline bool
tcplat_find_in_ipv6(const void *data, const void *at, const void *end, struct tcplat_packet *to)
{
	const struct tcplat_ipv6 *ip = at;
	const struct tcplat_ipv6_extension *extension;
	u32 length, size, used;
	u8 next;

	at = ip + 1;
	if (at > end || ip->version_class >> 4 != 6)
		return false;
	length = bpf_ntohs(ip->length);
	next = ip->next;
	for (int i = 0; i < TCPLAT_EXTENSIONS && next != IPPROTO_TCP; i++) {
		/*
		 * The verifier follows each way through the loop, kinds of headers to
		 * the power of eight, unless all of them lead to the same state. A
		 * difference of pointers is an unknown number to it; the compiler must not
		 * see which number it is.
		 */
		asm volatile("" : "+r"(at));
		at = data + ((at - data) & 0x7fff);
		extension = at;
		if ((const void *)(extension + 1) > end)
			return false;
		size = (extension->length + 1) * 8;
		switch (next) {
		case 0: /* hop by hop */
			/* Linux writes a jumbogram's length into the first option (BIG TCP). */
			if (!length && extension->option.type == 0xc2 &&
			    extension->option.length == 4) {
				length = bpf_ntohl(extension->jumbo);
				if (length <= 0xffff)
					return false;
			}
			break;
		case 44: /* fragment: only the first one has a TCP header */
			if (extension->fragment & bpf_htons(0xfff8))
				return false;
			size = 8;
			break;
		case 51: /* authentication */
			size = (extension->length + 2) * 4;
			break;
		case 43:  /* routing */
		case 60:  /* destination options */
		case 135: /* mobility */
		case 139: /* host identity */
		case 140: /* shim6 */
			break;
		default:
			return false;
		}
		next = extension->next;
		at += size;
	}
	used = at - (const void *)(ip + 1);
	if (next != IPPROTO_TCP || length < used + sizeof(*to->tcp))
		return false;
	to->tcp = at;
	to->ip = ip;
	to->length = length - used;
	to->version = 6;
	return (const void *)(to->tcp + 1) <= end;
}

/* The TCP header of an Ethernet frame; its fixed 20 bytes may be read. */
static __always_inline bool
tcplat_find_tcp(const void *data, const void *end, struct tcplat_packet *to)
{
	const struct tcplat_eth *eth = data;
	const struct tcplat_vlan *vlan;
	const void *at = eth + 1;
	u16 type;

	if (at > end)
		return false;
	type = eth->type;
#pragma unroll
	for (int i = 0; i < TCPLAT_VLANS; i++) {
		if (!tcplat_is_vlan(type))
			break;
		vlan = at;
		at = vlan + 1;
		if (at > end)
			return false;
		type = vlan->type;
	}
	if (type == bpf_htons(TCPLAT_ETH_IPV4))
		return tcplat_find_in_ipv4(at, end, to);
	if (type == bpf_htons(TCPLAT_ETH_IPV6))
		return tcplat_find_in_ipv6(data, at, end, to);
	return false;
}

/* Bytes of payload, or -1 where the TCP header is not whole. */
static __always_inline s64 tcplat_payload(const struct tcplat_packet *packet, const void *end)
{
	u32 header = (packet->tcp->words >> 4) * 4;

	if (header < sizeof(*packet->tcp) || header > packet->length)
		return -1;
	if ((const void *)packet->tcp + header > end)
		return -1;
	return packet->length - header;
}

/* Both addresses, as 16 bytes each. */
static __always_inline void
tcplat_copy_addresses(u8 *saddr, u8 *daddr, const struct tcplat_packet *packet)
{
	const struct tcplat_ipv4 *ipv4 = packet->ip;
	const struct tcplat_ipv6 *ipv6 = packet->ip;

	if (packet->version == 4) {
		tcplat_map_v4(saddr, ipv4->saddr);
		tcplat_map_v4(daddr, ipv4->daddr);
		return;
	}
	__builtin_memcpy(saddr, ipv6->saddr, 16);
	__builtin_memcpy(daddr, ipv6->daddr, 16);
}
