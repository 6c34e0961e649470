#!/bin/sh
# Makes Fairlead's images from the static programs in bin/ (make build), as OCI
# tars for hack/cluster.sh load; neither Docker nor a registry is involved.
#
#   hack/images.sh [-o DIR] [IMAGE...]     images: ztunnel waypoint istiod-lite cni (all)
#
# Prints the tars' paths. TAG (dev) is the images' tag.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
bin=$root/bin
out=$root/out/images
tag=${TAG:-dev}
case ${1:-} in
-h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
-o) out=$2; shift 2 ;;
esac
[ $# -gt 0 ] || set -- ztunnel waypoint istiod-lite cni
mkdir -p "$out"

# image NAME PROGRAM...: the first program is what the image runs.
image() {
    name=$1 entrypoint=/usr/local/bin/$2
    shift
    for program; do
        [ -x "$bin/$program" ] || { echo "images.sh: $bin/$program is missing; make build makes it" >&2; exit 1; }
        set -- "$@" -file "$bin/$program=/usr/local/bin/$program"
        shift
    done
    "$here/cluster.sh" image -o "$out/$name.tar" -name "fairlead/$name:$tag" "$@" -dir /tmp -dir /etc -dir /var/run -entrypoint "$entrypoint"
    echo "$out/$name.tar"
}

for name; do
    case $name in
    cni) image cni cni-agent cni-plugin ;;
    ztunnel | waypoint | istiod-lite) image "$name" "$name" ;;
    *) echo "images.sh: there is no image $name" >&2; exit 1 ;;
    esac
done
