package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"
)

// waypointGateway is what `fairlead waypoint apply` makes.
const waypointGateway = `apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata:
  namespace: %[1]s
  name: %[2]s
  labels:
    istio.io/waypoint-for: service
spec:
  gatewayClassName: istio-waypoint
  listeners:
  - name: mesh
    port: 15008
    protocol: HBONE
`

// Waypoint makes a waypoint: the Gateway, and the Service and pod that the control plane deploys for it in a cluster.
func (w *World) Waypoint(ctx context.Context, namespace, name string, node int) (*Pod, error) {
	if err := w.Apply("gateway."+namespace+"."+name, fmt.Sprintf(waypointGateway, namespace, name)); err != nil {
		return nil, err
	}
	labels := map[string]string{
		"gateway.networking.k8s.io/gateway-name": name,
		"gateway.istio.io/managed":               "istio.io-mesh-controller",
		"istio.io/dataplane-mode":                "none",
	}
	_, err := w.Service(ServiceSpec{
		Namespace: namespace, Name: name, Labels: labels,
		Selector: map[string]string{"gateway.networking.k8s.io/gateway-name": name},
		Ports:    []ServicePort{{Name: "mesh", Port: 15008, Target: 15008, AppProtocol: "hbone"}, {Name: "status-port", Port: 15021, Target: 15021}},
	})
	if err != nil {
		return nil, err
	}
	spec := PodSpec{Namespace: namespace, Name: name + "-1", ServiceAccount: name, Node: node, Labels: labels}
	return w.pod(ctx, spec, (*Pod).startWaypoint)
}

// startWaypoint starts the pod's waypoint and waits until it is ready, which it is when it has its configuration.
func (p *Pod) startWaypoint(ctx context.Context) error {
	w := p.node.world
	token, err := w.grant(p.Namespace, p.ServiceAccount, p.Name)
	if err != nil {
		return err
	}
	address := "https://" + istiodHost + ":15012"
	p.waypoint, err = p.thread.start(filepath.Join(w.Dir, "log"), command{
		name: waypointLog(p), path: filepath.Join(w.opts.Bin, "waypoint"), cgroup: p.cgroup,
		env: []string{
			"XDS_ADDRESS=" + address, "CA_ADDRESS=" + address, "XDS_ROOT_CA=" + w.rootCert(), "CA_ROOT_CA=" + w.rootCert(),
			"AUTH_TOKEN=" + token, "NODE_NAME=" + p.node.Name, "POD_NAME=" + p.Name, "POD_NAMESPACE=" + p.Namespace,
			"SERVICE_ACCOUNT=" + p.ServiceAccount, "GATEWAY_NAME=" + p.ServiceAccount, "INSTANCE_IP=" + p.Addrs[0].String(),
			"CLUSTER_ID=Kubernetes", "TRUST_DOMAIN=cluster.local",
		},
	})
	if err != nil {
		return err
	}
	return p.waypoint.ready(ctx, p.thread, netip.MustParseAddrPort("127.0.0.1:15021"), "/healthz/ready")
}

func waypointLog(p *Pod) string { return "waypoint." + p.Namespace + "." + p.Name }

// WaypointSaw is the identity that the client of a waypoint's last request proved, as the waypoint's access log has it;
// empty when there was no request.
func (p *Pod) WaypointSaw() (string, error) {
	identity := ""
	err := eachLine(p.node.world.logFile(waypointLog(p)), 0, func(text []byte) {
		var line struct {
			Identity string `json:"src.identity"`
		}
		if json.Unmarshal(text, &line) == nil && line.Identity != "" {
			identity = line.Identity
		}
	})
	return identity, err
}
