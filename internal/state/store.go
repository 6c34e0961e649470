// Package state (words) is what a node knows of the mesh: a store that changes are applied to, and immutable snapshots
// of it that readers load with one pointer and keep for a whole decision.
//
// The maps of a snapshot are persistent (trie.go), so that a change costs what it changes and not the size of the
// mesh; the slices in them (a service's endpoints, a namespace's policies) are copied when one of theirs changes.
//
// Next: internal/authz/authz.go, and internal/route/outbound.go: decisions over one snapshot.
package state

import (
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// Change is what becomes known at once: a snapshot shows all of it or nothing. The store keeps the pointers: do not
// write to the values afterwards.
type Change struct {
	Workloads []*mesh.Workload
	Services  []*mesh.Service
	Policies  []*mesh.Authorization
	// Removed are workloads and services by their xDS resource names (a uid, or "<namespace>/<hostname>"); what is not
	// known is passed over. Removals come before additions.
	Removed []string
	// RemovedPolicies are policies by "<namespace>/<name>".
	RemovedPolicies []string
}

// Store holds the current snapshot.
type Store struct {
	mu      sync.Mutex // one writer at a time
	current atomic.Pointer[Snapshot]
}

// New is a store that knows nothing.
func New() *Store {
	s := &Store{}
	s.current.Store(&Snapshot{
		workloads:   newTrie[string, *mesh.Workload](),
		workloadsAt: newTrie[mesh.NetworkAddress, []*mesh.Workload](),
		services:    newTrie[mesh.NamespacedHostname, *mesh.Service](),
		servicesAt:  newTrie[mesh.NetworkAddress, []*mesh.Service](),
		byHostname:  newTrie[string, []*mesh.Service](),
		endpoints:   newTrie[mesh.NamespacedHostname, []Endpoint](),
		policies:    newTrie[string, *mesh.Authorization](),
		byNamespace: newTrie[string, []*mesh.Authorization](),
		changed:     make(chan struct{}),
	})
	return s
}

// Load is the current snapshot.
func (s *Store) Load() *Snapshot { return s.current.Load() }

// Changed is closed when the snapshot that Load gives now has been followed by another. Take it before Load, or a
// change between the two goes unseen.
func (s *Store) Changed() <-chan struct{} { return s.current.Load().changed }

// Apply makes a change known.
func (s *Store) Apply(c Change) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.current.Load()
	next := *old
	next.changed = make(chan struct{})
	e := &edit{
		Snapshot:  &next,
		batch:     &batch{},
		endpoints: map[mesh.NamespacedHostname]map[string]*Endpoint{},
		policies:  map[string]map[string]*mesh.Authorization{},
	}
	for _, name := range c.Removed {
		if w := e.Workload(name); w != nil {
			e.removeWorkload(w)
		} else if svc := e.serviceNamed(name); svc != nil {
			e.removeService(svc)
		}
	}
	for _, w := range c.Workloads {
		e.addWorkload(w)
	}
	for _, svc := range c.Services {
		e.addService(svc)
	}
	for _, key := range c.RemovedPolicies {
		if p, ok := e.Snapshot.policies.get(key); ok {
			e.removePolicy(p)
		}
	}
	for _, p := range c.Policies {
		e.addPolicy(p)
	}
	e.finish()
	s.current.Store(&next)
	close(old.changed)
}

// edit is a snapshot in the making. What is kept in sorted slices is collected first and merged once, in finish, so
// that a service of many endpoints is copied once however many of them change.
type edit struct {
	*Snapshot
	batch *batch
	// endpoints to set, or to remove where nil, by service and uid.
	endpoints map[mesh.NamespacedHostname]map[string]*Endpoint
	// policies of global ("") and namespace scope to set, or to remove where nil, by namespace and key.
	policies map[string]map[string]*mesh.Authorization
}

func (e *edit) serviceNamed(name string) *mesh.Service {
	ns, host, _ := strings.Cut(name, "/")
	return e.Service(mesh.NamespacedHostname{Namespace: ns, Hostname: host})
}

func (e *edit) addWorkload(w *mesh.Workload) {
	if old := e.Workload(w.UID); old != nil {
		e.removeWorkload(old)
	}
	e.workloads.set(e.batch, w.UID, w)
	for _, a := range ownAddresses(w) {
		claims, _ := e.workloadsAt.get(a)
		e.workloadsAt.set(e.batch, a, append(slices.Clip(claims), w))
	}
	for key, ports := range w.Services {
		e.setEndpoint(key, w.UID, &Endpoint{Workload: w, Ports: ports})
	}
}

func (e *edit) removeWorkload(w *mesh.Workload) {
	e.workloads.remove(e.batch, w.UID)
	for _, a := range ownAddresses(w) {
		claims, _ := e.workloadsAt.get(a)
		left := without(claims, w)
		if len(left) == 0 {
			e.workloadsAt.remove(e.batch, a)
		} else {
			e.workloadsAt.set(e.batch, a, left)
		}
	}
	for key := range w.Services {
		e.setEndpoint(key, w.UID, nil)
	}
}

func (e *edit) setEndpoint(service mesh.NamespacedHostname, uid string, endpoint *Endpoint) {
	if e.endpoints[service] == nil {
		e.endpoints[service] = map[string]*Endpoint{}
	}
	e.endpoints[service][uid] = endpoint
}

func (e *edit) addService(svc *mesh.Service) {
	if old := e.Service(svc.Key()); old != nil {
		e.removeService(old)
	}
	e.services.set(e.batch, svc.Key(), svc)
	claim(e.batch, &e.byHostname, svc.Hostname, svc)
	for _, a := range svc.Addresses {
		claim(e.batch, &e.servicesAt, a, svc)
	}
}

func (e *edit) removeService(svc *mesh.Service) {
	e.services.remove(e.batch, svc.Key())
	disclaim(e.batch, &e.byHostname, svc.Hostname, svc)
	for _, a := range svc.Addresses {
		disclaim(e.batch, &e.servicesAt, a, svc)
	}
}

// claim adds a service to those that have the key: the canonical one first, then by name.
func claim[K comparable](b *batch, in *trie[K, []*mesh.Service], key K, svc *mesh.Service) {
	claims, _ := in.get(key)
	claims = append(slices.Clip(claims), svc)
	slices.SortFunc(claims, func(a, b *mesh.Service) int {
		if a.Canonical != b.Canonical {
			if a.Canonical {
				return -1
			}
			return 1
		}
		return compareServices(a, b)
	})
	in.set(b, key, claims)
}

// disclaim takes a service from those that have the key.
func disclaim[K comparable](b *batch, in *trie[K, []*mesh.Service], key K, svc *mesh.Service) {
	claims, _ := in.get(key)
	if left := without(claims, svc); len(left) > 0 {
		in.set(b, key, left)
	} else {
		in.remove(b, key)
	}
}

func (e *edit) addPolicy(p *mesh.Authorization) {
	if old, ok := e.Snapshot.policies.get(p.Key()); ok {
		e.removePolicy(old)
	}
	e.Snapshot.policies.set(e.batch, p.Key(), p)
	e.setPolicy(p, p)
}

func (e *edit) removePolicy(p *mesh.Authorization) {
	e.Snapshot.policies.remove(e.batch, p.Key())
	e.setPolicy(p, nil)
}

// setPolicy notes p, or its absence, where policies of p's scope are kept.
func (e *edit) setPolicy(p, value *mesh.Authorization) {
	var namespace string
	switch p.Scope {
	case mesh.ScopeGlobal:
	case mesh.ScopeNamespace:
		namespace = p.Namespace
	default:
		return // selector policies are found by their key
	}
	if e.policies[namespace] == nil {
		e.policies[namespace] = map[string]*mesh.Authorization{}
	}
	e.policies[namespace][p.Key()] = value
}

func (e *edit) finish() {
	for service, changes := range e.endpoints {
		old, _ := e.Snapshot.endpoints.get(service)
		next := merge(old, changes,
			func(v Endpoint) string { return v.Workload.UID },
			func(v *Endpoint) (Endpoint, bool) {
				if v == nil {
					return Endpoint{}, false
				}
				return *v, true
			})
		if len(next) == 0 {
			e.Snapshot.endpoints.remove(e.batch, service)
		} else {
			e.Snapshot.endpoints.set(e.batch, service, next)
		}
	}
	for namespace, changes := range e.policies {
		old := e.global
		if namespace != "" {
			old, _ = e.byNamespace.get(namespace)
		}
		next := merge(old, changes, (*mesh.Authorization).Key,
			func(v *mesh.Authorization) (*mesh.Authorization, bool) { return v, v != nil })
		switch {
		case namespace == "":
			e.global = next
		case len(next) == 0:
			e.byNamespace.remove(e.batch, namespace)
		default:
			e.byNamespace.set(e.batch, namespace, next)
		}
	}
}

// merge is old, sorted by key, with the changes made: a new slice, sorted as well. present turns a change into the
// value to keep, or says that it is a removal.
func merge[V, C any](old []V, changes map[string]C, key func(V) string, present func(C) (V, bool)) []V {
	next := make([]V, 0, len(old)+len(changes))
	for _, v := range old {
		if _, touched := changes[key(v)]; !touched {
			next = append(next, v)
		}
	}
	for _, change := range changes {
		if v, ok := present(change); ok {
			next = append(next, v)
		}
	}
	slices.SortFunc(next, func(a, b V) int { return strings.Compare(key(a), key(b)) })
	return next
}

// ownAddresses are the addresses that lead to this workload and no other.
func ownAddresses(w *mesh.Workload) []mesh.NetworkAddress {
	if w.HostNetwork {
		return nil
	}
	out := make([]mesh.NetworkAddress, 0, len(w.Addresses))
	for _, ip := range w.Addresses {
		out = append(out, mesh.NetworkAddress{Network: w.Network, Address: ip})
	}
	return out
}

// without is a copy of values that leaves one out.
func without[T comparable](values []T, one T) []T {
	var left []T
	for _, v := range values {
		if v != one {
			left = append(left, v)
		}
	}
	return left
}
