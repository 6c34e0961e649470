package wire

// A policy on the wire, in two steps: the model to bytes on the control plane, bytes to the model on a node.
//
//  1. EncodeAuthorization writes what the control plane pushes.
//  2. DecodeAuthorization reads it, and refuses what it does not know: a policy half understood would let through.
//
// Next: internal/xds/server.go between the two; internal/state/store.go after the second.

import (
	"errors"
	"fmt"
	"net/netip"

	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/fairlead-mesh/fairlead/api/security"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// EncodeAuthorization writes a policy; its resource name is a.Key().
//
// The model and the wire differ in what says nothing: on the wire a clause without matches holds and a match without
// fields never does, in the model the other way round. So a rule with a clause that cannot hold is left out, and so is
// a clause that always does.
func EncodeAuthorization(a *mesh.Authorization) *security.Authorization {
	out := &security.Authorization{
		Name: a.Name, Namespace: a.Namespace, DryRun: a.DryRun,
		Scope: encodeScope(a.Scope), Action: encodeAction(a.Action),
	}
	for _, rule := range a.Rules {
		if encoded, holds := encodeRule(rule); holds {
			out.Rules = append(out.Rules, encoded)
		}
	}
	return out
}

// DecodeAuthorization reads a policy.
func DecodeAuthorization(a *security.Authorization) (*mesh.Authorization, error) {
	out := &mesh.Authorization{Name: a.GetName(), Namespace: a.GetNamespace(), DryRun: a.GetDryRun()}
	if out.Name == "" || out.Namespace == "" {
		return nil, fmt.Errorf("decode authorization %q: without a namespace or name", out.Key())
	}
	var err error
	if out.Scope, err = decodeScope(a.GetScope()); err != nil {
		return nil, fmt.Errorf("decode authorization %q: %w", out.Key(), err)
	}
	if out.Action, err = decodeAction(a.GetAction()); err != nil {
		return nil, fmt.Errorf("decode authorization %q: %w", out.Key(), err)
	}
	for i, rule := range a.GetRules() {
		decoded, err := decodeRule(rule)
		if err != nil {
			return nil, fmt.Errorf("decode authorization %q: rule %d: %w", out.Key(), i, err)
		}
		out.Rules = append(out.Rules, decoded)
	}
	return out, nil
}

// encodeRule writes a rule; holds is false where no connection can match it.
func encodeRule(r mesh.Rule) (encoded *security.Rule, holds bool) {
	encoded = &security.Rule{}
	for _, clause := range r.Clauses {
		if len(clause.Matches) == 0 {
			return nil, false
		}
		out := &security.Clause{}
		always := false
		for i := range clause.Matches {
			always = always || emptyMatch(&clause.Matches[i])
			out.Matches = append(out.Matches, encodeMatch(&clause.Matches[i]))
		}
		if !always {
			encoded.Clauses = append(encoded.Clauses, out)
		}
	}
	return encoded, true
}

func decodeRule(r *security.Rule) (mesh.Rule, error) {
	var out mesh.Rule
	for _, clause := range r.GetClauses() {
		if len(clause.GetMatches()) == 0 {
			continue
		}
		var decoded mesh.Clause
		for _, m := range clause.GetMatches() {
			match, err := decodeMatch(m)
			if err != nil {
				return mesh.Rule{}, err
			}
			decoded.Matches = append(decoded.Matches, match)
		}
		out.Clauses = append(out.Clauses, decoded)
	}
	return out, nil
}

func emptyMatch(m *mesh.Match) bool {
	return len(m.Namespaces)+len(m.NotNamespaces)+len(m.Principals)+len(m.NotPrincipals)+
		len(m.ServiceAccounts)+len(m.NotServiceAccounts)+len(m.SourceIPs)+len(m.NotSourceIPs)+
		len(m.DestinationIPs)+len(m.NotDestinationIPs)+len(m.DestinationPorts)+len(m.NotDestinationPorts) == 0
}

func encodeMatch(m *mesh.Match) *security.Match {
	return &security.Match{
		Namespaces: encodeStrings(m.Namespaces), NotNamespaces: encodeStrings(m.NotNamespaces),
		Principals: encodeStrings(m.Principals), NotPrincipals: encodeStrings(m.NotPrincipals),
		ServiceAccounts:    encodeServiceAccounts(m.ServiceAccounts),
		NotServiceAccounts: encodeServiceAccounts(m.NotServiceAccounts),
		SourceIps:          encodePrefixes(m.SourceIPs), NotSourceIps: encodePrefixes(m.NotSourceIPs),
		DestinationIps: encodePrefixes(m.DestinationIPs), NotDestinationIps: encodePrefixes(m.NotDestinationIPs),
		DestinationPorts: encodePortNumbers(m.DestinationPorts), NotDestinationPorts: encodePortNumbers(m.NotDestinationPorts),
	}
}

func decodeMatch(m *security.Match) (mesh.Match, error) {
	if len(m.GetExtensions()) > 0 {
		return mesh.Match{}, fmt.Errorf("unsupported match extension %q", m.GetExtensions()[0].GetName())
	}
	var out mesh.Match
	var errs [12]error
	out.Namespaces, errs[0] = decodeStrings(m.GetNamespaces())
	out.NotNamespaces, errs[1] = decodeStrings(m.GetNotNamespaces())
	out.Principals, errs[2] = decodeStrings(m.GetPrincipals())
	out.NotPrincipals, errs[3] = decodeStrings(m.GetNotPrincipals())
	out.ServiceAccounts, errs[4] = decodeServiceAccounts(m.GetServiceAccounts())
	out.NotServiceAccounts, errs[5] = decodeServiceAccounts(m.GetNotServiceAccounts())
	out.SourceIPs, errs[6] = decodePrefixes(m.GetSourceIps())
	out.NotSourceIPs, errs[7] = decodePrefixes(m.GetNotSourceIps())
	out.DestinationIPs, errs[8] = decodePrefixes(m.GetDestinationIps())
	out.NotDestinationIPs, errs[9] = decodePrefixes(m.GetNotDestinationIps())
	out.DestinationPorts, errs[10] = decodePortNumbers(m.GetDestinationPorts())
	out.NotDestinationPorts, errs[11] = decodePortNumbers(m.GetNotDestinationPorts())
	if err := errors.Join(errs[:]...); err != nil {
		return mesh.Match{}, err
	}
	if emptyMatch(&out) {
		return mesh.Match{}, errors.New("match without a condition this version knows")
	}
	return out, nil
}

func encodeScope(s mesh.Scope) security.Scope {
	switch s {
	case mesh.ScopeNamespace:
		return security.Scope_NAMESPACE
	case mesh.ScopeSelector:
		return security.Scope_WORKLOAD_SELECTOR
	default:
		return security.Scope_GLOBAL
	}
}

func decodeScope(s security.Scope) (mesh.Scope, error) {
	switch s {
	case security.Scope_GLOBAL:
		return mesh.ScopeGlobal, nil
	case security.Scope_NAMESPACE:
		return mesh.ScopeNamespace, nil
	case security.Scope_WORKLOAD_SELECTOR:
		return mesh.ScopeSelector, nil
	default:
		return 0, fmt.Errorf("unknown scope %d", s)
	}
}

func encodeAction(a mesh.Action) security.Action {
	if a == mesh.ActionDeny {
		return security.Action_DENY
	}
	return security.Action_ALLOW
}

func decodeAction(a security.Action) (mesh.Action, error) {
	switch a {
	case security.Action_ALLOW:
		return mesh.ActionAllow, nil
	case security.Action_DENY:
		return mesh.ActionDeny, nil
	default:
		return 0, fmt.Errorf("unknown action %d", a)
	}
}

func encodeStrings(matches []mesh.StringMatch) []*security.StringMatch {
	var out []*security.StringMatch
	for _, m := range matches {
		s := &security.StringMatch{}
		switch m.Kind {
		case mesh.MatchPrefix:
			s.MatchType = &security.StringMatch_Prefix{Prefix: m.Value}
		case mesh.MatchSuffix:
			s.MatchType = &security.StringMatch_Suffix{Suffix: m.Value}
		case mesh.MatchPresence:
			s.MatchType = &security.StringMatch_Presence{Presence: &emptypb.Empty{}}
		default:
			s.MatchType = &security.StringMatch_Exact{Exact: m.Value}
		}
		out = append(out, s)
	}
	return out
}

func decodeStrings(matches []*security.StringMatch) ([]mesh.StringMatch, error) {
	var out []mesh.StringMatch
	for _, m := range matches {
		switch t := m.GetMatchType().(type) {
		case *security.StringMatch_Exact:
			out = append(out, mesh.StringMatch{Kind: mesh.MatchExact, Value: t.Exact})
		case *security.StringMatch_Prefix:
			out = append(out, mesh.StringMatch{Kind: mesh.MatchPrefix, Value: t.Prefix})
		case *security.StringMatch_Suffix:
			out = append(out, mesh.StringMatch{Kind: mesh.MatchSuffix, Value: t.Suffix})
		case *security.StringMatch_Presence:
			out = append(out, mesh.StringMatch{Kind: mesh.MatchPresence})
		default:
			return nil, errors.New("string match of unknown kind")
		}
	}
	return out, nil
}

func encodeServiceAccounts(matches []mesh.ServiceAccountMatch) []*security.ServiceAccountMatch {
	var out []*security.ServiceAccountMatch
	for _, m := range matches {
		out = append(out, &security.ServiceAccountMatch{Namespace: m.Namespace, ServiceAccount: m.ServiceAccount})
	}
	return out
}

func decodeServiceAccounts(matches []*security.ServiceAccountMatch) ([]mesh.ServiceAccountMatch, error) {
	var out []mesh.ServiceAccountMatch
	for _, m := range matches {
		if m.GetNamespace() == "" || m.GetServiceAccount() == "" {
			return nil, fmt.Errorf("service account match %q/%q: want both", m.GetNamespace(), m.GetServiceAccount())
		}
		out = append(out, mesh.ServiceAccountMatch{Namespace: m.GetNamespace(), ServiceAccount: m.GetServiceAccount()})
	}
	return out, nil
}

func encodePrefixes(prefixes []netip.Prefix) []*security.Address {
	var out []*security.Address
	for _, p := range prefixes {
		out = append(out, &security.Address{Address: p.Addr().AsSlice(), Length: uint32(p.Bits())})
	}
	return out
}

// decodePrefixes reads prefixes masked to their length; IPv4 in IPv6 form becomes IPv4, as addresses of peers are
// compared in that form.
func decodePrefixes(addresses []*security.Address) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, a := range addresses {
		ip, ok := netip.AddrFromSlice(a.GetAddress())
		if !ok {
			return nil, fmt.Errorf("address of %d bytes: want 4 or 16", len(a.GetAddress()))
		}
		bits := int64(a.GetLength())
		if bits > int64(ip.BitLen()) {
			return nil, fmt.Errorf("prefix %s/%d: longer than the address", ip, bits)
		}
		if ip.Is4In6() && bits >= 96 {
			ip, bits = ip.Unmap(), bits-96
		}
		out = append(out, netip.PrefixFrom(ip, int(bits)).Masked())
	}
	return out, nil
}

func encodePortNumbers(ports []uint16) []uint32 {
	var out []uint32
	for _, p := range ports {
		out = append(out, uint32(p))
	}
	return out
}

func decodePortNumbers(ports []uint32) ([]uint16, error) {
	var out []uint16
	for _, p := range ports {
		port, err := decodePort(p)
		if err != nil {
			return nil, err
		}
		out = append(out, port)
	}
	return out, nil
}
