// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Which process owns a socket, and whether the filters want it.
 *
 * Most events of a socket happen in softirq, where the current task is the one
 * that was interrupted. So a process claims the socket where it calls, and its
 * owner is looked up everywhere else.
 *
 * A probe includes this file, and none of its parts. Each part uses those above it:
 *
 *   process       names of processes, and the record of one that owns a socket
 *   store         entries by the socket's address, looked up in any context, softirq too; the
 *                 negative cache, seeds
 *   claim         the calling process becomes the owner of an entry
 *   flow          from the two ends of a connection to the entry of its socket
 *   listener      which process listens at a port, and so owns what is not accepted yet
 *   lifetime      connect, listen, child of a listener, accept, end
 *   packet_owner  in softirq: the owner of a packet, by its addresses
 *   sock_record   records of sockets, with owner, addresses and state
 */
#include <tcplat/process.bpf.h>
#include <tcplat/store.bpf.h>
#include <tcplat/claim.bpf.h>
#include <tcplat/flow.bpf.h>
#include <tcplat/listener.bpf.h>
#include <tcplat/lifetime.bpf.h>
#include <tcplat/packet_owner.bpf.h>
#include <tcplat/sock_record.bpf.h>
#include <tcplat/old_names.bpf.h>
