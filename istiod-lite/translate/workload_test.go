package translate

import (
	"fmt"
	"strings"
	"testing"

	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/fairlead-mesh/fairlead/internal/kubedir"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// waypointsOf are the waypoints of a case; those with the annotation ready: "false" have no endpoint.
func waypointsOf(t *testing.T, in *kubedir.Dir) Waypoints {
	ws := Waypoints{}
	for _, gw := range list(t, in, &gatewayv1.Gateway{}) {
		ws[types.NamespacedName{Namespace: gw.Namespace, Name: gw.Name}] = NewWaypointFacts(gw, nil, gw.Annotations["ready"] != "false")
	}
	return ws
}

func namespaceLabels(t *testing.T, in *kubedir.Dir) map[string]map[string]string {
	out := map[string]map[string]string{}
	for _, ns := range list(t, in, &corev1.Namespace{}) {
		out[ns.Name] = ns.Labels
	}
	return out
}

func TestWorkload(t *testing.T) {
	goldens(t, "workload", func(t *testing.T, in *kubedir.Dir) string {
		waypoints, labels := waypointsOf(t, in), namespaceLabels(t, in)
		nodes := map[string]*corev1.Node{}
		for _, n := range list(t, in, &corev1.Node{}) {
			nodes[n.Name] = n
		}
		var selectors []PolicySelector
		for _, p := range list(t, in, &securityv1.AuthorizationPolicy{}) {
			if r := Authorization(testMesh, p); r.Policy != nil && r.Policy.Scope == mesh.ScopeSelector {
				selectors = append(selectors, PolicySelector{Key: r.Policy.Key(), Namespace: p.Namespace, Labels: r.Selector})
			}
		}
		var b strings.Builder
		for _, pod := range list(t, in, &corev1.Pod{}) {
			w, binding := Workload(testMesh, WorkloadInput{
				Pod: pod, NamespaceLabels: labels[pod.Namespace], Node: nodes[pod.Spec.NodeName], Waypoints: waypoints, Selectors: selectors,
			})
			if w == nil {
				fmt.Fprintf(&b, "%s/%s is none\n", pod.Namespace, pod.Name)
				continue
			}
			printWorkload(&b, w)
			printCondition(&b, binding.Condition)
		}
		return b.String()
	})
}

// Where configuration is a directory the labels alone say who is in the mesh.
func TestCapturedByLabel(t *testing.T) {
	m := testMesh
	m.CapturedByLabel = true
	ambient, none := map[string]string{labelDataplaneMode: "ambient"}, map[string]string{labelDataplaneMode: "none"}
	for _, tt := range []struct {
		name           string
		pod, namespace map[string]string
		annotations    map[string]string
		host, want     bool
	}{
		{name: "namespace", namespace: ambient, want: true},
		{name: "pod", pod: ambient, want: true},
		{name: "pod opts out", pod: none, namespace: ambient},
		{name: "pod opts in", pod: ambient, namespace: none, want: true},
		{name: "sidecar", namespace: ambient, annotations: map[string]string{annotationSidecarStatus: "{}"}},
		{name: "host network", namespace: ambient, host: true},
		{name: "nobody asked"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			pod := &corev1.Pod{Spec: corev1.PodSpec{HostNetwork: tt.host}}
			pod.Labels, pod.Annotations = tt.pod, tt.annotations
			if got := captured(m, pod, tt.namespace); got != tt.want {
				t.Errorf("captured: got %t, want %t", got, tt.want)
			}
			if captured(testMesh, pod, tt.namespace) {
				t.Error("on a cluster the label alone captures nothing")
			}
		})
	}
}

func TestService(t *testing.T) {
	goldens(t, "service", func(t *testing.T, in *kubedir.Dir) string {
		waypoints, labels := waypointsOf(t, in), namespaceLabels(t, in)
		slices := map[string][]*discoveryv1.EndpointSlice{}
		for _, s := range list(t, in, &discoveryv1.EndpointSlice{}) {
			slices[s.Labels[discoveryv1.LabelServiceName]] = append(slices[s.Labels[discoveryv1.LabelServiceName]], s)
		}
		var b strings.Builder
		for _, svc := range list(t, in, &corev1.Service{}) {
			s, binding := Service(testMesh, svc, labels[svc.Namespace], waypoints)
			if s == nil {
				fmt.Fprintf(&b, "%s/%s is none\n", svc.Namespace, svc.Name)
				continue
			}
			fmt.Fprintf(&b, "%s %v ports=%v", s.Key(), s.Addresses, s.Ports)
			if lb := s.LoadBalancing; lb.Mode != 0 || lb.AllowUnhealthy {
				fmt.Fprintf(&b, " balance=%+v", lb)
			}
			b.WriteString("\n")
			if s.Waypoint != nil {
				fmt.Fprintf(&b, "  behind %s:%d attached=%t\n", s.Waypoint.Hostname, s.Waypoint.HBONEPort, binding.Attached)
			}
			printCondition(&b, binding.Condition)
			for _, backend := range Backends(svc, slices[svc.Name]) {
				fmt.Fprintf(&b, "  backend %s pod=%s slice=%s %v\n", backend.Address, backend.Pod, backend.Slice, backend.Ports)
			}
		}
		return b.String()
	})
}
