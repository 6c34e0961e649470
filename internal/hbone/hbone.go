// Package hbone (protocols) is the tunnel between proxies: HTTP/2 CONNECT streams in mutual TLS 1.3, both ends of it.
//
// A client calls Pool.Open, which shares one tunnel among the streams of one Key; a server gives each CONNECT to
// ServerConfig.Handle as an *Incoming, which it accepts or rejects. Both sides then hold a *Stream: a net.Conn with half
// close, reset and Relay. The protocol itself is package machine, without I/O; a Driver moves its bytes: Goroutines over
// any net.Conn, or Loops, the event loops with their own TLS records.
package hbone

import (
	"context"
	"crypto/tls"
	"net"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/net/http2/hpack"
)

const errConnReset = syscall.ECONNRESET

// Windows and frame size that this side offers; the values of Istio's node proxy, so that a pair of either make behaves alike.
const (
	streamWindow = 4 << 20
	connWindow   = 16 << 20
	maxFrame     = 1 << 20
)

// Request is one CONNECT: where to, and what is said about the connection.
type Request struct {
	Authority string // ip:port, or hostname:port towards waypoints and gateways
	// Header holds the fields beside the pseudo-header: forwarded, baggage, traceparent, x-istio-source,
	// x-forwarded-network. Names are lower case.
	Header []hpack.HeaderField
}

// Get returns the first header field called name (lower case), or "".
func (r *Request) Get(name string) string { return headerValue(r.Header, name) }

func headerValue(h []hpack.HeaderField, name string) string {
	for _, f := range h {
		if f.Name == name {
			return f.Value
		}
	}
	return ""
}

// Key says which streams may share a tunnel: all fields must be equal.
type Key struct {
	Source      string // SPIFFE id that this side proves
	Destination string // SPIFFE id that the peer must prove; "" = any that the Dialer's tls.Config accepts
	SourceIP    netip.Addr
	Addr        netip.AddrPort // of the peer proxy, usually port 15008
	Netns       uint64         // inode of the network namespace it is dialled in
	Buffers     *Buffers       // what this side's tunnels may be sent ahead of their applications; nil = 16 MiB each
}

// Dialer makes one TCP connection to the peer proxy, in the right network namespace, and gives the TLS configuration to
// use on it: this side's certificate, the check of the peer's identity, TLS 1.3, ALPN h2. It is called for each new
// tunnel, so a rotated certificate is used from the next tunnel on. ctx ends when the handshake timeout does.
type Dialer func(ctx context.Context) (net.Conn, *tls.Config, error)

// tunnelConfig is what a driver needs to know about a new tunnel.
type tunnelConfig struct {
	server     bool
	maxStreams int // streams that the peer may have open (server)
	events     tunnelEvents
	buffers    *Buffers
	ping       time.Duration // silence after which the peer is asked for a sign of life; 0 = never
	pingWait   time.Duration // how long it has for an answer
	idle       time.Duration // after which a tunnel without streams is ended, looked at when pings are; 0 = never
}

// tunnelEvents is told of what happens on a tunnel. Calls come from the driver and must not block.
type tunnelEvents interface {
	incoming(in *Incoming) // server: a CONNECT arrived
	limit(n int)           // client: the peer allows n streams at once
	draining()             // the tunnel takes no new streams
	ended(err error)       // the tunnel is gone, with its streams and its connection; called once, last
}

// tunnel is the driver's side of one connection between two proxies. All methods may be called from any goroutine.
type tunnel interface {
	// connect sends the CONNECT of s; the answer comes by s.answered or s.fail. errTunnelFull when the peer's limit is
	// reached, errTunnelDraining when no new streams can be opened; both may come later by s.fail as well.
	connect(s *Stream, req *Request)
	newStream() *Stream
	drain()          // sends GOAWAY; the tunnel ends by itself when its last stream has
	close(err error) // cuts all
	state() *tls.ConnectionState
}

// Driver moves the bytes of tunnels: Goroutines or Loops.
type Driver interface {
	// start does the TLS handshake on nc (bounded by ctx) and takes nc over. The error of a failed handshake is a *TLSError.
	start(ctx context.Context, nc net.Conn, cfg *tls.Config, tc tunnelConfig) (tunnel, error)
	// Accept calls accepted for each connection that comes to ln, with a bare descriptor, non-blocking and close-on-exec,
	// that accepted owns. It must not block: with Loops it runs on an event loop, so that a connection that Pool.Start
	// sends on costs no goroutine. What cannot be accepted is told to failed, and tried again soon. stop ends it, after
	// the connections that wait; ln stays the caller's.
	Accept(ln *net.TCPListener, accepted func(conn int, from netip.AddrPort), failed func(error)) (stop func(), err error)
}
