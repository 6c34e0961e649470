package agent

import (
	"slices"

	corev1 "k8s.io/api/core/v1"
)

// Labels and annotations of the mesh's public interface.
const (
	modeLabel             = "istio.io/dataplane-mode"
	modeAmbient           = "ambient"
	modeNone              = "none"
	sidecarAnnotation     = "sidecar.istio.io/status"
	redirectionAnnotation = "ambient.istio.io/redirection"
	redirectionEnabled    = "enabled"
	mirrorAnnotation      = "kubernetes.io/config.mirror"
	// capturedType is the condition of pods that could not be captured, and of those that were after all.
	capturedType = "fairlead-mesh.io/Captured"
)

// decision is whether a pod is to be in the mesh, and why.
type decision struct {
	enrol bool
	why   string
}

// decide tells whether a pod is to be in the mesh. The pod's own label wins over its namespace's. namespace is nil when
// it is not known, which leaves the pod's label; exclude are namespaces that are never in the mesh.
func decide(pod *corev1.Pod, namespace *corev1.Namespace, exclude []string) decision {
	switch mode := pod.Labels[modeLabel]; {
	case pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed:
		return decision{false, "the pod has ended"}
	case pod.Spec.HostNetwork:
		return decision{false, "the pod uses the host's network"}
	case slices.Contains(exclude, pod.Namespace):
		return decision{false, "the namespace is excluded"}
	case pod.Annotations[sidecarAnnotation] != "":
		return decision{false, "the pod has a sidecar"}
	case mode == modeNone:
		return decision{false, "the pod's label opts out"}
	case mode == modeAmbient:
		return decision{true, "the pod's label opts in"}
	case namespace != nil && namespace.Labels[modeLabel] == modeAmbient:
		return decision{true, "the namespace's label opts in"}
	}
	return decision{false, "neither the pod nor its namespace is labelled"}
}
