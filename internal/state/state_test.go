package state

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

func at(ip string) mesh.NetworkAddress { return mesh.NetworkAddress{Address: netip.MustParseAddr(ip)} }

func host(name string) mesh.NamespacedHostname {
	return mesh.NamespacedHostname{Namespace: "default", Hostname: name}
}

func pod(uid, ip string, services ...string) *mesh.Workload {
	w := &mesh.Workload{UID: uid, Namespace: "default", Addresses: []netip.Addr{netip.MustParseAddr(ip)}}
	for _, s := range services {
		if w.Services == nil {
			w.Services = map[mesh.NamespacedHostname][]mesh.Port{}
		}
		w.Services[host(s)] = []mesh.Port{{ServicePort: 80, TargetPort: 8080}}
	}
	return w
}

func service(name string, ips ...string) *mesh.Service {
	s := &mesh.Service{Namespace: "default", Hostname: name}
	for _, ip := range ips {
		s.Addresses = append(s.Addresses, at(ip))
	}
	return s
}

func uids(endpoints []Endpoint) []string {
	var out []string
	for _, e := range endpoints {
		out = append(out, e.Workload.UID)
	}
	return out
}

func keys(policies []*mesh.Authorization) []string {
	var out []string
	for _, p := range policies {
		out = append(out, p.Key())
	}
	return out
}

func expect(t *testing.T, what string, want, got any) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

func TestWorkloads(t *testing.T) {
	s := New()
	a, b := pod("a", "10.0.0.1", "web"), pod("b", "10.0.0.2", "web")
	s.Apply(Change{Workloads: []*mesh.Workload{b, a}})
	before := s.Load()
	expect(t, "endpoints", []string{"a", "b"}, uids(before.Endpoints(host("web"))))
	if before.Workload("a") != a || before.WorkloadAt(at("10.0.0.2")) != b {
		t.Error("a workload is not found by uid or address")
	}

	moved := pod("a", "10.0.0.3", "api")
	s.Apply(Change{Workloads: []*mesh.Workload{moved}, Removed: []string{"b", "nobody", "default/nothing"}})
	after := s.Load()
	expect(t, "endpoints of the left service", []string(nil), uids(after.Endpoints(host("web"))))
	expect(t, "endpoints of the new service", []string{"a"}, uids(after.Endpoints(host("api"))))
	if after.WorkloadAt(at("10.0.0.1")) != nil || after.WorkloadAt(at("10.0.0.3")) != moved || after.Workload("b") != nil {
		t.Error("an address is not that of the workload as it is now")
	}
	expect(t, "the snapshot before", []string{"a", "b"}, uids(before.Endpoints(host("web"))))
	if before.WorkloadAt(at("10.0.0.1")) != a || before.Workload("b") != b {
		t.Error("a snapshot changed after it was taken")
	}
	w, svc, p := after.Sizes()
	expect(t, "sizes", []int{1, 0, 0}, []int{w, svc, p})
}

func TestAddressHandedOn(t *testing.T) {
	s := New()
	first, second, onHost := pod("first", "10.0.0.1"), pod("second", "10.0.0.1"), pod("host", "10.0.0.1")
	onHost.HostNetwork = true
	s.Apply(Change{Workloads: []*mesh.Workload{first}})
	s.Apply(Change{Workloads: []*mesh.Workload{second, onHost}})
	if got := s.Load().WorkloadAt(at("10.0.0.1")); got != second {
		t.Errorf("address is %v's, want the one told of last that owns it", got)
	}
	s.Apply(Change{Removed: []string{"first"}})
	if got := s.Load().WorkloadAt(at("10.0.0.1")); got != second {
		t.Errorf("address is %v's after the first has gone, want the second's", got)
	}
	s.Apply(Change{Removed: []string{"second"}})
	if got := s.Load().WorkloadAt(at("10.0.0.1")); got != nil {
		t.Errorf("address is %v's, want nobody's", got)
	}
}

func TestServices(t *testing.T) {
	s := New()
	a, b := service("a", "10.96.0.1"), service("b", "10.96.0.1", "10.96.0.2")
	s.Apply(Change{Services: []*mesh.Service{b, a}})
	if got := s.Load().ServiceAt(at("10.96.0.1")); got != a {
		t.Errorf("shared address: %v, want the first by name", got)
	}
	canonical := service("b", "10.96.0.1")
	canonical.Canonical = true
	s.Apply(Change{Services: []*mesh.Service{canonical}})
	if got := s.Load().ServiceAt(at("10.96.0.1")); got != canonical {
		t.Errorf("shared address: %v, want the canonical service", got)
	}
	if got := s.Load().ServiceAt(at("10.96.0.2")); got != nil {
		t.Errorf("address given up: still %v's", got)
	}
	s.Apply(Change{Removed: []string{"default/b"}})
	if s.Load().Service(host("b")) != nil || s.Load().ServiceAt(at("10.96.0.1")) != a {
		t.Error("a removed service is still found")
	}
}

func TestPolicies(t *testing.T) {
	s := New()
	policy := func(ns, name string, scope mesh.Scope) *mesh.Authorization {
		return &mesh.Authorization{Namespace: ns, Name: name, Scope: scope}
	}
	s.Apply(Change{Policies: []*mesh.Authorization{
		policy("istio-system", "g2", mesh.ScopeGlobal), policy("istio-system", "g1", mesh.ScopeGlobal),
		policy("default", "ns", mesh.ScopeNamespace), policy("other", "ns", mesh.ScopeNamespace),
		policy("default", "sel", mesh.ScopeSelector), policy("default", "unlisted", mesh.ScopeSelector),
	}})
	w := pod("a", "10.0.0.1")
	w.Policies = []string{"default/sel", "default/unknown", "default/ns"}
	expect(t, "policies", []string{"istio-system/g1", "istio-system/g2", "default/ns", "default/sel"}, keys(s.Load().Policies(w)))

	// A change of scope leaves nothing behind at the old place; a removal in the same change comes first.
	s.Apply(Change{
		Policies:        []*mesh.Authorization{policy("istio-system", "g1", mesh.ScopeSelector), policy("default", "ns", mesh.ScopeNamespace)},
		RemovedPolicies: []string{"default/sel", "default/ns", "default/never"},
	})
	expect(t, "policies after", []string{"istio-system/g2", "default/ns"}, keys(s.Load().Policies(w)))
	expect(t, "all", []string{"default/ns", "default/unlisted", "istio-system/g1", "istio-system/g2", "other/ns"}, keys(s.Load().AllPolicies()))
	s.Apply(Change{RemovedPolicies: []string{"istio-system/g2", "default/ns"}})
	expect(t, "none left", []string(nil), keys(s.Load().Policies(w)))
}

func TestChanged(t *testing.T) {
	s := New()
	changed := s.Changed()
	select {
	case <-changed:
		t.Fatal("changed before a change")
	default:
	}
	s.Apply(Change{})
	select {
	case <-changed:
	default:
		t.Fatal("not changed after a change")
	}
	if s.Changed() == changed {
		t.Error("the next change has no channel of its own")
	}
}

// TestAgainstMaps holds the store, through random changes, to plain maps rebuilt each time; and every snapshot, to what
// it was when it was taken.
func TestAgainstMaps(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	s, model := New(), map[string]*mesh.Workload{}
	type taken struct {
		snapshot *Snapshot
		want     map[string]*mesh.Workload
	}
	var history []taken
	for range 400 {
		var c Change
		for range r.IntN(20) {
			uid := fmt.Sprint("pod", r.IntN(60))
			if r.IntN(3) == 0 {
				c.Removed = append(c.Removed, uid)
				continue
			}
			c.Workloads = append(c.Workloads, pod(uid, fmt.Sprintf("10.0.0.%d", 1+r.IntN(80)), fmt.Sprint("s", r.IntN(5))))
		}
		for _, uid := range c.Removed {
			delete(model, uid)
		}
		for _, w := range c.Workloads {
			model[w.UID] = w
		}
		s.Apply(c)
		history = append(history, taken{s.Load(), maps.Clone(model)})
	}
	for i, h := range history {
		if err := agrees(h.snapshot, h.want); err != nil {
			t.Fatalf("seed %d, change %d: %v", seed, i, err)
		}
	}
}

func agrees(s *Snapshot, want map[string]*mesh.Workload) error {
	if got := s.AllWorkloads(); len(got) != len(want) {
		return fmt.Errorf("%d workloads, want %d", len(got), len(want))
	}
	addresses, endpoints := map[mesh.NetworkAddress]bool{}, map[mesh.NamespacedHostname]int{}
	for uid, w := range want {
		if s.Workload(uid) != w {
			return fmt.Errorf("workload %s is %v, want %v", uid, s.Workload(uid), w)
		}
		a := mesh.NetworkAddress{Address: w.Addresses[0]}
		addresses[a] = true
		if got := s.WorkloadAt(a); got == nil || want[got.UID] != got || got.Addresses[0] != a.Address {
			return fmt.Errorf("workload at %v is %v", a, got)
		}
		for key := range w.Services {
			endpoints[key]++
		}
	}
	if s.workloadsAt.size != len(addresses) {
		return fmt.Errorf("%d addresses, want %d", s.workloadsAt.size, len(addresses))
	}
	for i := range 5 {
		key := host(fmt.Sprint("s", i))
		for _, e := range s.Endpoints(key) {
			if want[e.Workload.UID] != e.Workload {
				return fmt.Errorf("%v has the endpoint %v, which is gone", key, e.Workload)
			}
		}
		if got := len(s.Endpoints(key)); got != endpoints[key] {
			return fmt.Errorf("%v has %d endpoints, want %d", key, got, endpoints[key])
		}
	}
	return nil
}

// BenchmarkApplyOne shows what one changed workload costs in meshes of different size: it must not follow the size.
func BenchmarkApplyOne(b *testing.B) {
	for _, size := range []int{1000, 100_000} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			s := New()
			c := Change{}
			for i := range size {
				ip := netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
				c.Workloads = append(c.Workloads, pod(fmt.Sprint("pod", i), ip.String(), fmt.Sprint("s", i/10)))
			}
			s.Apply(c)
			b.ResetTimer()
			for i := range b.N {
				s.Apply(Change{Workloads: c.Workloads[i%size : i%size+1]})
			}
		})
	}
}
