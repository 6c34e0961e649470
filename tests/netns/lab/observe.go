package lab

import (
	"context"
	"net/netip"
	"slices"
	"time"
)

// Observation is a call as everybody saw it who had to do with it.
type Observation struct {
	Answer Answer
	// Wire is what was on the link between node1 and the other nodes meanwhile.
	Wire Traffic
	// Outbound is what the source's ztunnel logged of the last exchange, Inbound what the destination's did; nil when
	// the connection was not theirs.
	Outbound, Inbound *Connection
}

// Observe makes a pod's program try a call, and collects what the capture and the ztunnels' access logs have of it.
// lines is how many access-log lines there must be at least: one for each ztunnel (or side of one) that had the
// connection. Nothing else may go on in the world meanwhile.
func (w *World) Observe(ctx context.Context, p *Pod, c Call, lines int) (Observation, error) {
	var o Observation
	if err := w.quiet(ctx); err != nil {
		return o, err
	}
	since := w.Position()
	before, err := w.Wire.Total()
	if err != nil {
		return o, err
	}
	if o.Answer, err = p.Call(ctx, c); err != nil {
		return o, err
	}
	if o.Wire, err = w.Wire.Since(before); err != nil {
		return o, err
	}
	_, err = w.WaitConnections(ctx, since, func(all []Connection) bool {
		return o.take(all, p) >= lines
	})
	return o, err
}

// take finds the lines of the last exchange of a pod, and tells how many there are. Of a connection that was reset while
// it was being made the pod's program does not know its own port; then the pod's address must do.
func (o *Observation) take(all []Connection, p *Pod) int {
	o.Outbound, o.Inbound = nil, nil
	local := o.Answer.Last().Local
	isLocal := func(source string) bool {
		return source == local || local == "" && slices.ContainsFunc(p.Addrs, func(a netip.Addr) bool { return a.String() == host(source) })
	}
	for _, c := range all {
		switch {
		case c.Direction == "outbound" && isLocal(c.Source):
			o.Outbound = &c
		case c.Direction != "inbound":
		// Through a tunnel, the source's port is the tunnel's; otherwise the connection's own.
		case isLocal(c.Source) || c.Path == "hbone" && host(c.Source) == host(local):
			o.Inbound = &c
		}
	}
	n := 0
	for _, c := range []*Connection{o.Outbound, o.Inbound} {
		if c != nil {
			n++
		}
	}
	return n
}

func host(addr string) string {
	a, err := netip.ParseAddrPort(addr)
	if err != nil {
		return ""
	}
	return a.Addr().String()
}

// Until makes a pod try a call again and again until what comes of it is as wanted, and tells how long that took. A
// change of the mesh's configuration takes a moment until it is in force everywhere.
func (w *World) Until(ctx context.Context, p *Pod, c Call, wanted func(Answer) bool) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	start := time.Now()
	for {
		a, err := p.Call(ctx, c)
		if err != nil {
			return 0, err
		}
		if wanted(a) {
			return time.Since(start), nil
		}
		select {
		case <-ctx.Done():
			return 0, &TimeoutError{Last: a}
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// TimeoutError says that a call did not become as wanted in time.
type TimeoutError struct{ Last Answer }

func (e *TimeoutError) Error() string {
	return "not as wanted in time; the last answer: " + e.Last.String()
}

// quiet waits until the ztunnels have written the lines of earlier connections, which they do several at a time.
func (w *World) quiet(ctx context.Context) error {
	const flush = 200 * time.Millisecond
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(flush):
		return nil
	}
}

// Enrolled tells whether the pod's connections are redirected now: something of the mesh answers on its HBONE port.
func (p *Pod) Enrolled(ctx context.Context) bool {
	c, err := p.node.world.Nodes[p.Node].thread.dial(ctx, netip.AddrPortFrom(p.Addrs[0], hbonePort))
	if err != nil {
		return false
	}
	c.Close()
	return true
}
