// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * For XDP programs. Needs the types "xdp_buff:rxq", "xdp_rxq_info:dev",
 * "net_device:nd_net" and "net:ns".
 */

/* The network namespace that the interface is in. */
static __always_inline u32 tcplat_xdp_netns(struct xdp_md *ctx)
{
	/* What the program is handed as an xdp_md is the kernel's xdp_buff. */
	struct xdp_rxq_info *queue = tcplat_get((struct xdp_buff *)ctx, rxq);
	struct net_device *device = tcplat_get(queue, dev);
	struct net *net = tcplat_get(device, nd_net.net);

	return tcplat_get(net, ns.inum);
}

/*
 * Whether a packet passes the filters; `ends` are its source and its destination.
 *
 * Which end is the local one, an interface does not say: on lo both are.
 */
static __always_inline bool tcplat_wanted_packet(struct tcplat_addrs *ends)
{
	struct tcplat_addrs turned = *ends;

	__builtin_memcpy(turned.saddr, ends->daddr, 16);
	__builtin_memcpy(turned.daddr, ends->saddr, 16);
	turned.sport = ends->dport;
	turned.dport = ends->sport;
	if (!tcplat_wanted_addrs(&turned) && !tcplat_wanted_addrs(ends))
		return false;
#ifdef TCPLAT_FILTER_TASK
	struct tcplat_seed to = {}, from = {};

	if (tcplat_lookup_packet(&turned, &to) && to.wanted)
		return true;
	return tcplat_lookup_packet(ends, &from) && from.wanted;
#else
	return true;
#endif
}
