package route

// A name that a pod asks for, in steps:
//  1. The names it may stand for are listed: itself, with the rest of a Kubernetes name added, and without the search
//     domains that the pod's own resolver has added.
//  2. For each, the mesh's services of that hostname are looked up, then those of the wildcards above it.
//  3. Of several, the one of the pod's own namespace is taken, else the one that owns the hostname.
// What the mesh does not know is for the resolver that the pod has asked.
// Next: ztunnel/dns_upstream.go

import (
	"net/netip"
	"strings"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/state"
)

// Resolution is what the mesh knows of a name.
type Resolution struct {
	// Service is what the name stands for; nil when the mesh does not know it.
	Service *mesh.Service
	// Addresses are the service's, of the family asked for. There may be none.
	Addresses []netip.Addr
	// Alias is the name that the addresses belong to, where it is not the one that was asked for.
	Alias string
}

// Resolve looks a name up for a pod: in lower case, with no dot at its end. ipv6 chooses the family.
//
// Services without an address of their own, as headless ones, are left to the resolver asked: it knows which of their
// endpoints are to be shown.
func Resolve(snap *state.Snapshot, client *mesh.Workload, clusterDomain, name string, ipv6 bool) Resolution {
	for _, c := range candidates(client.Namespace, clusterDomain, name) {
		service, wildcard := find(snap, client.Namespace, c.name)
		if service == nil {
			continue
		}
		r := Resolution{Service: service}
		if !wildcard {
			r.Alias = c.alias
		}
		for _, a := range service.Addresses {
			if a.Network == client.Network && a.Address.Is6() == ipv6 {
				r.Addresses = append(r.Addresses, a.Address)
			}
		}
		return r
	}
	return Resolution{}
}

// candidate is a name to look for; alias is what the addresses belong to, when search domains were taken off.
type candidate struct{ name, alias string }

func candidates(namespace, clusterDomain, name string) []candidate {
	list := []candidate{{name: name}}
	for _, full := range kubernetesNames(namespace, clusterDomain, name) {
		list = append(list, candidate{name: full})
	}
	for _, search := range []string{namespace + ".svc." + clusterDomain, "svc." + clusterDomain, clusterDomain} {
		short, ok := strings.CutSuffix(name, "."+search)
		if !ok {
			continue
		}
		list = append(list, candidate{short, short})
		for _, full := range kubernetesNames(namespace, clusterDomain, short) {
			list = append(list, candidate{full, short})
		}
	}
	return list
}

// kubernetesNames are the full names that a short one may stand for in a namespace.
func kubernetesNames(namespace, clusterDomain, name string) []string {
	switch labels := strings.Count(name, ".") + 1; {
	case labels == 1:
		return []string{name + "." + namespace + ".svc." + clusterDomain}
	case labels == 2:
		return []string{name + ".svc." + clusterDomain}
	case labels == 3 && strings.HasSuffix(name, ".svc"):
		return []string{name + "." + clusterDomain}
	}
	return nil
}

// find looks for a service by a name, then by the wildcards above it.
func find(snap *state.Snapshot, namespace, name string) (service *mesh.Service, wildcard bool) {
	if s := choose(snap.ServicesNamed(name), namespace); s != nil {
		return s, false
	}
	for {
		var ok bool
		if _, name, ok = strings.Cut(name, "."); !ok {
			return nil, false
		}
		if s := choose(snap.ServicesNamed("*."+name), namespace); s != nil {
			return s, true
		}
	}
}

// choose prefers the namespace's own service; those without addresses do not count.
func choose(services []*mesh.Service, namespace string) *mesh.Service {
	var first *mesh.Service
	for _, s := range services {
		switch {
		case len(s.Addresses) == 0:
		case s.Namespace == namespace:
			return s
		case first == nil:
			first = s
		}
	}
	return first
}
