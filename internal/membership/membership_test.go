package membership

import "testing"

func TestDecide(t *testing.T) {
	pod := func(label string, change ...func(*Pod)) Pod {
		p := Pod{Namespace: "app", Annotations: map[string]string{}}
		if label != "" {
			p.Labels = map[string]string{ModeLabel: label}
		}
		for _, c := range change {
			c(&p)
		}
		return p
	}
	namespace := func(label string) map[string]string { return map[string]string{ModeLabel: label} }
	hostNetwork := func(p *Pod) { p.HostNetwork = true }
	sidecar := func(p *Pod) { p.Annotations[SidecarAnnotation] = "{}" }
	ended := func(p *Pod) { p.Ended = true }
	excluded := func(p *Pod) { p.Namespace = "kube-system" }
	for _, tc := range []struct {
		name      string
		pod       Pod
		namespace map[string]string
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
			if got := Decide(tc.pod, tc.namespace, []string{"kube-system"}); got.Enrol != tc.want || got.Why == "" {
				t.Errorf("decided %+v, want %v and a reason", got, tc.want)
			}
		})
	}
}
