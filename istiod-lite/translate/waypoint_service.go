package translate

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// waypointBuilder gathers the output of one call of Waypoint.
type waypointBuilder struct {
	in       WaypointInput
	services []WaypointService
	// known are attached services and backends, by namespace and name.
	known    map[types.NamespacedName]WaypointService
	attached map[types.NamespacedName]struct{}

	policies []boundPolicy
	routes   []boundRoute

	listeners  []*listenerv3.Listener
	tables     []*routev3.RouteConfiguration
	clusters   map[string]*clusterv3.Cluster
	endpoints  []*endpointv3.ClusterLoadAssignment
	conditions []WaypointCondition
	memory     WaypointMemory

	chains []*listenerv3.FilterChain
	ways   []way
	// sniffed tells whether some way in must look at the bytes to know the protocol.
	sniffed bool
}

// portProtocol is what is known of a service port.
type portProtocol uint8

const (
	// protocolUnknown ports are looked at: HTTP where the first bytes are.
	protocolUnknown portProtocol = iota
	protocolTCP
	protocolHTTP
	// protocolHTTP2 ports take HTTP/2 without TLS, gRPC among them.
	protocolHTTP2
)

func newWaypointBuilder(in WaypointInput) *waypointBuilder {
	in.TrustDomain = cmp.Or(in.TrustDomain, mesh.DefaultTrustDomain)
	in.RootNamespace = cmp.Or(in.RootNamespace, "istio-system")
	w := &waypointBuilder{
		in:       in,
		services: slices.Clone(in.Services),
		known:    map[types.NamespacedName]WaypointService{},
		attached: map[types.NamespacedName]struct{}{},
		clusters: map[string]*clusterv3.Cluster{},
	}
	slices.SortFunc(w.services, func(a, b WaypointService) int {
		return cmp.Or(cmp.Compare(a.Service.Namespace, b.Service.Namespace), cmp.Compare(a.Service.Hostname, b.Service.Hostname))
	})
	for _, s := range in.Backends {
		w.known[serviceName(s)] = s
	}
	for _, s := range w.services {
		w.known[serviceName(s)] = s
		w.attached[serviceName(s)] = struct{}{}
	}
	return w
}

func serviceName(s WaypointService) types.NamespacedName {
	return types.NamespacedName{Namespace: s.Service.Namespace, Name: s.Service.Name}
}

func sortedWorkloads(ws []*mesh.Workload) []*mesh.Workload {
	return slices.SortedFunc(slices.Values(ws), func(a, b *mesh.Workload) int { return cmp.Compare(a.UID, b.UID) })
}

// addService makes the way in for each port of a service: its filter chains, route table and clusters.
func (w *waypointBuilder) addService(s WaypointService) {
	way := way{hostname: s.Service.Hostname}
	for _, a := range s.Service.Addresses {
		way.addresses = append(way.addresses, a.Address)
	}
	for _, p := range sortedPorts(s.Service) {
		protocol, ok := protocolOf(s.Object, p.ServicePort)
		if !ok {
			continue
		}
		to := portWay{port: p.ServicePort}
		policies := w.policiesOf(serviceName(s))
		if protocol != protocolTCP {
			name := vipCluster("http", s.Service.Hostname, p.ServicePort)
			w.addCluster(name, s, p.ServicePort, protocol)
			w.tables = append(w.tables, w.routeTable(name, s, p.ServicePort))
			w.chains = append(w.chains, httpChain(name, policies))
			to.http = name
		}
		if protocol == protocolTCP || protocol == protocolUnknown {
			name := vipCluster("tcp", s.Service.Hostname, p.ServicePort)
			w.addCluster(name, s, p.ServicePort, protocolTCP)
			w.chains = append(w.chains, tcpChain(name, policies))
			to.tcp = name
		}
		w.sniffed = w.sniffed || (to.http != "" && to.tcp != "")
		way.ports = append(way.ports, to)
	}
	w.ways = append(w.ways, way)
}

// addWorkload makes the way in for connections to a workload's own addresses, on any port.
func (w *waypointBuilder) addWorkload(wl *mesh.Workload) {
	if len(wl.Addresses) == 0 {
		return
	}
	cluster := "encap|" + wl.UID
	w.clusters[cluster] = workloadCluster(cluster, wl)
	policies := w.policiesOf(types.NamespacedName{})
	w.tables = append(w.tables, singleRoute(cluster))
	http, tcp := "direct-http|"+wl.UID, "direct-tcp|"+wl.UID
	chain := httpChain(cluster, policies)
	chain.Name = http
	w.chains = append(w.chains, chain)
	chain = tcpChain(cluster, policies)
	chain.Name = tcp
	w.chains = append(w.chains, chain)
	w.ways = append(w.ways, way{addresses: wl.Addresses, ports: []portWay{{http: http, tcp: tcp}}})
	w.sniffed = true
}

// backendCluster makes sure of the cluster that a route sends to and names it; ok is false where there is no such port.
func (w *waypointBuilder) backendCluster(s WaypointService, port uint16) (name string, ok bool) {
	if !slices.ContainsFunc(s.Service.Ports, func(p mesh.Port) bool { return p.ServicePort == port }) {
		return "", false
	}
	protocol, ok := protocolOf(s.Object, port)
	if !ok {
		return "", false
	}
	name = fmt.Sprintf("outbound|%d||%s", port, s.Service.Hostname)
	if _, ours := w.attached[serviceName(s)]; ours && protocol != protocolTCP {
		name = vipCluster("http", s.Service.Hostname, port)
	}
	w.addCluster(name, s, port, protocol)
	return name, true
}

func vipCluster(protocol, hostname string, port uint16) string {
	return fmt.Sprintf("inbound-vip|%d|%s|%s", port, protocol, hostname)
}

func sortedPorts(s *mesh.Service) []mesh.Port {
	return slices.SortedFunc(slices.Values(s.Ports), func(a, b mesh.Port) int { return cmp.Compare(a.ServicePort, b.ServicePort) })
}

// protocolOf reads a port's protocol from its appProtocol or the first part of its name, as Istio does; ok is false for
// ports that are not TCP.
func protocolOf(svc *corev1.Service, port uint16) (_ portProtocol, ok bool) {
	if svc == nil {
		return protocolUnknown, true
	}
	for _, p := range svc.Spec.Ports {
		if p.Port != int32(port) || (p.Protocol != "" && p.Protocol != corev1.ProtocolTCP) {
			continue
		}
		name, _, _ := strings.Cut(p.Name, "-")
		if strings.HasPrefix(p.Name, "grpc-web") {
			name = "http"
		}
		if p.AppProtocol != nil {
			name = *p.AppProtocol
		}
		switch strings.ToLower(name) {
		case "http", "kubernetes.io/ws", "grpc-web":
			return protocolHTTP, true
		case "http2", "grpc", "kubernetes.io/h2c":
			return protocolHTTP2, true
		case "tcp", "tls", "https", "kubernetes.io/wss", "mongo", "mysql", "redis":
			return protocolTCP, true
		default:
			return protocolUnknown, true
		}
	}
	return protocolUnknown, false
}

func (w *waypointBuilder) output() WaypointOutput {
	out := WaypointOutput{
		Listeners: w.listeners, Routes: w.tables, Endpoints: w.endpoints, Conditions: w.conditions, Memory: w.memory,
		Clusters: slices.SortedFunc(maps.Values(w.clusters), func(a, b *clusterv3.Cluster) int { return cmp.Compare(a.Name, b.Name) }),
	}
	slices.SortFunc(out.Listeners, func(a, b *listenerv3.Listener) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(out.Routes, func(a, b *routev3.RouteConfiguration) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(out.Endpoints, func(a, b *endpointv3.ClusterLoadAssignment) int { return cmp.Compare(a.ClusterName, b.ClusterName) })
	slices.SortStableFunc(out.Conditions, func(a, b WaypointCondition) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Object.String(), b.Object.String()))
	})
	return out
}
