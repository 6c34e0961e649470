package waypoint

// The way to an endpoint, in steps:
//  1. Of the cluster's endpoints, the less loaded of two drawn at random.
//  2. A connection of the pool for that endpoint and protocol, or a new one: a stream of an HBONE tunnel whose far end
//     proves the endpoint's identity, or plain TCP to an endpoint without a proxy.
//  3. Where no connection can be made, nothing was sent: another endpoint, at most as often as the route says.
//
// Next: internal/hbone/client.go, and on the other node ztunnel/inbound.go.

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/net/http2/hpack"

	"github.com/fairlead-mesh/fairlead/internal/hbone"
	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// forwarder opens connections to endpoints and sends requests on them.
type forwarder struct {
	self         mesh.Identity
	certificates identity.Certificater
	pool         *hbone.Pool
	hbonePort    uint16
	// header is what every CONNECT says of the waypoint.
	header       []hpack.HeaderField
	http1, http2 *http.Transport
}

func newForwarder(cfg Config, certificates identity.Certificater, pool *hbone.Pool) *forwarder {
	f := &forwarder{self: cfg.self(), certificates: certificates, pool: pool, hbonePort: cfg.HBONEPort,
		header: []hpack.HeaderField{
			{Name: "x-istio-source", Value: "waypoint"},
			{Name: "baggage", Value: strings.Join([]string{"k8s.cluster.name=" + cfg.ClusterID, "k8s.namespace.name=" + cfg.PodNamespace,
				"k8s.deployment.name=" + cfg.GatewayName, "service.name=" + cfg.GatewayName, "service.version=latest"}, ",")},
		}}
	f.http1, f.http2 = f.transport(), f.transport()
	f.http1.Protocols, f.http2.Protocols = &http.Protocols{}, &http.Protocols{}
	f.http1.Protocols.SetHTTP1(true)
	f.http2.Protocols.SetUnencryptedHTTP2(true)
	return f
}

func (f *forwarder) transport() *http.Transport {
	return &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			to, ok := ctx.Value(attemptKey{}).(*attempt)
			if !ok {
				return nil, errors.New("no endpoint to connect to")
			}
			ctx, cancel := context.WithTimeout(ctx, to.cluster.connectTimeout)
			defer cancel()
			c, err := f.connect(ctx, to.endpoint, nil)
			if err != nil {
				return nil, connectFailure(err)
			}
			return c, nil
		},
		DisableCompression:  true,
		MaxIdleConnsPerHost: 256,
		IdleConnTimeout:     time.Minute,
	}
}

// close ends idle connections and gives their far ends a moment to end theirs, so that nobody takes the end for a loss.
func (f *forwarder) close() {
	f.http1.CloseIdleConnections()
	f.http2.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	_ = f.pool.Drain(ctx) // what has not ended by then is cut
	f.pool.Close()
}

// closeTimeout is how long the end of the process waits for tunnels to say goodbye.
const closeTimeout = time.Second

// forever is longer than any request.
const forever = 10 * 365 * 24 * time.Hour

// attempt is an endpoint tried for a request.
type attempt struct {
	cluster  *cluster
	endpoint *endpoint
}

type attemptKey struct{}

// connection is one to an endpoint.
type connection interface {
	net.Conn
	CloseWrite() error
}

// connect opens a connection to an endpoint. forwarded are header fields about the client, where it has the connection
// for itself.
func (f *forwarder) connect(ctx context.Context, e *endpoint, forwarded []hpack.HeaderField) (connection, error) {
	if !e.peer.hbone {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", e.addr.String())
		if err != nil {
			return nil, err
		}
		return c.(*net.TCPConn), nil
	}
	proxy := netip.AddrPortFrom(e.addr.Addr(), f.hbonePort)
	key := hbone.Key{Source: f.self.String(), Destination: e.peer.identity.String(), Addr: proxy}
	dial := func(ctx context.Context) (net.Conn, *tls.Config, error) {
		bundle, err := f.certificates.Certificate(ctx, f.self)
		if err != nil {
			return nil, nil, err
		}
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", proxy.String())
		if err != nil {
			return nil, nil, err
		}
		return c, identity.ClientTLS(bundle, []mesh.Identity{e.peer.identity}), nil
	}
	s, err := f.pool.Open(ctx, key, dial, hbone.Request{Authority: e.addr.String(), Header: append(slices.Clip(f.header), forwarded...)})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// endpoints lists what a cluster can send to for a connection to an address.
func (s *snapshot) endpointsOf(c *cluster, to netip.AddrPort) []*endpoint {
	if c.original != nil {
		e := &endpoint{addr: to, peer: c.original, weight: 1, load: &load{}}
		e.host = poolHost(e)
		return []*endpoint{e}
	}
	return s.endpoints[c.eds]
}

// pickEndpoint draws two endpoints that were not tried, by weight, and takes the one with less under way for its weight.
// It is nil when all were tried.
func pickEndpoint(all []*endpoint, tried []*endpoint, first, second uint64) *endpoint {
	left := all
	if len(tried) > 0 {
		left = slices.DeleteFunc(slices.Clone(all), func(e *endpoint) bool { return slices.Contains(tried, e) })
	}
	if len(left) == 0 {
		return nil
	}
	a, b := draw(left, first), draw(left, second)
	if b.load.active.Load()*int64(a.weight) < a.load.active.Load()*int64(b.weight) {
		return b
	}
	return a
}

func draw(list []*endpoint, rnd uint64) *endpoint {
	var sum uint64
	for _, e := range list {
		sum += uint64(e.weight)
	}
	at := rnd % sum
	for _, e := range list {
		if at < uint64(e.weight) {
			return e
		}
		at -= uint64(e.weight)
	}
	return list[len(list)-1]
}

// send sends a request to one of the cluster's endpoints; it is the transport of the reverse proxy.
func (f *forwarder) send(x *exchange, req *http.Request) (*http.Response, error) {
	endpoints := x.snapshot.endpointsOf(x.cluster, x.conn.to)
	if len(endpoints) == 0 {
		return nil, &failure{reason: reasonNoEndpoint, detail: fmt.Sprintf("cluster %s has no endpoint", x.cluster.name)}
	}
	transport := f.http1
	if x.cluster.http2 || req.ProtoMajor == 2 {
		transport = f.http2
	}
	body := req.Body
	if body != nil {
		defer body.Close()
		req.Body = io.NopCloser(body)
	}
	replayable := body == nil || body == http.NoBody
	retries := x.decision.Route.Retry
	left := max(int(retries.Attempts), 1)
	var tried []*endpoint
	for {
		e := pickEndpoint(endpoints, tried, rand.Uint64(), rand.Uint64())
		if e == nil {
			// All were tried once: those that failed may have come back meanwhile.
			e = pickEndpoint(endpoints, nil, rand.Uint64(), rand.Uint64())
		}
		x.endpoint = e
		resp, err := f.attempt(transport, req, x, e)
		again := left > 0 && req.Context().Err() == nil
		switch {
		case err == nil && (!again || !replayable || !slices.Contains(retries.Statuses, resp.StatusCode)):
			return resp, nil
		case err == nil:
			resp.Body.Close()
		case !again || !isConnectFailure(err):
			return nil, err
		}
		left--
		tried = append(tried, e)
		if err := pause(req.Context(), retries.Backoff); err != nil {
			return nil, err
		}
	}
}

func isConnectFailure(err error) bool {
	var f *failure
	return errors.As(err, &f) && f.connect
}

func pause(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// attempt sends a request to one endpoint and counts it as under way until the response's body is closed.
func (f *forwarder) attempt(transport *http.Transport, req *http.Request, x *exchange, e *endpoint) (*http.Response, error) {
	timeout := x.decision.Route.AttemptTimeout
	if timeout <= 0 {
		timeout = forever
	}
	ctx, cancel := context.WithTimeout(req.Context(), timeout)
	ctx = context.WithValue(ctx, attemptKey{}, &attempt{x.cluster, e})
	out := req.WithContext(ctx)
	u := *req.URL
	u.Host = e.host
	out.URL = &u
	e.load.active.Add(1)
	end := func() {
		cancel()
		e.load.active.Add(-1)
	}
	resp, err := transport.RoundTrip(out)
	if err != nil {
		end()
		return nil, err
	}
	body := &countedBody{ReadCloser: resp.Body, end: end}
	if w, ok := resp.Body.(io.Writer); ok {
		resp.Body = &countedUpgrade{body, w} // a switched protocol is written to as well
	} else {
		resp.Body = body
	}
	return resp, nil
}

// countedBody calls end once, when it is closed.
type countedBody struct {
	io.ReadCloser
	end func()
}

func (b *countedBody) Close() error {
	err := b.ReadCloser.Close()
	if b.end != nil {
		b.end()
		b.end = nil
	}
	return err
}

type countedUpgrade struct {
	*countedBody
	io.Writer
}
