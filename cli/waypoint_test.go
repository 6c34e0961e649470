package cli

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// gatewayOf is a Gateway of a class; programmed is the message of its condition, empty when there is none yet.
func gatewayOf(namespace, name, class, programmed string, labels map[string]string) *gatewayv1.Gateway {
	gw := &gatewayv1.Gateway{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: labels},
		Spec: gatewayv1.GatewaySpec{GatewayClassName: gatewayv1.ObjectName(class)}}
	if programmed != "" {
		status := metav1.ConditionFalse
		if programmed == "ready" {
			status = metav1.ConditionTrue
			gw.Status.Addresses = []gatewayv1.GatewayStatusAddress{{Value: "10.96.0.9"}}
		}
		gw.Status.Conditions = []metav1.Condition{{Type: "Programmed", Status: status, Reason: "Because", Message: programmed}}
	}
	return gw
}

func TestWaypointList(t *testing.T) {
	c := newCluster(
		gatewayOf("shop", "waypoint", waypointClass, "ready", nil),
		gatewayOf("shop", "slow", waypointClass, "no endpoint is ready", map[string]string{labelWaypointFor: "workload", labelRevision: "canary"}),
		gatewayOf("other", "new", waypointClass, "", nil),
		gatewayOf("shop", "ingress", "istio", "ready", nil),
	)
	for line, want := range map[string]string{
		"waypoint list -A": `NAMESPACE NAME REVISION TRAFFIC PROGRAMMED
other new - service Unknown
shop slow canary workload False
shop waypoint - service True
`,
		"waypoint list -n other": "NAMESPACE NAME REVISION TRAFFIC PROGRAMMED\nother new - service Unknown\n",
		"waypoint list -o json":  "[]\n",
		"waypoint status -A": `NAMESPACE NAME PROGRAMMED ADDRESS MESSAGE
other new Unknown - the control plane has not looked at it yet
shop slow False - no endpoint is ready
shop waypoint True 10.96.0.9 ready
`,
		"waypoint status -n shop slow": "NAMESPACE NAME PROGRAMMED ADDRESS MESSAGE\nshop slow False - no endpoint is ready\n",
		"waypoint list -n other -o yaml": `- apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata:
name: new
namespace: other
spec:
gatewayClassName: istio-waypoint
listeners: null
`,
	} {
		out, err := c.run(t, line)
		if err != nil {
			t.Errorf("%s: %v", line, err)
		}
		if diff := cmp.Diff(want, lines(out)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", line, diff)
		}
	}
	out, err := c.run(t, "waypoint status -n shop slow -o json")
	if err != nil || strings.Count(out, `"kind": "Gateway"`) != 1 || !strings.Contains(out, `"slow"`) {
		t.Errorf("status of one as JSON: %v\n%s", err, out)
	}
}

func TestWaypointGenerate(t *testing.T) {
	out, err := newCluster().run(t, "waypoint generate -n shop --name all --for all --revision canary")
	want := `apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata:
labels:
istio.io/rev: canary
istio.io/waypoint-for: all
name: all
namespace: shop
spec:
gatewayClassName: istio-waypoint
listeners:
- name: mesh
port: 15008
protocol: HBONE
`
	if diff := cmp.Diff(want, lines(out)); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
}

func TestWaypointApply(t *testing.T) {
	ambient := map[string]string{labelMode: "ambient"}
	for _, tc := range []struct {
		name, line string
		namespace  *corev1.Namespace
		out, err   string
		label      string // of the namespace afterwards
		made       bool
	}{
		{"alone", "waypoint apply -n shop", namespace("shop", ambient), "waypoint shop/waypoint applied\n", "", "", true},
		{"with its namespace", "waypoint apply -n shop --enroll-namespace", namespace("shop", ambient),
			"waypoint shop/waypoint applied\nnamespace shop uses waypoint waypoint\n", "", "waypoint", true},
		{"outside of the mesh", "waypoint apply -n shop --enroll-namespace", namespace("shop", nil),
			"waypoint shop/waypoint applied\nnamespace shop uses waypoint waypoint\nwarning: namespace shop is not in the mesh; " +
				"`kubectl label namespace shop istio.io/dataplane-mode=ambient` puts it there\n", "", "waypoint", true},
		{"another is there", "waypoint apply -n shop --enroll-namespace", namespace("shop", map[string]string{labelUseWaypoint: "first"}),
			"", `uses waypoint "first" already: --overwrite replaces it`, "first", false},
		{"another is replaced", "waypoint apply -n shop --enroll-namespace --overwrite",
			namespace("shop", map[string]string{labelUseWaypoint: "first", labelMode: "ambient"}),
			"waypoint shop/waypoint applied\nnamespace shop uses waypoint waypoint\n", "", "waypoint", true},
		{"never ready", "waypoint apply -n shop --wait --timeout 1ms --enroll-namespace", namespace("shop", ambient),
			"waypoint shop/waypoint applied\n", "is not ready after 1ms: no status yet: is istiod running in istio-system?", "", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := newCluster(tc.namespace)
			out, err := c.run(t, tc.line)
			if diff := cmp.Diff(tc.out, out); diff != "" {
				t.Errorf("printed (-want +got):\n%s", diff)
			}
			if (err != nil) != (tc.err != "") || err != nil && !strings.Contains(err.Error(), tc.err) {
				t.Errorf("error %v, want %q", err, tc.err)
			}
			ns, err := c.kubernetes.CoreV1().Namespaces().Get(t.Context(), "shop", metav1.GetOptions{})
			if err != nil || ns.Labels[labelUseWaypoint] != tc.label {
				t.Errorf("label %q (%v), want %q", ns.Labels[labelUseWaypoint], err, tc.label)
			}
			gw, err := c.gateway.GatewayV1().Gateways("shop").Get(t.Context(), "waypoint", metav1.GetOptions{})
			if made := err == nil && gw.Spec.GatewayClassName == waypointClass; made != tc.made {
				t.Errorf("the waypoint is there: %v (%v), want %v", made, err, tc.made)
			}
		})
	}
}

func TestWaypointDelete(t *testing.T) {
	objects := func() *cluster {
		return newCluster(namespace("shop", map[string]string{labelUseWaypoint: "waypoint", "kept": "yes"}),
			gatewayOf("shop", "waypoint", waypointClass, "ready", nil), gatewayOf("shop", "second", waypointClass, "ready", nil),
			gatewayOf("shop", "ingress", "istio", "ready", nil))
	}
	for _, tc := range []struct {
		line, out, err string
		left           []string
		labels         map[string]string
	}{
		{"waypoint delete -n shop second", "waypoint shop/second deleted\n", "", []string{"ingress", "waypoint"},
			map[string]string{labelUseWaypoint: "waypoint", "kept": "yes"}},
		{"waypoint delete -n shop waypoint", "namespace shop uses no waypoint\nwaypoint shop/waypoint deleted\n", "", []string{"ingress", "second"},
			map[string]string{"kept": "yes"}},
		{"waypoint delete -n shop --all", "waypoint shop/second deleted\nnamespace shop uses no waypoint\nwaypoint shop/waypoint deleted\n", "",
			[]string{"ingress"}, map[string]string{"kept": "yes"}},
		{"waypoint delete -n shop ingress", "", "not a waypoint", []string{"ingress", "second", "waypoint"},
			map[string]string{labelUseWaypoint: "waypoint", "kept": "yes"}},
	} {
		c := objects()
		out, err := c.run(t, tc.line)
		if (err != nil) != (tc.err != "") || err != nil && !strings.Contains(err.Error(), tc.err) {
			t.Errorf("%s: error %v, want %q", tc.line, err, tc.err)
		}
		var left []string
		list, err := c.gateway.GatewayV1().Gateways("shop").List(t.Context(), metav1.ListOptions{})
		if err != nil && !apierrors.IsNotFound(err) {
			t.Fatal(err)
		}
		for _, gw := range list.Items {
			left = append(left, gw.Name)
		}
		ns, err := c.kubernetes.CoreV1().Namespaces().Get(t.Context(), "shop", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]any{tc.out, tc.left, tc.labels}, []any{out, left, ns.Labels}); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tc.line, diff)
		}
	}
}
