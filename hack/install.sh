#!/usr/bin/env bash
# Installs Fairlead on the Kubernetes that KUBECONFIG names.
#
#   hack/install.sh [OPTIONS] [-- HELM ARGUMENTS]
#     --namespace NS     (istio-system)
#     --registry R       take the images R/ztunnel, R/cni ... from there; without it they are built here and loaded into
#                        the cluster of hack/cluster.sh that $CLUSTER names (hack/cluster.sh install sets both)
#     --tag T            of the images (dev)
#     --no-build         load the images of the last build
#     --package DIR      only write the chart, with its CustomResourceDefinitions, to DIR
#     --uninstall        take it all out again: pods, nodes, release. With --crds the CustomResourceDefinitions too, and
#                        with them every policy, Gateway and route there is.
#
# Examples
#   hack/cluster.sh install
#   hack/install.sh --registry ghcr.io/me/fairlead --tag v1 -- --set mesh.clusterID=east
#   hack/cluster.sh install --uninstall
set -euo pipefail
cd "$(dirname "$0")/.."

namespace=istio-system registry='' tag=dev build=yes package='' uninstall='' crds=''
fail() { echo "install.sh: $*" >&2; exit 1; }
while [ $# -gt 0 ]; do
	case $1 in
	-h | --help) sed -n '2,19s/^# \{0,1\}//p' "$0"; exit ;;
	--namespace) namespace=$2; shift 2 ;;
	--registry) registry=$2; shift 2 ;;
	--tag) tag=$2; shift 2 ;;
	--no-build) build=; shift ;;
	--package) package=$2; shift 2 ;;
	--uninstall) uninstall=yes; shift ;;
	--crds) crds=yes; shift ;;
	--) shift; break ;;
	*) fail "unknown option $1; --help lists them" ;;
	esac
done
need() { command -v "$1" >/dev/null || fail "$1 is not in PATH; after hack/cluster.sh up: eval \"\$(hack/cluster.sh env)\""; }

# chart DIR writes the chart with its CustomResourceDefinitions, from the modules that go.mod names, to DIR/fairlead.
chart() {
	mkdir -p "$1"
	rm -rf "$1/fairlead"
	cp -r helm/fairlead "$1/fairlead"
	mkdir -p "$1/fairlead/crds"
	local istio gateway
	istio=$(go list -m -f '{{.Dir}}' istio.io/api)
	gateway=$(go list -m -f '{{.Dir}}' sigs.k8s.io/gateway-api)
	if [ -z "$istio" ] || [ -z "$gateway" ]; then
		go mod download istio.io/api sigs.k8s.io/gateway-api
		istio=$(go list -m -f '{{.Dir}}' istio.io/api)
		gateway=$(go list -m -f '{{.Dir}}' sigs.k8s.io/gateway-api)
	fi
	cp "$istio/kubernetes/customresourcedefinitions.gen.yaml" "$1/fairlead/crds/istio.yaml"
	for crd in "$gateway"/config/crd/standard/gateway.networking.k8s.io_*.yaml; do
		# The admission policy that comes with them guards upgrades of all of Gateway API, which is not this chart's.
		case $crd in *_vap_*) continue ;; esac
		cp "$crd" "$1/fairlead/crds/"
	done
	chmod -R u+w "$1/fairlead"
}

if [ -n "$package" ]; then
	need helm
	work=$(mktemp -d)
	trap 'rm -rf "$work"' EXIT
	chart "$work"
	mkdir -p "$package"
	helm package "$work/fairlead" --destination "$package" --app-version "$tag"
	exit
fi

need helm
need kubectl
kubectl version >/dev/null 2>&1 || fail "no Kubernetes answers (KUBECONFIG=${KUBECONFIG:-unset}); hack/cluster.sh up brings one up"

if [ -n "$uninstall" ]; then
	if helm status fairlead --namespace "$namespace" >/dev/null 2>&1; then
		echo "uninstalling: every node is cleaned first"
		helm uninstall fairlead --namespace "$namespace" --wait --timeout 5m "$@"
	else
		echo "there is no release fairlead in $namespace"
	fi
	echo "removing what istiod made: its CA's Secret, and the root certificate in every namespace"
	kubectl delete secret istio-ca-secret --namespace "$namespace" --ignore-not-found
	kubectl get configmap --all-namespaces --field-selector metadata.name=istio-ca-root-cert \
		-o jsonpath='{range .items[*]}{.metadata.namespace}{"\n"}{end}' | while read -r ns; do
		kubectl delete configmap istio-ca-root-cert --namespace "$ns" --ignore-not-found
	done
	left=$(kubectl get gateways.gateway.networking.k8s.io --all-namespaces --ignore-not-found \
		-o jsonpath='{range .items[?(@.spec.gatewayClassName=="istio-waypoint")]}{" "}{.metadata.namespace}{"/"}{.metadata.name}{end}' 2>/dev/null || true)
	[ -z "$left" ] || [ -n "$crds" ] || echo "these Gateways, and the waypoints that run for them, stay; delete the Gateways to remove both:$left"
	if [ -n "$crds" ]; then
		work=$(mktemp -d)
		trap 'rm -rf "$work"' EXIT
		chart "$work"
		kubectl delete --ignore-not-found -f "$work/fairlead/crds" --wait
	else
		echo "CustomResourceDefinitions, and what users made of them, stay; --uninstall --crds removes them"
	fi
	exit
fi

images=(ztunnel waypoint istiod-lite cni)
if [ -z "$registry" ]; then
	[ -n "${CLUSTER:-}" ] || fail "where should the images go? Use hack/cluster.sh install, or --registry R with images that nodes can pull"
	if [ -n "$build" ]; then
		hack/build.sh ztunnel waypoint istiod-lite cni-agent cni-plugin fairlead
		TAG=$tag hack/images.sh "${images[@]}" >/dev/null
	fi
	tars=("${images[@]/#/out/images/}")
	echo "loading images into every node of $CLUSTER"
	hack/cluster.sh load --name "$CLUSTER" "${tars[@]/%/.tar}"
	registry=docker.io/fairlead
fi

echo "CustomResourceDefinitions"
chart out/chart
kubectl apply --server-side --force-conflicts -f out/chart/fairlead/crds >/dev/null
kubectl wait --for condition=Established --timeout 60s -f out/chart/fairlead/crds >/dev/null

echo "chart fairlead in $namespace"
fresh=
helm status fairlead --namespace "$namespace" >/dev/null 2>&1 || fresh=yes
# Without the definitions, which are there already and would only make the release record large.
helm upgrade --install fairlead helm/fairlead --namespace "$namespace" --create-namespace \
	--set image.registry="$registry" --set image.tag="$tag" --wait --timeout 5m "$@"
if [ -z "$fresh" ] && [ "$tag" = dev ]; then
	# The same tag names other images now, which nothing but a restart takes up.
	kubectl --namespace "$namespace" rollout restart deployment/istiod daemonset/istio-cni-node daemonset/ztunnel
	for what in deployment/istiod daemonset/istio-cni-node daemonset/ztunnel; do
		kubectl --namespace "$namespace" rollout status "$what" --timeout 5m
	done
fi
