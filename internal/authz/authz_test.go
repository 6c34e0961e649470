package authz

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

func policy(name string, action mesh.Action, matches ...mesh.Match) *mesh.Authorization {
	p := &mesh.Authorization{Name: name, Namespace: "default", Action: action}
	for _, m := range matches {
		p.Rules = append(p.Rules, mesh.Rule{Clauses: []mesh.Clause{{Matches: []mesh.Match{m}}}})
	}
	return p
}

func principal(kind mesh.MatchKind, value string) mesh.Match {
	return mesh.Match{Principals: []mesh.StringMatch{{Kind: kind, Value: value}}}
}

func dryRun(p *mesh.Authorization) *mesh.Authorization {
	p.DryRun = true
	return p
}

func TestCheck(t *testing.T) {
	client := Connection{
		Source:      mesh.Identity{TrustDomain: "cluster.local", Namespace: "default", ServiceAccount: "client"},
		SourceIP:    netip.MustParseAddr("::ffff:10.1.2.3"),
		Destination: netip.MustParseAddrPort("10.1.0.9:8080"),
	}
	plaintext := client
	plaintext.Source = mesh.Identity{}

	denyClient := policy("deny-client", mesh.ActionDeny, principal(mesh.MatchExact, "cluster.local/ns/default/sa/client"))
	allowOther := policy("allow-other", mesh.ActionAllow, principal(mesh.MatchSuffix, "/sa/other"))
	allowClient := policy("allow-client", mesh.ActionAllow, principal(mesh.MatchPrefix, "cluster.local/ns/default/"))
	allowNothing := policy("allow-nothing", mesh.ActionAllow)
	strict := policy("strict", mesh.ActionDeny, mesh.Match{NotPrincipals: []mesh.StringMatch{{Kind: mesh.MatchPresence}}})

	for _, tc := range []struct {
		name     string
		policies []*mesh.Authorization
		c        Connection
		want     Verdict
		text     string
	}{
		{"no policy", nil, client, Verdict{Allowed: true, Reason: ReasonNoPolicy}, "allowed: no policy refuses"},
		{"deny matches", []*mesh.Authorization{allowClient, denyClient}, client,
			Verdict{Reason: ReasonDenied, Policy: "default/deny-client"}, "denied by policy default/deny-client"},
		{"deny does not match", []*mesh.Authorization{denyClient}, plaintext,
			Verdict{Allowed: true, Reason: ReasonNoPolicy}, "allowed: no policy refuses"},
		{"one allow matches", []*mesh.Authorization{allowOther, allowClient}, client,
			Verdict{Allowed: true, Reason: ReasonAllowed, Policy: "default/allow-client"}, "allowed by policy default/allow-client"},
		{"no allow matches", []*mesh.Authorization{allowNothing, allowOther}, client,
			Verdict{Reason: ReasonNotAllowed, Policy: "default/allow-nothing", Unmatched: 2},
			"denied: not matched by ALLOW policy default/allow-nothing nor by 1 more"},
		{"strict refuses plaintext", []*mesh.Authorization{strict}, plaintext,
			Verdict{Reason: ReasonDenied, Policy: "default/strict"}, "denied by policy default/strict"},
		{"strict lets mutual TLS in", []*mesh.Authorization{strict}, client,
			Verdict{Allowed: true, Reason: ReasonNoPolicy}, "allowed: no policy refuses"},
		{"dry run only reports", []*mesh.Authorization{dryRun(policy("d", mesh.ActionDeny, mesh.Match{})), dryRun(policy("n", mesh.ActionAllow))}, client,
			Verdict{Allowed: true, Reason: ReasonNoPolicy, DryRun: []string{"DENY default/d"}},
			"allowed: no policy refuses (dry run: DENY default/d)"},
		{"dry run after a denial is reported too", []*mesh.Authorization{denyClient, dryRun(policy("d", mesh.ActionDeny, mesh.Match{}))}, client,
			Verdict{Reason: ReasonDenied, Policy: "default/deny-client", DryRun: []string{"DENY default/d"}},
			"denied by policy default/deny-client (dry run: DENY default/d)"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := Check(tc.policies, tc.c)
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("verdict (-want +got):\n%s", diff)
			}
			if got.String() != tc.text {
				t.Errorf("text %q, want %q", got.String(), tc.text)
			}
		})
	}
}

func TestMatches(t *testing.T) {
	c := Connection{
		Source:      mesh.Identity{TrustDomain: "td", Namespace: "ns", ServiceAccount: "sa"},
		SourceIP:    netip.MustParseAddr("2001:db8::5"),
		Destination: netip.MustParseAddrPort("10.1.0.9:8080"),
	}
	prefixes := func(s ...string) (out []netip.Prefix) {
		for _, p := range s {
			out = append(out, netip.MustParsePrefix(p))
		}
		return out
	}
	for _, tc := range []struct {
		name  string
		match mesh.Match
		want  bool
	}{
		{"empty match", mesh.Match{}, true},
		{"source range", mesh.Match{SourceIPs: prefixes("10.0.0.0/8", "2001:db8::/32")}, true},
		{"source of the other family", mesh.Match{SourceIPs: prefixes("0.0.0.0/0")}, false},
		{"not source", mesh.Match{NotSourceIPs: prefixes("2001:db8::5/128")}, false},
		{"destination and port", mesh.Match{DestinationIPs: prefixes("10.1.0.9/32"), DestinationPorts: []uint16{80, 8080}}, true},
		{"one kind fails", mesh.Match{DestinationIPs: prefixes("10.1.0.9/32"), DestinationPorts: []uint16{80}}, false},
		{"value and not value", mesh.Match{DestinationPorts: []uint16{8080}, NotDestinationPorts: []uint16{8080}}, false},
		{"service account in any trust domain", mesh.Match{ServiceAccounts: []mesh.ServiceAccountMatch{{Namespace: "ns", ServiceAccount: "sa"}}}, true},
		{"namespace", mesh.Match{Namespaces: []mesh.StringMatch{{Value: "other"}, {Kind: mesh.MatchPrefix, Value: "n"}}}, true},
		{"not namespace", mesh.Match{NotNamespaces: []mesh.StringMatch{{Value: "ns"}}}, false},
		{"principal with its scheme is no principal", principal(mesh.MatchExact, "spiffe://td/ns/ns/sa/sa"), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := Matches(policy("p", mesh.ActionAllow, tc.match), c); got != tc.want {
				t.Errorf("matches: %v, want %v", got, tc.want)
			}
		})
	}
}

// TestPlaintextMatchesNoPositiveFact: who is not authenticated has no principal, namespace or service account, not even
// an empty one.
func TestPlaintextMatchesNoPositiveFact(t *testing.T) {
	c := Connection{SourceIP: netip.MustParseAddr("10.0.0.1"), Destination: netip.MustParseAddrPort("10.0.0.2:80")}
	for _, kind := range []mesh.MatchKind{mesh.MatchExact, mesh.MatchPrefix, mesh.MatchSuffix, mesh.MatchPresence} {
		s := []mesh.StringMatch{{Kind: kind}}
		for _, m := range []mesh.Match{{Principals: s}, {Namespaces: s}, {ServiceAccounts: []mesh.ServiceAccountMatch{{}}}} {
			if Matches(policy("p", mesh.ActionAllow, m), c) {
				t.Errorf("%+v matches a plaintext peer", m)
			}
		}
	}
}

func TestCheckDoesNotAllocate(t *testing.T) {
	c := Connection{
		Source:   mesh.Identity{TrustDomain: "td", Namespace: "ns", ServiceAccount: "sa"},
		SourceIP: netip.MustParseAddr("10.0.0.1"), Destination: netip.MustParseAddrPort("10.0.0.2:80"),
	}
	policies := []*mesh.Authorization{
		policy("a", mesh.ActionDeny, mesh.Match{NotPrincipals: []mesh.StringMatch{{Kind: mesh.MatchPresence}}}),
		policy("b", mesh.ActionDeny, mesh.Match{ServiceAccounts: []mesh.ServiceAccountMatch{{Namespace: "x", ServiceAccount: "y"}}}),
	}
	if n := testing.AllocsPerRun(100, func() { Check(policies, c) }); n != 0 {
		t.Errorf("%v allocations a check, want none", n)
	}
}
