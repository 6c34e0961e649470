#!/usr/bin/env bash
# Fails where formatting, vet or generated code differ from what is checked in.
set -euo pipefail
cd "$(dirname "$0")/.."
echo "gofmt"
bad=$(git ls-files -z '*.go' | xargs -0 gofmt -l)
[ -z "$bad" ] || { echo "not formatted, run gofmt -w on:"; echo "$bad"; exit 1; }
echo "go vet"
go vet ./...
echo "generated code"
before=$(git status --porcelain)
hack/update.sh >/dev/null
after=$(git status --porcelain)
[ "$before" = "$after" ] || { echo "generated code differs: run \`make update\` and commit"; diff <(echo "$before") <(echo "$after"); exit 1; }
echo "verified"
