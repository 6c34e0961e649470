#!/bin/sh
# A real Kubernetes on this machine: hack/cluster.sh --help.
# Builds the cluster command of hack/cluster when its sources changed, and calls it.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cache=${FAIRLEAD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/fairlead}
# One command per checkout: two of them may differ.
command=$cache/cluster/command-$(printf %s "$here" | cksum | cut -d' ' -f1)
PATH=$PATH:/usr/sbin:/sbin
export FAIRLEAD_CLUSTER_SOURCE="$here/cluster"

if [ ! -x "$command" ] || [ -n "$(find "$here/cluster" -path "$here/cluster/build" -prune -o -newer "$command" -print -quit)" ]; then
    command -v go >/dev/null || { echo "cluster.sh: go is not installed; hack/prereq.sh says what is needed" >&2; exit 1; }
    mkdir -p "$cache/cluster"
    (cd "$here/cluster" && CGO_ENABLED=0 GOWORK=off GOFLAGS= go build -trimpath -buildvcs=false -ldflags '-s -w' -o "$command.$$" .)
    mv "$command.$$" "$command"
fi

if [ "${1:-}" = install ]; then
    shift
    case ${1:-} in
    --name) export CLUSTER="$2"; shift 2 ;;
    --name=*) export CLUSTER="${1#--name=}"; shift ;;
    esac
    environment=$("$command" env)
    eval "$environment"
    exec "$here/install.sh" "$@"
fi
exec "$command" "$@"
