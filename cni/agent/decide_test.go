package agent

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestDecide is about what internal/membership is told of a pod; what follows from it is tested there.
func TestDecide(t *testing.T) {
	pod := func(change ...func(*corev1.Pod)) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: "app", Labels: map[string]string{}, Annotations: map[string]string{}}}
		for _, c := range change {
			c(p)
		}
		return p
	}
	label := func(mode string) func(*corev1.Pod) { return func(p *corev1.Pod) { p.Labels[modeLabel] = mode } }
	phase := func(is corev1.PodPhase) func(*corev1.Pod) { return func(p *corev1.Pod) { p.Status.Phase = is } }
	namespace := func(mode string) *corev1.Namespace {
		return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "app", Labels: map[string]string{modeLabel: mode}}}
	}
	for _, tc := range []struct {
		name      string
		pod       *corev1.Pod
		namespace *corev1.Namespace
		want      bool
	}{
		{"no label", pod(), namespace(""), false},
		{"namespace", pod(), namespace("ambient"), true},
		{"namespace unknown", pod(), nil, false},
		{"pod", pod(label("ambient")), nil, true},
		{"pod opts out", pod(label("none")), namespace("ambient"), false},
		{"host network", pod(func(p *corev1.Pod) { p.Spec.HostNetwork = true }), namespace("ambient"), false},
		{"sidecar", pod(func(p *corev1.Pod) { p.Annotations[sidecarAnnotation] = "{}" }), namespace("ambient"), false},
		{"excluded", pod(func(p *corev1.Pod) { p.Namespace = "kube-system" }), namespace("ambient"), false},
		{"runs", pod(phase(corev1.PodRunning)), namespace("ambient"), true},
		{"has ended well", pod(phase(corev1.PodSucceeded)), namespace("ambient"), false},
		{"has failed", pod(phase(corev1.PodFailed)), namespace("ambient"), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := decide(tc.pod, tc.namespace, []string{"kube-system"}); got.Enrol != tc.want || got.Why == "" {
				t.Errorf("decided %+v, want %v and a reason", got, tc.want)
			}
		})
	}
}
