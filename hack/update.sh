#!/usr/bin/env bash
# Regenerates what is generated and checked in: protobuf code and BPF objects. Needs protoc and clang (hack/prereq.sh).
set -euo pipefail
cd "$(dirname "$0")/.."
gobin=$(mktemp -d)
trap 'rm -rf "$gobin"' EXIT
echo "protobuf: api/"
GOBIN=$gobin go install google.golang.org/protobuf/cmd/protoc-gen-go
PATH=$gobin:$PATH protoc -I . --go_out=. --go_opt=module=github.com/fairlead-mesh/fairlead \
	api/workload/workload.proto api/security/authorization.proto api/zds/zds.proto
echo "BPF: bpf/"
go generate ./bpf/...
