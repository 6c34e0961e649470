//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// TCP, and DNS queries, to be delivered inside a pod: an sk_lookup program, one instance in each pod's network namespace, asked
// once for each connection. The instances differ in their number only.
//
// 1. From lo to an address that is not the pod's: an outbound connection that connect.c marked; the proxy's outbound
//    listener takes it, whose accepted socket then has the original destination as its local address. Likewise DNS
//    queries, where they are captured: by TCP, and by UDP, which the pod's routing brings here.
// 2. From lo to the pod's own address, and the pod calling itself: left alone, as is the proxy's connection to the
//    application, which is bound to lo.
// 3. From outside: the kubelet's probes are left alone; port 15008 goes to the HBONE listener, all else to the
//    plaintext one, but for what the pod's exclusions name.
// 4. If the proxy does not listen, the connection is refused.
//
// Next: ztunnel/outbound.go, ztunnel/inbound.go, ztunnel/dns.go
#include "redirect.h"

#define HBONE_PORT 15008
#define DNS_PORT 53

char LICENSE[] SEC("license") = "Dual BSD/GPL";

// own_number is this instance's number, which the loader writes into the instruction. No helper tells here which network
// namespace the program runs in; and a number, other than a cookie, can be given before the pod exists.
static __always_inline __u32 own_number(void)
{
	__u64 number;
	asm volatile("%0 = 0x6661697266616972 ll" : "=r"(number));
	return number;
}

// The compiler may join reads of ctx fields across branches in a way that the verifier refuses; so each field is read
// once, before any branch.
#define READ(field) (*(volatile typeof(field) *)&(field))

// give hands the connection to the listener of a slot and returns the program's verdict.
static __always_inline int give(struct bpf_sk_lookup *ctx, __u64 netns, __u32 slot, enum counter given, enum counter refused)
{
	struct listener_key key = { .netns = netns, .slot = slot };
	struct bpf_sock *listener = bpf_map_lookup_elem(&listeners, &key);
	long failed = 1;
	if (listener) {
		failed = bpf_sk_assign(ctx, listener, BPF_SK_LOOKUP_F_NO_REUSEPORT);
		bpf_sk_release(listener);
	}
	count(failed ? refused : given);
	return failed ? SK_DROP : SK_PASS;
}

static __always_inline int is_probe(const struct addr *remote)
{
	__u32 zero = 0;
	struct host *host = bpf_map_lookup_elem(&host_config, &zero);
	return host && (same(remote, &host->probe4) || same(remote, &host->probe6));
}

// Each pod has an instance, which is verified for itself, and while others start if none is ready (lookup.go): what is done
// once, after the branches, is cheaper than what is done in each.
SEC("sk_lookup")
int lookup(struct bpf_sk_lookup *ctx)
{
	__u32 family = READ(ctx->family), protocol = READ(ctx->protocol);
	__u32 ifindex = READ(ctx->ingress_ifindex), port = READ(ctx->local_port);
	__u32 local4 = READ(ctx->local_ip4), remote4 = READ(ctx->remote_ip4);
	struct addr local = { { READ(ctx->local_ip6[0]), READ(ctx->local_ip6[1]),
				READ(ctx->local_ip6[2]), READ(ctx->local_ip6[3]) } };
	struct addr remote = { { READ(ctx->remote_ip6[0]), READ(ctx->remote_ip6[1]),
				 READ(ctx->remote_ip6[2]), READ(ctx->remote_ip6[3]) } };
	__u32 six = family == AF_INET6, slot;
	enum counter given = INBOUND_REDIRECTED, refused = INBOUND_REFUSED;
	if (!six) {
		local = from_ip4(local4);
		remote = from_ip4(remote4);
	}

	__u32 number = own_number();
	struct instance *instance = bpf_map_lookup_elem(&instances, &number);
	if (!instance || !instance->netns)
		return SK_DROP; // this instance has just been replaced
	__u64 netns = instance->netns;
	struct pod *pod = bpf_map_lookup_elem(&pods, &netns);
	if (!pod)
		return SK_PASS; // not captured yet, or any more
	// A pod that calls itself has the interface of its address as the arriving one, not lo.
	int inner = ifindex == LOOPBACK_IFINDEX;
	struct addr other = inner ? local : remote;
	if (is_loopback(&other) || is_own(pod, &other))
		return SK_PASS;
	if (inner) {
		int dns = port == DNS_PORT && (pod->flags & POD_DNS);
		if (protocol == IPPROTO_TCP) {
			slot = dns ? SLOT_DNS_TCP : SLOT_OUTBOUND;
			given = OUTBOUND_REDIRECTED;
			refused = OUTBOUND_REFUSED;
		} else if (dns) {
			slot = SLOT_DNS;
			given = DNS_REDIRECTED;
			refused = DNS_DROPPED;
		} else {
			return SK_PASS;
		}
	} else if (protocol != IPPROTO_TCP || same(&remote, &local) || is_probe(&remote)) {
		return SK_PASS;
	} else if (port == HBONE_PORT) {
		slot = SLOT_INBOUND_HBONE;
	} else if (is_excluded(netns, pod->flags, IN, &remote, port, ifindex)) {
		count(INBOUND_EXCLUDED);
		return SK_PASS;
	} else {
		slot = SLOT_INBOUND_PLAINTEXT;
	}
	return give(ctx, netns, slot + six, given, refused);
}
