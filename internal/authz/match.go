package authz

import (
	"net/netip"
	"strings"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// Matches tells whether a policy matches a connection: any of its rules does. What the policy then does, and whether
// it is in dry run, plays no part.
func Matches(p *mesh.Authorization, c Connection) bool {
	for i := range p.Rules {
		if ruleMatches(&p.Rules[i], c) {
			return true
		}
	}
	return false
}

func ruleMatches(r *mesh.Rule, c Connection) bool {
	for i := range r.Clauses {
		if !clauseMatches(&r.Clauses[i], c) {
			return false
		}
	}
	return true
}

func clauseMatches(cl *mesh.Clause, c Connection) bool {
	for i := range cl.Matches {
		if matchMatches(&cl.Matches[i], c) {
			return true
		}
	}
	return false
}

// matchMatches holds the facts against each kind the match names. A fact that is absent (the identity of a plaintext
// peer) is matched by no value, so the positive kinds fail on it and the Not kinds pass: DENY NotPrincipals "any" is
// how STRICT mutual TLS is said.
func matchMatches(m *mesh.Match, c Connection) bool {
	return kindMatches(m.DestinationPorts, m.NotDestinationPorts, func(p uint16) bool { return p == c.Destination.Port() }) &&
		kindMatches(m.SourceIPs, m.NotSourceIPs, func(p netip.Prefix) bool { return p.Contains(c.SourceIP) }) &&
		kindMatches(m.DestinationIPs, m.NotDestinationIPs, func(p netip.Prefix) bool { return p.Contains(c.Destination.Addr()) }) &&
		kindMatches(m.Namespaces, m.NotNamespaces, func(s mesh.StringMatch) bool { return stringMatches(s, c.Source.Namespace) }) &&
		kindMatches(m.ServiceAccounts, m.NotServiceAccounts, func(s mesh.ServiceAccountMatch) bool {
			return !c.Source.IsZero() && s.Namespace == c.Source.Namespace && s.ServiceAccount == c.Source.ServiceAccount
		}) &&
		kindMatches(m.Principals, m.NotPrincipals, func(s mesh.StringMatch) bool { return principalMatches(s, c.Source) })
}

func kindMatches[T any](values, nots []T, matches func(T) bool) bool {
	found := len(values) == 0
	for _, v := range values {
		if matches(v) {
			found = true
			break
		}
	}
	if !found {
		return false
	}
	for _, v := range nots {
		if matches(v) {
			return false
		}
	}
	return true
}

func stringMatches(m mesh.StringMatch, fact string) bool {
	if fact == "" {
		return false
	}
	switch m.Kind {
	case mesh.MatchExact:
		return fact == m.Value
	case mesh.MatchPrefix:
		return strings.HasPrefix(fact, m.Value)
	case mesh.MatchSuffix:
		return strings.HasSuffix(fact, m.Value)
	case mesh.MatchPresence:
		return true
	default:
		return false
	}
}

// principalMatches compares with the principal, which is only put together (an allocation) where the match needs it.
func principalMatches(m mesh.StringMatch, id mesh.Identity) bool {
	if id.IsZero() {
		return false
	}
	return m.Kind == mesh.MatchPresence || stringMatches(m, id.Principal())
}
