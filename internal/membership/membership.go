// Package membership (decisions) tells whether a pod is to be in the mesh. The node's agent decides by it, and so does the
// CNI plugin where there is no agent.
package membership

import "slices"

// Labels and annotations that decide. They are the mesh's public interface, but for MirrorAnnotation, which is the kubelet's: on
// the API server's copy of a static pod it is what the runtime takes for the pod's UID.
const (
	ModeLabel         = "istio.io/dataplane-mode"
	ModeAmbient       = "ambient"
	ModeNone          = "none"
	SidecarAnnotation = "sidecar.istio.io/status"
	MirrorAnnotation  = "kubernetes.io/config.mirror"
)

// Pod is what of a pod decides.
type Pod struct {
	Namespace           string
	Labels, Annotations map[string]string
	// HostNetwork: it has no network namespace of its own.
	HostNetwork bool
	// Ended: all its containers have, for good.
	Ended bool
}

// Decision is whether a pod is to be in the mesh, and why.
type Decision struct {
	Enrol bool
	Why   string
}

// Decide tells whether a pod is to be in the mesh. The pod's own label wins over its namespace's. namespace are its
// namespace's labels, nil when that is not known, which leaves the pod's; exclude are namespaces that are never in the mesh.
func Decide(pod Pod, namespace map[string]string, exclude []string) Decision {
	switch mode := pod.Labels[ModeLabel]; {
	case pod.Ended:
		return Decision{false, "the pod has ended"}
	case pod.HostNetwork:
		return Decision{false, "the pod uses the host's network"}
	case slices.Contains(exclude, pod.Namespace):
		return Decision{false, "the namespace is excluded"}
	case pod.Annotations[SidecarAnnotation] != "":
		return Decision{false, "the pod has a sidecar"}
	case mode == ModeNone:
		return Decision{false, "the pod's label opts out"}
	case mode == ModeAmbient:
		return Decision{true, "the pod's label opts in"}
	case namespace[ModeLabel] == ModeAmbient:
		return Decision{true, "the namespace's label opts in"}
	}
	return Decision{false, "neither the pod nor its namespace is labelled"}
}
