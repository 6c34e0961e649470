package ztunnel

// A connection that arrives in plaintext for an application of this node, in steps:
//  1. It is accepted in the pod's network namespace. Nobody has proven who the client is.
//  2. The policies are asked without an identity: one that requires mutual TLS refuses it.
//  3. The application is dialled, with the client's address as the source.
//  4. Bytes are relayed until both ends have finished, and one line is written.
// Next: internal/authz/authz.go

import (
	"context"
	"net"
	"net/netip"

	"github.com/fairlead-mesh/fairlead/internal/authz"
	"github.com/fairlead-mesh/fairlead/internal/relay"
)

// servePassthrough carries one connection from a client outside the mesh, which it owns. It runs on an event loop: when it
// returns the connection is registered, so that a proxy that leaves its listeners waits for the last that they gave it.
func (p *Proxy) servePassthrough(pod *pod, l *listener, fd int, from netip.AddrPort) {
	asked, failed := l.asked(fd)
	c := p.connections.open(pod, inbound, from, asked)
	c.path = pathPlain
	if failed == nil {
		failed = p.connections.admit(c)
	}
	if failed != nil {
		c.refuse(fd, failed)
		return
	}
	go p.sendBeside(c, fd, p.passThrough)
}

// passThrough decides and connects. Without a failure, client belongs to a relay.
func (p *Proxy) passThrough(ctx context.Context, c *connection, client *net.TCPConn) *failure {
	snap, self, failed := p.view(ctx, c.pod)
	if failed != nil {
		return failed
	}
	c.destination, c.hop = self, c.asked
	c.describeSource(snap, self, nil)
	if failed := c.refuseOwnListener(); failed != nil {
		return failed
	}
	if failed := c.authorize(p.store, authz.Connection{SourceIP: c.client.Addr(), Destination: c.asked}); failed != nil {
		return failed
	}
	app, err := p.dialApplication(ctx, c)
	if err != nil {
		return classify(err)
	}
	c.establish()
	h := relay.Splice(client, app, func(r relay.Result) { c.finish(r, r.Sent, r.Received) })
	c.attach(h)
	return nil
}
