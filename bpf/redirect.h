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
	SLOT_DNS = 6,	// UDP
	SLOT_DNS_TCP = 8,
	SLOTS = 10,
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
	DNS_REDIRECTED,		// packets with DNS queries given to the proxy
	DNS_DROPPED,		// packets with DNS queries dropped because the proxy does not listen
	OUTBOUND_EXCLUDED,	// connects that the pod's exclusions leave alone
	INBOUND_EXCLUDED,	// connections left alone on arrival by the pod's exclusions
	COUNTERS,
};

// What differs from pod to pod.
enum pod_flags {
	POD_DNS = 1,			// DNS queries go to the proxy
	POD_INBOUND_EXCLUDED = 2,	// what arrives in clear is left alone
	POD_EXCLUSIONS = 4,		// some of the exclusions' entries are the pod's
	POD_IN_LISTED = 8,		// what arrives in clear is left alone, unless an entry captures it
	POD_OUT_LISTED = 16,		// connects are left alone, unless an entry captures them
};

enum direction { IN, OUT };

// Whether to capture, as an entry has it. None beats another but that EXCLUDED beats CAPTURED.
enum capture { NO_SAY, CAPTURED, EXCLUDED };

// Ports (the pod's own for what arrives, the destination's for what is opened) and interfaces that exclusions name.
enum exclusion_kind { PORT_IN = IN, PORT_OUT = OUT, DEVICE };

struct exclusion_key {
	__u64 netns;
	enum exclusion_kind kind;
	__u32 number; // a port, or an interface's index
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct exclusion_key);
	__type(value, enum capture);
} exclusions SEC(".maps");

// Networks that exclusions name, of the other end. The longest prefix counts.
struct network_key {
	__u32 bits; // that count, of the fields below
	__u32 netns[2];
	enum direction direction;
	struct addr addr;
};

#define NETWORK_KEY_BITS (8 * (sizeof(struct network_key) - sizeof(__u32)))

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct network_key);
	__type(value, enum capture);
} excluded_networks SEC(".maps");

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

struct pod {
	__u32 addr_count;
	enum pod_flags flags;
	__u64 exclusions; // stands for all of the pod's exclusions, for the agent
	struct addr addrs[MAX_POD_ADDRS];
	__u8 uid[UID_LEN]; // for the agent, which reads it back after a restart
};

// instance is one of lookup.c.
struct instance {
	__u64 netns;	// the cookie of the network namespace that it is for, or 0
	__u64 version;	// of the program, for the agent
};

// Instances by their number.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 8192);
	__type(key, __u32);
	__type(value, struct instance);
} instances SEC(".maps");

struct host {
	__u64 netns;
	struct addr probe4;
	struct addr probe6;
};

// Pods of the mesh by the cookie of their network namespace.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, struct pod);
} pods SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct host);
} host_config SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 32); // more than there are: a pinned map keeps its shape when counters are added
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

// differing has the bits that are not the same in both. The second address is volatile because it may be in .rodata, which
// the loader fills in.
static __always_inline __u32 differing(const struct addr *a, const volatile struct addr *b)
{
	return (a->word[0] ^ b->word[0]) | (a->word[1] ^ b->word[1]) | (a->word[2] ^ b->word[2]) | (a->word[3] ^ b->word[3]);
}

static __always_inline int same(const struct addr *a, const volatile struct addr *b)
{
	return !differing(a, b);
}

// is_own tells whether an address is the pod's. Unused entries are all zero, which is no address. It has no branches, since
// the verifier would follow each of them.
static __always_inline int is_own(const struct pod *pod, const struct addr *a)
{
	__u64 others = 1;
#pragma unroll
	for (int i = 0; i < MAX_POD_ADDRS; i++) {
		__u64 differs = differing(a, &pod->addrs[i]);
		others &= (differs | -differs) >> 63;
	}
	return !others;
}

// is_loopback is true of 127.0.0.0/8 and ::1, and of the unspecified addresses, which connect(2) takes as loopback.
static __always_inline int is_loopback(const struct addr *a)
{
	if (is_ip4(a))
		return !a->word[3] || (a->word[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return !a->word[0] && !a->word[1] && !a->word[2] && (!a->word[3] || a->word[3] == bpf_htonl(1));
}

static __always_inline enum capture of_number(__u64 netns, enum exclusion_kind kind, __u32 number)
{
	struct exclusion_key key = { .netns = netns, .kind = kind, .number = number };
	enum capture *entry = bpf_map_lookup_elem(&exclusions, &key);
	return entry ? *entry : NO_SAY;
}

// is_excluded tells whether a pod's exclusions leave a connection alone: with whom, on which port of the one called, and on
// which interface (0: not known).
static __always_inline int is_excluded(__u64 netns, __u32 flags, enum direction direction, const struct addr *peer,
				       __u32 port, __u32 device)
{
	if (direction == IN && (flags & POD_INBOUND_EXCLUDED))
		return 1;
	if (!(flags & (POD_EXCLUSIONS | (direction == IN ? POD_IN_LISTED : POD_OUT_LISTED))))
		return 0;
	if (device && of_number(netns, DEVICE, device) == EXCLUDED)
		return 1;
	enum capture by_port = of_number(netns, direction == IN ? PORT_IN : PORT_OUT, port);
	struct network_key key = {
		.bits = NETWORK_KEY_BITS,
		.netns = { (__u32)netns, (__u32)(netns >> 32) },
		.direction = direction,
		.addr = *peer,
	};
	enum capture *network = bpf_map_lookup_elem(&excluded_networks, &key);
	enum capture by_network = network ? *network : NO_SAY;
	if (by_port == EXCLUDED || by_network == EXCLUDED)
		return 1;
	if (by_port == CAPTURED || by_network == CAPTURED)
		return 0;
	return (flags & (direction == IN ? POD_IN_LISTED : POD_OUT_LISTED)) != 0;
}

#endif
