#!/usr/bin/env bash
# Builds static binaries into bin/: all commands, or those named. The first build compiles the dependencies too.
#   hack/build.sh                  every command below cmd/
#   hack/build.sh ztunnel waypoint these two
# VERSION is what they say of themselves; by default what git says of the checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v go >/dev/null || { echo "build.sh: Go is not installed; 1.26 or later is needed (https://go.dev/dl)" >&2; exit 1; }

version=${VERSION:-$(git describe --tags --always --dirty 2>/dev/null || echo dev)}
names=("$@")
if [ ${#names[@]} = 0 ]; then
	for dir in cmd/*/; do names+=("$(basename "$dir")"); done
fi
mkdir -p bin
for i in "${!names[@]}"; do
	name=${names[$i]} start=$SECONDS
	printf 'build %d/%d %-12s' $((i + 1)) ${#names[@]} "$name"
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$version" -o "bin/$name" "./cmd/$name"
	printf ' %3d s\n' $((SECONDS - start))
done
