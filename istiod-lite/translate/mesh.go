// Package translate turns users' Kubernetes objects into the mesh's values, one noun a file, and says of each object what
// became of it. It is pure: objects in, values and conditions out.
package translate

import (
	"maps"

	"k8s.io/apimachinery/pkg/labels"
)

// Mesh is what every translation of one control plane has in common.
type Mesh struct {
	TrustDomain   string
	ClusterID     string
	RootNamespace string
	// Network of workloads that no label puts elsewhere; empty is the default network.
	Network string
	// DNSDomain ends the hostnames of services, "cluster.local".
	DNSDomain string
	// CapturedByLabel: a pod is in the mesh when its labels ask for it. Otherwise the CNI agent's annotation decides,
	// which it sets when traffic really is redirected; where configuration is a directory nobody can write one.
	CapturedByLabel bool
}

// Condition is one condition of a user's object.
type Condition struct {
	Type    string
	Status  bool
	Reason  string
	Message string
}

// Hostname is the name of a Kubernetes Service in DNS.
func (m Mesh) Hostname(namespace, name string) string {
	return name + "." + namespace + ".svc." + m.DNSDomain
}

// Labels and annotations of the mesh's public interface.
const (
	labelDataplaneMode               = "istio.io/dataplane-mode"
	labelUseWaypoint                 = "istio.io/use-waypoint"
	labelUseWaypointNamespace        = "istio.io/use-waypoint-namespace"
	labelWaypointFor                 = "istio.io/waypoint-for"
	labelManaged                     = "gateway.istio.io/managed"
	labelGatewayName                 = "gateway.networking.k8s.io/gateway-name"
	labelNetwork                     = "topology.istio.io/network"
	labelSubzone                     = "topology.istio.io/subzone"
	labelLocality                    = "istio-locality"
	labelCanonicalName               = "service.istio.io/canonical-name"
	labelCanonicalRevision           = "service.istio.io/canonical-revision"
	labelWorkloadName                = "service.istio.io/workload-name"
	annotationRedirection            = "ambient.istio.io/redirection"
	annotationSidecarStatus          = "sidecar.istio.io/status"
	annotationDryRun                 = "istio.io/dry-run"
	annotationTrafficDistrib         = "networking.istio.io/traffic-distribution"
	managedByMeshController          = "istio.io-mesh-controller"
	dataplaneAmbient                 = "ambient"
	useWaypointNone                  = "none"
	waypointHBONEPort         uint16 = 15008
)

// selects tells whether a label selector, empty meaning everything, holds for an object's labels.
func selects(matchLabels, objectLabels map[string]string) bool {
	return labels.SelectorFromSet(maps.Clone(matchLabels)).Matches(labels.Set(objectLabels))
}

// firstOf is the first label of keys that is set and not empty.
func firstOf(set map[string]string, keys ...string) string {
	for _, k := range keys {
		if v := set[k]; v != "" {
			return v
		}
	}
	return ""
}
