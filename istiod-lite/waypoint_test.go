package istiod

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/xds"
	"github.com/fairlead-mesh/fairlead/istiod-lite/translate"
)

const waypoint = `
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: v1
kind: Service
metadata: {name: waypoint, labels: {gateway.networking.k8s.io/gateway-name: waypoint}}
spec: {clusterIP: 10.96.0.9, ports: [{name: mesh, port: 15008}]}
`

const waypointPod = `
apiVersion: v1
kind: Pod
metadata: {name: waypoint-1, labels: {gateway.networking.k8s.io/gateway-name: waypoint, istio.io/dataplane-mode: none}}
spec: {nodeName: one, serviceAccountName: waypoint}
status: {phase: Running, podIP: 10.0.1.9, podIPs: [{ip: 10.0.1.9}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: waypoint-1, labels: {kubernetes.io/service-name: waypoint}}
addressType: IPv4
ports: [{name: mesh, port: 15008}]
endpoints: [{addresses: [10.0.1.9], targetRef: {kind: Pod, namespace: default, name: waypoint-1}}]
`

func TestWaypointIsBoundAndConfigured(t *testing.T) {
	enrolled := strings.Replace(twoNodes, "istio.io/dataplane-mode: ambient", "istio.io/dataplane-mode: ambient, istio.io/use-waypoint: waypoint", 1)
	w := start(t, map[string]string{"mesh.yaml": enrolled})
	zt := w.ztunnel()
	bound := func() *mesh.GatewayAddress {
		zt.mu.Lock()
		defer zt.mu.Unlock()
		return zt.services["default/server.default.svc.cluster.local"].Waypoint
	}
	want := &mesh.GatewayAddress{Hostname: mesh.NamespacedHostname{Namespace: "default", Hostname: "waypoint.default.svc.cluster.local"}, HBONEPort: 15008}
	// A waypoint that is asked for and missing is not gone past.
	if diff := cmp.Diff(want, bound(), cmp.Comparer(func(a, b mesh.NetworkAddress) bool { return a == b })); diff != "" {
		t.Errorf("waypoint of the service (-want +got):\n%s", diff)
	}
	w.status("service.default.server.yaml", "reason: WaypointIsNotReady")
	w.write("waypoint.yaml", waypoint)
	w.status("gateway.default.waypoint.yaml", "reason: Pending")
	w.write("pod.yaml", waypointPod)
	w.status("service.default.server.yaml", "reason: WaypointAccepted")
	w.status("gateway.default.waypoint.yaml", "reason: Programmed")
	w.wait("the waypoint's pod is a native tunnel, in front of which is none", func() bool {
		pod := zt.workload("Kubernetes//Pod/default/waypoint-1")
		return pod != nil && pod.NativeTunnel && pod.Protocol == mesh.ProtocolHBONE && pod.Waypoint == nil
	})
	zt.mu.Lock()
	if own := zt.services["default/waypoint.default.svc.cluster.local"]; own == nil || own.Waypoint != nil {
		t.Errorf("the waypoint's own service: %+v", own)
	}
	zt.mu.Unlock()

	config := &proxy{config: map[string][]string{}}
	client := w.client("wp", "waypoint~10.0.1.9~waypoint-1.default~default.svc.cluster.local")
	for _, typeURL := range []string{translate.ClusterType, translate.EndpointType, translate.ListenerType, translate.RouteType} {
		client.Subscribe(typeURL, xds.HandlerFunc(func(updated []xds.Resource, _ []string) error {
			config.mu.Lock()
			defer config.mu.Unlock()
			for _, r := range updated {
				config.config[typeURL] = append(config.config[typeURL], r.Name)
			}
			return nil
		}))
	}
	w.run(client)
	config.mu.Lock()
	defer config.mu.Unlock()
	if !strings.Contains(strings.Join(config.config[translate.ClusterType], " "), "server.default.svc.cluster.local") {
		t.Errorf("clusters of the waypoint: %v, none for the service", config.config[translate.ClusterType])
	}
	if len(config.config[translate.ListenerType]) == 0 {
		t.Error("the waypoint has no listener")
	}
}

func TestAddressesWithoutPodsAreWorkloads(t *testing.T) {
	w := start(t, map[string]string{"api.yaml": `
apiVersion: v1
kind: Service
metadata: {name: kubernetes}
spec: {clusterIP: 10.96.0.1, ports: [{name: https, port: 443, targetPort: 6443}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: kubernetes, labels: {kubernetes.io/service-name: kubernetes}}
addressType: IPv4
ports: [{name: https, port: 6443}]
endpoints: [{addresses: [192.0.2.10]}]
`})
	zt := w.ztunnel()
	const uid = "Kubernetes/discovery.k8s.io/EndpointSlice/default/kubernetes/192.0.2.10"
	api := zt.workload(uid)
	if api == nil || api.Protocol != mesh.ProtocolNone || len(api.Services) != 1 {
		t.Fatalf("the API server's address: %+v", api)
	}
	// A pod that appears at the address takes its place.
	w.write("pod.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: api}\nstatus: {phase: Running, podIP: 192.0.2.10, podIPs: [{ip: 192.0.2.10}]}\n")
	w.wait("the pod stands for its address", func() bool {
		pod := zt.workload("Kubernetes//Pod/default/api")
		return zt.workload(uid) == nil && pod != nil && len(pod.Services) == 1
	})
	if err := os.Remove(filepath.Join(w.dir, "pod.yaml")); err != nil {
		t.Fatal(err)
	}
	w.wait("the address stands for itself again", func() bool { return zt.workload(uid) != nil })
}
