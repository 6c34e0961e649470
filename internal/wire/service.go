package wire

import (
	"errors"
	"fmt"

	"github.com/fairlead-mesh/fairlead/api/workload"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// EncodeService writes a service as an Address resource; its resource name is s.Key().String().
func EncodeService(s *mesh.Service) *workload.Address {
	out := &workload.Service{
		Name: s.Name, Namespace: s.Namespace, Hostname: s.Hostname,
		Ports: encodePorts(s.Ports), SubjectAltNames: s.SubjectAltNames,
		Waypoint: encodeGateway(s.Waypoint), LoadBalancing: encodeLoadBalancing(s.LoadBalancing),
		IpFamilies: encodeIPFamilies(s.Addresses), Canonical: s.Canonical,
	}
	for _, a := range s.Addresses {
		out.Addresses = append(out.Addresses, encodeNetworkAddress(a))
	}
	return &workload.Address{Type: &workload.Address_Service{Service: out}}
}

func decodeService(s *workload.Service) (*mesh.Service, error) {
	if s.GetHostname() == "" || s.GetNamespace() == "" {
		return nil, errors.New("without a namespace or hostname")
	}
	out := &mesh.Service{
		Name: s.GetName(), Namespace: s.GetNamespace(), Hostname: s.GetHostname(),
		SubjectAltNames: s.GetSubjectAltNames(), Canonical: s.GetCanonical(),
	}
	for _, a := range s.GetAddresses() {
		address, err := decodeNetworkAddress(a)
		if err != nil {
			return nil, err
		}
		out.Addresses = append(out.Addresses, address)
	}
	var errs [3]error
	out.Ports, errs[0] = decodePorts(s.GetPorts())
	out.Waypoint, errs[1] = decodeGateway(s.GetWaypoint())
	out.LoadBalancing, errs[2] = decodeLoadBalancing(s.GetLoadBalancing())
	if err := errors.Join(errs[:]...); err != nil {
		return nil, err
	}
	return out, nil
}

// encodeIPFamilies tells which families the addresses have; without addresses it is left to the receiver.
func encodeIPFamilies(addresses []mesh.NetworkAddress) workload.IPFamilies {
	var v4, v6 bool
	for _, a := range addresses {
		v4 = v4 || a.Address.Is4()
		v6 = v6 || a.Address.Is6()
	}
	switch {
	case v4 && v6:
		return workload.IPFamilies_DUAL
	case v4:
		return workload.IPFamilies_IPV4_ONLY
	case v6:
		return workload.IPFamilies_IPV6_ONLY
	default:
		return workload.IPFamilies_AUTOMATIC
	}
}

// localityScopes pairs the model's scopes with the wire's, for both directions.
var localityScopes = map[mesh.LocalityScope]workload.LoadBalancing_Scope{
	mesh.ScopeNetwork: workload.LoadBalancing_NETWORK,
	mesh.ScopeRegion:  workload.LoadBalancing_REGION,
	mesh.ScopeZone:    workload.LoadBalancing_ZONE,
	mesh.ScopeSubzone: workload.LoadBalancing_SUBZONE,
	mesh.ScopeNode:    workload.LoadBalancing_NODE,
	mesh.ScopeCluster: workload.LoadBalancing_CLUSTER,
}

// loadBalancingModes pairs the model's modes with the wire's, for both directions.
var loadBalancingModes = map[mesh.LoadBalancingMode]workload.LoadBalancing_Mode{
	mesh.LoadBalanceUnspecified: workload.LoadBalancing_UNSPECIFIED_MODE,
	mesh.LoadBalanceStrict:      workload.LoadBalancing_STRICT,
	mesh.LoadBalanceFailover:    workload.LoadBalancing_FAILOVER,
	mesh.LoadBalancePassthrough: workload.LoadBalancing_PASSTHROUGH,
}

func encodeLoadBalancing(lb mesh.LoadBalancing) *workload.LoadBalancing {
	if len(lb.Preference) == 0 && lb.Mode == mesh.LoadBalanceUnspecified && !lb.AllowUnhealthy {
		return nil
	}
	out := &workload.LoadBalancing{Mode: loadBalancingModes[lb.Mode]}
	for _, scope := range lb.Preference {
		out.RoutingPreference = append(out.RoutingPreference, localityScopes[scope])
	}
	if lb.AllowUnhealthy {
		out.HealthPolicy = workload.LoadBalancing_ALLOW_ALL
	}
	return out
}

func decodeLoadBalancing(lb *workload.LoadBalancing) (mesh.LoadBalancing, error) {
	var out mesh.LoadBalancing
	for _, scope := range lb.GetRoutingPreference() {
		decoded, ok := keyOf(localityScopes, scope)
		if !ok {
			return out, fmt.Errorf("unknown load balancing scope %d", scope)
		}
		out.Preference = append(out.Preference, decoded)
	}
	mode, ok := keyOf(loadBalancingModes, lb.GetMode())
	if !ok {
		return out, fmt.Errorf("unknown load balancing mode %d", lb.GetMode())
	}
	out.Mode = mode
	switch lb.GetHealthPolicy() {
	case workload.LoadBalancing_ONLY_HEALTHY:
	case workload.LoadBalancing_ALLOW_ALL:
		out.AllowUnhealthy = true
	default:
		return out, fmt.Errorf("unknown health policy %d", lb.GetHealthPolicy())
	}
	return out, nil
}

// keyOf is the key under which table holds value.
func keyOf[K, V comparable](table map[K]V, value V) (K, bool) {
	for k, v := range table {
		if v == value {
			return k, true
		}
	}
	var zero K
	return zero, false
}
