package agent

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestDecide(t *testing.T) {
	pod := func(label string, change ...func(*corev1.Pod)) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: "app", Annotations: map[string]string{}}}
		if label != "" {
			p.Labels = map[string]string{modeLabel: label}
		}
		for _, c := range change {
			c(p)
		}
		return p
	}
	namespace := func(label string) *corev1.Namespace {
		return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "app", Labels: map[string]string{modeLabel: label}}}
	}
	hostNetwork := func(p *corev1.Pod) { p.Spec.HostNetwork = true }
	sidecar := func(p *corev1.Pod) { p.Annotations[sidecarAnnotation] = "{}" }
	ended := func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }
	excluded := func(p *corev1.Pod) { p.Namespace = "kube-system" }
	for _, tc := range []struct {
		name      string
		pod       *corev1.Pod
		namespace *corev1.Namespace
		want      bool
	}{
		{"no label", pod(""), namespace(""), false},
		{"namespace", pod(""), namespace("ambient"), true},
		{"namespace says none", pod(""), namespace("none"), false},
		{"another word", pod("sidecar"), namespace("Ambient"), false},
		{"pod", pod("ambient"), namespace(""), true},
		{"pod wins over none", pod("ambient"), namespace("none"), true},
		{"pod opts out", pod("none"), namespace("ambient"), false},
		{"pod, namespace unknown", pod("ambient"), nil, true},
		{"namespace unknown", pod(""), nil, false},
		{"another word on the pod", pod("sidecar"), namespace("ambient"), true},
		{"host network", pod("ambient", hostNetwork), namespace("ambient"), false},
		{"sidecar", pod("ambient", sidecar), namespace("ambient"), false},
		{"ended", pod("ambient", ended), namespace("ambient"), false},
		{"excluded", pod("ambient", excluded), namespace("ambient"), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := decide(tc.pod, tc.namespace, []string{"kube-system"}); got.enrol != tc.want || got.why == "" {
				t.Errorf("decided %+v, want %v and a reason", got, tc.want)
			}
		})
	}
}
