//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// No TCP for a pod that is to be in the mesh and could not be captured: a pair of programs at the pod's cgroup, which is
// known even when its network namespace is not. Loopback is left alone.
#include "redirect.h"

#define ETH_P_IP 0x0800

char LICENSE[] SEC("license") = "Dual BSD/GPL";

static __always_inline int pass(struct __sk_buff *skb)
{
	__u8 protocol = IPPROTO_TCP; // what cannot be read is refused
	if (skb->ifindex == LOOPBACK_IFINDEX)
		return 1;
	bpf_skb_load_bytes(skb, skb->protocol == bpf_htons(ETH_P_IP) ? 9 : 6, &protocol, 1);
	if (protocol == IPPROTO_UDP || protocol == IPPROTO_ICMP || protocol == 58 /* ICMPv6 */)
		return 1;
	count(UNCAPTURED_DROPPED);
	return 0;
}

SEC("cgroup_skb/egress")
int refuse_out(struct __sk_buff *skb)
{
	return pass(skb);
}

SEC("cgroup_skb/ingress")
int refuse_in(struct __sk_buff *skb)
{
	return pass(skb);
}
