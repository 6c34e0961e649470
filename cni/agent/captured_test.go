package agent

import (
	"net/netip"
	"testing"
)

// Only of what this agent has done itself, and to the pod as it is now, it need not ask the kernel.
func TestCaptured(t *testing.T) {
	first, second := netip.MustParseAddr("10.1.0.1"), netip.MustParseAddr("10.1.0.2")
	e := &enroller{acked: map[string]bool{"accepted": true}}
	for _, tc := range []struct {
		name string
		rec  record
		now  []netip.Addr
		want bool
	}{
		{"captured", record{UID: "accepted", IPs: []netip.Addr{first}, Redirected: true}, []netip.Addr{first}, true},
		{"its addresses are still to be told", record{UID: "accepted", IPs: []netip.Addr{first}, Redirected: true}, nil, true},
		{"its sandbox is another", record{UID: "accepted", IPs: []netip.Addr{first}, Redirected: true}, []netip.Addr{second}, false},
		{"captured by the agent before", record{UID: "other", IPs: []netip.Addr{first}, Redirected: true}, []netip.Addr{first}, false},
		{"released", record{UID: "accepted", IPs: []netip.Addr{first}}, []netip.Addr{first}, false},
	} {
		if got := e.captured(tc.rec, tc.now); got != tc.want {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
}
