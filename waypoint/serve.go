package waypoint

// A request's way through the waypoint, in steps:
//  1. A client proxy's CONNECT names a service's address or hostname and a port, or a workload's address.
//  2. The listener's matcher names the filter chain of that port; what it does not know is refused: nothing passes here
//     that the control plane did not send.
//  3. Where the protocol is not known, the first bytes tell HTTP from anything else.
//  4. A TCP chain: policy over the connection, then bytes to an endpoint (tcp.go).
//  5. An HTTP chain: each request goes through http.go.
//
// Next: internal/httproute/httproute.go, by way of waypoint/http.go.

import (
	"bufio"
	"bytes"
	"errors"
	"net"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/fairlead-mesh/fairlead/internal/hbone"
	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// inbound is a connection as the client's proxy described it.
type inbound struct {
	source mesh.Identity
	// sourceIP is the client pod's: its proxy dials from the pod's own network namespace.
	sourceIP netip.Addr
	// client is the address the application connected from, as its proxy says; for the log.
	client netip.AddrPort
	// from are the client workload's names, as its proxy says; for log and metrics.
	from      mesh.Workload
	authority string
	// to is where the connection goes; its address is zero where the authority is a hostname.
	to netip.AddrPort
}

// handle takes one CONNECT.
func (p *Proxy) handle(in *hbone.Incoming) {
	c, err := describe(in)
	if err != nil {
		p.refuse(c, in, &failure{reason: reasonBadRequest, err: err})
		return
	}
	s := p.resources.current.Load()
	if s == nil {
		p.refuse(c, in, &failure{reason: reasonNotReady, detail: "no configuration in force"})
		return
	}
	t, ok := s.entrance.targetOf(c)
	if !ok {
		p.refuse(c, in, &failure{reason: reasonNoService, detail: "no filter chain for " + c.authority})
		return
	}
	if t.http == "" {
		// Policy comes first, so that the client's proxy learns of a refusal.
		if f := p.admitTCP(s, c, t.tcp); f != nil {
			p.refuse(c, in, f)
			return
		}
	}
	stream, err := in.Accept()
	if err != nil {
		p.log.Debug("client gave up", zap.Error(err))
		return
	}
	conn := &serverConn{Stream: stream, in: c}
	if t.http != "" && t.tcp != "" && !conn.looksLikeHTTP(s.entrance.sniffTimeout) {
		if f := p.admitTCP(s, c, t.tcp); f != nil {
			p.logTCP(c, nil, nil, f, time.Now(), 0, 0)
			stream.Abort(f)
			return
		}
		t.http = ""
	}
	if t.http == "" {
		p.forwardTCP(s, c, conn, t.tcp)
		return
	}
	p.serveHTTP(conn)
}

// refuse answers a CONNECT that goes nowhere.
func (p *Proxy) refuse(c *inbound, in *hbone.Incoming, f *failure) {
	status := reasons[f.reason].status
	if f.reason == reasonDenied {
		status = 401 // what node proxies expect of a refusal by policy
	}
	in.Reject(status, f.Error())
	p.logTCP(c, nil, nil, f, time.Now(), 0, 0)
}

// describe reads a CONNECT.
func describe(in *hbone.Incoming) (*inbound, error) {
	c := &inbound{authority: in.Authority, sourceIP: in.RemoteAddr.Addr().Unmap(), client: in.RemoteAddr}
	if in.Peer == nil {
		return c, errors.New("the tunnel has no TLS")
	}
	id, err := identity.FromTLS(*in.Peer)
	if err != nil {
		return c, err
	}
	c.source = id
	c.from = fromBaggage(in.Get("baggage"))
	c.from.Namespace = id.Namespace
	if client, ok := forwardedFor(in.Get("forwarded")); ok {
		c.client = client
	}
	if to, err := netip.ParseAddrPort(in.Authority); err == nil {
		c.to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
		return c, nil
	}
	_, port, err := net.SplitHostPort(in.Authority)
	if err != nil {
		return c, err
	}
	n, err := netip.ParseAddrPort("0.0.0.0:" + port)
	if err != nil {
		return c, err
	}
	c.to = netip.AddrPortFrom(netip.Addr{}, n.Port())
	return c, nil
}

// targetOf finds the chains of a connection.
func (e *entrance) targetOf(c *inbound) (target, bool) {
	if c.to.Addr().IsValid() {
		return e.find(c.to)
	}
	t, ok := e.byHostname[strings.ToLower(c.authority)]
	return t, ok
}

// forwardedFor reads the client's address from a Forwarded header (RFC 7239).
func forwardedFor(header string) (netip.AddrPort, bool) {
	first, _, _ := strings.Cut(header, ",")
	for pair := range strings.SplitSeq(first, ";") {
		name, value, _ := strings.Cut(strings.TrimSpace(pair), "=")
		if !strings.EqualFold(name, "for") {
			continue
		}
		at, err := netip.ParseAddrPort(strings.Trim(value, `"`))
		return at, err == nil
	}
	return netip.AddrPort{}, false
}

// fromBaggage reads the names of the client workload. They are its proxy's word, for telemetry only.
func fromBaggage(header string) mesh.Workload {
	var w mesh.Workload
	for entry := range strings.SplitSeq(header, ",") {
		key, value, _ := strings.Cut(strings.TrimSpace(entry), "=")
		value, err := url.PathUnescape(value)
		if err != nil {
			continue
		}
		switch key {
		case "k8s.cluster.name":
			w.ClusterID = value
		case "k8s.namespace.name":
		case "service.name":
			w.CanonicalName = value
		case "service.version":
			w.CanonicalRevision = value
		case "cloud.region":
			w.Locality.Region = value
		case "cloud.availability_zone":
			w.Locality.Zone = value
		default:
			if strings.HasPrefix(key, "k8s.") && strings.HasSuffix(key, ".name") {
				w.WorkloadName = value
			}
		}
	}
	return w
}

// serverConn is the client's side of a connection. Bytes that were looked at are read again.
type serverConn struct {
	*hbone.Stream
	in *inbound
	r  *bufio.Reader
}

func (c *serverConn) Read(b []byte) (int, error) {
	if c.r != nil {
		if c.r.Buffered() > 0 {
			return c.r.Read(b)
		}
		c.r = nil
	}
	return c.Stream.Read(b)
}

// looksLikeHTTP waits for the first bytes, at most for wait.
func (c *serverConn) looksLikeHTTP(wait time.Duration) bool {
	c.r = bufio.NewReaderSize(c.Stream, 64)
	_ = c.SetReadDeadline(time.Now().Add(wait))
	defer func() { _ = c.SetReadDeadline(time.Time{}) }()
	for n := 1; ; n++ {
		seen, err := c.r.Peek(n)
		if is, known := httpPrefix(seen); known {
			return is
		}
		if err != nil {
			return false // silence is not HTTP; nor is what ended before it was
		}
		n = max(n, c.r.Buffered())
	}
}

const http2Preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// httpPrefix tells whether the first bytes are HTTP's; known is false while more bytes are needed.
func httpPrefix(b []byte) (is, known bool) {
	if len(b) > 0 && b[0] == 'P' && strings.HasPrefix(http2Preface, string(b)) {
		return len(b) >= len("PRI "), len(b) >= len("PRI ")
	}
	method, rest, found := bytes.Cut(b, []byte{' '})
	if len(method) > 16 || (found && len(method) == 0) {
		return false, true
	}
	for _, c := range method {
		if c < 'A' || c > 'Z' {
			return false, true
		}
	}
	if !found || len(rest) == 0 {
		return false, false
	}
	return rest[0] == '/' || rest[0] == '*' || rest[0] == 'h', true
}

// handOver is a listener whose connections are given to it by serveHTTP.
type handOver struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
	addr   net.Addr
}

func newHandOver(addr net.Addr) *handOver {
	return &handOver{conns: make(chan net.Conn), closed: make(chan struct{}), addr: addr}
}

func (h *handOver) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.closed:
		return nil, net.ErrClosed
	}
}

func (h *handOver) Close() error {
	h.once.Do(func() { close(h.closed) })
	return nil
}

func (h *handOver) Addr() net.Addr { return h.addr }
