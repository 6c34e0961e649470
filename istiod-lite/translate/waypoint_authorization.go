package translate

// An AuthorizationPolicy that names a target is enforced by the target's waypoint:
//
//  1. targetRefs → this waypoint's business, and for which of its services.
//  2. action → an RBAC filter, DENY before ALLOW; dry-run → shadow rules.
//  3. rules → RBAC policies: to and when become permissions, from and when principals.
//  4. on TCP ports what needs HTTP → an ALLOW rule goes, a DENY rule loses the field: both refuse more than was asked.
//  5. a value that means nothing → a condition that says which; the last valid version stays in force.
//
// Next: waypoint/authorization.go

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	rbachttp "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	rbacnetwork "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	"google.golang.org/protobuf/proto"
	securityapi "istio.io/api/security/v1beta1"
	typeapi "istio.io/api/type/v1beta1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	"k8s.io/apimachinery/pkg/types"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// ConditionWaypointAccepted says whether waypoints enforce an AuthorizationPolicy.
const ConditionWaypointAccepted = "WaypointAccepted"

const shadowPrefix = "istio_dry_run_"

// boundPolicy is a valid policy with a target here.
type boundPolicy struct {
	policy *securityv1.AuthorizationPolicy
	dryRun bool
	// everything: it is for the whole waypoint; else for services.
	everything bool
	services   map[types.NamespacedName]struct{}
	http, tcp  map[string]*rbacv3.Policy
}

func (p *boundPolicy) deny() bool {
	return p.policy.Spec.GetAction() == securityapi.AuthorizationPolicy_DENY
}

// checkPolicies finds the policies that target this waypoint and compiles them.
func (w *waypointBuilder) checkPolicies() {
	w.memory.policies = map[types.NamespacedName]*securityv1.AuthorizationPolicy{}
	for _, p := range sortedPolicies(w.in.Policies) {
		name := types.NamespacedName{Namespace: p.Namespace, Name: p.Name}
		if !w.targets(p, nil) {
			continue
		}
		bound, err := w.compilePolicy(p)
		c := WaypointCondition{Kind: "AuthorizationPolicy", Object: name, Generation: p.Generation,
			Type: ConditionWaypointAccepted, Status: err == nil, Reason: ReasonAccepted,
			Message: fmt.Sprintf("bound to %s/%s", w.in.Gateway.Namespace, w.in.Gateway.Name)}
		if err != nil {
			c.Reason, c.Message = ReasonInvalid, err.Error()
			last := w.in.Previous.policies[name]
			if last != nil {
				c.Message += "; the last valid version stays in force"
				bound, err = w.compilePolicy(last)
			}
		}
		w.conditions = append(w.conditions, c)
		if err == nil {
			w.memory.policies[name] = bound.policy
			w.policies = append(w.policies, bound)
		}
	}
}

func sortedPolicies(ps []*securityv1.AuthorizationPolicy) []*securityv1.AuthorizationPolicy {
	return slices.SortedFunc(slices.Values(ps), func(a, b *securityv1.AuthorizationPolicy) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
}

// targets tells whether a policy is for this waypoint, and notes in bound (unless nil) for what of it.
func (w *waypointBuilder) targets(p *securityv1.AuthorizationPolicy, bound *boundPolicy) bool {
	refs := p.Spec.GetTargetRefs()
	if r := p.Spec.GetTargetRef(); r != nil {
		refs = append([]*typeapi.PolicyTargetReference{r}, refs...)
	}
	if bound == nil {
		bound = &boundPolicy{}
	}
	bound.services = map[types.NamespacedName]struct{}{}
	gw := w.in.Gateway
	for _, r := range refs {
		namespace := cmp.Or(r.GetNamespace(), p.Namespace)
		switch {
		case r.GetKind() == "Gateway" && r.GetGroup() == gatewayv1.GroupName:
			bound.everything = bound.everything || (namespace == gw.Namespace && r.GetName() == gw.Name)
		case r.GetKind() == "GatewayClass" && r.GetGroup() == gatewayv1.GroupName:
			bound.everything = bound.everything || (p.Namespace == w.in.RootNamespace && r.GetName() == string(gw.Spec.GatewayClassName))
		case r.GetKind() == "Service" && (r.GetGroup() == "" || r.GetGroup() == "core"):
			name := types.NamespacedName{Namespace: namespace, Name: r.GetName()}
			if _, ok := w.attached[name]; ok && namespace == p.Namespace {
				bound.services[name] = struct{}{}
			}
		}
	}
	return bound.everything || len(bound.services) > 0
}

// policiesOf lists the policies of a service; the zero name stands for workloads, which only whole-waypoint policies reach.
func (w *waypointBuilder) policiesOf(service types.NamespacedName) []boundPolicy {
	var out []boundPolicy
	for _, p := range w.policies {
		if _, ok := p.services[service]; ok || p.everything {
			out = append(out, p)
		}
	}
	return out
}

func (w *waypointBuilder) compilePolicy(p *securityv1.AuthorizationPolicy) (boundPolicy, error) {
	bound := boundPolicy{policy: p, http: map[string]*rbacv3.Policy{}, tcp: map[string]*rbacv3.Policy{}}
	w.targets(p, &bound)
	switch p.Spec.GetAction() {
	case securityapi.AuthorizationPolicy_ALLOW, securityapi.AuthorizationPolicy_DENY:
	default:
		return bound, fmt.Errorf("the %s action is not supported by this waypoint", p.Spec.GetAction())
	}
	dryRun, err := parseDryRun(p.Annotations)
	if err != nil {
		return bound, err
	}
	bound.dryRun = dryRun
	for i, r := range p.Spec.GetRules() {
		name := fmt.Sprintf("ns[%s]-policy[%s]-rule[%d]", p.Namespace, p.Name, i)
		c := ruleCompiler{namespace: p.Namespace, trustDomain: w.in.TrustDomain}
		policy := c.rule(r)
		if c.err != nil {
			return bound, fmt.Errorf("rules[%d].%w", i, c.err)
		}
		bound.http[name] = policy
		tcp := ruleCompiler{namespace: p.Namespace, trustDomain: w.in.TrustDomain, tcp: true}
		policy = tcp.rule(r)
		if !tcp.needsHTTP || bound.deny() {
			bound.tcp[name] = policy
		}
	}
	return bound, nil
}

// rbacRules are the rules in force and those only reported, of one action; nil where there are none.
func rbacRules(policies []boundPolicy, deny, tcp bool) (rules, shadow *rbacv3.RBAC) {
	action := rbacv3.RBAC_ALLOW
	if deny {
		action = rbacv3.RBAC_DENY
	}
	for _, p := range policies {
		if p.deny() != deny {
			continue
		}
		into := &rules
		if p.dryRun {
			into = &shadow
		}
		if *into == nil {
			*into = &rbacv3.RBAC{Action: action, Policies: map[string]*rbacv3.Policy{}}
		}
		from := p.http
		if tcp {
			from = p.tcp
		}
		for name, policy := range from {
			(*into).Policies[name] = policy
		}
	}
	return rules, shadow
}

// httpAuthorization makes the RBAC filters: DENY, then ALLOW.
func httpAuthorization(policies []boundPolicy) []*hcmv3.HttpFilter {
	var out []*hcmv3.HttpFilter
	for _, deny := range []bool{true, false} {
		rules, shadow := rbacRules(policies, deny, false)
		if rules == nil && shadow == nil {
			continue
		}
		m := &rbachttp.RBAC{Rules: rules, ShadowRules: shadow}
		if shadow != nil {
			m.ShadowRulesStatPrefix = shadowPrefix + strings.ToLower(shadow.Action.String()) + "_"
		}
		out = append(out, httpFilter("envoy.filters.http.rbac", m))
	}
	return out
}

// tcpAuthorization is httpAuthorization for a TCP port.
func tcpAuthorization(policies []boundPolicy) []*listenerv3.Filter {
	var out []*listenerv3.Filter
	for _, deny := range []bool{true, false} {
		rules, shadow := rbacRules(policies, deny, true)
		if rules == nil && shadow == nil {
			continue
		}
		m := &rbacnetwork.RBAC{Rules: rules, ShadowRules: shadow, StatPrefix: "tcp."}
		if shadow != nil {
			m.ShadowRulesStatPrefix = shadowPrefix + strings.ToLower(shadow.Action.String()) + "_"
		}
		out = append(out, networkFilter("envoy.filters.network.rbac", proto.Message(m)))
	}
	return out
}
