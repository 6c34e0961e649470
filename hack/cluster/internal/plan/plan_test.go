package plan

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func spec(index, nodes int, family string) Spec {
	return Spec{Name: "lab", Index: index, Nodes: nodes, IPFamily: family, ProxyMode: "nftables", CNI: "ptp", Cgroup: "v1"}
}

func strs[T interface{ String() string }](in []T) []string {
	var out []string
	for _, v := range in {
		out = append(out, v.String())
	}
	return out
}

func TestNewLaysOutBothFamilies(t *testing.T) {
	p, err := New(spec(3, 2, "dual"))
	if err != nil {
		t.Fatal(err)
	}
	got := map[string][]string{
		"machines": strs(p.MachineCIDRs), "host": strs(p.HostAddrs), "control": strs(p.ControlPlane),
		"pods": strs(p.PodCIDRs), "services": strs(p.ServiceCIDRs), "api": strs(p.APIService), "dns": strs(p.DNSService),
		"node1": append(strs(p.Nodes[0].Addrs), strs(p.Nodes[0].PodCIDRs)...),
		"node2": append(strs(p.Nodes[1].Addrs), strs(p.Nodes[1].PodCIDRs)...),
		"names": p.Machines(),
	}
	want := map[string][]string{
		"machines": {"172.30.3.0/24", "fd66:1a1e:3::/64"},
		"host":     {"172.30.3.254", "fd66:1a1e:3::fe"},
		"control":  {"172.30.3.1", "fd66:1a1e:3::1"},
		"pods":     {"10.203.0.0/16", "fd66:1a1e:3:100::/56"},
		"services": {"10.99.0.0/16", "fd66:1a1e:3:fff0::/112"},
		"api":      {"10.99.0.1", "fd66:1a1e:3:fff0::1"},
		"dns":      {"10.99.0.10", "fd66:1a1e:3:fff0::a"},
		"node1":    {"172.30.3.11", "fd66:1a1e:3::b", "10.203.1.0/24", "fd66:1a1e:3:101::/64"},
		"node2":    {"172.30.3.12", "fd66:1a1e:3::c", "10.203.2.0/24", "fd66:1a1e:3:102::/64"},
		"names":    {"control-plane", "node1", "node2"},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestIPv4PlanHasNoIPv6(t *testing.T) {
	p, err := New(spec(0, 1, "ipv4"))
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range p.Prefixes() {
		if !x.Addr().Is4() {
			t.Errorf("unexpected range %v", x)
		}
	}
}

// Nothing in one cluster may overlap anything else in it or in another one, and
// node ranges must lie within the cluster's.
func TestRangesAreDisjoint(t *testing.T) {
	var all []netip.Prefix
	for i := 0; i <= MaxIndex; i++ {
		p, err := New(spec(i, MaxNodes, "dual"))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, p.Prefixes()...)
		seen := map[netip.Addr]bool{p.HostAddrs[0]: true, p.HostAddrs[1]: true, p.ControlPlane[0]: true, p.ControlPlane[1]: true}
		for _, n := range p.Nodes {
			for f := range n.Addrs {
				if seen[n.Addrs[f]] || !p.MachineCIDRs[f].Contains(n.Addrs[f]) {
					t.Fatalf("cluster %d %s: address %v is taken or outside %v", i, n.Name, n.Addrs[f], p.MachineCIDRs[f])
				}
				seen[n.Addrs[f]] = true
				if !p.PodCIDRs[f].Contains(n.PodCIDRs[f].Addr()) {
					t.Fatalf("cluster %d %s: %v is outside %v", i, n.Name, n.PodCIDRs[f], p.PodCIDRs[f])
				}
			}
		}
	}
	for i, a := range all {
		for _, b := range all[i+1:] {
			if a.Overlaps(b) {
				t.Fatalf("%v overlaps %v", a, b)
			}
		}
	}
}

func TestFreeIndex(t *testing.T) {
	routed := []netip.Prefix{netip.MustParsePrefix("172.30.1.0/24"), netip.MustParsePrefix("10.98.0.0/16")}
	everything := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	for _, c := range []struct {
		name   string
		taken  map[int]bool
		routed []netip.Prefix
		want   int
		err    string
	}{
		{name: "first", want: 0},
		{name: "taken and routed ones are passed over", taken: map[int]bool{0: true}, routed: routed, want: 3},
		{name: "none left", routed: everything, err: "no free address ranges"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := FreeIndex(spec(0, 2, "ipv4"), c.taken, c.routed)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Fatalf("error %v, want %q", err, c.err)
				}
				return
			}
			if err != nil || got != c.want {
				t.Errorf("got %d, %v; want %d", got, err, c.want)
			}
		})
	}
}

func TestCheckNamesEveryFault(t *testing.T) {
	err := Spec{Name: "Lab", Index: 99, Nodes: 0, IPFamily: "ipv6", ProxyMode: "ipvs", CNI: "x", Cgroup: "v3"}.Check()
	if err == nil {
		t.Fatal("accepted")
	}
	for _, w := range []string{`"Lab"`, "99", "0 nodes", "ipv6", "ipvs", `"x"`, "v3"} {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q is not named in: %v", w, err)
		}
	}
	if d := cmp.Diff(nil, spec(0, 1, "ipv4").Check(), cmpopts.EquateErrors()); d != "" {
		t.Error(d)
	}
}
