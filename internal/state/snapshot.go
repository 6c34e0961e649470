package state

import (
	"cmp"
	"slices"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// Snapshot is the mesh as one moment of the store knew it. It never changes, nor do the values and slices it gives
// out: take one, keep it for a whole decision, and do not write to what it returns.
type Snapshot struct {
	workloads   trie[string, *mesh.Workload]
	workloadsAt trie[mesh.NetworkAddress, []*mesh.Workload]
	services    trie[mesh.NamespacedHostname, *mesh.Service]
	servicesAt  trie[mesh.NetworkAddress, []*mesh.Service]
	byHostname  trie[string, []*mesh.Service]
	endpoints   trie[mesh.NamespacedHostname, []Endpoint]
	policies    trie[string, *mesh.Authorization]
	// global and byNamespace are the policies that apply without being listed by a workload, sorted by key.
	global      []*mesh.Authorization
	byNamespace trie[string, []*mesh.Authorization]

	changed chan struct{}
}

// Endpoint is a workload that serves a service, and on which ports.
type Endpoint struct {
	Workload *mesh.Workload
	Ports    []mesh.Port
}

// Workload is the workload of that uid, or nil.
func (s *Snapshot) Workload(uid string) *mesh.Workload {
	w, _ := s.workloads.get(uid)
	return w
}

// WorkloadAt is the workload that owns the address, or nil. Host-network workloads own none: they share their node's.
// Where an address is claimed by several for a moment (a pod's address given to the next pod), it is the one that was
// told of last.
func (s *Snapshot) WorkloadAt(a mesh.NetworkAddress) *mesh.Workload {
	claims, _ := s.workloadsAt.get(a)
	if len(claims) == 0 {
		return nil
	}
	return claims[len(claims)-1]
}

// Service is the service of that name, or nil.
func (s *Snapshot) Service(key mesh.NamespacedHostname) *mesh.Service {
	svc, _ := s.services.get(key)
	return svc
}

// ServiceAt is the service that has the address, or nil. Where several have it, the canonical one is preferred, then
// the first by name, so that every node chooses alike.
func (s *Snapshot) ServiceAt(a mesh.NetworkAddress) *mesh.Service {
	claims, _ := s.servicesAt.get(a)
	if len(claims) == 0 {
		return nil
	}
	return claims[0]
}

// ServicesNamed are the services with that hostname, which may be a wildcard as they were given it ("*.example.com"): the
// canonical one first, then by namespace.
func (s *Snapshot) ServicesNamed(hostname string) []*mesh.Service {
	named, _ := s.byHostname.get(hostname)
	return named
}

// Endpoints are the workloads of a service, sorted by uid; they may be known before the service itself is.
func (s *Snapshot) Endpoints(service mesh.NamespacedHostname) []Endpoint {
	e, _ := s.endpoints.get(service)
	return e
}

// Policies are those that apply to a workload: the global ones, its namespace's, and the selector policies it lists.
// A listed one that is not known is left out, as nothing can be said of what it would do; the control plane sends
// policies before the workloads that list them.
func (s *Snapshot) Policies(w *mesh.Workload) []*mesh.Authorization {
	inNamespace, _ := s.byNamespace.get(w.Namespace)
	if len(w.Policies) == 0 && len(s.global) == 0 {
		return inNamespace
	}
	out := make([]*mesh.Authorization, 0, len(s.global)+len(inNamespace)+len(w.Policies))
	out = append(append(out, s.global...), inNamespace...)
	for _, key := range w.Policies {
		if p, ok := s.policies.get(key); ok && p.Scope == mesh.ScopeSelector {
			out = append(out, p)
		}
	}
	return out
}

// AllWorkloads are all workloads, sorted by uid; for people to look at, not for a connection's path.
func (s *Snapshot) AllWorkloads() []*mesh.Workload {
	return sorted(s.workloads, func(a, b *mesh.Workload) int { return cmp.Compare(a.UID, b.UID) })
}

// AllServices are all services, sorted by namespace and hostname.
func (s *Snapshot) AllServices() []*mesh.Service {
	return sorted(s.services, compareServices)
}

// AllPolicies are all policies, sorted by key.
func (s *Snapshot) AllPolicies() []*mesh.Authorization {
	return sorted(s.policies, comparePolicies)
}

// Sizes are the numbers of workloads, services and policies.
func (s *Snapshot) Sizes() (workloads, services, policies int) {
	return s.workloads.size, s.services.size, s.policies.size
}

func sorted[K comparable, V any](t trie[K, V], compare func(a, b V) int) []V {
	out := make([]V, 0, t.size)
	for _, v := range t.all() {
		out = append(out, v)
	}
	slices.SortFunc(out, compare)
	return out
}

func compareServices(a, b *mesh.Service) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Hostname, b.Hostname))
}

func comparePolicies(a, b *mesh.Authorization) int { return cmp.Compare(a.Key(), b.Key()) }
