package ztunnel

// A connection that arrives through a tunnel for an application of this node, in steps:
//  1. It is asked for inside a tunnel whose handshake has proven the peer's identity.
//  2. What the mesh knows at this moment is taken.
//  3. internal/route/inbound.go decides whether it is for this pod.
//  4. internal/authz/authz.go decides whether this peer may come in.
//  5. The application is dialled, with the client's address as the source.
//  6. The peer is answered, bytes are relayed until both ends have finished, and one line is written.
// Next: internal/authz/authz.go

import (
	"context"
	"crypto/tls"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/authz"
	"github.com/fairlead-mesh/fairlead/internal/hbone"
	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/netns"
	"github.com/fairlead-mesh/fairlead/internal/relay"
	"github.com/fairlead-mesh/fairlead/internal/route"
	"github.com/fairlead-mesh/fairlead/internal/state"
)

// newServer makes the HBONE server of a pod: it answers with the pod's identity.
func (p *Proxy) newServer(pod *pod) *hbone.Server {
	config := identity.ServerTLS(p.running, p.certs, pod.identity)
	return hbone.NewServer(hbone.ServerConfig{
		TLS: func(_ context.Context, hello *tls.ClientHelloInfo) (*tls.Config, error) {
			return config.GetConfigForClient(hello)
		},
		Begin:  func(in *hbone.Incoming) func() { return p.serveInbound(pod, in) },
		Driver: p.driver,
		Log:    p.log,

		MaxStreams:     p.cfg.Limits.Streams,
		MaxTunnels:     p.cfg.Limits.Tunnels,
		MaxPeerTunnels: p.cfg.Limits.PeerTunnels,
		Buffers:        pod.buffers,
		Limited:        func(l hbone.Limit) { p.metrics.limited(pod, l) },
	})
}

// serveInbound answers one CONNECT. It runs on an event loop: what has to wait is returned.
func (p *Proxy) serveInbound(pod *pod, in *hbone.Incoming) (rest func()) {
	c := p.connections.open(pod, inbound, in.RemoteAddr, in.LocalAddr)
	c.path, c.mutualTLS, c.hbone = pathHBONE, true, in.Authority
	if failed := p.connections.admit(c); failed != nil {
		c.reject(in, failed)
		return nil
	}
	if snap, self := p.known(pod); self != nil {
		return p.letIn(c, snap, self, in)
	}
	return func() {
		ctx, cancel := context.WithTimeout(in.Context(), setupTimeout)
		defer cancel()
		snap, self, failed := p.view(ctx, pod)
		if failed != nil {
			c.reject(in, failed)
		} else if rest := p.letIn(c, snap, self, in); rest != nil {
			rest()
		}
	}
}

// reject answers with a refusal and ends the connection.
func (c *connection) reject(in *hbone.Incoming, failed *failure) {
	in.Reject(reasons[failed.reason].status, failed.Error())
	c.fail(failed)
}

// letIn decides and begins to connect; rest waits for that, where it takes time.
func (p *Proxy) letIn(c *connection, snap *state.Snapshot, self *mesh.Workload, in *hbone.Incoming) (rest func()) {
	if failed := p.decideInbound(c, snap, self, in); failed != nil {
		c.reject(in, failed)
		return nil
	}
	app, pending, err := p.sockets.Begin(c.pod.Netns, c.towardsApplication(), c.asked)
	if err != nil {
		c.reject(in, classify(err))
		return nil
	}
	if !pending {
		p.deliver(c, in, app)
		return nil
	}
	return func() {
		ctx, cancel := context.WithTimeout(in.Context(), setupTimeout)
		defer cancel()
		app, err := p.sockets.Finish(ctx, app, c.asked)
		if err != nil {
			c.reject(in, classify(err))
			return
		}
		p.deliver(c, in, app)
	}
}

// deliver answers the peer and joins the stream with the application's socket, app, which it owns.
func (p *Proxy) deliver(c *connection, in *hbone.Incoming, app int) {
	stream, err := in.Accept()
	if err != nil {
		c.refuse(app, classify(err))
		return
	}
	c.establish()
	c.attach(stream)
	stream.RelayFD(app, func(r relay.Result) { c.finish(r, r.Received, r.Sent) })
}

// decideInbound describes the connection and asks whether it may come in.
func (p *Proxy) decideInbound(c *connection, snap *state.Snapshot, self *mesh.Workload, in *hbone.Incoming) *failure {
	peer, err := identity.FromTLS(*in.Peer)
	if err != nil {
		return fail(reasonIdentity, "%w", err)
	}
	c.sourceID, c.destID, c.destination = peer, c.pod.identity, self
	c.describeSource(snap, self, in)
	d := route.Inbound(self, in.LocalAddr.Addr(), in.Authority)
	if d.Action == route.Refuse {
		return refused(d)
	}
	p.connections.retarget(c, d.Target)
	if failed := c.refuseOwnListener(); failed != nil {
		return failed
	}
	return c.authorize(p.store, authz.Connection{Source: peer, SourceIP: c.client.Addr(), Destination: d.Target})
}

// describeSource finds out what can be said of the peer for logs and metrics: the workload with its address, when that
// has the identity the peer has proven, and the service that it says it was asked for.
func (c *connection) describeSource(snap *state.Snapshot, self *mesh.Workload, in *hbone.Incoming) {
	at := mesh.NetworkAddress{Network: self.Network, Address: c.client.Addr()}
	if w := snap.WorkloadAt(at); w != nil && (c.sourceID.IsZero() || w.Identity() == c.sourceID) {
		c.source = w
	}
	if in == nil {
		return
	}
	host := forwardedHost(in.Get("forwarded"))
	for key := range self.Services {
		if key.Hostname == host {
			c.service = snap.Service(key)
		}
	}
}

// retarget notes the application's address of a connection that came through a tunnel.
func (s *connections) retarget(c *connection, target netip.AddrPort) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forgetPort(c)
	c.asked, c.hop = target, target
	s.ports[portKey{c.client, c.asked}]++
}

// refuseOwnListener refuses what would lead back into this proxy.
func (c *connection) refuseOwnListener() *failure {
	for _, l := range c.pod.listeners {
		if l.slots && c.asked == l.addr || !l.slots && c.asked.Port() == l.addr.Port() {
			return fail(reasonSelfCall, "port %d is the proxy's own", c.asked.Port())
		}
	}
	return nil
}

// sourcePorts are where a source port is looked for when the kernel's choice might be in use by the client: outside of
// what Linux gives to clients by default (32768 to 60999).
const (
	firstSourcePort = 10000
	sourcePorts     = 32768 - firstSourcePort
	portAttempts    = 8
)

// towardsApplication is how to connect to the pod's application from the client's address, so that the application sees
// who calls. A client of another family than the application's cannot be shown, nor one on loopback. A pod that calls
// itself needs nothing: the kernel chooses that very address.
func (c *connection) towardsApplication() netns.DialOptions {
	client := c.client.Addr()
	if client.Is4() != c.asked.Addr().Is4() || client.IsLoopback() || client == c.asked.Addr() {
		return netns.DialOptions{Mark: netns.ProxyMark}
	}
	options := netns.DialOptions{Source: netip.AddrPortFrom(client, 0), Transparent: true, Mark: netns.ProxyMark}
	if c.pod.slots {
		// The pod's routing brings what carries this mark to lo, and so the application's answers back here.
		options.Mark, options.Device = netns.RedirectMark, "lo"
	}
	return options
}

// dialApplication connects to the pod's application for a connection that did not come through a tunnel.
func (p *Proxy) dialApplication(ctx context.Context, c *connection) (*net.TCPConn, error) {
	options := c.towardsApplication()
	if c.path != pathPlain || !options.Source.IsValid() {
		return netns.Dial(ctx, c.pod.Netns, options, c.asked)
	}
	// The client's own connections to this very address exist in this namespace, held by the plaintext listener: one more
	// between the same two ends would be taken for them. The kernel does not see that, as the ends are the other way round.
	var err error
	for range portAttempts {
		port := uint16(firstSourcePort + rand.N(sourcePorts))
		options.Source = netip.AddrPortFrom(c.client.Addr(), port)
		if p.connections.clientUses(options.Source, c.asked) {
			continue
		}
		var conn *net.TCPConn
		conn, err = netns.Dial(ctx, c.pod.Netns, options, c.asked)
		if !isPortTaken(err) {
			return conn, err
		}
	}
	return nil, fail(reasonConnect, "no free source port: %w", err)
}

func isPortTaken(err error) bool {
	return errors.Is(err, unix.EADDRINUSE) || errors.Is(err, unix.EADDRNOTAVAIL)
}
