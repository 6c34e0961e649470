package ztunnel

// A connection that an application of this node opens, in steps:
//  1. It is accepted in the pod's network namespace; the address it was opened to is known.
//  2. What the mesh knows at this moment is taken: one snapshot for the whole decision.
//  3. internal/route/outbound.go decides where it goes.
//  4. It goes there: by a tunnel that proves both identities, straight to a pod of this node, or plain.
//  5. Bytes are relayed until both ends have finished, and one line is written.
// Next: internal/route/outbound.go

import (
	"context"
	"crypto/tls"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/authz"
	"github.com/fairlead-mesh/fairlead/internal/hbone"
	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/loop"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/netns"
	"github.com/fairlead-mesh/fairlead/internal/relay"
	"github.com/fairlead-mesh/fairlead/internal/route"
	"github.com/fairlead-mesh/fairlead/internal/state"
)

// setupTimeout bounds everything between accepting a connection and relaying its bytes.
const setupTimeout = 10 * time.Second

// serveOutbound carries one connection of the pod's application, app, which it owns. It runs on an event loop: what has to
// wait goes on in a goroutine.
func (p *Proxy) serveOutbound(pod *pod, l *listener, app int, client netip.AddrPort) {
	asked, failed := l.asked(app)
	c := p.connections.open(pod, outbound, client, asked)
	if failed == nil {
		failed = p.connections.admit(c)
	}
	if failed != nil {
		c.refuse(app, failed)
		return
	}
	if snap, self := p.known(pod); self != nil {
		p.sendOut(c, snap, self, app)
		return
	}
	go func() {
		ctx, cancel := context.WithTimeout(p.running, setupTimeout)
		defer cancel()
		snap, self, failed := p.view(ctx, pod)
		if failed != nil {
			c.refuse(app, failed)
			return
		}
		p.sendOut(c, snap, self, app)
	}()
}

// refuse ends a connection whose application has been accepted and gets no further.
func (c *connection) refuse(app int, failed *failure) {
	loop.Reset(app)
	c.fail(failed)
}

// sendOut decides, and begins to connect.
func (p *Proxy) sendOut(c *connection, snap *state.Snapshot, self *mesh.Workload, app int) {
	c.source, c.sourceID = self, c.pod.identity
	d := route.Outbound(snap, self, c.asked, rand.Uint64())
	c.destination, c.service, c.hop = d.Destination, d.Service, d.NextHop
	switch d.Action {
	case route.Passthrough, route.Plain:
		go p.sendBeside(c, app, p.sendPlain)
	case route.HBONE:
		if peer := p.onThisNode(c, d); peer != nil {
			go p.sendBeside(c, app, func(ctx context.Context, c *connection, app *net.TCPConn) *failure {
				return p.sendNode(ctx, c, peer, d, app)
			})
			return
		}
		p.sendTunnel(c, d, app)
	default:
		c.refuse(app, refused(d))
	}
}

// sendBeside sends app, which it owns, on by a way that is no tunnel and may take its time.
func (p *Proxy) sendBeside(c *connection, app int, way func(context.Context, *connection, *net.TCPConn) *failure) {
	ctx, cancel := context.WithTimeout(p.running, setupTimeout)
	defer cancel()
	conn, err := loop.Attach(app)
	if err != nil {
		c.fail(classify(err))
		return
	}
	if failed := way(ctx, c, conn); failed != nil {
		reset(conn)
		c.fail(failed)
	}
}

// sendTunnel goes through a tunnel to the next proxy, which may be a waypoint.
func (p *Proxy) sendTunnel(c *connection, d route.Decision, app int) {
	c.hbone, c.path = d.Authority, pathHBONE
	if d.Waypoint {
		c.path = pathWaypoint
	}
	key := hbone.Key{
		Source:      c.pod.identity.String(),
		Destination: joinIdentities(d.Expected),
		SourceIP:    c.client.Addr(),
		Addr:        d.NextHop,
		Netns:       c.pod.cookie,
		Buffers:     c.pod.buffers,
	}
	pod := c.pod
	dial := func(ctx context.Context) (net.Conn, *tls.Config, error) {
		bundle, err := p.certs.Certificate(ctx, pod.identity)
		if err != nil {
			return nil, nil, fail(reasonIdentity, "%w", err)
		}
		conn, err := netns.Dial(ctx, pod.Netns, netns.DialOptions{Mark: netns.ProxyMark}, d.NextHop)
		if err != nil {
			return nil, nil, err
		}
		return conn, identity.ClientTLS(bundle, d.Expected), nil
	}
	request := hbone.Request{Authority: d.Authority, Header: requestHeader(c.client, c.source, c.service)}
	p.pool.Start(p.running, setupTimeout, key, dial, request, app, func(stream *hbone.Stream, err error) {
		if err != nil {
			c.refuse(app, classify(err))
			return
		}
		if state := stream.ConnectionState(); state != nil {
			// The handshake has verified it to be one of those expected.
			if id, err := identity.FromTLS(*state); err == nil {
				c.destID, c.mutualTLS = id, true
			}
		}
		c.establish()
		c.attach(stream)
		stream.RelayFD(app, func(r relay.Result) { c.finish(r, r.Sent, r.Received) })
	})
}

// sendPlain goes to the next hop as the application would have, from inside the pod.
func (p *Proxy) sendPlain(ctx context.Context, c *connection, app *net.TCPConn) *failure {
	c.path = pathPlain
	upstream, err := netns.Dial(ctx, c.pod.Netns, netns.DialOptions{Mark: netns.ProxyMark}, c.hop)
	if err != nil {
		return classify(err)
	}
	c.establish()
	h := relay.Splice(app, upstream, func(r relay.Result) { c.finish(r, r.Sent, r.Received) })
	c.attach(h)
	return nil
}

// onThisNode is the pod of this node that a decision leads to, or nil: then there is a tunnel. A pod that calls itself
// through a service never needs one.
func (p *Proxy) onThisNode(c *connection, d route.Decision) *pod {
	if d.Waypoint {
		return nil
	}
	peer := p.pods.local(d.Destination)
	if peer == nil || !slices.Contains(d.Expected, peer.identity) || p.cfg.ForceHBONE && peer != c.pod {
		return nil
	}
	return peer
}

// sendNode goes straight to a pod of this node, where a tunnel could too. Both identities are known, as both pods are this
// proxy's; the destination's policies are asked as if the connection had come through a tunnel, and it is counted and
// logged twice, as each side's.
func (p *Proxy) sendNode(ctx context.Context, c *connection, peer *pod, d route.Decision, app *net.TCPConn) *failure {
	c.path = pathNode
	if peer != c.pod {
		if err := p.mayReach(ctx, c.pod, reached{peer, d.NextHop}); err != nil {
			return classify(err)
		}
	}
	c.hop, c.destID, c.mutualTLS = d.Target, peer.identity, true
	in := p.connections.open(peer, inbound, c.client, d.Target)
	in.source, in.sourceID, in.destination, in.destID = c.source, c.sourceID, c.destination, c.destID
	in.service, in.path, in.mutualTLS = c.service, pathNode, true
	failed := p.connections.admit(in)
	if failed == nil {
		failed = in.authorize(p.store, authz.Connection{Source: c.sourceID, SourceIP: c.client.Addr(), Destination: d.Target})
	}
	if failed != nil {
		in.fail(failed)
		return failed
	}
	upstream, err := p.dialApplication(ctx, in)
	if err != nil {
		failed = classify(err)
		in.fail(failed)
		return failed
	}
	c.establish()
	in.establish()
	h := relay.Splice(app, upstream, func(r relay.Result) { finishRelay([]*connection{in, c}, r) })
	in.attach(h)
	c.attach(h)
	return nil
}

func joinIdentities(ids []mesh.Identity) string {
	if len(ids) == 1 {
		return ids[0].String()
	}
	names := make([]string, 0, len(ids))
	for _, id := range ids {
		names = append(names, id.String())
	}
	return strings.Join(names, ",")
}
