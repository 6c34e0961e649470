//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// TCP, and DNS queries, to be delivered inside a pod: an sk_lookup program, one instance in each pod's network namespace, asked
// once for each connection.
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

// Filled in by the loader for each pod. Unused entries are all zero, which is no address.
const volatile __u64 netns;
const volatile __u32 flags;
const volatile struct addr pod_addrs[MAX_POD_ADDRS];
const volatile struct addr probe4;
const volatile struct addr probe6;

// The compiler may join reads of ctx fields across branches in a way that the verifier refuses; so each field is read
// once, before any branch.
#define READ(field) (*(volatile typeof(field) *)&(field))

static __always_inline int is_own(const struct addr *a)
{
#pragma unroll
	for (int i = 0; i < MAX_POD_ADDRS; i++)
		if (same(a, &pod_addrs[i]))
			return 1;
	return 0;
}

// give hands the connection to the listener of a slot and returns the program's verdict.
static __always_inline int give(struct bpf_sk_lookup *ctx, __u32 slot, enum counter given, enum counter refused)
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
	__u32 six = family == AF_INET6;
	if (!six) {
		local = from_ip4(local4);
		remote = from_ip4(remote4);
	}

	if (ifindex == LOOPBACK_IFINDEX) {
		if (is_loopback(&local) || is_own(&local))
			return SK_PASS;
		int dns = port == DNS_PORT && (flags & POD_DNS);
		if (protocol == IPPROTO_TCP)
			return give(ctx, (dns ? SLOT_DNS_TCP : SLOT_OUTBOUND) + six, OUTBOUND_REDIRECTED, OUTBOUND_REFUSED);
		if (protocol == IPPROTO_UDP && dns)
			return give(ctx, SLOT_DNS + six, DNS_REDIRECTED, DNS_DROPPED);
		return SK_PASS;
	}
	if (protocol != IPPROTO_TCP)
		return SK_PASS;
	// A pod that calls itself has the interface of its address as the arriving one, not lo.
	if (same(&remote, &local) || is_own(&remote) || is_loopback(&remote))
		return SK_PASS;
	if (same(&remote, &probe4) || same(&remote, &probe6))
		return SK_PASS;
	if (port == HBONE_PORT)
		return give(ctx, SLOT_INBOUND_HBONE + six, INBOUND_REDIRECTED, INBOUND_REFUSED);
	if (is_excluded(netns, flags, IN, &remote, port, ifindex)) {
		count(INBOUND_EXCLUDED);
		return SK_PASS;
	}
	return give(ctx, SLOT_INBOUND_PLAINTEXT + six, INBOUND_REDIRECTED, INBOUND_REFUSED);
}
