package translate

import (
	"cmp"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/types"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/fairlead-mesh/fairlead/internal/httproute"
)

func hostnamesOf(r boundRoute) []gatewayv1.Hostname {
	if len(r.hostnames) == 0 {
		return []gatewayv1.Hostname{"*"}
	}
	return r.hostnames
}

func sortedHostnames(names map[gatewayv1.Hostname]struct{}) []gatewayv1.Hostname {
	return slices.Sorted(maps.Keys(names))
}

// widening lists a hostname and all wildcards that cover it, the closest first.
func widening(name gatewayv1.Hostname) []gatewayv1.Hostname {
	out := []gatewayv1.Hostname{name}
	rest := strings.TrimPrefix(string(name), "*.")
	for {
		_, parent, ok := strings.Cut(rest, ".")
		if !ok {
			break
		}
		out = append(out, gatewayv1.Hostname("*."+parent))
		rest = parent
	}
	if name != "*" {
		out = append(out, "*")
	}
	return out
}

// routeCompiler makes the rules of one route object.
type routeCompiler struct {
	w          *waypointBuilder
	kind       string
	namespace  string
	name       string
	unresolved *unresolvedRef
}

func (w *waypointBuilder) compileHTTPRoute(r *gatewayv1.HTTPRoute) ([]httproute.Route, *unresolvedRef, error) {
	c := &routeCompiler{w: w, kind: "HTTPRoute", namespace: r.Namespace, name: r.Name}
	var out []httproute.Route
	for i, rule := range r.Spec.Rules {
		routes, err := c.httpRule(i, rule)
		if err != nil {
			return nil, c.unresolved, fmt.Errorf("rules[%d]%w", i, err)
		}
		out = append(out, routes...)
	}
	return out, c.unresolved, nil
}

// httpRule makes one route for each match of a rule.
func (c *routeCompiler) httpRule(i int, rule gatewayv1.HTTPRouteRule) ([]httproute.Route, error) {
	action := httproute.Route{Name: c.ruleName(i, rule.Name)}
	for j, f := range rule.Filters {
		if err := c.httpFilter(&action, f); err != nil {
			return nil, fmt.Errorf(".filters[%d]%w", j, err)
		}
	}
	if err := timeouts(&action, rule); err != nil {
		return nil, err
	}
	if rule.SessionPersistence != nil {
		return nil, fmt.Errorf(".sessionPersistence is not supported")
	}
	if action.Redirect == nil {
		for j, b := range rule.BackendRefs {
			cluster := httproute.Weighted{}
			for k, f := range b.Filters {
				var own httproute.Route
				if err := c.httpFilter(&own, f); err != nil {
					return nil, fmt.Errorf(".backendRefs[%d].filters[%d]%w", j, k, err)
				}
				if own.Redirect != nil || own.Rewrite != (httproute.Rewrite{}) {
					return nil, fmt.Errorf(".backendRefs[%d].filters[%d] of type %s is not supported on a backend", j, k, f.Type)
				}
				cluster.Change = join(cluster.Change, own.Change)
			}
			cluster.Cluster, cluster.Weight = c.backend(b.BackendRef), weightOf(b.BackendRef)
			action.Clusters = append(action.Clusters, cluster)
		}
		settle(&action)
	}
	matches := rule.Matches
	if len(matches) == 0 {
		matches = []gatewayv1.HTTPRouteMatch{{}}
	}
	var out []httproute.Route
	for j, m := range matches {
		route := action
		match, err := httpMatch(m)
		if err != nil {
			return nil, fmt.Errorf(".matches[%d]%w", j, err)
		}
		route.Match = match
		if needsPrefix(action) && match.Path.Kind != httproute.Prefix {
			return nil, fmt.Errorf(".matches[%d].path must be a PathPrefix where a filter replaces the prefix", j)
		}
		out = append(out, route)
	}
	return out, nil
}

func (c *routeCompiler) ruleName(i int, name *gatewayv1.SectionName) string {
	if name != nil {
		return fmt.Sprintf("%s/%s.%s", c.namespace, c.name, *name)
	}
	return fmt.Sprintf("%s/%s.%d", c.namespace, c.name, i)
}

func needsPrefix(r httproute.Route) bool {
	return r.Rewrite.Prefix != "" || (r.Redirect != nil && r.Redirect.Path.Prefix != "")
}

// settle answers 500 where a rule has no backend that could take a request, as the Gateway API asks.
func settle(r *httproute.Route) {
	good := slices.ContainsFunc(r.Clusters, func(w httproute.Weighted) bool { return w.Weight > 0 && w.Cluster != invalidBackend })
	if !good {
		r.Clusters, r.Answer = nil, &httproute.Answer{Status: 500}
	}
}

func weightOf(b gatewayv1.BackendRef) uint32 {
	if b.Weight == nil {
		return 1
	}
	return uint32(max(*b.Weight, 0))
}

// backend names the cluster of a backendRef; one that leads nowhere is noted.
func (c *routeCompiler) backend(b gatewayv1.BackendRef) string {
	note := func(reason gatewayv1.RouteConditionReason, format string, args ...any) string {
		if c.unresolved == nil {
			c.unresolved = &unresolvedRef{string(reason), fmt.Sprintf(format, args...)}
		}
		return invalidBackend
	}
	if !refersToService(b.Group, b.Kind, "Service") {
		return note(gatewayv1.RouteReasonInvalidKind, "backendRef %s is not a Service", b.Name)
	}
	name := types.NamespacedName{Namespace: c.namespace, Name: string(b.Name)}
	if b.Namespace != nil {
		name.Namespace = string(*b.Namespace)
	}
	if name.Namespace != c.namespace && !c.granted(name) {
		return note(gatewayv1.RouteReasonRefNotPermitted, "no ReferenceGrant of namespace %s lets this route send to service %s", name.Namespace, name)
	}
	s, ok := c.w.known[name]
	if !ok {
		return note(gatewayv1.RouteReasonBackendNotFound, "there is no service %s", name)
	}
	if b.Port == nil {
		return note(gatewayv1.RouteReasonBackendNotFound, "backendRef %s names no port", b.Name)
	}
	cluster, ok := c.w.backendCluster(s, uint16(*b.Port))
	if !ok {
		return note(gatewayv1.RouteReasonBackendNotFound, "service %s has no TCP port %d", name, *b.Port)
	}
	return cluster
}

func (c *routeCompiler) granted(to types.NamespacedName) bool {
	for _, g := range c.w.in.ReferenceGrants {
		if g.Namespace != to.Namespace {
			continue
		}
		from := slices.ContainsFunc(g.Spec.From, func(f gatewayv1.ReferenceGrantFrom) bool {
			return string(f.Group) == gatewayv1.GroupName && string(f.Kind) == c.kind && string(f.Namespace) == c.namespace
		})
		target := slices.ContainsFunc(g.Spec.To, func(t gatewayv1.ReferenceGrantTo) bool {
			return (t.Group == "" || t.Group == "core") && t.Kind == "Service" && (t.Name == nil || string(*t.Name) == to.Name)
		})
		if from && target {
			return true
		}
	}
	return false
}

func (c *routeCompiler) httpFilter(r *httproute.Route, f gatewayv1.HTTPRouteFilter) error {
	switch f.Type {
	case gatewayv1.HTTPRouteFilterRequestHeaderModifier:
		r.Change.Request = joinHeaders(r.Change.Request, headerChange(f.RequestHeaderModifier))
	case gatewayv1.HTTPRouteFilterResponseHeaderModifier:
		r.Change.Response = joinHeaders(r.Change.Response, headerChange(f.ResponseHeaderModifier))
	case gatewayv1.HTTPRouteFilterRequestRedirect:
		if f.RequestRedirect == nil {
			return fmt.Errorf(".requestRedirect is missing")
		}
		r.Redirect = redirect(f.RequestRedirect)
	case gatewayv1.HTTPRouteFilterURLRewrite:
		if f.URLRewrite == nil {
			return fmt.Errorf(".urlRewrite is missing")
		}
		if f.URLRewrite.Hostname != nil {
			r.Rewrite.Host = string(*f.URLRewrite.Hostname)
		}
		r.Rewrite.PathChange = pathChange(f.URLRewrite.Path)
	default:
		return fmt.Errorf(" of type %s is not supported", f.Type)
	}
	return nil
}

func redirect(f *gatewayv1.HTTPRequestRedirectFilter) *httproute.Redirect {
	d := &httproute.Redirect{Status: 302, Path: pathChange(f.Path)}
	if f.StatusCode != nil {
		d.Status = *f.StatusCode
	}
	if f.Scheme != nil {
		d.Scheme = *f.Scheme
	}
	if f.Hostname != nil {
		d.Host = string(*f.Hostname)
	}
	if f.Port != nil {
		d.Port = uint16(*f.Port)
	}
	return d
}

func pathChange(p *gatewayv1.HTTPPathModifier) httproute.PathChange {
	switch {
	case p == nil:
		return httproute.PathChange{}
	case p.Type == gatewayv1.FullPathHTTPPathModifier && p.ReplaceFullPath != nil:
		return httproute.PathChange{Full: cmp.Or(*p.ReplaceFullPath, "/")}
	case p.ReplacePrefixMatch != nil:
		return httproute.PathChange{Prefix: cmp.Or(*p.ReplacePrefixMatch, "/")}
	default:
		return httproute.PathChange{}
	}
}

func headerChange(f *gatewayv1.HTTPHeaderFilter) httproute.Headers {
	var h httproute.Headers
	if f == nil {
		return h
	}
	for _, s := range f.Set {
		h.Set = append(h.Set, httproute.Field{Name: strings.ToLower(string(s.Name)), Value: s.Value})
	}
	for _, a := range f.Add {
		h.Add = append(h.Add, httproute.Field{Name: strings.ToLower(string(a.Name)), Value: a.Value})
	}
	for _, r := range f.Remove {
		h.Remove = append(h.Remove, strings.ToLower(r))
	}
	return h
}

func join(a, b httproute.Change) httproute.Change {
	return httproute.Change{Request: joinHeaders(a.Request, b.Request), Response: joinHeaders(a.Response, b.Response)}
}

func joinHeaders(a, b httproute.Headers) httproute.Headers {
	return httproute.Headers{Set: append(a.Set, b.Set...), Add: append(a.Add, b.Add...), Remove: append(a.Remove, b.Remove...)}
}

func timeouts(r *httproute.Route, rule gatewayv1.HTTPRouteRule) error {
	read := func(field string, d *gatewayv1.Duration, into *time.Duration) error {
		if d == nil {
			return nil
		}
		v, err := time.ParseDuration(string(*d))
		if err != nil {
			return fmt.Errorf(".%s: %w", field, err)
		}
		*into = v
		return nil
	}
	if t := rule.Timeouts; t != nil {
		if err := read("timeouts.request", t.Request, &r.Timeout); err != nil {
			return err
		}
		if err := read("timeouts.backendRequest", t.BackendRequest, &r.AttemptTimeout); err != nil {
			return err
		}
	}
	if t := rule.Retry; t != nil {
		for _, code := range t.Codes {
			r.Retry.Statuses = append(r.Retry.Statuses, int(code))
		}
		if t.Attempts != nil {
			r.Retry.Attempts = uint32(max(*t.Attempts, 0))
		}
		return read("retry.backoff", t.Backoff, &r.Retry.Backoff)
	}
	return nil
}

func httpMatch(m gatewayv1.HTTPRouteMatch) (httproute.Match, error) {
	out := httproute.Match{Path: httproute.StringMatch{Kind: httproute.Prefix, Value: "/"}}
	if m.Path != nil {
		kind, value := gatewayv1.PathMatchPathPrefix, "/"
		if m.Path.Type != nil {
			kind = *m.Path.Type
		}
		if m.Path.Value != nil {
			value = *m.Path.Value
		}
		switch kind {
		case gatewayv1.PathMatchExact:
			out.Path = httproute.StringMatch{Kind: httproute.Exact, Value: value}
		case gatewayv1.PathMatchPathPrefix:
			out.Path = httproute.StringMatch{Kind: httproute.Prefix, Value: cmp.Or(strings.TrimRight(value, "/"), "/")}
		case gatewayv1.PathMatchRegularExpression:
			out.Path = httproute.StringMatch{Kind: httproute.Regex, Value: value}
		default:
			return out, fmt.Errorf(".path.type %s is not supported", kind)
		}
		if kind != gatewayv1.PathMatchRegularExpression && !strings.HasPrefix(value, "/") {
			return out, fmt.Errorf(".path.value %q does not begin with a slash", value)
		}
	}
	if m.Method != nil {
		out.Method = string(*m.Method)
	}
	for _, h := range m.Headers {
		regex := h.Type != nil && *h.Type == gatewayv1.HeaderMatchRegularExpression
		out.Headers = addNamed(out.Headers, strings.ToLower(string(h.Name)), h.Value, regex)
	}
	for _, q := range m.QueryParams {
		regex := q.Type != nil && *q.Type == gatewayv1.QueryParamMatchRegularExpression
		out.Query = addNamed(out.Query, string(q.Name), q.Value, regex)
	}
	return out, checked(&out)
}

// addNamed adds a match unless there is one of the name: the Gateway API has the first count.
func addNamed(to []httproute.NamedMatch, name, value string, regex bool) []httproute.NamedMatch {
	if slices.ContainsFunc(to, func(m httproute.NamedMatch) bool { return m.Name == name }) {
		return to
	}
	kind := httproute.Exact
	if regex {
		kind = httproute.Regex
	}
	return append(to, httproute.NamedMatch{Name: name, StringMatch: httproute.StringMatch{Kind: kind, Value: value}})
}

func checked(m *httproute.Match) error {
	if err := m.Compile(); err != nil {
		return fmt.Errorf(": %w", err)
	}
	return nil
}

func (w *waypointBuilder) compileGRPCRoute(r *gatewayv1.GRPCRoute) ([]httproute.Route, *unresolvedRef, error) {
	c := &routeCompiler{w: w, kind: "GRPCRoute", namespace: r.Namespace, name: r.Name}
	var out []httproute.Route
	for i, rule := range r.Spec.Rules {
		routes, err := c.grpcRule(i, rule)
		if err != nil {
			return nil, c.unresolved, fmt.Errorf("rules[%d]%w", i, err)
		}
		out = append(out, routes...)
	}
	return out, c.unresolved, nil
}

func (c *routeCompiler) grpcRule(i int, rule gatewayv1.GRPCRouteRule) ([]httproute.Route, error) {
	action := httproute.Route{Name: c.ruleName(i, rule.Name)}
	if rule.SessionPersistence != nil {
		return nil, fmt.Errorf(".sessionPersistence is not supported")
	}
	change, err := grpcFilters(rule.Filters)
	if err != nil {
		return nil, err
	}
	action.Change = change
	for j, b := range rule.BackendRefs {
		change, err := grpcFilters(b.Filters)
		if err != nil {
			return nil, fmt.Errorf(".backendRefs[%d]%w", j, err)
		}
		action.Clusters = append(action.Clusters, httproute.Weighted{
			Cluster: c.backend(b.BackendRef), Weight: weightOf(b.BackendRef), Change: change})
	}
	settle(&action)
	matches := rule.Matches
	if len(matches) == 0 {
		matches = []gatewayv1.GRPCRouteMatch{{}}
	}
	var out []httproute.Route
	for j, m := range matches {
		route := action
		if route.Match, err = grpcMatch(m); err != nil {
			return nil, fmt.Errorf(".matches[%d]%w", j, err)
		}
		out = append(out, route)
	}
	return out, nil
}

func grpcFilters(filters []gatewayv1.GRPCRouteFilter) (httproute.Change, error) {
	var change httproute.Change
	for i, f := range filters {
		switch f.Type {
		case gatewayv1.GRPCRouteFilterRequestHeaderModifier:
			change.Request = joinHeaders(change.Request, headerChange(f.RequestHeaderModifier))
		case gatewayv1.GRPCRouteFilterResponseHeaderModifier:
			change.Response = joinHeaders(change.Response, headerChange(f.ResponseHeaderModifier))
		default:
			return change, fmt.Errorf(".filters[%d] of type %s is not supported", i, f.Type)
		}
	}
	return change, nil
}

// grpcMatch makes a gRPC method the path it travels as: /package.Service/Method.
func grpcMatch(m gatewayv1.GRPCRouteMatch) (httproute.Match, error) {
	out := httproute.Match{GRPC: true, Path: httproute.StringMatch{Kind: httproute.Prefix, Value: "/"}}
	if m.Method != nil {
		service, method := "", ""
		if m.Method.Service != nil {
			service = *m.Method.Service
		}
		if m.Method.Method != nil {
			method = *m.Method.Method
		}
		regex := m.Method.Type != nil && *m.Method.Type == gatewayv1.GRPCMethodMatchRegularExpression
		switch {
		case service != "" && method != "" && !regex:
			out.Path = httproute.StringMatch{Kind: httproute.Exact, Value: "/" + service + "/" + method}
		case service != "" && method == "" && !regex:
			out.Path = httproute.StringMatch{Kind: httproute.Prefix, Value: "/" + service}
		case service != "" || method != "":
			if !regex {
				service, method = regexp.QuoteMeta(service), regexp.QuoteMeta(method)
			}
			out.Path = httproute.StringMatch{Kind: httproute.Regex,
				Value: "/" + cmp.Or(service, "[^/]+") + "/" + cmp.Or(method, "[^/]+")}
		}
	}
	for _, h := range m.Headers {
		regex := h.Type != nil && *h.Type == gatewayv1.GRPCHeaderMatchRegularExpression
		out.Headers = addNamed(out.Headers, strings.ToLower(string(h.Name)), h.Value, regex)
	}
	return out, checked(&out)
}
