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
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/netns"
	"github.com/fairlead-mesh/fairlead/internal/relay"
	"github.com/fairlead-mesh/fairlead/internal/route"
	"github.com/fairlead-mesh/fairlead/internal/state"
)

const protocolTCP = "tcp"

// dnsIdle is how long a connection to a resolver may be without a query.
const dnsIdle = 10 * time.Second

// serveDNS takes one connection of the pod's application, app, which it owns. A resolver that is itself reached through the
// mesh is connected to as anything else is: the tunnel and the resolver's own policies come first. It runs on an event loop.
func (p *Proxy) serveDNS(pod *pod, l *listener, app int, client netip.AddrPort) {
	if snap, self := p.known(pod); self != nil {
		if _, plain := plainResolver(snap, self, l, app); !plain {
			p.serveOutbound(pod, l, app, client)
			return
		}
	}
	select {
	case pod.dnsConnections <- struct{}{}:
		go p.answerDNS(pod, l, app, client)
	default:
		p.metrics.limited(pod, limitDNSConnections)
		loop.Reset(app)
	}
}

// answerDNS answers the queries on a connection that has one of its pod's places, which it gives back.
func (p *Proxy) answerDNS(pod *pod, l *listener, app int, client netip.AddrPort) {
	resolver, plain := p.awaitResolver(pod, l, app)
	if !plain {
		<-pod.dnsConnections
		p.serveOutbound(pod, l, app, client)
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

// awaitResolver is plainResolver as soon as the pod is known.
func (p *Proxy) awaitResolver(pod *pod, l *listener, app int) (netip.AddrPort, bool) {
	snap, self, failed := p.view(p.running, pod)
	if failed != nil {
		return netip.AddrPort{}, false
	}
	return plainResolver(snap, self, l, app)
}

// plainResolver is where the resolver that a connection was opened to is reached; false when that is by a tunnel, or not
// known.
func plainResolver(snap *state.Snapshot, self *mesh.Workload, l *listener, app int) (netip.AddrPort, bool) {
	asked, failed := l.asked(app)
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
