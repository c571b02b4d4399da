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
