package ztunnel

import (
	"context"
	"math/rand/v2"
	"net"
	"net/netip"
	"time"

	"github.com/miekg/dns"
	"go.uber.org/zap"

	"github.com/fairlead-mesh/fairlead/internal/loop"
	"github.com/fairlead-mesh/fairlead/internal/netns"
	"github.com/fairlead-mesh/fairlead/internal/relay"
	"github.com/fairlead-mesh/fairlead/internal/route"
)

const protocolTCP = "tcp"

// dnsIdle is how long a connection to a resolver may be without a query.
const dnsIdle = 10 * time.Second

// serveDNS answers the queries on one connection of the pod's application, app, which it owns. A resolver that is itself
// reached through the mesh is connected to as anything else is: the tunnel and the resolver's own policies come first.
func (p *Proxy) serveDNS(pod *pod, l *listener, app int, client netip.AddrPort) {
	resolver, ok := p.plainResolver(pod, l, app)
	if !ok {
		p.serveOutbound(pod, l, app, client)
		return
	}
	select {
	case pod.dnsConnections <- struct{}{}:
	default:
		loop.Reset(app)
		return
	}
	defer func() { <-pod.dnsConnections }()
	conn, err := loop.Attach(app)
	if err != nil {
		p.log.Warn("serve DNS", zap.String("pod", pod.Namespace+"/"+pod.Name), zap.Error(err))
		return
	}
	p.resolver.serveStream(p.running, pod, conn, &upstreamConn{dial: func(ctx context.Context) (*net.TCPConn, error) {
		return netns.Dial(ctx, pod.Netns, netns.DialOptions{Mark: netns.ProxyMark}, resolver)
	}})
}

// plainResolver is where the resolver that a connection was opened to is reached; false when that is by a tunnel, or not
// known.
func (p *Proxy) plainResolver(pod *pod, l *listener, app int) (netip.AddrPort, bool) {
	asked, failed := l.asked(app)
	if failed != nil {
		return netip.AddrPort{}, false
	}
	ctx, cancel := context.WithTimeout(p.running, setupTimeout)
	defer cancel()
	snap, self, failed := p.view(ctx, pod)
	if failed != nil {
		return netip.AddrPort{}, false
	}
	d := route.Outbound(snap, self, asked, rand.Uint64())
	return d.NextHop, d.Action == route.Passthrough || d.Action == route.Plain
}

// serveStream answers queries one after the other until one end has had enough. It owns both connections.
func (r *resolver) serveStream(ctx context.Context, p *pod, app *net.TCPConn, upstream *upstreamConn) {
	stop := context.AfterFunc(ctx, func() { app.Close() })
	defer stop()
	for {
		if err := app.SetDeadline(time.Now().Add(dnsIdle)); err != nil {
			break
		}
		message, err := readMessage(app)
		if err != nil {
			break
		}
		q, ok := parseQuery(message)
		if !ok {
			break
		}
		if q.opcode != dns.OpcodeQuery || q.kind == dns.TypeAXFR || q.kind == dns.TypeIXFR {
			r.relay(ctx, p, q, app, upstream)
			return
		}
		answer := r.answer(ctx, p, q, protocolTCP, upstream.ask)
		if err := app.SetDeadline(time.Now().Add(dnsTimeout)); err != nil {
			break
		}
		if writeMessage(app, answer) != nil {
			break
		}
	}
	app.Close()
	upstream.close()
}

// relay leaves the connection to the two ends from this query on: a zone transfer has many answers, an update may need
// several exchanges.
func (r *resolver) relay(ctx context.Context, p *pod, q query, app *net.TCPConn, upstream *upstreamConn) {
	if err := upstream.send(ctx, q); err != nil {
		r.explain(p, q, err)
		upstream.close()
		reset(app)
		return
	}
	ended := make(chan struct{})
	for _, conn := range []*net.TCPConn{app, upstream.conn} {
		if err := conn.SetDeadline(time.Time{}); err != nil {
			r.explain(p, q, err)
		}
	}
	relay.Splice(app, upstream.conn, func(relay.Result) { close(ended) })
	<-ended
}
