package translate

// An AuthorizationPolicy that names no target is enforced by ztunnel:
//
//  1. targetRefs → the waypoint's business, nothing here.
//  2. action → ALLOW or DENY; ztunnel has no other.
//  3. namespace and selector → the scope.
//  4. rules → clauses: one for from, one for to, one for each when.
//  5. what ztunnel cannot see (HTTP) → an ALLOW rule goes, a DENY rule loses the field: both refuse more than was asked.
//  6. a value that means nothing → no policy at all, and a condition that says which value.
//
// Next: internal/wire/authorization.go

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"
	securityapi "istio.io/api/security/v1beta1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// ConditionZtunnelAccepted says whether ztunnel enforces an AuthorizationPolicy as written.
const ConditionZtunnelAccepted = "ZtunnelAccepted"

// Reasons of ConditionZtunnelAccepted.
const (
	ReasonAccepted         = "Accepted"
	ReasonUnsupportedValue = "UnsupportedValue"
	ReasonInvalid          = "Invalid"
)

// AuthorizationResult is what becomes of one AuthorizationPolicy.
type AuthorizationResult struct {
	// Policy for ztunnels; nil when they have none to enforce.
	Policy *mesh.Authorization
	// Selector are the labels of the workloads that list the policy, for ScopeSelector.
	Selector map[string]string
	// Invalid: the object cannot be understood, so that what it said before is to stay in force.
	Invalid bool
	// Condition to report on the object; nil for a policy that is not ztunnel's.
	Condition *Condition
}

// Authorization translates one AuthorizationPolicy.
func Authorization(m Mesh, p *securityv1.AuthorizationPolicy) AuthorizationResult {
	if p.Spec.GetTargetRef() != nil || len(p.Spec.GetTargetRefs()) > 0 {
		return AuthorizationResult{}
	}
	if p.Name == staticStrictName || strings.HasPrefix(p.Name, convertedPrefix) {
		return AuthorizationResult{Invalid: true, Condition: rejected(ReasonInvalid, "the name is reserved for policies made of PeerAuthentications")}
	}
	out := &mesh.Authorization{Name: p.Name, Namespace: p.Namespace}
	switch p.Spec.GetAction() {
	case securityapi.AuthorizationPolicy_ALLOW:
		out.Action = mesh.ActionAllow
	case securityapi.AuthorizationPolicy_DENY:
		out.Action = mesh.ActionDeny
	default:
		return AuthorizationResult{Condition: rejected(ReasonUnsupportedValue,
			fmt.Sprintf("ztunnel does not support the %s action", p.Spec.GetAction()))}
	}
	dryRun, err := parseDryRun(p.Annotations)
	if err != nil {
		return AuthorizationResult{Invalid: true, Condition: rejected(ReasonInvalid, err.Error())}
	}
	out.DryRun = dryRun
	result := AuthorizationResult{Policy: out, Selector: p.Spec.GetSelector().GetMatchLabels()}
	switch {
	case len(result.Selector) > 0:
		out.Scope = mesh.ScopeSelector
	case p.Namespace == m.RootNamespace:
		out.Scope = mesh.ScopeGlobal
	default:
		out.Scope = mesh.ScopeNamespace
	}
	var unsupported []string
	for i, r := range p.Spec.GetRules() {
		t := ruleTranslation{namespace: p.Namespace}
		rule := t.rule(r)
		if t.err != nil {
			return AuthorizationResult{Invalid: true, Condition: rejected(ReasonInvalid, fmt.Sprintf("rules[%d].%v", i, t.err))}
		}
		unsupported = append(unsupported, t.unsupported...)
		if len(t.unsupported) == 0 || out.Action == mesh.ActionDeny {
			out.Rules = append(out.Rules, rule)
		}
	}
	result.Condition = acceptance(out.Action, unsupported)
	return result
}

// acceptance is the condition of a policy that is in force.
func acceptance(action mesh.Action, unsupported []string) *Condition {
	if len(unsupported) == 0 {
		return &Condition{Type: ConditionZtunnelAccepted, Status: true, Reason: ReasonAccepted, Message: "attached to ztunnel"}
	}
	slices.Sort(unsupported)
	consequence := "rules of an ALLOW policy that use them never match"
	if action == mesh.ActionDeny {
		consequence = "rules of a DENY policy are enforced without them"
	}
	return &Condition{Type: ConditionZtunnelAccepted, Status: true, Reason: ReasonUnsupportedValue, Message: fmt.Sprintf(
		"ztunnel cannot enforce these attributes: %s; %s, which refuses more than was asked for. HTTP attributes need a waypoint and targetRefs",
		strings.Join(slices.Compact(unsupported), ", "), consequence)}
}

func rejected(reason, message string) *Condition {
	return &Condition{Type: ConditionZtunnelAccepted, Reason: reason, Message: message}
}

func parseDryRun(annotations map[string]string) (bool, error) {
	v, ok := annotations[annotationDryRun]
	if !ok {
		return false, nil
	}
	dryRun, err := strconv.ParseBool(v)
	if err != nil {
		return false, fmt.Errorf("annotation %s: %q is neither true nor false", annotationDryRun, v)
	}
	return dryRun, nil
}

// ruleTranslation collects, over one rule, what ztunnel cannot enforce and the first thing that makes no sense.
type ruleTranslation struct {
	namespace   string
	unsupported []string
	err         error
}

func (t *ruleTranslation) rule(r *securityapi.Rule) mesh.Rule {
	var out mesh.Rule
	if len(r.GetFrom()) > 0 {
		var clause mesh.Clause
		for i, from := range r.GetFrom() {
			clause.Matches = append(clause.Matches, t.source(fmt.Sprintf("from[%d].source", i), from.GetSource()))
		}
		out.Clauses = append(out.Clauses, clause)
	}
	if len(r.GetTo()) > 0 {
		var clause mesh.Clause
		for i, to := range r.GetTo() {
			clause.Matches = append(clause.Matches, t.operation(fmt.Sprintf("to[%d].operation", i), to.GetOperation()))
		}
		out.Clauses = append(out.Clauses, clause)
	}
	for i, when := range r.GetWhen() {
		out.Clauses = append(out.Clauses, mesh.Clause{Matches: []mesh.Match{t.condition(fmt.Sprintf("when[%d]", i), when)}})
	}
	return out
}

func (t *ruleTranslation) source(path string, s *securityapi.Source) mesh.Match {
	if proto.Size(s) == 0 {
		t.fail(path, "names nothing")
		return mesh.Match{}
	}
	t.unsupportedIf("requestPrincipals", s.GetRequestPrincipals())
	t.unsupportedIf("notRequestPrincipals", s.GetNotRequestPrincipals())
	t.unsupportedIf("remoteIpBlocks", s.GetRemoteIpBlocks())
	t.unsupportedIf("notRemoteIpBlocks", s.GetNotRemoteIpBlocks())
	t.unsupportedIf("trustDomains", s.GetTrustDomains())
	t.unsupportedIf("notTrustDomains", s.GetNotTrustDomains())
	return mesh.Match{
		Principals:         t.strings(path+".principals", s.GetPrincipals()),
		NotPrincipals:      t.strings(path+".notPrincipals", s.GetNotPrincipals()),
		Namespaces:         t.strings(path+".namespaces", s.GetNamespaces()),
		NotNamespaces:      t.strings(path+".notNamespaces", s.GetNotNamespaces()),
		ServiceAccounts:    t.serviceAccounts(path+".serviceAccounts", s.GetServiceAccounts()),
		NotServiceAccounts: t.serviceAccounts(path+".notServiceAccounts", s.GetNotServiceAccounts()),
		SourceIPs:          t.prefixes(path+".ipBlocks", s.GetIpBlocks()),
		NotSourceIPs:       t.prefixes(path+".notIpBlocks", s.GetNotIpBlocks()),
	}
}

func (t *ruleTranslation) operation(path string, o *securityapi.Operation) mesh.Match {
	if proto.Size(o) == 0 {
		t.fail(path, "names nothing")
		return mesh.Match{}
	}
	t.unsupportedIf("hosts", o.GetHosts())
	t.unsupportedIf("notHosts", o.GetNotHosts())
	t.unsupportedIf("methods", o.GetMethods())
	t.unsupportedIf("notMethods", o.GetNotMethods())
	t.unsupportedIf("paths", o.GetPaths())
	t.unsupportedIf("notPaths", o.GetNotPaths())
	return mesh.Match{
		DestinationPorts:    t.ports(path+".ports", o.GetPorts()),
		NotDestinationPorts: t.ports(path+".notPorts", o.GetNotPorts()),
	}
}

func (t *ruleTranslation) condition(path string, c *securityapi.Condition) mesh.Match {
	if len(c.GetValues()) == 0 && len(c.GetNotValues()) == 0 {
		t.fail(path, "has neither values nor notValues")
	}
	values, notValues := path+".values", path+".notValues"
	switch c.GetKey() {
	case "source.ip":
		return mesh.Match{SourceIPs: t.prefixes(values, c.GetValues()), NotSourceIPs: t.prefixes(notValues, c.GetNotValues())}
	case "source.namespace":
		return mesh.Match{Namespaces: t.strings(values, c.GetValues()), NotNamespaces: t.strings(notValues, c.GetNotValues())}
	case "source.principal":
		return mesh.Match{Principals: t.strings(values, c.GetValues()), NotPrincipals: t.strings(notValues, c.GetNotValues())}
	case "source.serviceAccount":
		return mesh.Match{ServiceAccounts: t.serviceAccounts(values, c.GetValues()),
			NotServiceAccounts: t.serviceAccounts(notValues, c.GetNotValues())}
	case "destination.ip":
		return mesh.Match{DestinationIPs: t.prefixes(values, c.GetValues()), NotDestinationIPs: t.prefixes(notValues, c.GetNotValues())}
	case "destination.port":
		return mesh.Match{DestinationPorts: t.ports(values, c.GetValues()), NotDestinationPorts: t.ports(notValues, c.GetNotValues())}
	case "":
		t.fail(path, "has no key")
	default:
		t.unsupported = append(t.unsupported, c.GetKey())
	}
	return mesh.Match{}
}

func (t *ruleTranslation) unsupportedIf(field string, values []string) {
	if len(values) > 0 {
		t.unsupported = append(t.unsupported, field)
	}
}

func (t *ruleTranslation) fail(path, message string) {
	if t.err == nil {
		t.err = fmt.Errorf("%s %s", path, message)
	}
}

// strings reads "*" (anything), "a*" (prefix), "*a" (suffix) and "a" (exact).
func (t *ruleTranslation) strings(path string, values []string) []mesh.StringMatch {
	var out []mesh.StringMatch
	for i, v := range values {
		match := mesh.StringMatch{Kind: mesh.MatchExact, Value: v}
		if v == "*" {
			match = mesh.StringMatch{Kind: mesh.MatchPresence}
		} else if suffix, ok := strings.CutPrefix(v, "*"); ok {
			match = mesh.StringMatch{Kind: mesh.MatchSuffix, Value: suffix}
		} else if prefix, ok := strings.CutSuffix(v, "*"); ok {
			match = mesh.StringMatch{Kind: mesh.MatchPrefix, Value: prefix}
		}
		if v == "" {
			t.fail(fmt.Sprintf("%s[%d]", path, i), "is empty")
		}
		out = append(out, match)
	}
	return out
}

// serviceAccounts reads "<namespace>/<name>", or "<name>" in the policy's own namespace.
func (t *ruleTranslation) serviceAccounts(path string, values []string) []mesh.ServiceAccountMatch {
	var out []mesh.ServiceAccountMatch
	for i, v := range values {
		namespace, name, ok := strings.Cut(v, "/")
		if !ok {
			namespace, name = t.namespace, v
		}
		if namespace == "" || name == "" || strings.ContainsAny(v, "*") || strings.Contains(name, "/") {
			t.fail(fmt.Sprintf("%s[%d]", path, i), fmt.Sprintf("%q is not <namespace>/<service account>", v))
		}
		out = append(out, mesh.ServiceAccountMatch{Namespace: namespace, ServiceAccount: name})
	}
	return out
}

// prefixes reads addresses and CIDR blocks.
func (t *ruleTranslation) prefixes(path string, values []string) []netip.Prefix {
	var out []netip.Prefix
	for i, v := range values {
		prefix, err := netip.ParsePrefix(v)
		if err != nil {
			var addr netip.Addr
			if addr, err = netip.ParseAddr(v); err == nil && addr.Zone() == "" {
				addr = addr.Unmap()
				prefix = netip.PrefixFrom(addr, addr.BitLen())
			}
		}
		if !prefix.IsValid() {
			t.fail(fmt.Sprintf("%s[%d]", path, i), fmt.Sprintf("%q is neither an IP address nor a CIDR block", v))
		}
		out = append(out, prefix.Masked())
	}
	return out
}

func (t *ruleTranslation) ports(path string, values []string) []uint16 {
	var out []uint16
	for i, v := range values {
		port, err := strconv.ParseUint(v, 10, 16)
		if err != nil || port == 0 {
			t.fail(fmt.Sprintf("%s[%d]", path, i), fmt.Sprintf("%q is not a port number", v))
		}
		out = append(out, uint16(port))
	}
	return out
}
