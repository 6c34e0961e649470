// Package balance (decisions) chooses one of a service's endpoints for a connection: those that may take traffic, then
// those nearest by the service's preference, then one of them at random, weighed by capacity.
package balance

import "github.com/fairlead-mesh/fairlead/internal/mesh"

// Pick returns the index of the endpoint chosen among n, or false when none may be. at(i) is the workload of endpoint
// i, or nil where the caller rules it out; it is asked more than once and must answer alike. random is the only source
// of chance: the same arguments give the same endpoint.
func Pick(lb mesh.LoadBalancing, source *mesh.Workload, n int, at func(int) *mesh.Workload, random uint64) (int, bool) {
	best, total := -1, uint64(0)
	for i := range n {
		rank, ok := rank(lb, source, at(i))
		switch {
		case !ok || rank < best:
		case rank > best:
			best, total = rank, weight(at(i))
		default:
			total += weight(at(i))
		}
	}
	if best < 0 {
		return 0, false
	}
	left := random % total
	for i := range n {
		if rank, ok := rank(lb, source, at(i)); !ok || rank != best {
			continue
		}
		if w := weight(at(i)); left < w {
			return i, true
		} else {
			left -= w
		}
	}
	return 0, false
}

// rank says how near an endpoint is, higher is nearer, and whether it may take traffic at all.
func rank(lb mesh.LoadBalancing, source, endpoint *mesh.Workload) (int, bool) {
	if endpoint == nil || (!endpoint.Healthy && !lb.AllowUnhealthy) {
		return 0, false
	}
	if lb.Mode != mesh.LoadBalanceStrict && lb.Mode != mesh.LoadBalanceFailover {
		return 0, true
	}
	matched := 0
	for _, scope := range lb.Preference {
		if !shares(scope, source, endpoint) {
			break
		}
		matched++
	}
	if lb.Mode == mesh.LoadBalanceStrict && matched < len(lb.Preference) {
		return 0, false
	}
	return matched, true
}

// shares tells whether both workloads are in the same place of that scope.
func shares(scope mesh.LocalityScope, a, b *mesh.Workload) bool {
	if a == nil {
		return false
	}
	switch scope {
	case mesh.ScopeNetwork:
		return a.Network == b.Network
	case mesh.ScopeRegion:
		return a.Locality.Region == b.Locality.Region
	case mesh.ScopeZone:
		return a.Locality.Region == b.Locality.Region && a.Locality.Zone == b.Locality.Zone
	case mesh.ScopeSubzone:
		return a.Locality == b.Locality
	case mesh.ScopeNode:
		return a.Node == b.Node && a.ClusterID == b.ClusterID
	case mesh.ScopeCluster:
		return a.ClusterID == b.ClusterID
	}
	return false
}

func weight(w *mesh.Workload) uint64 { return max(1, uint64(w.Capacity)) }
