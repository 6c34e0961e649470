package ztunnel

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/fairlead-mesh/fairlead/internal/authz"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/route"
	"github.com/fairlead-mesh/fairlead/internal/state"
)

// FuzzParseLocal: a file is refused, or what it says can be served and asked.
func FuzzParseLocal(f *testing.F) {
	f.Add([]byte(localYAML))
	f.Add([]byte("workloads: []\n"))
	f.Add([]byte("workloads: [{uid: a, name: b}]\n"))
	f.Add([]byte("policies: [{name: a, namespace: b, scope: Global, action: Deny, rules: [[[{sourceIps: [10.0.0.0/8]}]]]}]\n"))
	question := authz.Connection{
		Source:   mesh.Identity{TrustDomain: "cluster.local", Namespace: "a", ServiceAccount: "b"},
		SourceIP: netip.MustParseAddr("10.0.0.1"), Destination: netip.MustParseAddrPort("10.0.0.2:80"),
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		change, err := parseLocal(content, "c")
		if err != nil {
			return
		}
		store := state.New()
		store.Apply(change)
		snap := store.Load()
		for _, w := range change.Workloads {
			if w.UID == "" { // one that the file names is taken as it is
				t.Errorf("accepted workload %q without a name of its own", w.Name)
			}
			authz.Check(snap.Policies(w), question)
			route.Outbound(snap, w, question.Destination, 1)
		}
		authz.Check(change.Policies, question)
	})
}

// FuzzRequestOfPeer reads what a peer proxy says in a CONNECT.
func FuzzRequestOfPeer(f *testing.F) {
	f.Add("10.0.0.2:80", `for="10.0.0.1:4";host=web.shop.svc.cluster.local;proto=x, host=y`)
	f.Add("[::ffff:10.0.0.2]:80", "")
	f.Add("[fe80::1%eth0]:80", "host")
	self := &mesh.Workload{Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.2")}}
	f.Fuzz(func(t *testing.T, authority, forwarded string) {
		d := route.Inbound(self, self.Addresses[0], authority)
		if d.Action != route.Refuse && (d.Target.Addr() != self.Addresses[0] || d.Target.Port() == 0) {
			t.Errorf("%q leads to %v", authority, d.Target)
		}
		if host := forwardedHost(forwarded); !strings.Contains(forwarded, host) {
			t.Errorf("host %q of %q", host, forwarded)
		}
	})
}
