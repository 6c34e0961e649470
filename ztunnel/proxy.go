// Package ztunnel is the node proxy: every TCP connection of the node's pods goes through it, in mutual TLS from node to
// node. proxy.go puts it together; outbound.go, inbound.go and passthrough.go each carry one kind of connection, and
// dns.go answers for names.
package ztunnel

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/fairlead-mesh/fairlead/internal/accesslog"
	"github.com/fairlead-mesh/fairlead/internal/admin"
	"github.com/fairlead-mesh/fairlead/internal/hbone"
	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/netns"
	"github.com/fairlead-mesh/fairlead/internal/state"
	"github.com/fairlead-mesh/fairlead/internal/xds"
	"github.com/fairlead-mesh/fairlead/internal/zds"
)

const (
	// viewTimeout is how long a connection waits until the control plane has told of its pod.
	viewTimeout = 5 * time.Second
	// forgetInterval is how often what is kept for workloads that are gone is dropped.
	forgetInterval = time.Minute
	// closeTimeout is how long the end of the process waits for tunnels to say goodbye.
	closeTimeout = time.Second
)

// Proxy is one ztunnel.
type Proxy struct {
	cfg         Config
	log         *zap.Logger
	store       *state.Store
	certs       *identity.Certificates
	driver      hbone.Driver
	stopDriver  func()
	pool        *hbone.Pool
	source      configuration
	pods        *pods
	connections *connections
	resolver    *resolver
	metrics     *metrics
	registry    *prometheus.Registry
	sockets     *netns.Beginner

	// running ends when the process is about to: connections live in it.
	running  context.Context
	unfollow func() // ends followPods
	draining atomic.Bool
	taken    atomic.Int64 // connections that came from a predecessor
}

// Log is where a proxy writes.
type Log struct {
	Process *zap.Logger
	Level   zap.AtomicLevel
	Access  *accesslog.Log
}

// Run serves the node until ctx ends, then lets open connections end, for Config.TerminationGrace at most.
func Run(ctx context.Context, cfg Config, log Log) error {
	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	p, err := newProxy(running, cfg, log)
	if err != nil {
		return err
	}
	group, groupCtx := errgroup.WithContext(running)
	background := func(name string, run func(context.Context) error) {
		group.Go(func() error {
			if err := run(groupCtx); err != nil && groupCtx.Err() == nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			return nil
		})
	}
	background("admin", func(ctx context.Context) error {
		return admin.Serve(ctx, cfg.AdminAddr, admin.Admin(func() any { return p.dump() }, log.Level))
	})
	background("metrics", func(ctx context.Context) error { return admin.Serve(ctx, cfg.StatsAddr, admin.Stats(p.registry)) })
	background("readiness", func(ctx context.Context) error {
		return admin.Serve(ctx, cfg.ReadinessAddr, admin.Readiness(p.ready))
	})
	background("configuration", p.source.Run)
	following, unfollow := context.WithCancel(groupCtx)
	defer unfollow()
	p.unfollow = unfollow
	background("pods", func(context.Context) error { return p.followPods(following) })
	taking, noMore := context.WithCancel(groupCtx)
	defer noMore()
	background("hand-over", func(context.Context) error { p.takeOver(taking); return nil })
	background("recheck", p.recheck)
	background("trim", p.trim)
	background("reap", p.connections.reap)
	select {
	case <-ctx.Done():
		noMore()
		p.drain(groupCtx)
	case <-groupCtx.Done(): // a part has failed
	}
	p.close()
	stop()
	return group.Wait()
}

// followPods serves the pods that the CNI agent names. It starts when the mesh is known: whoever takes pods over, from a
// proxy that may be serving them, must be able to serve them.
func (p *Proxy) followPods(ctx context.Context) error {
	select {
	case <-p.source.Synced():
	case <-ctx.Done():
		return nil
	}
	if w := p.cfg.Dedicated; w.Name != "" {
		return p.serveOwn(ctx, w)
	}
	_ = (&zds.Client{Socket: p.cfg.ZDSSocket, Handler: p.pods, Log: p.log}).Run(ctx) // when ctx ends
	return nil
}

// serveOwn serves the workload whose network namespace this process is in, and no other.
func (p *Proxy) serveOwn(ctx context.Context, w zds.Workload) error {
	var err error
	// Not the process's: its first thread may have ended in another namespace.
	if w.Netns, err = netns.Open("/proc/thread-self/ns/net"); err != nil {
		return err
	}
	if err := p.pods.Add(ctx, w); err != nil {
		return err
	}
	p.pods.Snapshot(map[string]struct{}{w.UID: {}})
	<-ctx.Done()
	return nil
}

// newProxy puts the parts together. running ends what they do in the background.
func newProxy(running context.Context, cfg Config, log Log) (*Proxy, error) {
	description, err := node(cfg)
	if err != nil {
		return nil, err
	}
	fetcher, err := newFetcher(cfg)
	if err != nil {
		return nil, err
	}
	p := &Proxy{
		cfg: cfg, log: log.Process, running: running,
		store:    state.New(),
		registry: prometheus.NewRegistry(),
		certs:    identity.NewCertificates(running, fetcher, log.Process),
	}
	if p.sockets, err = netns.NewBeginner(); err != nil {
		return nil, err
	}
	if p.driver, p.stopDriver, err = newDriver(cfg); err != nil {
		return nil, err
	}
	p.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	p.metrics = newMetrics(p.registry)
	p.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "fairlead_access_log_dropped_lines_total", Help: "Lines of the access log that were dropped: nobody read those before them, or they could not be written.",
	}, func() float64 { return float64(log.Access.Dropped()) }))
	p.connections = newConnections(log.Access, p.metrics, cfg.Limits)
	p.pool = hbone.NewPool(hbone.PoolConfig{
		Driver: p.driver, Log: log.Process, MaxStreamsPerTunnel: cfg.MaxStreams, IdleTimeout: cfg.TunnelIdle,
	})
	p.pods = newPods(p)
	p.resolver = newResolver(p)
	p.source = newConfiguration(cfg, description, p.store, log.Process)
	return p, nil
}

// newFetcher is where certificates come from.
func newFetcher(cfg Config) (identity.Fetcher, error) {
	if cfg.FakeCA {
		if cfg.FakeCADir != "" {
			return identity.OpenSelfSigned(cfg.FakeCADir, cfg.TrustDomain, cfg.SecretTTL)
		}
		return identity.NewSelfSigned(cfg.TrustDomain, cfg.SecretTTL)
	}
	return identity.NewCA(identity.ClientConfig{Dial: cfg.CA.Dial, ClusterID: cfg.ClusterID, TTL: cfg.SecretTTL}), nil
}

// newConfiguration is where the content of the store comes from.
func newConfiguration(cfg Config, node *core.Node, store *state.Store, log *zap.Logger) configuration {
	if cfg.LocalXDSPath != "" || cfg.LocalXDS != "" {
		return newLocalConfiguration(cfg, store, log)
	}
	client := xds.NewClient(xds.ClientConfig{Dial: cfg.XDS.Dial, Node: node, Log: log})
	subscribe(client, store)
	return client
}

// known is view without waiting: no workload where view would wait.
func (p *Proxy) known(pod *pod) (*state.Snapshot, *mesh.Workload) {
	select {
	case <-p.source.Synced():
	default:
		return nil, nil
	}
	snap := p.store.Load()
	return snap, pod.workload(snap)
}

// view is what the mesh knows at this moment, and of the pod itself. A pod that has just started may be ahead of the
// control plane, so it waits for a while; without knowing what protects the pod and what it may reach, nothing passes.
func (p *Proxy) view(ctx context.Context, pod *pod) (*state.Snapshot, *mesh.Workload, *failure) {
	ctx, cancel := context.WithTimeout(ctx, viewTimeout)
	defer cancel()
	select {
	case <-p.source.Synced():
	case <-ctx.Done():
		return nil, nil, fail(reasonNotSynced, "no configuration from the control plane yet")
	}
	for {
		changed := p.store.Changed()
		snap := p.store.Load()
		if self := pod.workload(snap); self != nil {
			return snap, self, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, nil, fail(reasonNotSynced, "the control plane has not told of workload %s yet", pod.workloadUID)
		}
	}
}

// recheck asks the policies of each new snapshot about the live connections.
func (p *Proxy) recheck(ctx context.Context) error {
	forgotten := time.Now()
	for {
		changed := p.store.Changed()
		snap := p.store.Load()
		p.connections.recheck(snap)
		if now := time.Now(); now.Sub(forgotten) > forgetInterval {
			forgotten = now
			p.metrics.forget(func(w *mesh.Workload, s *mesh.Service) bool {
				return w != nil && snap.Workload(w.UID) != w || s != nil && snap.Service(s.Key()) != s
			})
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// ready is nil when connections of this node's pods can be carried.
func (p *Proxy) ready() error {
	if p.draining.Load() {
		return errors.New("shutting down")
	}
	select {
	case <-p.source.Synced():
	default:
		return errors.New("no configuration from the control plane yet")
	}
	if !p.pods.synced() {
		return errors.New("the CNI agent has not named the node's pods yet")
	}
	return nil
}

// leave leaves the pods to a successor: no agent, also not one that has just come, has this proxy's listeners in their slots
// again, and those that share their ports with the successor's get no more.
func (p *Proxy) leave() {
	p.unfollow()
	p.pods.close()
}

// drain gives the open connections to a successor, where there is one, or waits until they have ended. New ones are
// still accepted: without a successor the node has no other proxy yet, and with one some may be on their way here.
func (p *Proxy) drain(ctx context.Context) {
	p.draining.Store(true)
	p.log.Info("shutting down", zap.Duration("grace", p.cfg.TerminationGrace))
	ctx, stop := context.WithTimeout(ctx, p.cfg.TerminationGrace)
	defer stop()
	p.giveAll(ctx)
}

// close ends listeners first, so that redirection refuses, and then the tunnels.
func (p *Proxy) close() {
	p.pods.close()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(p.running), closeTimeout)
	defer cancel()
	var servers sync.WaitGroup
	for _, pod := range p.pods.list() {
		servers.Go(func() {
			_ = pod.server.Drain(ctx) // what has not ended by then is cut
			pod.server.Close()
		})
	}
	servers.Go(func() {
		_ = p.pool.Drain(ctx)
		p.pool.Close()
	})
	servers.Wait()
	p.stopDriver()
	_ = p.sockets.Close() // the process ends
}
