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
					{v4, 1, netns.RedirectMark, Table}, {v4, 2, netns.RedirectMark, 0},
					{v6, 1, netns.RedirectMark, Table}, {v6, 2, netns.RedirectMark, 0},
				},
				Routes: tc.routes,
			}
			if diff := cmp.Diff(want, Plan(PodConfig{IPs: tc.ips}), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
				t.Errorf("rules (-want +got):\n%s", diff)
			}
		})
	}
}
