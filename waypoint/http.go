package waypoint

// A request on an HTTP chain, in steps:
//  1. The snapshot in force now, and in it the chain of the connection's destination: a change reaches open connections
//     with their next request.
//  2. The path is normalised, so that policy, route and endpoint see the same.
//  3. Policy: a refusal is 403 "RBAC: access denied".
//  4. Route: 404 where none matches, a redirect, an answer, or a cluster.
//  5. Headers, host and path change as the route says; the request goes to an endpoint (forward.go), its response back.
//  6. One line in the access log and the metrics, at the end.
//
// Next: internal/httproute/httproute.go, then waypoint/forward.go.

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/fairlead-mesh/fairlead/internal/httproute"
)

const (
	requestIDHeader = "X-Request-Id"
	maxHeaderBytes  = 60 << 10 // Envoy's
	headerTimeout   = time.Minute
	idleTimeout     = time.Hour
	maxStreams      = 1000
)

// exchange is one request and its response.
type exchange struct {
	start    time.Time
	conn     *inbound
	snapshot *snapshot
	chain    *chain
	facts    facts
	verdict  verdict
	decision httproute.Decision
	cluster  *cluster
	endpoint *endpoint
	failure  *failure
	w        *countedWriter
	body     *countedReader
	path     string // normalised
}

type exchangeKey struct{}
type connKey struct{}

// newHTTPServer makes the server whose connections are given to it by serveHTTP.
func (p *Proxy) newHTTPServer() *http.Server {
	protocols := &http.Protocols{}
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	p.reverse = &httputil.ReverseProxy{
		Rewrite:        rewrite,
		Transport:      roundTripper(p.forwarder.roundTrip),
		FlushInterval:  -1,
		ModifyResponse: modifyResponse,
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			x := r.Context().Value(exchangeKey{}).(*exchange)
			x.reply(r, classify(err, r.Context().Err() == context.Canceled))
		},
		ErrorLog: p.quiet,
	}
	return &http.Server{
		Handler:           http.HandlerFunc(p.serveRequest),
		Protocols:         protocols,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: maxStreams},
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          p.quiet,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, c.(*serverConn).in)
		},
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// serveHTTP gives a connection to the HTTP server.
func (p *Proxy) serveHTTP(c *serverConn) {
	select {
	case p.handOver.conns <- c:
	case <-p.handOver.closed:
		c.Abort(http.ErrServerClosed)
	}
}

// serveRequest takes one request to its end.
func (p *Proxy) serveRequest(w http.ResponseWriter, r *http.Request) {
	x := &exchange{start: time.Now(), conn: r.Context().Value(connKey{}).(*inbound), w: &countedWriter{ResponseWriter: w}}
	// A response cut short ends the handler by panic; the line is written all the same.
	defer func() {
		if e := recover(); e != nil {
			if x.failure == nil {
				x.failure = &failure{reason: reasonUpstreamReset, detail: "response cut short"}
			}
			p.ended(x, r)
			panic(e)
		}
		p.ended(x, r)
	}()
	if r.Body != nil && r.Body != http.NoBody {
		x.body = &countedReader{ReadCloser: r.Body}
		r.Body = x.body
	}
	if r.Header.Get(requestIDHeader) == "" {
		r.Header.Set(requestIDHeader, uuid.NewString())
	}
	if f := p.decide(x, r); f != nil {
		x.reply(r, f)
		return
	}
	route := x.decision.Route
	switch {
	case route.Redirect != nil:
		apply(x.w.Header(), &route.Change.Response)
		x.w.Header().Set("Location", route.Redirect.Location(x.facts.http, &route.Match, "http", x.conn.to.Port()))
		x.w.WriteHeader(route.Redirect.Status)
	case route.Answer != nil:
		apply(x.w.Header(), &route.Change.Response)
		x.w.WriteHeader(route.Answer.Status)
		_, _ = io.WriteString(x.w, route.Answer.Body)
	default:
		ctx := context.WithValue(r.Context(), exchangeKey{}, x)
		if route.Timeout > 0 {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, route.Timeout)
			defer cancel()
		}
		p.reverse.ServeHTTP(x.w, r.WithContext(ctx))
	}
}

// decide finds chain, verdict, route and cluster; a failure is what the client is answered with.
func (p *Proxy) decide(x *exchange, r *http.Request) *failure {
	x.snapshot = p.resources.current.Load()
	t, ok := x.snapshot.entrance.targetOf(x.conn)
	if !ok || t.http == "" {
		return &failure{reason: reasonNoService, detail: "no HTTP filter chain for " + x.conn.authority}
	}
	x.chain = x.snapshot.entrance.chains[t.http]
	if x.path, ok = httproute.NormalizePath(r.URL.EscapedPath()); !ok {
		return &failure{reason: reasonBadRequest, detail: "path cannot be normalised"}
	}
	x.facts = facts{source: x.conn.source, sourceIP: x.conn.sourceIP, destination: x.conn.to, remoteIP: x.conn.sourceIP,
		http: &httproute.Request{Method: r.Method, Host: r.Host, Path: x.path, RawQuery: r.URL.RawQuery,
			Header: func(name string) (string, bool) {
				values := r.Header.Values(name)
				return strings.Join(values, ","), len(values) > 0
			}}}
	if ip, ok := lastForwarded(r.Header); ok {
		x.facts.remoteIP = ip
	}
	x.verdict = check(x.chain.rules, &x.facts)
	if !x.verdict.allowed {
		return &failure{reason: reasonDenied, detail: x.verdict.String()}
	}
	x.decision = x.snapshot.tableOf(x.chain).Select(x.facts.http, rand.Uint64())
	if x.decision.Route == nil {
		return &failure{reason: reasonNoRoute, detail: x.decision.Reason.String()}
	}
	if x.decision.Route.Redirect != nil || x.decision.Route.Answer != nil {
		return nil
	}
	if x.decision.Cluster == nil || x.decision.Cluster.Cluster == invalidBackend {
		return &failure{reason: reasonNoBackend, detail: fmt.Sprintf("route %s has no valid backend", x.decision.Route.Name)}
	}
	x.cluster = x.snapshot.clusters[x.decision.Cluster.Cluster]
	return nil
}

// invalidBackend is the cluster of backendRefs that lead nowhere.
const invalidBackend = "invalid-backend"

// lastForwarded is the client as the hop before the waypoint saw it.
func lastForwarded(h http.Header) (netip.Addr, bool) {
	values := h.Values("X-Forwarded-For")
	if len(values) == 0 {
		return netip.Addr{}, false
	}
	list := strings.Split(values[len(values)-1], ",")
	ip, err := netip.ParseAddr(strings.TrimSpace(list[len(list)-1]))
	return ip, err == nil
}

// rewrite makes the request to the endpoint. What ReverseProxy takes out of forwarding headers and queries is put back:
// a waypoint is not where they begin.
func rewrite(pr *httputil.ProxyRequest) {
	x := pr.In.Context().Value(exchangeKey{}).(*exchange)
	for _, name := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"} {
		if v, ok := pr.In.Header[name]; ok {
			pr.Out.Header[name] = v
		}
	}
	if pr.Out.Header.Get("X-Forwarded-Proto") == "" {
		pr.Out.Header.Set("X-Forwarded-Proto", "http")
	}
	route := x.decision.Route
	path := route.Rewrite.Apply(x.path, &route.Match)
	plain, err := url.PathUnescape(path)
	if err != nil {
		plain = path // a rewrite may make an escape that is none; it then goes out escaped
	}
	pr.Out.URL = &url.URL{Scheme: "http", Host: x.cluster.name, Path: plain, RawPath: path, RawQuery: pr.In.URL.RawQuery,
		ForceQuery: pr.In.URL.ForceQuery}
	pr.Out.Host = pr.In.Host
	if route.Rewrite.Host != "" {
		pr.Out.Host = route.Rewrite.Host
	}
	apply(pr.Out.Header, &route.Change.Request)
	apply(pr.Out.Header, &x.decision.Cluster.Change.Request)
	if host := pr.Out.Header.Get("Host"); host != "" {
		pr.Out.Host = host
		pr.Out.Header.Del("Host")
	}
}

// roundTrip is send, for the exchange of the request.
func (f *forwarder) roundTrip(req *http.Request) (*http.Response, error) {
	return f.send(req.Context().Value(exchangeKey{}).(*exchange), req)
}

func modifyResponse(resp *http.Response) error {
	x := resp.Request.Context().Value(exchangeKey{}).(*exchange)
	apply(resp.Header, &x.decision.Cluster.Change.Response)
	apply(resp.Header, &x.decision.Route.Change.Response)
	x.w.bodiless = resp.ContentLength == 0
	return nil
}

// apply changes headers: remove, set, add.
func apply(h http.Header, c *httproute.Headers) {
	for _, name := range c.Remove {
		h.Del(name)
	}
	for _, f := range c.Set {
		h.Set(f.Name, f.Value)
	}
	for _, f := range c.Add {
		h.Add(f.Name, f.Value)
	}
}

// reply answers a request that goes nowhere; gRPC clients get their own form of the status.
func (x *exchange) reply(r *http.Request, f *failure) {
	x.failure = f
	if f.reason == reasonClientGone || x.w.status != 0 {
		return
	}
	to := reasons[f.reason]
	body := to.body
	if strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
		h := x.w.Header()
		h.Set("Content-Type", "application/grpc")
		h.Set("Grpc-Status", strconv.Itoa(grpcStatus(to.status)))
		h.Set("Grpc-Message", body)
		x.w.WriteHeader(http.StatusOK)
		return
	}
	if body != "" {
		x.w.Header().Set("Content-Type", "text/plain")
	}
	x.w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	x.w.WriteHeader(to.status)
	_, _ = io.WriteString(x.w, body)
}

// grpcStatus is gRPC's own table of HTTP statuses (doc/http-grpc-status-mapping.md of gRPC).
func grpcStatus(status int) int {
	switch status {
	case http.StatusBadRequest:
		return 13
	case http.StatusUnauthorized:
		return 16
	case http.StatusForbidden:
		return 7
	case http.StatusNotFound:
		return 12
	case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return 14
	default:
		return 2
	}
}

// countedWriter counts a response and keeps net/http from adding headers that the endpoint did not send.
type countedWriter struct {
	http.ResponseWriter
	status int
	bytes  int64
	// bodiless responses end with their header. A flush would put the end into a frame of its own, and a gRPC client
	// takes a status in the header for the whole answer only when the stream ends there.
	bodiless bool
}

func (w *countedWriter) WriteHeader(status int) {
	if status >= 200 || status == http.StatusSwitchingProtocols {
		w.status = status
		for _, name := range []string{"Content-Type", "Date"} {
			if _, ok := w.Header()[name]; !ok {
				w.Header()[name] = nil
			}
		}
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *countedWriter) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	n, err := w.ResponseWriter.Write(b)
	w.bytes += int64(n)
	return n, err
}

// FlushError sends what was written, for http.ResponseController.
func (w *countedWriter) FlushError() error {
	if w.bodiless {
		return nil
	}
	return http.NewResponseController(w.ResponseWriter).Flush()
}

// Unwrap lets http.ResponseController reach the connection.
func (w *countedWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// countedReader counts a request's body.
type countedReader struct {
	io.ReadCloser
	bytes int64
}

func (r *countedReader) Read(b []byte) (int, error) {
	n, err := r.ReadCloser.Read(b)
	r.bytes += int64(n)
	return n, err
}
