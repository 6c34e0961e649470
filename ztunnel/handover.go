package ztunnel

// The end of a proxy whose successor runs already, in steps:
//  1. Every proxy that is ready waits for its predecessor on a socket (takeOver).
//  2. On SIGTERM, drain connects to the successor. Its own listeners are out of the pods' slots by then, or share their ports
//     with the successor's (nftables); they end when what was on its way to them is here, and that is still served here.
//  3. What stands between two sockets is frozen and offered: tunnels with their streams, and relays (giveAll).
//  4. The successor finds the pod, prepares (prepare), and registers the connections once the offer is committed, so that
//     its policies are asked and their one line is written by it.
//  5. What cannot be given yet is offered again until nothing is left or the grace period ends.
// Next: internal/handover/handover.go

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"go.uber.org/zap"

	"github.com/fairlead-mesh/fairlead/internal/handover"
	"github.com/fairlead-mesh/fairlead/internal/hbone"
	"github.com/fairlead-mesh/fairlead/internal/relay"
)

const (
	// readyInterval is how often a proxy that is not ready yet looks whether it is.
	readyInterval = 20 * time.Millisecond
	// offerInterval is the pause before what could not be given is offered again, or a successor is looked for.
	offerInterval = 50 * time.Millisecond
	// lateConnects is how long connections that were on their way to this proxy's listeners when the successor's took
	// their place may take to be accepted. Then the listeners end.
	lateConnects = time.Second
)

// offer is what goes from one proxy to the next: a tunnel, or a relay.
type offer struct {
	Pod         string             // uid of the pod that the tunnel is of
	Key         *tunnelKey         `json:",omitempty"` // of a tunnel that this side has opened
	Tunnel      *hbone.TunnelState `json:",omitempty"`
	Relay       *relay.State       `json:",omitempty"`
	Connections []connectionState  `json:",omitempty"` // of a tunnel's relayed streams, in their order; both sides of a relay
}

// tunnelKey is hbone.Key without what belongs to one process.
type tunnelKey struct {
	Source, Destination string
	SourceIP            netip.Addr
	Addr                netip.AddrPort
}

// takeOver takes what a predecessor gives, from the moment when this proxy is ready.
func (p *Proxy) takeOver(ctx context.Context) {
	for p.ready() != nil {
		select {
		case <-time.After(readyInterval):
		case <-ctx.Done():
			return
		}
	}
	l, err := handover.Listen(p.cfg.HandoverSocket)
	if err != nil {
		p.log.Warn("connections of a predecessor cannot be taken over", zap.Error(err))
		return
	}
	defer l.Close()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	p.awaitPredecessors(ctx, l)
}

// predecessors is the socket on which they come.
type predecessors interface{ AcceptUnix() (*net.UnixConn, error) }

// awaitPredecessors takes what those who come give, until ctx ends or the socket is closed. What keeps one of them away, as
// being out of descriptors does, passes, and must not end what this proxy serves: it is tried again.
func (p *Proxy) awaitPredecessors(ctx context.Context, l predecessors) {
	for {
		conn, err := l.AcceptUnix()
		if err == nil {
			go p.takeFrom(ctx, conn)
			continue
		}
		if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			return
		}
		p.log.Warn("wait for a predecessor", zap.Error(err))
		select {
		case <-time.After(offerInterval):
		case <-ctx.Done():
			return
		}
	}
}

// takeFrom takes what one predecessor gives.
func (p *Proxy) takeFrom(ctx context.Context, conn *net.UnixConn) {
	before := p.taken.Load()
	if err := handover.Take(ctx, conn, p.prepare); err != nil {
		p.log.Warn("take connections over", zap.Error(err))
	}
	p.log.Info("took connections over", zap.Int64("connections", p.taken.Load()-before))
}

// prepare makes a predecessor's offer ready to go on here.
func (p *Proxy) prepare(value []byte, files []int) (*handover.Prepared, error) {
	var o offer
	if err := json.Unmarshal(value, &o); err != nil {
		return nil, fmt.Errorf("read offer: %w", err)
	}
	conns := make([]*connection, 0, len(o.Connections))
	for i := range o.Connections {
		c, err := p.adopt(&o.Connections[i])
		if err != nil {
			return nil, err
		}
		conns = append(conns, c)
	}
	switch {
	case o.Tunnel != nil:
		return p.prepareTunnel(&o, conns, files)
	case o.Relay != nil && len(files) == 2 && len(conns) > 0:
		return p.prepareRelay(&o, conns, files)
	}
	return nil, errors.New("neither a tunnel nor a relay")
}

func (p *Proxy) prepareTunnel(o *offer, conns []*connection, files []int) (*handover.Prepared, error) {
	relayed := 0
	for _, s := range o.Tunnel.Streams {
		if s.Relayed {
			relayed++
		}
	}
	pod := p.pods.get(o.Pod)
	if pod == nil || relayed != len(conns) {
		return nil, fmt.Errorf("pod %s is not served here, or %d connections of %d streams", o.Pod, len(conns), relayed)
	}
	a, err := p.adoptTunnel(o, pod, files)
	if err != nil {
		return nil, err
	}
	of := make([]*connection, len(a.Streams)) // as a.Streams
	for i, s := range a.Streams {
		if s != nil {
			of[i], conns = conns[0], conns[1:]
		}
	}
	return &handover.Prepared{Discard: a.Discard, Start: func() {
		for _, c := range of {
			if c != nil {
				p.connections.resume(c)
			}
		}
		a.Start(func(i int, r relay.Result) { of[i].finishStream(r) })
		for i, c := range of {
			if c != nil {
				p.carry(c, a.Streams[i])
			}
		}
	}}, nil
}

func (p *Proxy) adoptTunnel(o *offer, pod *pod, files []int) (*hbone.Adopted, error) {
	if o.Key == nil {
		return pod.server.Adopt(p.running, o.Tunnel, files)
	}
	key := hbone.Key{Source: o.Key.Source, Destination: o.Key.Destination, SourceIP: o.Key.SourceIP, Addr: o.Key.Addr,
		Netns: pod.cookie, Buffers: pod.buffers}
	return p.pool.Adopt(key, o.Tunnel, files)
}

func (p *Proxy) prepareRelay(o *offer, conns []*connection, files []int) (*handover.Prepared, error) {
	h, err := relay.Adopt(*o.Relay, [2]int(files))
	if err != nil {
		return nil, err
	}
	return &handover.Prepared{Discard: h.Discard, Start: func() {
		for _, c := range conns {
			p.connections.resume(c)
		}
		h.Start(func(r relay.Result) { finishRelay(conns, r) })
		for _, c := range conns {
			p.carry(c, h)
		}
	}}, nil
}

// carry gives a connection that was taken over its carrier, and cuts it if the policies of today do not let it in.
func (p *Proxy) carry(c *connection, by carrier) {
	c.attach(by)
	p.taken.Add(1)
	snap := p.store.Load()
	if self := c.pod.workload(snap); self != nil {
		if failed := c.reconsider(snap.Policies(self)); failed != nil {
			c.abort(failed)
		}
	}
}

// giveAll offers all there is to a successor until there are no connections here, or ctx ends. Beside a successor the
// listeners end on the way, so that no more come: where both proxies listen on the same ports connections come here to the
// last. Without a successor it only waits.
func (p *Proxy) giveAll(ctx context.Context) {
	var to *handover.Giver
	var met time.Time // when the successor was first there
	left := false     // the listeners have ended
	given := &gift{p: p}
	defer func() {
		if to != nil {
			to.Close()
			p.log.Info("handed connections over", zap.Int("tunnels", given.tunnels), zap.Int("connections", given.connections))
		}
	}()
	for {
		if to == nil {
			var err error
			if to, err = handover.Dial(p.cfg.HandoverSocket); err == nil && met.IsZero() {
				met = time.Now()
			} else if refused := (*handover.RefusedError)(nil); errors.As(err, &refused) {
				p.log.Warn("connections stay here until they end", zap.Error(err))
				p.await(ctx)
				return
			}
		}
		if to != nil && !given.round(ctx, to) {
			to.Close()
			to = nil
		}
		if !met.IsZero() && !left && time.Since(met) > lateConnects {
			p.leave()
			left = true
		}
		if met.IsZero() || left {
			select {
			case <-p.connections.drained():
				return
			default:
			}
		}
		select {
		case <-time.After(offerInterval):
		case <-ctx.Done():
			return
		}
	}
}

// await waits until there are no connections, or ctx ends.
func (p *Proxy) await(ctx context.Context) {
	select {
	case <-p.connections.drained():
	case <-ctx.Done():
	}
}

// gift counts what was given.
type gift struct {
	p                    *Proxy
	tunnels, connections int
	broken               bool
}

// round offers everything once; false when the successor does not answer any more.
func (g *gift) round(ctx context.Context, to *handover.Giver) bool {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	g.broken = false
	give := func(o *offer, files []int, conns []*connection) bool {
		err := to.Give(o, files)
		var refused *handover.RefusedError
		switch {
		case err == nil:
			for _, c := range conns {
				g.p.connections.forget(c)
			}
			g.connections += len(conns)
			return true
		case errors.As(err, &refused):
			g.p.log.Debug("kept", zap.Error(err))
		default:
			g.p.log.Warn("hand connections over", zap.Error(err))
			g.broken = true
			stop()
		}
		return false
	}
	carried := g.p.connections.byCarrier()
	pods := g.p.pods.list()
	g.p.pool.Handover(ctx, func(k hbone.Key, f *hbone.Frozen) bool {
		for _, pod := range pods {
			if pod.cookie == k.Netns {
				return g.tunnel(f, carried, give, &offer{Pod: pod.UID, Key: &tunnelKey{k.Source, k.Destination, k.SourceIP, k.Addr}})
			}
		}
		return false
	})
	for _, pod := range pods {
		pod.server.Handover(ctx, func(f *hbone.Frozen) bool { return g.tunnel(f, carried, give, &offer{Pod: pod.UID}) })
	}
	for by, conns := range carried {
		if h, ok := by.(*relay.Handle); ok && ctx.Err() == nil {
			g.relay(h, conns, give)
		}
	}
	return !g.broken
}

// giver offers something; true when it is the successor's.
type giver func(o *offer, files []int, conns []*connection) bool

func (g *gift) tunnel(f *hbone.Frozen, carried map[carrier][]*connection, give giver, o *offer) bool {
	o.Tunnel = &f.State
	var conns []*connection
	for _, s := range f.Streams {
		if s == nil {
			continue
		}
		found := carried[s]
		if len(found) != 1 {
			return false // it came after this round had begun
		}
		conns = append(conns, found[0])
		o.Connections = append(o.Connections, found[0].export())
	}
	if !give(o, f.Files, conns) {
		return false
	}
	g.tunnels++
	return true
}

func (g *gift) relay(h *relay.Handle, conns []*connection, give giver) {
	o := &offer{}
	for _, c := range conns {
		if c.path == pathNode && len(conns) != 2 {
			return // the other side is just being noted
		}
		o.Connections = append(o.Connections, c.export())
	}
	f, ok := h.Freeze()
	if !ok {
		return
	}
	o.Relay = &f.State
	if give(o, f.Files[:], conns) {
		f.Moved()
	} else {
		f.Resume()
	}
}
