package translate

import (
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"
	securityapi "istio.io/api/security/v1beta1"
)

// ruleCompiler makes one rule an RBAC policy.
type ruleCompiler struct {
	namespace   string
	trustDomain string
	// tcp: fields that need HTTP are left out, and needsHTTP tells that there were some.
	tcp       bool
	needsHTTP bool
	err       error
}

func (c *ruleCompiler) rule(r *securityapi.Rule) *rbacv3.Policy {
	var permissions []*rbacv3.Permission
	var principals []*rbacv3.Principal
	if len(r.GetFrom()) > 0 {
		var any []*rbacv3.Principal
		for i, from := range r.GetFrom() {
			any = append(any, c.source(fmt.Sprintf("from[%d].source", i), from.GetSource()))
		}
		principals = append(principals, anyPrincipal(any))
	}
	if len(r.GetTo()) > 0 {
		var any []*rbacv3.Permission
		for i, to := range r.GetTo() {
			any = append(any, c.operation(fmt.Sprintf("to[%d].operation", i), to.GetOperation()))
		}
		permissions = append(permissions, anyPermission(any))
	}
	for i, when := range r.GetWhen() {
		permission, principal := c.condition(fmt.Sprintf("when[%d]", i), when)
		if permission != nil {
			permissions = append(permissions, permission)
		}
		if principal != nil {
			principals = append(principals, principal)
		}
	}
	return &rbacv3.Policy{
		Permissions: []*rbacv3.Permission{allPermissions(permissions)},
		Principals:  []*rbacv3.Principal{allPrincipals(principals)},
	}
}

func (c *ruleCompiler) fail(path, format string, args ...any) {
	if c.err == nil {
		c.err = fmt.Errorf("%s %s", path, fmt.Sprintf(format, args...))
	}
}

func (c *ruleCompiler) source(path string, s *securityapi.Source) *rbacv3.Principal {
	if s == nil {
		c.fail(path, "is missing")
		return noPrincipal()
	}
	var all []*rbacv3.Principal
	add := func(field string, values, not []string, http bool, one func(path, v string) *rbacv3.Principal) {
		all = append(all, c.principals(path+"."+field, values, not, http, one)...)
	}
	add("principals", s.GetPrincipals(), s.GetNotPrincipals(), false, c.principal)
	add("namespaces", s.GetNamespaces(), s.GetNotNamespaces(), false, c.sourceNamespace)
	add("serviceAccounts", s.GetServiceAccounts(), s.GetNotServiceAccounts(), false, c.serviceAccount)
	add("trustDomains", s.GetTrustDomains(), s.GetNotTrustDomains(), false, c.sourceTrustDomain)
	add("ipBlocks", s.GetIpBlocks(), s.GetNotIpBlocks(), false, c.sourceIP)
	add("remoteIpBlocks", s.GetRemoteIpBlocks(), s.GetNotRemoteIpBlocks(), true, c.remoteIP)
	// No token is ever validated here, so no request has a request principal.
	add("requestPrincipals", s.GetRequestPrincipals(), s.GetNotRequestPrincipals(), true,
		func(string, string) *rbacv3.Principal { return noPrincipal() })
	return allPrincipals(all)
}

// principals makes "one of values and none of not"; http tells that the field needs HTTP.
func (c *ruleCompiler) principals(path string, values, not []string, http bool, one func(path, v string) *rbacv3.Principal) []*rbacv3.Principal {
	if c.skips(http, values, not) {
		return nil
	}
	list := func(values []string) []*rbacv3.Principal {
		var out []*rbacv3.Principal
		for i, v := range values {
			at := fmt.Sprintf("%s[%d]", path, i)
			if v == "" {
				c.fail(at, "is empty")
			}
			out = append(out, one(at, v))
		}
		return out
	}
	var out []*rbacv3.Principal
	if len(values) > 0 {
		out = append(out, anyPrincipal(list(values)))
	}
	if len(not) > 0 {
		out = append(out, &rbacv3.Principal{Identifier: &rbacv3.Principal_NotId{NotId: anyPrincipal(list(not))}})
	}
	return out
}

func (c *ruleCompiler) skips(http bool, values, not []string) bool {
	if len(values)+len(not) == 0 {
		return true
	}
	if http && c.tcp {
		c.needsHTTP = true
		return true
	}
	return false
}

func (c *ruleCompiler) permissions(path string, values, not []string, http bool, one func(path, v string) *rbacv3.Permission) []*rbacv3.Permission {
	if c.skips(http, values, not) {
		return nil
	}
	list := func(values []string) []*rbacv3.Permission {
		var out []*rbacv3.Permission
		for i, v := range values {
			at := fmt.Sprintf("%s[%d]", path, i)
			if v == "" {
				c.fail(at, "is empty")
			}
			out = append(out, one(at, v))
		}
		return out
	}
	var out []*rbacv3.Permission
	if len(values) > 0 {
		out = append(out, anyPermission(list(values)))
	}
	if len(not) > 0 {
		out = append(out, &rbacv3.Permission{Rule: &rbacv3.Permission_NotRule{NotRule: anyPermission(list(not))}})
	}
	return out
}

func (c *ruleCompiler) operation(path string, o *securityapi.Operation) *rbacv3.Permission {
	if o == nil {
		c.fail(path, "is missing")
		return anyPermission(nil)
	}
	var all []*rbacv3.Permission
	add := func(field string, values, not []string, http bool, one func(path, v string) *rbacv3.Permission) {
		all = append(all, c.permissions(path+"."+field, values, not, http, one)...)
	}
	add("hosts", o.GetHosts(), o.GetNotHosts(), true, hostPermission)
	add("methods", o.GetMethods(), o.GetNotMethods(), true, func(_, v string) *rbacv3.Permission { return headerPermission(":method", v) })
	add("paths", o.GetPaths(), o.GetNotPaths(), true, c.pathPermission)
	add("ports", o.GetPorts(), o.GetNotPorts(), false, c.portPermission)
	return allPermissions(all)
}

// condition is a when clause; it is about the request or about the source, never both.
func (c *ruleCompiler) condition(path string, w *securityapi.Condition) (*rbacv3.Permission, *rbacv3.Principal) {
	if len(w.GetValues()) == 0 && len(w.GetNotValues()) == 0 {
		c.fail(path, "has neither values nor notValues")
	}
	permission := func(http bool, one func(path, v string) *rbacv3.Permission) (*rbacv3.Permission, *rbacv3.Principal) {
		return allPermissions(c.permissions(path+".values", w.GetValues(), w.GetNotValues(), http, one)), nil
	}
	principal := func(http bool, one func(path, v string) *rbacv3.Principal) (*rbacv3.Permission, *rbacv3.Principal) {
		return nil, allPrincipals(c.principals(path+".values", w.GetValues(), w.GetNotValues(), http, one))
	}
	key := w.GetKey()
	if name, ok := bracketed(key, "request.headers"); ok {
		return permission(true, func(_, v string) *rbacv3.Permission { return headerPermission(strings.ToLower(name), v) })
	}
	if strings.HasPrefix(key, "request.auth.") {
		return principal(true, func(string, string) *rbacv3.Principal { return noPrincipal() })
	}
	switch key {
	case "source.ip":
		return principal(false, c.sourceIP)
	case "remote.ip":
		return principal(true, c.remoteIP)
	case "source.namespace":
		return principal(false, c.sourceNamespace)
	case "source.principal":
		return principal(false, c.principal)
	case "source.serviceAccount":
		return principal(false, c.serviceAccount)
	case "source.trustDomain":
		return principal(false, c.sourceTrustDomain)
	case "destination.ip":
		return permission(false, c.destinationIP)
	case "destination.port":
		return permission(false, c.portPermission)
	case "connection.sni":
		return permission(false, func(_, v string) *rbacv3.Permission {
			return &rbacv3.Permission{Rule: &rbacv3.Permission_RequestedServerName{RequestedServerName: stringMatcher(v)}}
		})
	default:
		c.fail(path+".key", "%q is not supported", key)
		return nil, nil
	}
}

// bracketed reads the name out of key[name].
func bracketed(key, prefix string) (string, bool) {
	name, ok := strings.CutPrefix(key, prefix+"[")
	if !ok {
		return "", false
	}
	name, ok = strings.CutSuffix(name, "]")
	return name, ok && name != ""
}

func (c *ruleCompiler) principal(_, v string) *rbacv3.Principal {
	m := stringMatcher(v)
	switch p := m.MatchPattern.(type) {
	case *matcherv3.StringMatcher_Exact:
		p.Exact = "spiffe://" + c.localTrustDomain(p.Exact)
	case *matcherv3.StringMatcher_Prefix:
		p.Prefix = "spiffe://" + c.localTrustDomain(p.Prefix)
	}
	return peerPrincipal(m)
}

// localTrustDomain makes cluster.local stand for the mesh's own trust domain, as Istio does.
func (c *ruleCompiler) localTrustDomain(v string) string {
	if rest, ok := strings.CutPrefix(v, "cluster.local/"); ok {
		return c.trustDomain + "/" + rest
	}
	return v
}

func (c *ruleCompiler) sourceNamespace(_, v string) *rbacv3.Principal {
	return peerPrincipal(regexMatcher("spiffe://[^/]+/ns/" + wildcardPattern(v, "[^/]*") + "/sa/.*"))
}

func (c *ruleCompiler) sourceTrustDomain(_, v string) *rbacv3.Principal {
	return peerPrincipal(regexMatcher("spiffe://" + wildcardPattern(v, "[^/]*") + "/.*"))
}

func (c *ruleCompiler) serviceAccount(path, v string) *rbacv3.Principal {
	namespace, name, ok := strings.Cut(v, "/")
	if !ok {
		namespace, name = c.namespace, v
	}
	if namespace == "" || name == "" || strings.ContainsAny(v, "*") || strings.Contains(name, "/") {
		c.fail(path, "%q is not <namespace>/<service account>", v)
	}
	return peerPrincipal(regexMatcher("spiffe://[^/]+/ns/" + regexp.QuoteMeta(namespace) + "/sa/" + regexp.QuoteMeta(name)))
}

// wildcardPattern makes "*", "a*" and "*a" regular expressions.
func wildcardPattern(v, star string) string {
	prefix, suffix := "", ""
	if v == "*" {
		return strings.TrimSuffix(star, "*") + "+"
	}
	if rest, ok := strings.CutPrefix(v, "*"); ok {
		v, prefix = rest, star
	} else if rest, ok := strings.CutSuffix(v, "*"); ok {
		v, suffix = rest, star
	}
	return prefix + regexp.QuoteMeta(v) + suffix
}

func (c *ruleCompiler) sourceIP(path, v string) *rbacv3.Principal {
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_DirectRemoteIp{DirectRemoteIp: c.cidr(path, v)}}
}

func (c *ruleCompiler) remoteIP(path, v string) *rbacv3.Principal {
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_RemoteIp{RemoteIp: c.cidr(path, v)}}
}

func (c *ruleCompiler) destinationIP(path, v string) *rbacv3.Permission {
	return &rbacv3.Permission{Rule: &rbacv3.Permission_DestinationIp{DestinationIp: c.cidr(path, v)}}
}

func (c *ruleCompiler) cidr(path, v string) *corev3.CidrRange {
	prefix, err := netip.ParsePrefix(v)
	if err != nil {
		addr, err := netip.ParseAddr(v)
		if err != nil || addr.Zone() != "" {
			c.fail(path, "%q is neither an IP address nor a CIDR block", v)
			return nil
		}
		prefix = netip.PrefixFrom(addr.Unmap(), addr.Unmap().BitLen())
	}
	prefix = prefix.Masked()
	return &corev3.CidrRange{AddressPrefix: prefix.Addr().String(), PrefixLen: wrapperspb.UInt32(uint32(prefix.Bits()))}
}

func (c *ruleCompiler) portPermission(path, v string) *rbacv3.Permission {
	port, err := strconv.ParseUint(v, 10, 16)
	if err != nil || port == 0 {
		c.fail(path, "%q is not a port number", v)
	}
	return &rbacv3.Permission{Rule: &rbacv3.Permission_DestinationPort{DestinationPort: uint32(port)}}
}

func headerPermission(name, v string) *rbacv3.Permission {
	h := &routev3.HeaderMatcher{Name: name}
	if v == "*" {
		h.HeaderMatchSpecifier = &routev3.HeaderMatcher_PresentMatch{PresentMatch: true}
	} else {
		h.HeaderMatchSpecifier = &routev3.HeaderMatcher_StringMatch{StringMatch: stringMatcher(v)}
	}
	return &rbacv3.Permission{Rule: &rbacv3.Permission_Header{Header: h}}
}

// hostPermission matches without regard to case; a host without a port matches it with any, so that naming a port in the
// Host header does not get past a DENY.
func hostPermission(_, v string) *rbacv3.Permission {
	if v == "*" {
		return headerPermission(":authority", v)
	}
	pattern := "(?i)" + wildcardPattern(v, ".*")
	if !strings.HasSuffix(v, "*") && !strings.Contains(v, ":") {
		pattern += "(:[0-9]+)?"
	}
	return &rbacv3.Permission{Rule: &rbacv3.Permission_Header{Header: &routev3.HeaderMatcher{Name: ":authority",
		HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: regexMatcher(pattern)}}}}
}

// pathPermission knows exact paths, prefixes and suffixes, and templates: {*} is one element, {**} any number of them.
func (c *ruleCompiler) pathPermission(path, v string) *rbacv3.Permission {
	m := stringMatcher(v)
	if strings.ContainsAny(v, "{}") {
		pattern := regexp.QuoteMeta(v)
		pattern = strings.ReplaceAll(pattern, regexp.QuoteMeta("{**}"), ".*")
		pattern = strings.ReplaceAll(pattern, regexp.QuoteMeta("{*}"), "[^/]+")
		if strings.ContainsAny(pattern, "{}") {
			c.fail(path, "%q has braces that are neither {*} nor {**}", v)
		}
		m = regexMatcher(pattern)
	}
	return &rbacv3.Permission{Rule: &rbacv3.Permission_UrlPath{UrlPath: &matcherv3.PathMatcher{
		Rule: &matcherv3.PathMatcher_Path{Path: m}}}}
}

// stringMatcher reads "*" (anything), "a*" (prefix), "*a" (suffix) and "a" (exact).
func stringMatcher(v string) *matcherv3.StringMatcher {
	if v == "*" {
		return regexMatcher(".+")
	}
	if suffix, ok := strings.CutPrefix(v, "*"); ok {
		return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Suffix{Suffix: suffix}}
	}
	if prefix, ok := strings.CutSuffix(v, "*"); ok {
		return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: prefix}}
	}
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: v}}
}

func regexMatcher(pattern string) *matcherv3.StringMatcher {
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: pattern}}}
}

func peerPrincipal(m *matcherv3.StringMatcher) *rbacv3.Principal {
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_FilterState{FilterState: &matcherv3.FilterStateMatcher{
		Key: principalState, Matcher: &matcherv3.FilterStateMatcher_StringMatch{StringMatch: m}}}}
}

func noPrincipal() *rbacv3.Principal {
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_NotId{NotId: &rbacv3.Principal{Identifier: &rbacv3.Principal_Any{Any: true}}}}
}

func allPrincipals(all []*rbacv3.Principal) *rbacv3.Principal {
	switch len(all) {
	case 0:
		return &rbacv3.Principal{Identifier: &rbacv3.Principal_Any{Any: true}}
	case 1:
		return all[0]
	}
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_AndIds{AndIds: &rbacv3.Principal_Set{Ids: all}}}
}

func anyPrincipal(one []*rbacv3.Principal) *rbacv3.Principal {
	if len(one) == 1 {
		return one[0]
	}
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_OrIds{OrIds: &rbacv3.Principal_Set{Ids: one}}}
}

func allPermissions(all []*rbacv3.Permission) *rbacv3.Permission {
	switch len(all) {
	case 0:
		return &rbacv3.Permission{Rule: &rbacv3.Permission_Any{Any: true}}
	case 1:
		return all[0]
	}
	return &rbacv3.Permission{Rule: &rbacv3.Permission_AndRules{AndRules: &rbacv3.Permission_Set{Rules: all}}}
}

func anyPermission(one []*rbacv3.Permission) *rbacv3.Permission {
	if len(one) == 1 {
		return one[0]
	}
	return &rbacv3.Permission{Rule: &rbacv3.Permission_OrRules{OrRules: &rbacv3.Permission_Set{Rules: one}}}
}
