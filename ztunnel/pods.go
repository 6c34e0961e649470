package ztunnel

// The pods of this node, in steps:
//  1. The CNI agent names a pod and hands its network namespace over (ZDS).
//  2. The pod's certificate is asked for, ahead of its first connection.
//  3. Listeners are made inside the namespace: outbound, inbound plaintext, inbound HBONE, DNS.
//  4. Where the agent redirects by eBPF, the listeners go into the pod's slots; elsewhere the agent's rules lead to their
//     ports. Then the agent is answered.
// Next: ztunnel/outbound.go, ztunnel/inbound.go, ztunnel/passthrough.go, ztunnel/dns.go

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/fairlead-mesh/fairlead/internal/hbone"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/netns"
	"github.com/fairlead-mesh/fairlead/internal/state"
	"github.com/fairlead-mesh/fairlead/internal/zds"
)

// pods is the set of pods that this proxy serves.
type pods struct {
	proxy *Proxy

	mu       sync.Mutex
	byUID    map[string]*pod // by the pod's own uid
	snapshot bool            // the agent has named all pods
	// byWorkload has a lock of its own: an event loop asks it for each connection, and mu is held while the loop is waited for.
	byWorkload sync.Map // string, the workload's uid in the mesh → *pod
}

// pod is one pod that this proxy serves.
type pod struct {
	zds.Workload
	identity    mesh.Identity
	workloadUID string
	cookie      uint64
	slots       bool // redirected by eBPF: connections come by slots, not by port
	listeners   []*listener
	packets     []packetListener
	server      *hbone.Server
	buffers     *hbone.Buffers // of its tunnels, in both directions
	connections int            // open now; guarded by connections.mu
	stops       []func()       // end accepting
	// queries and dnsConnections bound what the pod may ask at once.
	queries, dnsConnections chan struct{}
	reach                   reach // of the pods of this node
}

// workload is what the mesh knows of the pod, or nil.
func (p *pod) workload(snap *state.Snapshot) *mesh.Workload { return snap.Workload(p.workloadUID) }

func newPods(proxy *Proxy) *pods {
	return &pods{proxy: proxy, byUID: map[string]*pod{}}
}

// Add serves a pod, or takes its current description. It returns when connections of the pod are accepted.
func (s *pods) Add(ctx context.Context, w zds.Workload) error {
	if err := netns.Check(w.Netns); err != nil {
		w.Netns.Close()
		return fmt.Errorf("add pod %s/%s: %w", w.Namespace, w.Name, err)
	}
	cookie, err := netns.Cookie(w.Netns)
	if err != nil {
		w.Netns.Close()
		return fmt.Errorf("add pod %s/%s: %w", w.Namespace, w.Name, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.byUID[w.UID]
	if old != nil && old.cookie == cookie && old.same(w) {
		kept, err := old.refresh(s.proxy.cfg.BPFFS)
		if err != nil || kept {
			w.Netns.Close()
			return err
		}
	}
	if old != nil {
		s.remove(old)
	}
	p := s.describe(w, cookie)
	if err := p.serve(s.proxy); err != nil {
		w.Netns.Close()
		return fmt.Errorf("add pod %s/%s: %w", w.Namespace, w.Name, err)
	}
	s.proxy.certs.Warm(p.identity)
	s.byUID[p.UID] = p
	s.byWorkload.Store(p.workloadUID, p)
	s.proxy.log.Info("serving pod", zap.String("pod", p.Namespace+"/"+p.Name), zap.String("uid", p.UID), zap.Bool("ebpf", p.slots))
	return nil
}

func (s *pods) describe(w zds.Workload, cookie uint64) *pod {
	cfg := &s.proxy.cfg
	return &pod{
		Workload:    w,
		identity:    mesh.Identity{TrustDomain: cfg.TrustDomain, Namespace: w.Namespace, ServiceAccount: w.ServiceAccount},
		workloadUID: cfg.ClusterID + "//Pod/" + w.Namespace + "/" + w.Name,
		cookie:      cookie,
		queries:     make(chan struct{}, podQueries), dnsConnections: make(chan struct{}, podDNSConnections),
	}
}

// same tells whether a new description says what the pod is served as.
func (p *pod) same(w zds.Workload) bool {
	return p.Name == w.Name && p.Namespace == w.Namespace && p.ServiceAccount == w.ServiceAccount
}

// Delete stops serving a pod. Its open connections go on; none that is still being made will be.
func (s *pods) Delete(uid string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.byUID[uid]; p != nil {
		s.remove(p)
	}
	return nil
}

// Snapshot drops the pods that were not named.
func (s *pods) Snapshot(named map[string]struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.snapshot = true
	for uid, p := range s.byUID {
		if _, ok := named[uid]; !ok {
			s.remove(p)
		}
	}
}

// remove stops serving a pod. The lock is held.
func (s *pods) remove(p *pod) {
	delete(s.byUID, p.UID)
	s.byWorkload.CompareAndDelete(p.workloadUID, p)
	p.close()
	p.Netns.Close()
	// Peers are told to take no more streams on the tunnels they have.
	go p.server.Drain(s.proxy.running)
	s.proxy.certs.Release(p.identity)
	s.proxy.metrics.limits.DeletePartialMatch(prometheus.Labels{"namespace": p.Namespace, "pod": p.Name})
	s.proxy.log.Info("no longer serving pod", zap.String("pod", p.Namespace+"/"+p.Name), zap.String("uid", p.UID))
}

// synced tells whether the agent has named all pods of the node.
func (s *pods) synced() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.snapshot
}

// local is the pod of this node that a workload is, or nil.
func (s *pods) local(w *mesh.Workload) *pod {
	p, _ := s.byWorkload.Load(w.UID)
	found, _ := p.(*pod)
	return found
}

// get is the pod with a uid, or nil.
func (s *pods) get(uid string) *pod {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.byUID[uid]
}

func (s *pods) list() []*pod {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*pod, 0, len(s.byUID))
	for _, p := range s.byUID {
		all = append(all, p)
	}
	slices.SortFunc(all, func(a, b *pod) int { return compareNames(a.Workload, b.Workload) })
	return all
}

// close stops all listeners, in the end of the process.
func (s *pods) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.byUID {
		p.close()
	}
}

// serve makes the pod's listeners, accepts on them and puts them in the pod's slots.
func (p *pod) serve(proxy *Proxy) error {
	slots, err := openSlots(proxy.cfg.BPFFS, p.cookie)
	if err != nil {
		return err
	}
	if slots != nil {
		defer slots.Close()
	}
	p.slots = slots != nil
	if p.listeners, err = listen(p.Netns, p.slots); err != nil {
		return err
	}
	if p.packets, err = listenPackets(p); err != nil {
		p.close()
		return fmt.Errorf("listen for DNS in the pod's network namespace: %w", err)
	}
	p.buffers = hbone.NewBuffers(proxy.cfg.Limits.BufferedBytes, func(l hbone.Limit) { proxy.metrics.limited(p, l) })
	p.server = proxy.newServer(p)
	for _, l := range p.packets {
		go proxy.resolver.servePackets(proxy.running, p, l)
	}
	for _, l := range p.listeners {
		switch l.purpose {
		case purposeOutbound:
			err = p.accept(proxy, l, func(app int, from netip.AddrPort) { proxy.serveOutbound(p, l, app, from) })
		case purposePlaintext:
			err = p.accept(proxy, l, func(client int, from netip.AddrPort) { proxy.servePassthrough(p, l, client, from) })
		case purposeDNS:
			err = p.accept(proxy, l, func(app int, from netip.AddrPort) { proxy.serveDNS(p, l, app, from) })
		case purposeHBONE:
			go func() {
				// Tunnels outlive the pod's listeners, as connections do.
				if err := p.server.Serve(proxy.running, l); err != nil {
					proxy.log.Error("HBONE listener failed", zap.String("pod", p.Namespace+"/"+p.Name), zap.Error(err))
				}
			}()
		}
		if err != nil {
			p.close()
			return err
		}
	}
	if slots != nil {
		if err := p.fillSlots(slots); err != nil {
			p.close()
			return err
		}
	}
	return nil
}

// refresh puts the listeners in the pod's slots again, where the agent has made new ones. It is false when the pod is
// redirected in another way than before, and must be served anew.
func (p *pod) refresh(bpffs string) (bool, error) {
	slots, err := openSlots(bpffs, p.cookie)
	if err != nil {
		return false, err
	}
	if slots == nil {
		return !p.slots, nil
	}
	defer slots.Close()
	if !p.slots {
		return false, nil
	}
	return true, p.fillSlots(slots)
}

// accept lets serve have the connections of a listener. They outlive it.
func (p *pod) accept(proxy *Proxy, l *listener, serve func(conn int, from netip.AddrPort)) error {
	stop, err := proxy.driver.Accept(l.TCPListener, serve, func(err error) {
		proxy.log.Warn("accept connection", zap.String("pod", p.Namespace+"/"+p.Name), zap.Error(err))
	})
	if err != nil {
		return fmt.Errorf("accept connections: %w", err)
	}
	p.stops = append(p.stops, stop)
	return nil
}

// close ends the listeners. Tunnels and connections live on and end with their peers.
func (p *pod) close() {
	for _, stop := range p.stops {
		stop()
	}
	for _, l := range p.listeners {
		l.Close()
	}
	for _, l := range p.packets {
		l.Close()
	}
}
