package agent

import (
	"context"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// warnings is a cluster that keeps the events of pods.
type warnings struct {
	cluster
	all []string
}

func (w *warnings) warn(_ context.Context, _ *corev1.Pod, reason, message string) error {
	w.all = append(w.all, reason+": "+message)
	return nil
}

// TestInvalidExclusionsAreToldOfOnce: and again when they have changed; what the cache keeps of a pod is enough to know.
func TestInvalidExclusionsAreToldOfOnce(t *testing.T) {
	events := &warnings{}
	w := &watcher{cluster: events, captureDNS: true, complaints: map[string]string{}}
	look := func(ports string) mesh.Exclusions {
		t.Helper()
		trimmed, err := trim(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{
			UID: "u", Annotations: map[string]string{"traffic.sidecar.istio.io/excludeInboundPorts": ports},
		}})
		if err != nil {
			t.Fatal(err)
		}
		pod := trimmed.(*corev1.Pod)
		namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{mesh.DNSCaptureAnnotation: "false"}}}
		exclude, invalid := w.exclusions(pod, namespace)
		if err := w.complain(t.Context(), pod, invalid); err != nil {
			t.Fatal(err)
		}
		return exclude
	}
	for _, step := range []struct {
		ports string
		want  mesh.Exclusions
		told  int
	}{
		{"http", mesh.Exclusions{DNS: true}, 1},
		{"http", mesh.Exclusions{DNS: true}, 1},
		{"https", mesh.Exclusions{DNS: true}, 2},
		{"443", mesh.Exclusions{DNS: true, In: mesh.Exclusion{Ports: []uint16{443}}}, 2},
		{"https", mesh.Exclusions{DNS: true}, 3},
	} {
		if diff := cmp.Diff(step.want, look(step.ports)); diff != "" || len(events.all) != step.told {
			t.Errorf("%s: %d events, want %d; exclusions (-want +got):\n%s", step.ports, len(events.all), step.told, diff)
		}
	}
	if !strings.HasPrefix(events.all[0], "InvalidExclusion: ") || !strings.Contains(events.all[0], `excludeInboundPorts: "http"`) {
		t.Errorf("event %q", events.all[0])
	}
}
