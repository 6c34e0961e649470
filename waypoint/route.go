package waypoint

import (
	"fmt"
	"regexp"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"

	"github.com/fairlead-mesh/fairlead/internal/httproute"
)

// decodeRoutes reads a route table. A field that would change where requests go and is not understood is an error; those
// listed in docs/waypoint-xds.md are understood.
func decodeRoutes(rc *routev3.RouteConfiguration) (*httproute.Table, error) {
	t := &httproute.Table{Name: rc.GetName()}
	for _, vh := range rc.GetVirtualHosts() {
		h := httproute.Host{Name: vh.GetName(), Domains: vh.GetDomains()}
		for i, r := range vh.GetRoutes() {
			route, err := decodeRoute(r)
			if err != nil {
				return nil, fmt.Errorf("virtual host %q, route %d (%s): %w", vh.GetName(), i, r.GetName(), err)
			}
			h.Routes = append(h.Routes, route)
		}
		t.Hosts = append(t.Hosts, h)
	}
	return t, nil
}

func decodeRoute(r *routev3.Route) (httproute.Route, error) {
	out := httproute.Route{Name: r.GetName()}
	var err error
	if out.Match, err = decodeMatch(r.GetMatch()); err != nil {
		return out, fmt.Errorf("match: %w", err)
	}
	out.Change.Request = decodeHeaders(r.GetRequestHeadersToAdd(), r.GetRequestHeadersToRemove())
	out.Change.Response = decodeHeaders(r.GetResponseHeadersToAdd(), r.GetResponseHeadersToRemove())
	switch a := r.GetAction().(type) {
	case *routev3.Route_Route:
		err = decodeForward(&out, a.Route)
	case *routev3.Route_Redirect:
		out.Redirect, err = decodeRedirect(a.Redirect)
	case *routev3.Route_DirectResponse:
		out.Answer = &httproute.Answer{Status: int(a.DirectResponse.GetStatus()), Body: a.DirectResponse.GetBody().GetInlineString()}
	default:
		err = fmt.Errorf("action %T is not supported", a)
	}
	return out, err
}

func decodeForward(out *httproute.Route, a *routev3.RouteAction) error {
	switch c := a.GetClusterSpecifier().(type) {
	case *routev3.RouteAction_Cluster:
		out.Clusters = []httproute.Weighted{{Cluster: c.Cluster, Weight: 1}}
	case *routev3.RouteAction_WeightedClusters:
		for _, w := range c.WeightedClusters.GetClusters() {
			out.Clusters = append(out.Clusters, httproute.Weighted{Cluster: w.GetName(), Weight: w.GetWeight().GetValue(),
				Change: httproute.Change{
					Request:  decodeHeaders(w.GetRequestHeadersToAdd(), w.GetRequestHeadersToRemove()),
					Response: decodeHeaders(w.GetResponseHeadersToAdd(), w.GetResponseHeadersToRemove())}})
		}
	default:
		return fmt.Errorf("cluster specifier %T is not supported", c)
	}
	if len(a.GetRequestMirrorPolicies()) > 0 {
		return fmt.Errorf("request_mirror_policies are not supported")
	}
	switch h := a.GetHostRewriteSpecifier().(type) {
	case nil:
	case *routev3.RouteAction_HostRewriteLiteral:
		out.Rewrite.Host = h.HostRewriteLiteral
	default:
		return fmt.Errorf("host rewrite %T is not supported", h)
	}
	out.Rewrite.Prefix = a.GetPrefixRewrite()
	if a.GetRegexRewrite() != nil {
		var err error
		if out.Rewrite.Regex, out.Rewrite.Substitution, err = decodeSubstitution(a.GetRegexRewrite()); err != nil {
			return err
		}
	}
	out.Timeout = a.GetTimeout().AsDuration()
	if p := a.GetRetryPolicy(); p != nil {
		out.AttemptTimeout = p.GetPerTryTimeout().AsDuration()
		out.Retry.Attempts = p.GetNumRetries().GetValue()
		out.Retry.Backoff = p.GetRetryBackOff().GetBaseInterval().AsDuration()
		for _, s := range p.GetRetriableStatusCodes() {
			out.Retry.Statuses = append(out.Retry.Statuses, int(s))
		}
	}
	return nil
}

func decodeSubstitution(s *matcherv3.RegexMatchAndSubstitute) (*regexp.Regexp, string, error) {
	re, err := regexp.Compile(s.GetPattern().GetRegex())
	if err != nil {
		return nil, "", fmt.Errorf("regex rewrite: %w", err)
	}
	// Envoy's \1 is Go's ${1}, its \\ a backslash; a dollar stands for itself.
	var b strings.Builder
	for i := 0; i < len(s.GetSubstitution()); i++ {
		switch c := s.GetSubstitution()[i]; {
		case c == '$':
			b.WriteString("$$")
		case c == '\\' && i+1 < len(s.GetSubstitution()):
			i++
			if n := s.GetSubstitution()[i]; n >= '0' && n <= '9' {
				b.WriteString("${" + string(n) + "}")
			} else {
				b.WriteByte(n)
			}
		default:
			b.WriteByte(c)
		}
	}
	return re, b.String(), nil
}

func decodeRedirect(a *routev3.RedirectAction) (*httproute.Redirect, error) {
	d := &httproute.Redirect{Host: a.GetHostRedirect(), Port: uint16(a.GetPortRedirect())}
	statuses := map[routev3.RedirectAction_RedirectResponseCode]int{
		routev3.RedirectAction_MOVED_PERMANENTLY: 301, routev3.RedirectAction_FOUND: 302, routev3.RedirectAction_SEE_OTHER: 303,
		routev3.RedirectAction_TEMPORARY_REDIRECT: 307, routev3.RedirectAction_PERMANENT_REDIRECT: 308,
	}
	d.Status = statuses[a.GetResponseCode()]
	switch s := a.GetSchemeRewriteSpecifier().(type) {
	case nil:
	case *routev3.RedirectAction_HttpsRedirect:
		if s.HttpsRedirect {
			d.Scheme = "https"
		}
	case *routev3.RedirectAction_SchemeRedirect:
		d.Scheme = s.SchemeRedirect
	}
	switch p := a.GetPathRewriteSpecifier().(type) {
	case nil:
	case *routev3.RedirectAction_PathRedirect:
		d.Path.Full = p.PathRedirect
	case *routev3.RedirectAction_PrefixRewrite:
		d.Path.Prefix = p.PrefixRewrite
	case *routev3.RedirectAction_RegexRewrite:
		var err error
		if d.Path.Regex, d.Path.Substitution, err = decodeSubstitution(p.RegexRewrite); err != nil {
			return nil, err
		}
	}
	if d.Status == 0 {
		return nil, fmt.Errorf("redirect status %s is not supported", a.GetResponseCode())
	}
	return d, nil
}

func decodeMatch(m *routev3.RouteMatch) (httproute.Match, error) {
	var out httproute.Match
	switch p := m.GetPathSpecifier().(type) {
	case *routev3.RouteMatch_Prefix:
		if p.Prefix != "/" && p.Prefix != "" {
			return out, fmt.Errorf("prefix %q is not supported: use path_separated_prefix", p.Prefix)
		}
		out.Path = httproute.StringMatch{Kind: httproute.Prefix, Value: "/"}
	case *routev3.RouteMatch_PathSeparatedPrefix:
		out.Path = httproute.StringMatch{Kind: httproute.Prefix, Value: p.PathSeparatedPrefix}
	case *routev3.RouteMatch_Path:
		out.Path = httproute.StringMatch{Kind: httproute.Exact, Value: p.Path}
	case *routev3.RouteMatch_SafeRegex:
		out.Path = httproute.StringMatch{Kind: httproute.Regex, Value: p.SafeRegex.GetRegex()}
	default:
		return out, fmt.Errorf("path specifier %T is not supported", p)
	}
	out.GRPC = m.GetGrpc() != nil
	for _, h := range m.GetHeaders() {
		one, err := decodeHeader(h)
		if err != nil {
			return out, err
		}
		if one.Name == ":method" && one.Kind == httproute.Exact && !one.Not && out.Method == "" {
			out.Method = one.Value
			continue
		}
		out.Headers = append(out.Headers, one)
	}
	for _, q := range m.GetQueryParameters() {
		one := httproute.NamedMatch{Name: q.GetName(), StringMatch: httproute.StringMatch{Kind: httproute.Present}}
		if s := q.GetStringMatch(); s != nil {
			var err error
			if one.StringMatch, err = decodeString(s); err != nil {
				return out, err
			}
		}
		out.Query = append(out.Query, one)
	}
	if m.GetRuntimeFraction() != nil || m.GetTlsContext() != nil || len(m.GetDynamicMetadata()) > 0 || len(m.GetFilterState()) > 0 {
		return out, fmt.Errorf("runtime_fraction, tls_context, dynamic_metadata and filter_state are not supported")
	}
	return out, out.Compile()
}

func decodeHeader(h *routev3.HeaderMatcher) (httproute.NamedMatch, error) {
	out := httproute.NamedMatch{Name: strings.ToLower(h.GetName())}
	switch m := h.GetHeaderMatchSpecifier().(type) {
	case *routev3.HeaderMatcher_StringMatch:
		var err error
		if out.StringMatch, err = decodeString(m.StringMatch); err != nil {
			return out, fmt.Errorf("header %q: %w", h.GetName(), err)
		}
	case *routev3.HeaderMatcher_PresentMatch:
		out.Kind, out.Not = httproute.Present, !m.PresentMatch
	default:
		return out, fmt.Errorf("header %q: %T is not supported", h.GetName(), m)
	}
	if h.GetTreatMissingHeaderAsEmpty() {
		return out, fmt.Errorf("header %q: treat_missing_header_as_empty is not supported", h.GetName())
	}
	out.Not = out.Not != h.GetInvertMatch()
	return out, nil
}

func decodeString(m *matcherv3.StringMatcher) (httproute.StringMatch, error) {
	out := httproute.StringMatch{IgnoreCase: m.GetIgnoreCase()}
	switch p := m.GetMatchPattern().(type) {
	case *matcherv3.StringMatcher_Exact:
		out.Kind, out.Value = httproute.Exact, p.Exact
	case *matcherv3.StringMatcher_Prefix:
		out.Kind, out.Value = httproute.Prefix, p.Prefix
	case *matcherv3.StringMatcher_Suffix:
		out.Kind, out.Value = httproute.Suffix, p.Suffix
	case *matcherv3.StringMatcher_Contains:
		out.Kind, out.Value = httproute.Contains, p.Contains
	case *matcherv3.StringMatcher_SafeRegex:
		out.Kind, out.Value = httproute.Regex, p.SafeRegex.GetRegex()
	default:
		return out, fmt.Errorf("string match %T is not supported", p)
	}
	return out, out.Compile()
}

func decodeHeaders(add []*corev3.HeaderValueOption, remove []string) httproute.Headers {
	h := httproute.Headers{Remove: remove}
	for _, o := range add {
		f := httproute.Field{Name: o.GetHeader().GetKey(), Value: strings.ReplaceAll(o.GetHeader().GetValue(), "%%", "%")}
		if o.GetAppendAction() == corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD {
			h.Set = append(h.Set, f)
		} else {
			h.Add = append(h.Add, f)
		}
	}
	return h
}
