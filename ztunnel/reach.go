package ztunnel

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"sync"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// reachKept is how long the network's word is taken, unless unused tunnels are kept for another time.
const reachKept = 5 * time.Minute

// reach is where the network has let a pod go of late, among the pods of its node. Sockets that are joined pass no
// network, and with it nothing that keeps NetworkPolicy. So the first connection of a pair of pods, and then one every few
// minutes, has to wait until the server's proxy port answers the client's pod, as it would for a tunnel.
type reach struct {
	mu    sync.Mutex
	until map[netip.AddrPort]time.Time
}

// mayReach asks the network whether the pod may reach another pod's proxy port, unless it has said so of late. The error is
// that of the connection.
func (p *Proxy) mayReach(ctx context.Context, from *pod, to netip.AddrPort) error {
	r, now := &from.reach, time.Now()
	r.mu.Lock()
	known := now.Before(r.until[to])
	r.mu.Unlock()
	if known {
		return nil
	}
	conn, err := netns.Dial(ctx, from.Netns, netns.DialOptions{Mark: netns.ProxyMark}, to)
	if err != nil {
		return fmt.Errorf("ask the network for the way to %s: %w", to, err)
	}
	reset(conn)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.until == nil {
		r.until = map[netip.AddrPort]time.Time{}
	}
	maps.DeleteFunc(r.until, func(_ netip.AddrPort, until time.Time) bool { return now.After(until) })
	r.until[to] = now.Add(cmp.Or(p.cfg.TunnelIdle, reachKept))
	return nil
}
