package authz

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"regexp"
	"testing"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// The naive matcher: policies as sets of strings and regular expressions, in the words of Istio's documentation and
// without any early end. TestAgainstNaive holds Check to it.

func naiveAllowed(policies []*mesh.Authorization, c Connection) bool {
	deny, allow, allows := 0, 0, 0
	for _, p := range policies {
		if p.DryRun {
			continue
		}
		matched := 0
		for _, r := range p.Rules {
			held := 0
			for _, cl := range r.Clauses {
				n := 0
				for _, m := range cl.Matches {
					if naiveMatch(m, c) {
						n++
					}
				}
				if n > 0 {
					held++
				}
			}
			if held == len(r.Clauses) {
				matched++
			}
		}
		if p.Action == mesh.ActionDeny && matched > 0 {
			deny++
		}
		if p.Action == mesh.ActionAllow {
			allows++
			if matched > 0 {
				allow++
			}
		}
	}
	return deny == 0 && (allows == 0 || allow > 0)
}

func naiveMatch(m mesh.Match, c Connection) bool {
	known := c.Source.TrustDomain != ""
	principal := c.Source.TrustDomain + "/ns/" + c.Source.Namespace + "/sa/" + c.Source.ServiceAccount
	strings := func(list []mesh.StringMatch, fact string) bool {
		hits := 0
		for _, s := range list {
			pattern := map[mesh.MatchKind]string{
				mesh.MatchExact:    "^" + regexp.QuoteMeta(s.Value) + "$",
				mesh.MatchPrefix:   "^" + regexp.QuoteMeta(s.Value) + ".*$",
				mesh.MatchSuffix:   "^.*" + regexp.QuoteMeta(s.Value) + "$",
				mesh.MatchPresence: "^.+$",
			}[s.Kind]
			if known && regexp.MustCompile(pattern).MatchString(fact) {
				hits++
			}
		}
		return hits > 0
	}
	accounts := func(list []mesh.ServiceAccountMatch) bool {
		for _, s := range list {
			if known && s.Namespace+"/"+s.ServiceAccount == c.Source.Namespace+"/"+c.Source.ServiceAccount {
				return true
			}
		}
		return false
	}
	ips := func(list []netip.Prefix, ip netip.Addr) bool {
		for _, p := range list {
			if p.Addr().BitLen() != ip.BitLen() {
				continue
			}
			a, b := fmt.Sprintf("%08b", p.Addr().AsSlice()), fmt.Sprintf("%08b", ip.AsSlice())
			bits := regexp.MustCompile(`[^01]`)
			if bits.ReplaceAllString(a, "")[:p.Bits()] == bits.ReplaceAllString(b, "")[:p.Bits()] {
				return true
			}
		}
		return false
	}
	ports := func(list []uint16) bool {
		for _, p := range list {
			if p == c.Destination.Port() {
				return true
			}
		}
		return false
	}
	ok := true
	ok = ok && (len(m.Namespaces) == 0 || strings(m.Namespaces, c.Source.Namespace)) && !strings(m.NotNamespaces, c.Source.Namespace)
	ok = ok && (len(m.Principals) == 0 || strings(m.Principals, principal)) && !strings(m.NotPrincipals, principal)
	ok = ok && (len(m.ServiceAccounts) == 0 || accounts(m.ServiceAccounts)) && !accounts(m.NotServiceAccounts)
	ok = ok && (len(m.SourceIPs) == 0 || ips(m.SourceIPs, c.SourceIP)) && !ips(m.NotSourceIPs, c.SourceIP)
	ok = ok && (len(m.DestinationIPs) == 0 || ips(m.DestinationIPs, c.Destination.Addr())) && !ips(m.NotDestinationIPs, c.Destination.Addr())
	ok = ok && (len(m.DestinationPorts) == 0 || ports(m.DestinationPorts)) && !ports(m.NotDestinationPorts)
	return ok
}

// generator draws from few values, so that policies and connections often meet.
type generator struct{ *rand.Rand }

func pick[T any](g generator, values ...T) T { return values[g.IntN(len(values))] }

func some[T any](g generator, one func() T) []T {
	if g.IntN(3) > 0 {
		return nil
	}
	out := make([]T, 1+g.IntN(2))
	for i := range out {
		out[i] = one()
	}
	return out
}

func (g generator) match() mesh.Match {
	namespace := func() mesh.StringMatch {
		return mesh.StringMatch{Kind: mesh.MatchKind(g.IntN(4)), Value: pick(g, "a", "ab", "b", "")}
	}
	principal := func() mesh.StringMatch {
		return mesh.StringMatch{Kind: mesh.MatchKind(g.IntN(4)), Value: pick(g, "td/ns/a/sa/x", "td/", "/sa/y", "td2/ns/ab/sa/x", "")}
	}
	account := func() mesh.ServiceAccountMatch {
		return mesh.ServiceAccountMatch{Namespace: pick(g, "a", "ab"), ServiceAccount: pick(g, "x", "y")}
	}
	prefix := func() netip.Prefix {
		return netip.MustParsePrefix(pick(g, "10.0.0.0/8", "10.0.0.1/32", "0.0.0.0/0", "2001:db8::/32", "::/0", "10.0.0.0/31")).Masked()
	}
	port := func() uint16 { return pick[uint16](g, 80, 81) }
	return mesh.Match{
		Namespaces: some(g, namespace), NotNamespaces: some(g, namespace),
		Principals: some(g, principal), NotPrincipals: some(g, principal),
		ServiceAccounts: some(g, account), NotServiceAccounts: some(g, account),
		SourceIPs: some(g, prefix), NotSourceIPs: some(g, prefix),
		DestinationIPs: some(g, prefix), NotDestinationIPs: some(g, prefix),
		DestinationPorts: some(g, port), NotDestinationPorts: some(g, port),
	}
}

func (g generator) policies() []*mesh.Authorization {
	var out []*mesh.Authorization
	for i := range g.IntN(4) {
		p := &mesh.Authorization{Name: fmt.Sprint(i), Namespace: "n", Action: mesh.Action(g.IntN(2)), DryRun: g.IntN(5) == 0}
		for range g.IntN(3) {
			var r mesh.Rule
			for range g.IntN(3) {
				var cl mesh.Clause
				for range g.IntN(3) {
					cl.Matches = append(cl.Matches, g.match())
				}
				r.Clauses = append(r.Clauses, cl)
			}
			p.Rules = append(p.Rules, r)
		}
		out = append(out, p)
	}
	return out
}

func (g generator) connection() Connection {
	c := Connection{
		SourceIP: netip.MustParseAddr(pick(g, "10.0.0.1", "10.0.0.2", "192.0.2.1", "2001:db8::1")),
		Destination: netip.AddrPortFrom(
			netip.MustParseAddr(pick(g, "10.0.0.1", "10.9.0.2", "2001:db8::2")), pick[uint16](g, 80, 81, 82)),
	}
	if g.IntN(3) > 0 {
		c.Source = mesh.Identity{TrustDomain: pick(g, "td", "td2"), Namespace: pick(g, "a", "ab", "b"), ServiceAccount: pick(g, "x", "y")}
	}
	return c
}

func TestAgainstNaive(t *testing.T) {
	seed := rand.Uint64()
	g := generator{rand.New(rand.NewPCG(seed, 0))}
	outcomes := map[bool]int{}
	for range 20000 {
		policies, c := g.policies(), g.connection()
		got, want := Check(policies, c), naiveAllowed(policies, c)
		if got.Allowed != want {
			t.Fatalf("seed %d: %v, naive says %v, for %+v under %+v", seed, got, want, c, policies)
		}
		outcomes[want]++
	}
	if outcomes[true] < 1000 || outcomes[false] < 1000 {
		t.Errorf("one-sided sample %v: it shows little", outcomes)
	}
}
