package mesh

// LocalityScope is a level that load balancing prefers to keep to.
type LocalityScope uint8

// The scopes, widest first.
const (
	ScopeNetwork LocalityScope = iota + 1
	ScopeRegion
	ScopeZone
	ScopeSubzone
	ScopeNode
	ScopeCluster
)

// LoadBalancingMode says what happens where no endpoint matches every scope.
type LoadBalancingMode uint8

// The load balancing modes.
const (
	LoadBalanceUnspecified LoadBalancingMode = iota
	// LoadBalanceStrict: only endpoints that match all scopes.
	LoadBalanceStrict
	// LoadBalanceFailover: those that match most scopes, first.
	LoadBalanceFailover
	// LoadBalancePassthrough: to the address asked for, not to an endpoint.
	LoadBalancePassthrough
)

// LoadBalancing is a service's endpoint preference.
type LoadBalancing struct {
	Preference []LocalityScope
	Mode       LoadBalancingMode
	// AllowUnhealthy: endpoints that are not ready take traffic too (publishNotReadyAddresses).
	AllowUnhealthy bool
}

// Service is a name and its addresses that stand for a set of workloads.
type Service struct {
	Name      string
	Namespace string
	Hostname  string
	Addresses []NetworkAddress
	Ports     []Port
	// SubjectAltNames are the identities the service's endpoints may have; empty: each endpoint its own.
	SubjectAltNames []string
	Waypoint        *GatewayAddress
	LoadBalancing   LoadBalancing
	// Canonical: this service owns its hostname where several namespaces define it.
	Canonical bool
}

// Key is the service's name across the mesh.
func (s *Service) Key() NamespacedHostname {
	return NamespacedHostname{Namespace: s.Namespace, Hostname: s.Hostname}
}
