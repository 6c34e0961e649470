package route

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/state"
)

func TestResolve(t *testing.T) {
	named := func(namespace, hostname string, canonical bool, ips ...string) *mesh.Service {
		s := &mesh.Service{Namespace: namespace, Hostname: hostname, Canonical: canonical}
		for _, ip := range ips {
			s.Addresses = append(s.Addresses, at(ip))
		}
		return s
	}
	far := named("shop", "far.example", false, "10.1.0.9")
	far.Addresses[0].Network = "other"
	store := state.New()
	store.Apply(state.Change{Services: []*mesh.Service{
		named("shop", "orders.shop.svc.cluster.local", true, "10.1.0.1", "fd01::1"),
		named("bank", "orders.bank.svc.cluster.local", true, "10.1.0.2"),
		named("shop", "headless.shop.svc.cluster.local", true),
		named("shop", "api.example.com", false, "240.240.0.1"),
		named("shop", "*.wild.example", false, "240.240.0.2"),
		named("bank", "both.example", false, "240.240.0.3"),
		named("shop", "both.example", false, "240.240.0.4"),
		named("aaa", "owned.example", false, "240.240.0.5"),
		named("bank", "owned.example", true, "240.240.0.6"),
		far,
	}})
	const none = "-"
	for _, tc := range []struct {
		name, ask, namespace string
		ipv6                 bool
		want, alias          string
	}{
		{name: "full name", ask: "orders.shop.svc.cluster.local", want: "10.1.0.1"},
		{name: "full name, IPv6", ask: "orders.shop.svc.cluster.local", ipv6: true, want: "fd01::1"},
		{name: "known, not in this family", ask: "orders.bank.svc.cluster.local", ipv6: true, want: ""},
		{name: "short name in the pod's namespace", ask: "orders", want: "10.1.0.1"},
		{name: "short name in another pod's namespace", ask: "orders", namespace: "bank", want: "10.1.0.2"},
		{name: "with the namespace", ask: "orders.bank", want: "10.1.0.2"},
		{name: "with svc", ask: "orders.bank.svc", want: "10.1.0.2"},
		{name: "search domain added to a short name", ask: "orders.bank.svc.cluster.local.shop.svc.cluster.local", want: "10.1.0.2", alias: "orders.bank.svc.cluster.local"},
		{name: "search domain added to a host outside", ask: "api.example.com.shop.svc.cluster.local", want: "240.240.0.1", alias: "api.example.com"},
		{name: "last search domain", ask: "api.example.com.cluster.local", want: "240.240.0.1", alias: "api.example.com"},
		{name: "another namespace's search domain is not the pod's", ask: "api.example.com.bank.svc.cluster.local", want: none},
		{name: "host outside", ask: "api.example.com", want: "240.240.0.1"},
		{name: "host outside, IPv6", ask: "api.example.com", ipv6: true, want: ""},
		{name: "wildcard", ask: "a.b.wild.example", want: "240.240.0.2"},
		{name: "wildcard with a search domain keeps the name", ask: "a.wild.example.shop.svc.cluster.local", want: "240.240.0.2"},
		{name: "what the wildcard stands on", ask: "wild.example", want: none},
		{name: "own namespace first", ask: "both.example", want: "240.240.0.4"},
		{name: "the owner of the hostname", ask: "owned.example", want: "240.240.0.6"},
		{name: "in another network", ask: "far.example", want: ""},
		{name: "headless", ask: "headless.shop.svc.cluster.local", want: none},
		{name: "nobody", ask: "www.example.com", want: none},
		{name: "one label of nobody", ask: "localhost", want: none},
		{name: "the root", ask: "", want: none},
	} {
		t.Run(tc.name, func(t *testing.T) {
			namespace := tc.namespace
			if namespace == "" {
				namespace = "shop"
			}
			r := Resolve(store.Load(), &mesh.Workload{Namespace: namespace}, "cluster.local", tc.ask, tc.ipv6)
			got := none
			if r.Service != nil {
				got = ""
				for _, a := range r.Addresses {
					got += a.String()
				}
			}
			if diff := cmp.Diff([]string{tc.want, tc.alias}, []string{got, r.Alias}); diff != "" {
				t.Errorf("addresses and alias (-want +got):\n%s", diff)
			}
		})
	}
	store.Apply(state.Change{Removed: []string{"shop/both.example"}})
	if r := Resolve(store.Load(), &mesh.Workload{Namespace: "shop"}, "cluster.local", "both.example", false); r.Addresses[0] != netip.MustParseAddr("240.240.0.3") {
		t.Errorf("after the removal of the namespace's own: %v", r.Addresses)
	}
}
