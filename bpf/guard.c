//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// What leaves a pod of the mesh: a program at the host's end of the pod's interface, out of the pod's reach. The other
// programs decide where a connection goes; this one refuses what went round them, as with a raw socket, with marks, rules
// or routes that the pod has changed, or with interfaces and namespaces of its own.
//
// 1. What is not TCP passes, as do segments that neither open a connection nor carry anything.
// 2. Answers to the kubelet's probes pass.
// 3. What the pod's exclusions leave alone passes, and the answers to it.
// 4. All else must be of a connection that the proxy has in the pod's network namespace, or one that is older than the
//    pod's membership or than its exclusions (elders and changed below).
// 5. The rest is dropped, counted, and told to the agent, at most once a second for each pod.
//
// Next: cni/agent/attempts.go
#include "redirect.h"

#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86DD
#define ETH_P_8021Q 0x8100
#define ETH_P_8021AD 0x88A8
#define ETH_HLEN 14
// IPv6 extension headers.
#define HOP_BY_HOP 0
#define ROUTING 43
#define FRAGMENT 44
#define DESTINATION 60
#define EXTENSION_HEADERS 6
// Verdicts, which mean the same to tcx and to clsact.
#define NEXT -1
#define DROP 2
#define SYN 0x02
#define ACK 0x10
#define SECOND 1000000000ull

char LICENSE[] SEC("license") = "Dual BSD/GPL";

const volatile struct addr probe4;
const volatile struct addr probe6;

struct wire {
	__u64 netns;	// the cookie of the pod's network namespace
	__s32 nsid;	// the id by which the host's network namespace knows it
	__u32 flags; // enum pod_flags
	__u64 told;	// when the agent was last told of an attempt
};

// The host's ends of pods' interfaces, by interface index.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, struct wire);
} wires SEC(".maps");

// attempt is what the agent is told of a dropped packet.
struct attempt {
	__u64 netns;
	struct addr dst;
	__u32 port; // 0: not known
	__u32 pad;
};

// It names the type for the loader.
const struct attempt *an_attempt __attribute__((unused));

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 64 << 10);
} attempts SEC(".maps");

// What is read of the kernel's own structures; the loader finds the fields' places.
struct kernfs_node {
	__u64 id;
} __attribute__((preserve_access_index));

struct cgroup {
	struct kernfs_node *kn;
} __attribute__((preserve_access_index));

struct sock_cgroup_data {
	struct cgroup *cgroup;
} __attribute__((preserve_access_index));

struct sock_common {
	volatile unsigned char skc_state;
} __attribute__((preserve_access_index));

struct sock {
	struct sock_cgroup_data sk_cgrp_data;
	__u32 sk_max_ack_backlog;
	__u32 sk_mark;
} __attribute__((preserve_access_index));

struct inet_sock {
	struct sock sk;
} __attribute__((preserve_access_index));

struct request_sock_queue {
	struct {
		int counter;
	} qlen;
} __attribute__((preserve_access_index));

struct inet_connection_sock {
	struct inet_sock icsk_inet;
	struct request_sock_queue icsk_accept_queue;
} __attribute__((preserve_access_index));

struct tcp_sock {
	struct inet_connection_sock inet_conn;
} __attribute__((preserve_access_index));

struct bpf_iter__tcp {
	struct bpf_iter_meta *meta;
	struct sock_common *sk_common;
} __attribute__((preserve_access_index));

struct bpf_iter_meta {
	struct seq_file *seq;
} __attribute__((preserve_access_index));

// segment is what matters of a packet.
struct segment {
	struct addr src, dst;
	__u16 sport, dport;	// network order
	__u8 tcp;		// 0: something else
	__u8 whole;		// the TCP header is there
	__u8 flags;
	__u8 empty;		// no payload
};

struct ip4 {
	__u8 version_ihl, tos;
	__u16 length, id, fragment;
	__u8 ttl, protocol;
	__u16 check;
	__u32 src, dst;
};

struct ip6 {
	__u32 flow;
	__u16 length;
	__u8 next, hops;
	struct addr src, dst;
};

struct tcp {
	__u16 sport, dport;
	__u32 seq, ack;
	__u8 offset, flags;
	__u16 window, check, urgent;
};

// read_tcp reads the TCP header at offset.
static __always_inline void read_tcp(struct __sk_buff *skb, __u32 offset, struct segment *s)
{
	struct tcp tcp;
	s->tcp = 1;
	if (bpf_skb_load_bytes(skb, offset, &tcp, sizeof(tcp)))
		return;
	s->whole = 1;
	s->sport = tcp.sport;
	s->dport = tcp.dport;
	s->flags = tcp.flags;
	s->empty = skb->len <= offset + (tcp.offset >> 4) * 4;
}

static __always_inline void read_ip4(struct __sk_buff *skb, struct segment *s)
{
	struct ip4 ip;
	if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)) || ip.protocol != IPPROTO_TCP)
		return;
	s->src = from_ip4(ip.src);
	s->dst = from_ip4(ip.dst);
	s->tcp = 1;
	if (!(ip.fragment & bpf_htons(0x3fff))) // a fragment's header would say nothing of the others'
		read_tcp(skb, ETH_HLEN + (ip.version_ihl & 15) * 4, s);
}

static __always_inline void read_ip6(struct __sk_buff *skb, struct segment *s)
{
	struct ip6 ip;
	if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)))
		return;
	s->src = ip.src;
	s->dst = ip.dst;
	__u32 offset = ETH_HLEN + sizeof(ip);
	__u8 next = ip.next;
#pragma unroll
	for (int i = 0; i < EXTENSION_HEADERS; i++) {
		__u8 header[2];
		if (next == IPPROTO_TCP) {
			read_tcp(skb, offset, s);
			return;
		}
		if (next == FRAGMENT) {
			s->tcp = bpf_skb_load_bytes(skb, offset, header, 1) || header[0] == IPPROTO_TCP || header[0] == DESTINATION;
			return;
		}
		if (next != HOP_BY_HOP && next != ROUTING && next != DESTINATION)
			return;
		if (bpf_skb_load_bytes(skb, offset, header, sizeof(header)))
			return;
		next = header[0];
		offset += (header[1] + 1) * 8;
	}
	s->tcp = 1; // nobody needs that many headers
}

// of_proxy tells whether a connection is the proxy's. With a listener in its place there is none yet: the kernel answers by
// SYN cookies, which it does when its queue is full.
static __always_inline int of_proxy(struct bpf_sock *sk, int answers)
{
	struct tcp_sock *tcp;
	__u32 state = sk->state;
	if (state == BPF_TCP_NEW_SYN_RECV) {
		struct bpf_sock *listener = bpf_get_listener_sock(sk);
		if (!answers || !listener)
			return 0;
		tcp = bpf_skc_to_tcp_sock(listener);
	} else {
		tcp = bpf_skc_to_tcp_sock(sk);
	}
	if (!tcp)
		return 0;
	struct inet_connection_sock *conn = &tcp->inet_conn;
	if (state == BPF_TCP_LISTEN &&
	    (!answers || (__u32)conn->icsk_accept_queue.qlen.counter < conn->icsk_inet.sk.sk_max_ack_backlog / 2))
		return 0;
	struct cgroup *group = conn->icsk_inet.sk.sk_cgrp_data.cgroup;
	if (!group)
		return 0;
	__u64 cgroup = group->kn->id;
	return bpf_map_lookup_elem(&proxies, &cgroup) != 0;
}

// find looks in the pod's network namespace for the connection that a segment is of. A socket that is found must be
// released.
static __always_inline struct bpf_sock *find(struct __sk_buff *skb, const struct wire *wire, const struct segment *s)
{
	struct bpf_sock_tuple tuple = {};
	if (is_ip4(&s->dst)) {
		tuple.ipv4.saddr = s->dst.word[3];
		tuple.ipv4.daddr = s->src.word[3];
		tuple.ipv4.sport = s->dport;
		tuple.ipv4.dport = s->sport;
		return bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), wire->nsid, 0);
	}
	__builtin_memcpy(tuple.ipv6.saddr, s->dst.word, sizeof(s->dst.word));
	__builtin_memcpy(tuple.ipv6.daddr, s->src.word, sizeof(s->src.word));
	tuple.ipv6.sport = s->dport;
	tuple.ipv6.dport = s->sport;
	return bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv6), wire->nsid, 0);
}

static __always_inline int may_leave(struct __sk_buff *skb, const struct wire *wire, const struct segment *s)
{
	int opens = (s->flags & (SYN | ACK)) == SYN, answers = (s->flags & (SYN | ACK)) == (SYN | ACK);
	if (!s->whole)
		return 0;
	if (s->empty && !(s->flags & SYN))
		return 1;
	if (!opens && (same(&s->dst, &probe4) || same(&s->dst, &probe6)))
		return 1;
	if (is_excluded(wire->netns, wire->flags, OUT, &s->dst, bpf_ntohs(s->dport), 0) ||
	    (!opens && is_excluded(wire->netns, wire->flags, IN, &s->dst, bpf_ntohs(s->sport), 0)))
		return 1;
	struct bpf_sock *sk = find(skb, wire, s);
	if (!sk)
		return 0;
	int may = of_proxy(sk, answers && s->empty) || bpf_sk_storage_get(&exempt, sk, 0, 0);
	bpf_sk_release(sk);
	return may;
}

static __always_inline void tell(struct wire *wire, const struct segment *s)
{
	count(BYPASS_DROPPED);
	__u64 now = bpf_ktime_get_ns();
	if (now - wire->told < SECOND && wire->told)
		return;
	wire->told = now;
	struct attempt a = { .netns = wire->netns, .dst = s->dst, .port = bpf_ntohs(s->dport) };
	bpf_ringbuf_output(&attempts, &a, sizeof(a), 0);
}

SEC("tcx/ingress")
int guard(struct __sk_buff *skb)
{
	struct segment s = {};
	__u32 ifindex = skb->ifindex;
	switch (bpf_ntohs(skb->protocol)) {
	case ETH_P_IP:
		read_ip4(skb, &s);
		break;
	case ETH_P_IPV6:
		read_ip6(skb, &s);
		break;
	case ETH_P_8021Q:
	case ETH_P_8021AD:
		s.tcp = 1; // what a bridge would carry to another pod, unread
	}
	if (!s.tcp)
		return NEXT;
	struct wire *wire = bpf_map_lookup_elem(&wires, &ifindex);
	if (!wire || may_leave(skb, wire, &s))
		return NEXT;
	tell(wire, &s);
	return DROP;
}

// exempt_open exempts a connection that exists in the network namespace of who reads the iterator, and writes a byte for one
// that is just being made: it gets its socket later, or is not known to come to be.
static __always_inline void exempt_open(struct bpf_iter__tcp *ctx, struct sock_common *sk, int opening)
{
	__u8 state = sk->skc_state;
	if (state == BPF_TCP_NEW_SYN_RECV || (state == BPF_TCP_SYN_SENT && !opening))
		bpf_seq_write(ctx->meta->seq, &state, sizeof(state));
	else if (state != BPF_TCP_LISTEN)
		bpf_sk_storage_get(&exempt, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
}

// elders is for what is older than the pod's membership.
SEC("iter/tcp")
int elders(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;
	if (sk)
		exempt_open(ctx, sk, 1);
	return 0;
}

// changed is for what is older than a change of the pod's exclusions. What the guard has kept from opening gains nothing by it,
// nor does what is redirected: that has a mark, by connect.c, or as the proxy's connection that it was accepted from.
SEC("iter/tcp")
int changed(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;
	if (!sk)
		return 0;
	struct tcp_sock *tcp = bpf_skc_to_tcp_sock(sk);
	if (!tcp || tcp->inet_conn.icsk_inet.sk.sk_mark != REDIRECT_MARK)
		exempt_open(ctx, sk, 0);
	return 0;
}
