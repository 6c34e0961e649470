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
	"slices"
	"strings"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/authz"
	"github.com/fairlead-mesh/fairlead/internal/hbone"
	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/netns"
	"github.com/fairlead-mesh/fairlead/internal/relay"
	"github.com/fairlead-mesh/fairlead/internal/route"
)

// setupTimeout bounds everything between accepting a connection and relaying its bytes.
const setupTimeout = 10 * time.Second

// serveOutbound carries one connection of the pod's application, app, which it owns.
func (p *Proxy) serveOutbound(ctx context.Context, pod *pod, l *listener, app *net.TCPConn) {
	asked, failed := l.asked(app)
	c := p.connections.open(pod, outbound, addrPort(app.RemoteAddr()), asked)
	if failed == nil {
		failed = p.connections.admit(c)
	}
	if failed == nil {
		failed = p.sendOut(ctx, c, app)
	}
	if failed != nil {
		reset(app)
		c.fail(failed)
	}
}

// sendOut decides and connects. Without a failure, app belongs to a relay.
func (p *Proxy) sendOut(ctx context.Context, c *connection, app *net.TCPConn) *failure {
	ctx, cancel := context.WithTimeout(ctx, setupTimeout)
	defer cancel()
	snap, self, failed := p.view(ctx, c.pod)
	if failed != nil {
		return failed
	}
	c.source, c.sourceID = self, c.pod.identity
	d := route.Outbound(snap, self, c.asked, rand.Uint64())
	c.destination, c.service, c.hop = d.Destination, d.Service, d.NextHop
	switch d.Action {
	case route.Passthrough, route.Plain:
		return p.sendPlain(ctx, c, app)
	case route.HBONE:
		if peer := p.onThisNode(c, d); peer != nil {
			return p.sendNode(ctx, c, peer, d, app)
		}
		return p.sendTunnel(ctx, c, d, app)
	}
	return refused(d)
}

// sendTunnel goes through a tunnel to the next proxy, which may be a waypoint.
func (p *Proxy) sendTunnel(ctx context.Context, c *connection, d route.Decision, app *net.TCPConn) *failure {
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
	stream, err := p.pool.Open(ctx, key, dial, request)
	if err != nil {
		return classify(err)
	}
	if state := stream.ConnectionState(); state != nil {
		// The handshake has verified it to be one of those expected.
		if id, err := identity.FromTLS(*state); err == nil {
			c.destID, c.mutualTLS = id, true
		}
	}
	c.establish()
	c.attach(stream)
	stream.Relay(app, func(r relay.Result) { c.finish(r, r.Sent, r.Received) })
	return nil
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

// sendNode goes straight to a pod of this node. Both identities are known, as both pods are this proxy's; the
// destination's policies are asked as if the connection had come through a tunnel, and it is counted and logged twice,
// as each side's.
func (p *Proxy) sendNode(ctx context.Context, c *connection, peer *pod, d route.Decision, app *net.TCPConn) *failure {
	c.path, c.hop, c.destID, c.mutualTLS = pathNode, d.Target, peer.identity, true
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
