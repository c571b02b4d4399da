// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * What probes of packets have in common: the fields of PacketEvent, and the ports they look at.
 *
 * PACKET_PORTS: a case label for each port; not defined for all of them.
 */

#ifdef PACKET_PORTS
static __always_inline bool tcplat_wanted_port(u16 port)
{
	/* The compiler makes a search tree of it: five comparisons for 32 ports. */
	switch (port) {
		PACKET_PORTS
		return true;
	}
	return false;
}
#else
#define tcplat_wanted_port(port) true
#endif

/* Without the flag the number means nothing. */
static __always_inline void
tcplat_fill_packet(struct tcplat_event *e, u8 flags, u16 window, u32 ack)
{
	e->window = window;
	if (flags & TCPLAT_TCP_ACK) {
		e->ack = ack;
		e->has |= TCPLAT_HAS_ACK;
	}
}
