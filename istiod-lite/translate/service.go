package translate

import (
	"cmp"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// Service translates a Kubernetes Service and says how it is bound to a waypoint. An ExternalName Service is none of
// the mesh's: nil.
func Service(m Mesh, svc *corev1.Service, namespaceLabels map[string]string, waypoints Waypoints) (*mesh.Service, Binding) {
	if svc.Spec.Type == corev1.ServiceTypeExternalName {
		return nil, Binding{}
	}
	var binding Binding
	if !isWaypointService(svc, waypoints) {
		binding = bind(waypoints, trafficService, svc.Namespace, svc.Labels, namespaceLabels)
	}
	network := m.Network
	if n := firstOf(svc.Labels, labelNetwork); n != "" {
		network = n
	}
	out := &mesh.Service{
		Name: svc.Name, Namespace: svc.Namespace, Hostname: m.Hostname(svc.Namespace, svc.Name),
		Waypoint: binding.address(m), LoadBalancing: loadBalancing(svc), Canonical: true,
	}
	for _, ip := range serviceAddresses(svc) {
		out.Addresses = append(out.Addresses, mesh.NetworkAddress{Network: network, Address: ip})
	}
	for _, p := range svc.Spec.Ports {
		if isTCP(&p.Protocol) {
			out.Ports = append(out.Ports, mesh.Port{ServicePort: uint16(p.Port), TargetPort: numericTarget(p)})
		}
	}
	return out, binding
}

// isWaypointService: a waypoint's own Service is not behind a waypoint.
func isWaypointService(svc *corev1.Service, waypoints Waypoints) bool {
	_, named := waypoints[types.NamespacedName{Namespace: svc.Namespace, Name: svc.Name}]
	return named || svc.Labels[labelManaged] == managedByMeshController
}

// numericTarget is the target port where it is a number; a named one differs from pod to pod, and each workload says it.
func numericTarget(p corev1.ServicePort) uint16 {
	if n := p.TargetPort.IntValue(); n > 0 && n < 1<<16 {
		return uint16(n)
	}
	return 0
}

func isTCP(p *corev1.Protocol) bool { return p == nil || *p == "" || *p == corev1.ProtocolTCP }

// serviceAddresses are those that stand for the service inside the cluster: its cluster IPs, and the addresses of its
// load balancer, which kube-proxy serves inside the cluster too.
func serviceAddresses(svc *corev1.Service) []netip.Addr {
	texts := slices.Clone(svc.Spec.ClusterIPs)
	if len(texts) == 0 {
		texts = []string{svc.Spec.ClusterIP}
	}
	for _, ingress := range svc.Status.LoadBalancer.Ingress {
		if ingress.IPMode == nil || *ingress.IPMode == corev1.LoadBalancerIPModeVIP {
			texts = append(texts, ingress.IP)
		}
	}
	var out []netip.Addr
	for _, text := range texts {
		if ip, err := netip.ParseAddr(text); err == nil && !slices.Contains(out, ip) {
			out = append(out, ip)
		}
	}
	return out
}

func loadBalancing(svc *corev1.Service) mesh.LoadBalancing {
	lb := mesh.LoadBalancing{AllowUnhealthy: svc.Spec.PublishNotReadyAddresses}
	if p := svc.Spec.InternalTrafficPolicy; p != nil && *p == corev1.ServiceInternalTrafficPolicyLocal {
		lb.Mode, lb.Preference = mesh.LoadBalanceStrict, []mesh.LocalityScope{mesh.ScopeNode}
		return lb
	}
	distribution := svc.Annotations[annotationTrafficDistrib]
	if d := svc.Spec.TrafficDistribution; d != nil {
		distribution = *d
	}
	switch distribution {
	case corev1.ServiceTrafficDistributionPreferClose:
		lb.Preference = []mesh.LocalityScope{mesh.ScopeNetwork, mesh.ScopeRegion, mesh.ScopeZone, mesh.ScopeSubzone}
	case "PreferSameZone":
		lb.Preference = []mesh.LocalityScope{mesh.ScopeNetwork, mesh.ScopeRegion, mesh.ScopeZone}
	case "PreferSameNode":
		lb.Preference = []mesh.LocalityScope{mesh.ScopeNetwork, mesh.ScopeRegion, mesh.ScopeZone, mesh.ScopeSubzone, mesh.ScopeNode}
	default:
		return lb
	}
	lb.Mode = mesh.LoadBalanceFailover
	return lb
}

// Backend is one address behind a service, as its EndpointSlices have it.
type Backend struct {
	Address netip.Addr
	// Pod is the pod at the address; empty where the slice names none.
	Pod types.NamespacedName
	// Slice the address stands in.
	Slice string
	Node  string
	Zone  string
	Ports []mesh.Port
}

// Backends are the ready addresses behind a service.
func Backends(svc *corev1.Service, endpointSlices []*discoveryv1.EndpointSlice) []Backend {
	var out []Backend
	inOrder := slices.SortedFunc(slices.Values(endpointSlices), func(a, b *discoveryv1.EndpointSlice) int { return cmp.Compare(a.Name, b.Name) })
	for _, slice := range inOrder {
		ports := slicePorts(svc, slice)
		if len(ports) == 0 || slice.AddressType == discoveryv1.AddressTypeFQDN {
			continue
		}
		for _, e := range slice.Endpoints {
			if e.Conditions.Ready != nil && !*e.Conditions.Ready {
				continue
			}
			b := Backend{Slice: slice.Name, Ports: ports}
			if e.NodeName != nil {
				b.Node = *e.NodeName
			}
			if e.Zone != nil {
				b.Zone = *e.Zone
			}
			if ref := e.TargetRef; ref != nil && ref.Kind == "Pod" {
				b.Pod = types.NamespacedName{Namespace: ref.Namespace, Name: ref.Name}
				if ref.Namespace == "" {
					b.Pod.Namespace = slice.Namespace
				}
			}
			for _, text := range e.Addresses {
				if ip, err := netip.ParseAddr(text); err == nil {
					b.Address = ip
					out = append(out, b)
				}
			}
		}
	}
	return out
}

// slicePorts joins a service's ports with those of one of its slices, by name.
func slicePorts(svc *corev1.Service, slice *discoveryv1.EndpointSlice) []mesh.Port {
	var out []mesh.Port
	for _, sp := range svc.Spec.Ports {
		for _, ep := range slice.Ports {
			name := ""
			if ep.Name != nil {
				name = *ep.Name
			}
			if name == sp.Name && ep.Port != nil && isTCP(ep.Protocol) && isTCP(&sp.Protocol) {
				out = append(out, mesh.Port{ServicePort: uint16(sp.Port), TargetPort: uint16(*ep.Port)})
			}
		}
	}
	return out
}
