// Package bpf (plumbing) holds the programs that redirect a pod's TCP to the node proxy, and loads them.
//
// connect.c gives the sockets of a pod's applications a mark when they connect, and gives the kubelet's probes their
// source address; there is one pair of programs for a node, attached to a cgroup. lookup.c hands arriving connections to
// the proxy's listeners; there is one instance for each pod, attached to its network namespace, and some are kept ready. The routes between
// the two are made by cni/redirect. guard.c drops what leaves a pod past both; it is attached to the host's ends of pods'
// interfaces. refuse.c is for pods that could not be captured, and attached to their cgroups.
//
// Everything is pinned under one directory of a BPF file system and outlives the process that made it:
//
//	maps/NAME               the node's maps
//	links/connect4, 6       the attachments to the cgroup
//	pods/COOKIE/lookup      the attachment to the pod's network namespace
//	pods/COOKIE/filter-N    a directory: the guard is a filter of the host's interface with index N
//	pods/COOKIE/guard-N     the guard's attachment to that interface, for pods that ran already and where others have programs
//	refused/UID-in, UID-out the attachments to the cgroup of a pod that could not be captured
//	pods/COOKIE/elders      a directory: connections older than the pod's membership have been exempted
//	pods/COOKIE/changed     a directory: connections older than a change of the pod's exclusions have not been exempted yet
//
// The map listeners is filled in by the proxy.
package bpf

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang -tags linux -target bpfel -type pod -type host -type instance -type counter -type slot -type listener_key -type capture -type direction -type exclusion_kind -type exclusion_key -type network_key -type pod_flags connect connect.c -- -O2 -g -Wall -Werror -I/usr/include/x86_64-linux-gnu -I/usr/include/aarch64-linux-gnu
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang -tags linux -target bpfel lookup lookup.c -- -O2 -g -Wall -Werror -I/usr/include/x86_64-linux-gnu -I/usr/include/aarch64-linux-gnu
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang -tags linux -target bpfel -type wire -type attempt guard guard.c -- -O2 -g -Wall -Werror -I/usr/include/x86_64-linux-gnu -I/usr/include/aarch64-linux-gnu
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang -tags linux -target bpfel refuse refuse.c -- -O2 -g -Wall -Werror -I/usr/include/x86_64-linux-gnu -I/usr/include/aarch64-linux-gnu
