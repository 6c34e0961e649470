#!/usr/bin/env bash
# Two nodes and a mesh in network namespaces of this machine, no Kubernetes, and a table of what was seen.
#   hack/demo.sh            build, run, take everything away again
#   hack/demo.sh --keep     leaves the logs and the configuration in place and says where
#   hack/demo.sh --down     removes what a killed run left behind
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "$(id -u)" != 0 ]; then
	echo "demo.sh: root is needed to make network namespaces and load BPF programs (nothing outside them changes): sudo make demo" >&2
	exit 1
fi
command -v go >/dev/null || { echo "demo.sh: Go is not installed; 1.26 or later is needed (https://go.dev/dl)" >&2; exit 1; }

mkdir -p out
if [ "${1:-}" != --down ]; then
	hack/build.sh cni-agent cni-plugin istiod-lite waypoint ztunnel
fi
CGO_ENABLED=0 go build -trimpath -buildvcs=false -o out/demo ./tests/netns/demo
exec out/demo --bin "$PWD/bin" "$@"
