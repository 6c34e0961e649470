package agent

import (
	corev1 "k8s.io/api/core/v1"

	"github.com/fairlead-mesh/fairlead/internal/membership"
)

// Labels and annotations of the mesh's public interface.
const (
	modeLabel             = membership.ModeLabel
	modeAmbient           = membership.ModeAmbient
	modeNone              = membership.ModeNone
	sidecarAnnotation     = membership.SidecarAnnotation
	mirrorAnnotation      = membership.MirrorAnnotation
	redirectionAnnotation = "ambient.istio.io/redirection"
	redirectionEnabled    = "enabled"
	// capturedType is the condition of pods that could not be captured, and of those that were after all.
	capturedType = "fairlead-mesh.io/Captured"
)

// decide tells whether a pod is to be in the mesh, as internal/membership does. namespace is nil when it is not known.
func decide(pod *corev1.Pod, namespace *corev1.Namespace, exclude []string) membership.Decision {
	var labels map[string]string
	if namespace != nil {
		labels = namespace.Labels
	}
	return membership.Decide(membership.Pod{
		Namespace: pod.Namespace, Labels: pod.Labels, Annotations: pod.Annotations, HostNetwork: pod.Spec.HostNetwork,
		Ended: pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed,
	}, labels, exclude)
}
