package redirect

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/netns"
)

func TestPlan(t *testing.T) {
	const v4, v6 = unix.AF_INET, unix.AF_INET6
	addr := netip.MustParseAddr
	for _, tc := range []struct {
		name   string
		ips    []netip.Addr
		routes []Route
	}{
		{"IPv4", []netip.Addr{addr("10.0.0.1")}, []Route{{v4, Table, addr("10.0.0.1")}, {v6, Table, netip.Addr{}}}},
		{"IPv6", []netip.Addr{addr("fd00::1")}, []Route{{v4, Table, netip.Addr{}}, {v6, Table, netip.Addr{}}}},
		{"dual stack, IPv6 first", []netip.Addr{addr("fd00::1"), addr("10.0.0.1"), addr("10.0.0.2")},
			[]Route{{v4, Table, addr("10.0.0.1")}, {v6, Table, netip.Addr{}}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			want := Rules{
				Sysctls: []Sysctl{
					{"ipv4/tcp_fwmark_accept", "1", "0"}, {"ipv4/fwmark_reflect", "1", "0"}, {"ipv6/fwmark_reflect", "1", "0"},
				},
				Rules: []Rule{
					{v4, 1, netns.RedirectMark, wholeMark, 0, 0, Table}, {v4, 2, netns.RedirectMark, wholeMark, 0, 0, 0},
					{v6, 1, netns.RedirectMark, wholeMark, 0, 0, Table}, {v6, 2, netns.RedirectMark, wholeMark, 0, 0, 0},
				},
				DNS:    []Rule{{v4, 3, 0, 0xfff, unix.IPPROTO_UDP, 53, Table}, {v6, 3, 0, 0xfff, unix.IPPROTO_UDP, 53, Table}},
				Routes: tc.routes,
			}
			if diff := cmp.Diff(want, Plan(PodConfig{IPs: tc.ips}), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
				t.Errorf("rules (-want +got):\n%s", diff)
			}
		})
	}
}

// TestPlanOfNFTables: routing is the same, chains take the place of the programs and of what they count on.
func TestPlanOfNFTables(t *testing.T) {
	compare := cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	ips := []netip.Addr{netip.MustParseAddr("10.0.0.1")}
	ebpf, got := Plan(PodConfig{Mode: EBPF, IPs: ips}), Plan(PodConfig{Mode: NFTables, IPs: ips})
	if diff := cmp.Diff([]any{ebpf.Rules, ebpf.Routes}, []any{got.Rules, got.Routes}, compare); diff != "" {
		t.Errorf("rules and routes (-eBPF +nftables):\n%s", diff)
	}
	if len(ebpf.Chains) > 0 {
		t.Errorf("chains with eBPF: %v", ebpf.Chains)
	}
	if diff := cmp.Diff([]Sysctl{{"ipv4/tcp_migrate_req", "1", "0"}}, got.Sysctls); diff != "" {
		t.Errorf("sysctls with nftables (-want +got):\n%s", diff)
	}
	// A released pod keeps the chains, without which the kernel would forget how it has rewritten connections.
	released := Plan(PodConfig{Mode: NFTables, IPs: ips, Released: true}).Chains
	steps := map[string][2]int{}
	for i, c := range got.Chains {
		if c.Name != released[i].Name {
			t.Fatalf("chain %d is %s, when released %s", i, c.Name, released[i].Name)
		}
		steps[c.Name] = [2]int{len(c.Steps), len(released[i].Steps)}
	}
	want := map[string][2]int{"note": {1, 1}, "answer": {1, 1}, "in": {5, 0}, "out": {5, 0}, "last_in": {6, 0}, "last_out": {3, 0}}
	if diff := cmp.Diff(want, steps); diff != "" {
		t.Errorf("number of steps, redirected and released (-want +got):\n%s", diff)
	}
}
