package waypoint

// A policy at the waypoint, from Envoy's RBAC to a verdict:
//
//  1. Decode: each filter's policies become matchers; what is not understood refuses the whole listener, so that no DENY
//     is lost.
//  2. Check: filter by filter, DENY before ALLOW as the control plane sent them, over the facts of one request.
//
// Next: waypoint/http.go, which answers 403.

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	xdsmatcher "github.com/cncf/xds/go/xds/type/matcher/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"

	"github.com/fairlead-mesh/fairlead/internal/httproute"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// deniedBody is what a refused request is answered with, word for word Envoy's.
const deniedBody = "RBAC: access denied"

// facts is what policies may know of a request or, without HTTP, of a connection.
type facts struct {
	source      mesh.Identity
	sourceIP    netip.Addr
	destination netip.AddrPort
	// http is nil for a TCP connection.
	http *httproute.Request
	// remoteIP is the client as headers tell it; the source where they do not.
	remoteIP netip.Addr
}

// verdict is what the policies say.
type verdict struct {
	allowed bool
	// policy is "<namespace>/<name>" of the policy that decided; empty where none applies, or none allowed.
	policy string
	// dryRun lists the policies that would have refused.
	dryRun []string
}

func (v verdict) String() string {
	switch {
	case v.allowed && v.policy != "":
		return "allowed by policy " + v.policy
	case v.allowed:
		return "no policy applies"
	case v.policy != "":
		return "denied by policy " + v.policy
	default:
		return "denied: no ALLOW policy matches"
	}
}

// rules are the policies of one filter.
type rules struct {
	deny     bool
	shadow   bool
	policies []rule
}

// rule is one policy: any of its permissions and any of its principals must match.
type rule struct {
	name        string
	permissions matcher
	principals  matcher
}

type matcher func(*facts) bool

// check runs the filters in order.
func check(filters []rules, f *facts) verdict {
	v := verdict{allowed: true}
	for i := range filters {
		r := &filters[i]
		matched := r.match(f)
		refused := (matched != nil) == r.deny
		switch {
		case r.shadow:
			if refused {
				v.dryRun = append(v.dryRun, r.names(matched)...)
			}
		case refused && matched != nil:
			return verdict{policy: policyName(matched.name), dryRun: v.dryRun}
		case refused:
			return verdict{dryRun: v.dryRun}
		case !r.deny:
			v.policy = policyName(matched.name)
		}
	}
	return v
}

func (r *rules) match(f *facts) *rule {
	for i := range r.policies {
		if r.policies[i].permissions(f) && r.policies[i].principals(f) {
			return &r.policies[i]
		}
	}
	return nil
}

// names says which dry-run policies refuse: the one that matched, or all whose ALLOW did not.
func (r *rules) names(matched *rule) []string {
	if matched != nil {
		return []string{policyName(matched.name)}
	}
	var out []string
	for _, p := range r.policies {
		out = append(out, policyName(p.name))
	}
	return slices.Compact(out)
}

// policyName reads ns[a]-policy[b]-rule[0] as a/b; other names stay.
func policyName(name string) string {
	namespace, rest, ok := strings.Cut(strings.TrimPrefix(name, "ns["), "]-policy[")
	policy, _, okRule := strings.Cut(rest, "]-rule[")
	if !ok || !okRule || !strings.HasPrefix(name, "ns[") {
		return name
	}
	return namespace + "/" + policy
}

// rbacRules is what the network and the HTTP filter have in common.
type rbacRules interface {
	GetRules() *rbacv3.RBAC
	GetShadowRules() *rbacv3.RBAC
	GetMatcher() *xdsmatcher.Matcher
	GetShadowMatcher() *xdsmatcher.Matcher
}

func decodeRules(f rbacRules) ([]rules, error) {
	if f.GetMatcher() != nil || f.GetShadowMatcher() != nil {
		return nil, fmt.Errorf("matcher is not supported")
	}
	var out []rules
	for _, r := range []*rbacv3.RBAC{f.GetRules(), f.GetShadowRules()} {
		if r == nil {
			continue
		}
		one := rules{deny: r.GetAction() == rbacv3.RBAC_DENY, shadow: r == f.GetShadowRules()}
		if r.GetAction() != rbacv3.RBAC_DENY && r.GetAction() != rbacv3.RBAC_ALLOW {
			return nil, fmt.Errorf("action %s is not supported", r.GetAction())
		}
		for _, name := range slices.Sorted(maps.Keys(r.GetPolicies())) {
			p := r.GetPolicies()[name]
			if p.GetCondition() != nil || p.GetCheckedCondition() != nil {
				return nil, fmt.Errorf("policy %q: condition is not supported", name)
			}
			permissions, err := anyOf(p.GetPermissions(), decodePermission)
			if err != nil {
				return nil, fmt.Errorf("policy %q: %w", name, err)
			}
			principals, err := anyOf(p.GetPrincipals(), decodePrincipal)
			if err != nil {
				return nil, fmt.Errorf("policy %q: %w", name, err)
			}
			one.policies = append(one.policies, rule{name, permissions, principals})
		}
		out = append(out, one)
	}
	return out, nil
}

func anyOf[T any](list []T, decode func(T) (matcher, error)) (matcher, error) {
	all, err := decodeAll(list, decode)
	return func(f *facts) bool { return slices.ContainsFunc(all, func(m matcher) bool { return m(f) }) }, err
}

func allOf[T any](list []T, decode func(T) (matcher, error)) (matcher, error) {
	all, err := decodeAll(list, decode)
	return func(f *facts) bool { return !slices.ContainsFunc(all, func(m matcher) bool { return !m(f) }) }, err
}

func not(m matcher, err error) (matcher, error) {
	return func(f *facts) bool { return !m(f) }, err
}

func decodeAll[T any](list []T, decode func(T) (matcher, error)) ([]matcher, error) {
	var out []matcher
	for _, one := range list {
		m, err := decode(one)
		if err != nil {
			return nil, err
		}
		out = append(out, m)
	}
	return out, nil
}

func always(*facts) bool { return true }

func decodePermission(p *rbacv3.Permission) (matcher, error) {
	switch r := p.GetRule().(type) {
	case *rbacv3.Permission_Any:
		return always, nil
	case *rbacv3.Permission_AndRules:
		return allOf(r.AndRules.GetRules(), decodePermission)
	case *rbacv3.Permission_OrRules:
		return anyOf(r.OrRules.GetRules(), decodePermission)
	case *rbacv3.Permission_NotRule:
		return not(decodePermission(r.NotRule))
	case *rbacv3.Permission_Header:
		return decodeHeaderFact(r.Header)
	case *rbacv3.Permission_UrlPath:
		return decodePathFact(r.UrlPath)
	case *rbacv3.Permission_DestinationPort:
		return func(f *facts) bool { return uint32(f.destination.Port()) == r.DestinationPort }, nil
	case *rbacv3.Permission_DestinationIp:
		return decodeIPFact(r.DestinationIp, func(f *facts) netip.Addr { return f.destination.Addr() })
	case *rbacv3.Permission_RequestedServerName:
		// A connection inside the tunnel is never TLS that ends here, so that it has no server name.
		m, err := decodeString(r.RequestedServerName)
		return func(*facts) bool { return m.Matches("", false) }, err
	default:
		return nil, fmt.Errorf("permission %T is not supported", r)
	}
}

func decodePrincipal(p *rbacv3.Principal) (matcher, error) {
	switch r := p.GetIdentifier().(type) {
	case *rbacv3.Principal_Any:
		return always, nil
	case *rbacv3.Principal_AndIds:
		return allOf(r.AndIds.GetIds(), decodePrincipal)
	case *rbacv3.Principal_OrIds:
		return anyOf(r.OrIds.GetIds(), decodePrincipal)
	case *rbacv3.Principal_NotId:
		return not(decodePrincipal(r.NotId))
	case *rbacv3.Principal_Header:
		return decodeHeaderFact(r.Header)
	case *rbacv3.Principal_UrlPath:
		return decodePathFact(r.UrlPath)
	case *rbacv3.Principal_DirectRemoteIp:
		return decodeIPFact(r.DirectRemoteIp, func(f *facts) netip.Addr { return f.sourceIP })
	case *rbacv3.Principal_RemoteIp:
		return decodeIPFact(r.RemoteIp, func(f *facts) netip.Addr { return f.remoteIP })
	case *rbacv3.Principal_Authenticated_:
		if r.Authenticated.GetPrincipalName() == nil {
			return func(f *facts) bool { return !f.source.IsZero() }, nil
		}
		return decodeIdentityFact(r.Authenticated.GetPrincipalName())
	case *rbacv3.Principal_FilterState:
		if r.FilterState.GetKey() != "io.istio.peer_principal" || r.FilterState.GetStringMatch() == nil {
			return nil, fmt.Errorf("filter state %q is not supported", r.FilterState.GetKey())
		}
		return decodeIdentityFact(r.FilterState.GetStringMatch())
	default:
		return nil, fmt.Errorf("principal %T is not supported", r)
	}
}

func decodeIdentityFact(s *matcherv3.StringMatcher) (matcher, error) {
	m, err := decodeString(s)
	return func(f *facts) bool { return m.Matches(f.source.String(), !f.source.IsZero()) }, err
}

func decodeIPFact(c *corev3.CidrRange, of func(*facts) netip.Addr) (matcher, error) {
	addr, err := netip.ParseAddr(c.GetAddressPrefix())
	if err != nil {
		return nil, err
	}
	prefix, err := addr.Prefix(int(c.GetPrefixLen().GetValue()))
	if err != nil {
		return nil, err
	}
	return func(f *facts) bool { return prefix.Contains(of(f).Unmap()) }, nil
}

func decodePathFact(p *matcherv3.PathMatcher) (matcher, error) {
	m, err := decodeString(p.GetPath())
	return func(f *facts) bool { return f.http != nil && m.Matches(f.http.Path, true) }, err
}

func decodeHeaderFact(h *routev3.HeaderMatcher) (matcher, error) {
	m, err := decodeHeader(h)
	if err != nil {
		return nil, err
	}
	return func(f *facts) bool {
		if f.http == nil {
			return false
		}
		value, present := headerOf(f.http, m.Name)
		return m.Matches(value, present)
	}, nil
}

// headerOf reads a header, or a pseudo header of HTTP/2 whatever the request's version is.
func headerOf(r *httproute.Request, name string) (string, bool) {
	switch name {
	case ":method":
		return r.Method, true
	case ":authority", "host":
		return r.Host, true
	case ":path":
		if r.RawQuery != "" {
			return r.Path + "?" + r.RawQuery, true
		}
		return r.Path, true
	case ":scheme":
		return "http", true
	default:
		return r.Header(name)
	}
}
