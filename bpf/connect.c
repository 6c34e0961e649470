//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// A pod's outbound TCP, and the kubelet's probes: cgroup connect programs, one pair for a node.
//
// 1. Which pod: the network namespace's cookie is looked up; a namespace that is no pod of the mesh is left alone,
//    except that in the host's the kubelet's connects to pods of the mesh get the probe source address.
// 2. Loopback and the pod's own addresses are left alone.
// 3. The proxy's own sockets pass: they have the proxy's mark and the caller is in the proxy's cgroup. The mark alone
//    is not enough, because an application with CAP_NET_ADMIN can set it.
// 4. What the pod's exclusions name is left alone.
// 5. Everything else gets REDIRECT_MARK, which the pod's routing delivers on device lo.
// 6. If the proxy does not listen, the connect is refused at once.
//
// Next: bpf/lookup.c
#include "redirect.h"

#define SOL_SOCKET 1
#define SO_BINDTODEVICE 25
#define SO_MARK 36
#define SOCK_STREAM 1
#define ECONNREFUSED 111
#define CGROUP_LEVELS 6

char LICENSE[] SEC("license") = "Dual BSD/GPL";

// Cookie by address of the pods of the mesh.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096 * MAX_POD_ADDRS);
	__type(key, struct addr);
	__type(value, __u64);
} pod_addrs SEC(".maps");

// Cgroups under which the node's pods run; a process in there is not the kubelet, whatever it calls itself.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 64);
	__type(key, __u64);
	__type(value, __u32);
} workloads SEC(".maps");

static __always_inline int is_proxy(struct bpf_sock_addr *ctx)
{
	__u32 mark = 0;
	if (bpf_getsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark)))
		return 0;
	if ((mark & PROXY_MARK_MASK) != PROXY_MARK)
		return 0;
	__u64 cgroup = bpf_get_current_cgroup_id();
	if (bpf_map_lookup_elem(&proxies, &cgroup))
		return 1;
	count(FORGED_MARK);
	return 0;
}

static __always_inline int is_kubelet(void)
{
	static const char name[] = "kubelet";
	char comm[16] = {};
	if (bpf_get_current_comm(comm, sizeof(comm)))
		return 0;
#pragma unroll
	for (int i = 0; i < sizeof(name); i++)
		if (comm[i] != name[i])
			return 0;
#pragma unroll
	for (int level = 0; level < CGROUP_LEVELS; level++) {
		__u64 cgroup = bpf_get_current_ancestor_cgroup_id(level);
		if (cgroup && bpf_map_lookup_elem(&workloads, &cgroup))
			return 0;
	}
	return 1;
}

// probe gives a kubelet's connect to a pod of the mesh its source address. When that fails, as it does when the socket
// is bound already, the connect goes on and arrives as any other plaintext.
static __always_inline void probe(struct bpf_sock_addr *ctx, __u64 netns, const struct addr *dst)
{
	__u32 zero = 0;
	struct host *host = bpf_map_lookup_elem(&host_config, &zero);
	if (!host || host->netns != netns || !bpf_map_lookup_elem(&pod_addrs, dst) || !is_kubelet())
		return;
	long failed;
	if (is_ip4(dst)) {
		struct sockaddr_in source = {
			.sin_family = AF_INET,
			.sin_addr.s_addr = host->probe4.word[3],
		};
		failed = bpf_bind(ctx, (struct sockaddr *)&source, sizeof(source));
	} else {
		struct {
			__u16 family;
			__u16 port;
			__u32 flow;
			struct addr addr;
			__u32 scope;
		} source = {
			.family = AF_INET6,
			.addr = host->probe6,
		};
		failed = bpf_bind(ctx, (struct sockaddr *)&source, sizeof(source));
	}
	if (!failed)
		count(PROBES);
}

static __always_inline int has_listener(__u64 netns, __u32 slot)
{
	struct listener_key key = { .netns = netns, .slot = slot };
	struct bpf_sock *listener = bpf_map_lookup_elem(&listeners, &key);
	if (!listener)
		return 0;
	bpf_sk_release(listener);
	return 1;
}

static __always_inline int connect(struct bpf_sock_addr *ctx, const struct addr *dst)
{
	if (ctx->type != SOCK_STREAM || (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_MPTCP))
		return 1;
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct pod *pod = bpf_map_lookup_elem(&pods, &netns);
	if (!pod) {
		probe(ctx, netns, dst);
		return 1;
	}
	if (is_loopback(dst) || is_own(pod, dst) || is_proxy(ctx))
		return 1;
	__u32 device = ctx->sk ? ctx->sk->bound_dev_if : 0;
	if (is_excluded(netns, pod->flags, OUT, dst, bpf_ntohs(ctx->user_port), device)) {
		count(OUTBOUND_EXCLUDED);
		return 1;
	}
	__u32 mark = REDIRECT_MARK;
	if (bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark)))
		return 0;
	// A socket that the application has bound to a device would not find the route to lo.
	char any[4] = {};
	if (bpf_setsockopt(ctx, SOL_SOCKET, SO_BINDTODEVICE, any, sizeof(any)))
		return 0;
	if (!has_listener(netns, SLOT_OUTBOUND + !is_ip4(dst))) {
		count(OUTBOUND_REFUSED);
		bpf_set_retval(-ECONNREFUSED);
		return 0;
	}
	count(OUTBOUND_REDIRECTED);
	return 1;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	struct addr dst = from_ip4(ctx->user_ip4);
	return connect(ctx, &dst);
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	struct addr dst = { { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3] } };
	return connect(ctx, &dst);
}
