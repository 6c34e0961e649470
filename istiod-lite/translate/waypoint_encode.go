package translate

import (
	"regexp"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/fairlead-mesh/fairlead/internal/httproute"
)

// encodeHost makes a virtual host Envoy's; waypoint/route.go reads it back.
func encodeHost(h httproute.Host) *routev3.VirtualHost {
	out := &routev3.VirtualHost{Name: h.Name, Domains: h.Domains}
	for _, r := range h.Routes {
		out.Routes = append(out.Routes, encodeRoute(r))
	}
	return out
}

func encodeRoute(r httproute.Route) *routev3.Route {
	out := &routev3.Route{Name: r.Name, Match: encodeMatch(r.Match)}
	out.RequestHeadersToAdd, out.RequestHeadersToRemove = encodeHeaders(r.Change.Request)
	out.ResponseHeadersToAdd, out.ResponseHeadersToRemove = encodeHeaders(r.Change.Response)
	switch {
	case r.Answer != nil:
		a := &routev3.DirectResponseAction{Status: uint32(r.Answer.Status)}
		if r.Answer.Body != "" {
			a.Body = &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: r.Answer.Body}}
		}
		out.Action = &routev3.Route_DirectResponse{DirectResponse: a}
	case r.Redirect != nil:
		out.Action = &routev3.Route_Redirect{Redirect: encodeRedirect(r)}
	default:
		out.Action = &routev3.Route_Route{Route: encodeForward(r)}
	}
	return out
}

func encodeForward(r httproute.Route) *routev3.RouteAction {
	a := &routev3.RouteAction{
		Timeout:                     durationpb.New(r.Timeout),
		RetryPolicy:                 encodeRetry(r),
		ClusterNotFoundResponseCode: routev3.RouteAction_INTERNAL_SERVER_ERROR,
	}
	if len(r.Clusters) == 1 && r.Clusters[0].Change.Request.Empty() && r.Clusters[0].Change.Response.Empty() {
		a.ClusterSpecifier = &routev3.RouteAction_Cluster{Cluster: r.Clusters[0].Cluster}
	} else {
		w := &routev3.WeightedCluster{}
		for _, c := range r.Clusters {
			one := &routev3.WeightedCluster_ClusterWeight{Name: c.Cluster, Weight: wrapperspb.UInt32(c.Weight)}
			one.RequestHeadersToAdd, one.RequestHeadersToRemove = encodeHeaders(c.Change.Request)
			one.ResponseHeadersToAdd, one.ResponseHeadersToRemove = encodeHeaders(c.Change.Response)
			w.Clusters = append(w.Clusters, one)
		}
		a.ClusterSpecifier = &routev3.RouteAction_WeightedClusters{WeightedClusters: w}
	}
	if r.Rewrite.Host != "" {
		a.HostRewriteSpecifier = &routev3.RouteAction_HostRewriteLiteral{HostRewriteLiteral: r.Rewrite.Host}
	}
	switch {
	case r.Rewrite.Full != "":
		a.RegexRewrite = substitution("^/.*$", r.Rewrite.Full)
	case r.Rewrite.Prefix == "/" && r.Match.Path.Value != "/":
		a.RegexRewrite = dropPrefix(r.Match.Path.Value)
	case r.Rewrite.Prefix != "":
		a.PrefixRewrite = prefixRewrite(r.Match.Path.Value, r.Rewrite.Prefix)
	}
	return a
}

// dropPrefix takes a prefix off: Envoy's own prefix rewrite to "/" would leave two slashes.
func dropPrefix(prefix string) *matcherv3.RegexMatchAndSubstitute {
	return substitution("^"+regexp.QuoteMeta(prefix)+"/*", "/")
}

// prefixRewrite keeps the slash between a replaced "/" and what follows it.
func prefixRewrite(matched, replacement string) string {
	replacement = strings.TrimRight(replacement, "/")
	if matched == "/" {
		return replacement + "/"
	}
	return replacement
}

func substitution(pattern, with string) *matcherv3.RegexMatchAndSubstitute {
	return &matcherv3.RegexMatchAndSubstitute{
		Pattern: &matcherv3.RegexMatcher{Regex: pattern}, Substitution: strings.ReplaceAll(with, `\`, `\\`)}
}

// encodeRetry: a failure to connect is always tried again, on another endpoint where there is one.
func encodeRetry(r httproute.Route) *routev3.RetryPolicy {
	p := &routev3.RetryPolicy{RetryOn: "connect-failure,refused-stream", NumRetries: wrapperspb.UInt32(2)}
	if r.Retry.Attempts > 0 {
		p.NumRetries = wrapperspb.UInt32(r.Retry.Attempts)
	}
	if len(r.Retry.Statuses) > 0 {
		p.RetryOn += ",retriable-status-codes"
		for _, s := range r.Retry.Statuses {
			p.RetriableStatusCodes = append(p.RetriableStatusCodes, uint32(s))
		}
	}
	if r.AttemptTimeout > 0 {
		p.PerTryTimeout = durationpb.New(r.AttemptTimeout)
	}
	if r.Retry.Backoff > 0 {
		p.RetryBackOff = &routev3.RetryPolicy_RetryBackOff{
			BaseInterval: durationpb.New(r.Retry.Backoff), MaxInterval: durationpb.New(max(10*r.Retry.Backoff, time.Millisecond))}
	}
	return p
}

func encodeRedirect(r httproute.Route) *routev3.RedirectAction {
	d := r.Redirect
	a := &routev3.RedirectAction{HostRedirect: d.Host, PortRedirect: uint32(d.Port)}
	switch d.Status {
	case 301:
		a.ResponseCode = routev3.RedirectAction_MOVED_PERMANENTLY
	case 303:
		a.ResponseCode = routev3.RedirectAction_SEE_OTHER
	case 307:
		a.ResponseCode = routev3.RedirectAction_TEMPORARY_REDIRECT
	case 308:
		a.ResponseCode = routev3.RedirectAction_PERMANENT_REDIRECT
	default:
		a.ResponseCode = routev3.RedirectAction_FOUND
	}
	if d.Scheme != "" {
		a.SchemeRewriteSpecifier = &routev3.RedirectAction_SchemeRedirect{SchemeRedirect: d.Scheme}
	}
	switch {
	case d.Path.Full != "":
		a.PathRewriteSpecifier = &routev3.RedirectAction_PathRedirect{PathRedirect: d.Path.Full}
	case d.Path.Prefix == "/" && r.Match.Path.Value != "/":
		a.PathRewriteSpecifier = &routev3.RedirectAction_RegexRewrite{RegexRewrite: dropPrefix(r.Match.Path.Value)}
	case d.Path.Prefix != "":
		a.PathRewriteSpecifier = &routev3.RedirectAction_PrefixRewrite{PrefixRewrite: prefixRewrite(r.Match.Path.Value, d.Path.Prefix)}
	}
	return a
}

func encodeMatch(m httproute.Match) *routev3.RouteMatch {
	out := &routev3.RouteMatch{}
	switch {
	case m.Path.Kind == httproute.Exact:
		out.PathSpecifier = &routev3.RouteMatch_Path{Path: m.Path.Value}
	case m.Path.Kind == httproute.Regex:
		out.PathSpecifier = &routev3.RouteMatch_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: m.Path.Value}}
	case m.Path.Kind == httproute.Prefix && m.Path.Value != "/":
		out.PathSpecifier = &routev3.RouteMatch_PathSeparatedPrefix{PathSeparatedPrefix: m.Path.Value}
	default:
		out.PathSpecifier = &routev3.RouteMatch_Prefix{Prefix: "/"}
	}
	if m.GRPC {
		out.Grpc = &routev3.RouteMatch_GrpcRouteMatchOptions{}
	}
	if m.Method != "" {
		out.Headers = append(out.Headers, encodeHeader(httproute.NamedMatch{Name: ":method",
			StringMatch: httproute.StringMatch{Kind: httproute.Exact, Value: m.Method}}))
	}
	for _, h := range m.Headers {
		out.Headers = append(out.Headers, encodeHeader(h))
	}
	for _, q := range m.Query {
		out.QueryParameters = append(out.QueryParameters, &routev3.QueryParameterMatcher{Name: q.Name,
			QueryParameterMatchSpecifier: &routev3.QueryParameterMatcher_StringMatch{StringMatch: encodeString(q.StringMatch)}})
	}
	return out
}

func encodeHeader(h httproute.NamedMatch) *routev3.HeaderMatcher {
	return &routev3.HeaderMatcher{Name: h.Name,
		HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: encodeString(h.StringMatch)}}
}

// encodeString knows the two kinds that the Gateway API has.
func encodeString(m httproute.StringMatch) *matcherv3.StringMatcher {
	if m.Kind == httproute.Regex {
		return regexMatcher(m.Value)
	}
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: m.Value}}
}

func encodeHeaders(h httproute.Headers) (add []*corev3.HeaderValueOption, remove []string) {
	option := func(f httproute.Field, action corev3.HeaderValueOption_HeaderAppendAction) {
		add = append(add, &corev3.HeaderValueOption{
			Header: &corev3.HeaderValue{Key: f.Name, Value: strings.ReplaceAll(f.Value, "%", "%%")}, AppendAction: action, KeepEmptyValue: true})
	}
	for _, f := range h.Set {
		option(f, corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD)
	}
	for _, f := range h.Add {
		option(f, corev3.HeaderValueOption_APPEND_IF_EXISTS_OR_ADD)
	}
	return add, h.Remove
}
