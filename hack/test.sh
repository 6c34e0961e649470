#!/usr/bin/env bash
# Runs the tests, all or the parts that are named, and says at the end how each went.
#   hack/test.sh               unit, netns, e2e and ways
#   hack/test.sh unit          no privileges needed (as root, tests of single packages on the real kernel run too)
#   hack/test.sh netns         the real programs on two nodes made of network namespaces; root; once for each way to
#                              redirect, or for the one that FAIRLEAD_REDIRECTION names (ebpf, nftables)
#   hack/test.sh e2e           a real two-node Kubernetes, brought up and taken down again; root ($CLUSTER names it: e2e)
#   hack/test.sh ways          a few of them on other Kubernetes: kube-proxy by iptables, CNI bridge, redirection by nftables
# As root nothing may be skipped (FAIRLEAD_REQUIRE_ALL=1, which FAIRLEAD_REQUIRE_ALL=0 undoes): what is missing is
# installed first by hack/prereq.sh, and the cluster's programs are built. RACE=1 runs unit tests with the race detector. KEEP=1 leaves the e2e cluster up.
# Arguments after -- go to go test, as in `hack/test.sh netns -- -run TestDeny -v`.
set -uo pipefail
cd "$(dirname "$0")/.."

parts=() args=()
while [ $# -gt 0 ]; do
	case $1 in
	unit | netns | e2e | ways) parts+=("$1") ;;
	--) shift; args=("$@"); break ;;
	*) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2 ;;
	esac
	shift
done
[ ${#parts[@]} -gt 0 ] || parts=(unit netns e2e ways)

if [ "$(id -u)" = 0 ]; then
	export FAIRLEAD_REQUIRE_ALL=${FAIRLEAD_REQUIRE_ALL:-1}
	groups=(demo)
	[[ " ${parts[*]} " != *" e2e "* && " ${parts[*]} " != *" ways "* ]] || groups+=(cluster)
	[[ " ${parts[*]} " != *" netns "* ]] || groups+=(interop)
	hack/prereq.sh "${groups[@]}" || exit 1
elif [ "${parts[*]}" != unit ]; then
	echo "test.sh: ${parts[*]}: root is needed; unit tests run without: make test-unit" >&2
	exit 1
fi

unit() {
	local packages tools
	# The chart's tests want Helm, which is among the cluster's programs.
	if [ "${FAIRLEAD_REQUIRE_ALL:-0}" = 1 ]; then
		tools=$(hack/cluster.sh build | tee /dev/stderr | tail -n 1) || return 1
		PATH=$PATH:$tools
	fi
	packages=$(go list ./... | grep -v -e /tests/netns -e /tests/interop -e /tests/e2e) || return 1
	# shellcheck disable=SC2086 # a list of packages
	go test ${RACE:+-race} "${args[@]}" $packages && (cd hack/cluster && go test "${args[@]}" ./...)
}

netns() {
	local mode
	hack/build.sh cni-agent cni-plugin istiod-lite waypoint ztunnel || return 1
	for mode in ${FAIRLEAD_REDIRECTION:-ebpf nftables}; do
		echo "redirection by $mode"
		FAIRLEAD_REDIRECTION=$mode go test -count=1 -timeout 15m "${args[@]}" ./tests/netns/... || return 1
	done
	ENVOY=$(hack/envoy.sh) || return 1
	[ -n "${PEER_ZTUNNEL:-}" ] || echo "PEER_ZTUNNEL is not set: nothing is tried with Istio's ztunnel"
	ENVOY=$ENVOY go test -count=1 -timeout 15m "${args[@]}" ./tests/interop
}

e2e() { on_cluster "${args[@]}"; }

# What differs from cluster to cluster: kube-proxy, the CNI plugin, and how pods' connections are redirected. With e2e,
# each two of them have met.
ways() {
	local proxy cni redirection few='TestLabelPuts|TestStrict|TestKubeletProbes|TestHostPort|TestUninstall' status=0
	while read -r proxy cni redirection; do
		echo "kube-proxy by $proxy, CNI $cni, redirection by $redirection"
		up=(--proxy-mode "$proxy" --cni "$cni")
		FAIRLEAD_REDIRECTION=$redirection on_cluster -run "$few" "${args[@]}" </dev/null || status=1
	done <<-EOF
		iptables bridge ebpf
		iptables ptp    nftables
		nftables bridge nftables
	EOF
	up=()
	return "$status"
}

# on_cluster [GO TEST ARGUMENTS] runs tests/e2e on a cluster that is brought up with the arguments in $up, and taken down.
up=()
on_cluster() {
	local environment status
	export CLUSTER=${CLUSTER:-e2e} # a cluster of its own, beside the one that make cluster-up brings up
	hack/build.sh && hack/cluster.sh up "${up[@]}" || return 1
	environment=$(hack/cluster.sh env) || return 1
	(
		eval "$environment"
		FAIRLEAD_E2E=1 go test -count=1 -timeout 45m -v "$@" ./tests/e2e
	)
	status=$?
	if [ "${KEEP:-0}" = 1 ]; then
		echo "the cluster stays up: CLUSTER=$CLUSTER hack/cluster.sh down takes it away"
	else
		hack/cluster.sh down || status=1
	fi
	return "$status"
}

results=() failed=0
for part in "${parts[@]}"; do
	echo "== $part"
	start=$SECONDS
	if "$part"; then
		results+=("$part: passed in $((SECONDS - start)) s")
	else
		results+=("$part: FAILED after $((SECONDS - start)) s")
		failed=1
	fi
done
printf '%s\n' "" "${results[@]}"
exit "$failed"
