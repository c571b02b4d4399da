// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Which process owns a socket, and whether the filters want it.
 *
 * Most events of a socket happen in softirq, where the current task is the one
 * that was interrupted. So a process claims the socket where it calls, and its
 * owner is looked up everywhere else.
 *
 * Each part uses those above it. A probe includes this file, and none of them.
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
