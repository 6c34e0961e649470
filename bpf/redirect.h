// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// What the programs, connect.c, lookup.c and guard.c, and their Go loader agree on.
#ifndef FAIRLEAD_REDIRECT_H
#define FAIRLEAD_REDIRECT_H

#include <linux/bpf.h>
#include <linux/in.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define AF_INET 2
#define AF_INET6 10
#define LOOPBACK_IFINDEX 1

// The names of these marks are in internal/netns.
#define PROXY_MARK 0x539
#define PROXY_MARK_MASK 0xfff
#define REDIRECT_MARK 0x53a

#define MAX_POD_ADDRS 8
#define UID_LEN 64

// Every address is held in its IPv6 form, in network byte order; IPv4 as ::ffff:a.b.c.d. So there is one code path.
struct addr {
	__u32 word[4];
};

// Slots of a pod's listeners; the IPv6 listener of a purpose follows its IPv4 one.
enum slot {
	SLOT_OUTBOUND = 0,
	SLOT_INBOUND_PLAINTEXT = 2,
	SLOT_INBOUND_HBONE = 4,
	SLOT_DNS = 6,
	SLOTS = 8,
};

enum counter {
	OUTBOUND_REDIRECTED,	// connects given REDIRECT_MARK
	OUTBOUND_REFUSED,	// connects refused because the proxy does not listen
	FORGED_MARK,		// connects with the proxy's mark by a process that is not the proxy
	INBOUND_REDIRECTED,	// connections given to the proxy on arrival
	INBOUND_REFUSED,	// connections refused on arrival because the proxy does not listen
	PROBES,			// kubelet connects that were given the probe source address
	BYPASS_DROPPED,		// packets of TCP that went round the proxy and were dropped
	UNCAPTURED_DROPPED,	// packets of pods that could not be captured, dropped
	COUNTERS,
};

struct listener_key {
	__u64 netns;
	enum slot slot;
	__u32 pad;
};

// The proxy's listeners in all pods. One map for the node: a map for each pod inside of another would make each pod wait
// for every CPU of the kernel to be done with it (synchronize_rcu, about 10 ms).
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 4096 * SLOTS);
	__type(key, struct listener_key);
	__type(value, __u64);
} listeners SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTERS);
	__type(key, enum counter);
	__type(value, __u64);
} counters SEC(".maps");

// Cgroups whose processes are, or were, the node proxy. One that is gone may still have sockets.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, __u32);
} proxies SEC(".maps");

// Sockets of applications that may leave the pod by themselves; an entry goes with its socket.
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u32);
} exempt SEC(".maps");

static __always_inline void count(enum counter which)
{
	__u64 *n = bpf_map_lookup_elem(&counters, &which);
	if (n)
		(*n)++;
}

static __always_inline struct addr from_ip4(__u32 ip4)
{
	struct addr a = { { 0, 0, bpf_htonl(0xffff), ip4 } };
	return a;
}

static __always_inline int is_ip4(const struct addr *a)
{
	return !a->word[0] && !a->word[1] && a->word[2] == bpf_htonl(0xffff);
}

// same takes the second address as volatile because it may be in .rodata, which the loader fills in.
static __always_inline int same(const struct addr *a, const volatile struct addr *b)
{
	return a->word[0] == b->word[0] && a->word[1] == b->word[1] &&
	       a->word[2] == b->word[2] && a->word[3] == b->word[3];
}

// is_loopback is true of 127.0.0.0/8 and ::1, and of the unspecified addresses, which connect(2) takes as loopback.
static __always_inline int is_loopback(const struct addr *a)
{
	if (is_ip4(a))
		return !a->word[3] || (a->word[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return !a->word[0] && !a->word[1] && !a->word[2] && (!a->word[3] || a->word[3] == bpf_htonl(1));
}

#endif
