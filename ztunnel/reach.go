package ztunnel

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// reachKept is how long the network's word is taken, unless unused tunnels are kept for another time.
const reachKept = 5 * time.Minute

// reach is where the network has let a pod go of late, among the pods of its node. Sockets that are joined pass no
// network, and with it nothing that keeps NetworkPolicy. So the first connection of a pair of pods, and then one every few
// minutes, has to wait until the server's proxy port answers the client's pod, as it would for a tunnel.
type reach struct {
	asking singleflight.Group // connections that come while the network is asked wait for the same answer
	mu     sync.Mutex
	until  map[reached]time.Time
}

// reached is the proxy port of a server. The pod belongs to it: another may have the address soon.
type reached struct {
	server *pod
	at     netip.AddrPort
}

// mayReach asks the network whether the pod may reach another pod's proxy port, unless it has said so of late. The error is
// that of the connection.
func (p *Proxy) mayReach(ctx context.Context, from *pod, to reached) error {
	r := &from.reach
	r.mu.Lock()
	known := time.Now().Before(r.until[to])
	r.mu.Unlock()
	if known {
		return nil
	}
	var err error
	select {
	case answer := <-r.asking.DoChan(to.server.UID+" "+to.at.String(), func() (any, error) { return nil, p.askNetwork(from, to) }):
		err = answer.Err
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("ask the network for the way to %s: %w", to.at, err)
	}
	return nil
}

// askNetwork notes when the network lets a connection through.
func (p *Proxy) askNetwork(from *pod, to reached) error {
	ctx, cancel := context.WithTimeout(p.running, setupTimeout)
	defer cancel()
	conn, err := netns.Dial(ctx, from.Netns, netns.DialOptions{Mark: netns.ProxyMark}, to.at)
	if err != nil {
		return err
	}
	reset(conn)
	r, now := &from.reach, time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.until == nil {
		r.until = map[reached]time.Time{}
	}
	maps.DeleteFunc(r.until, func(_ reached, until time.Time) bool { return now.After(until) })
	r.until[to] = now.Add(cmp.Or(p.cfg.TunnelIdle, reachKept))
	return nil
}
