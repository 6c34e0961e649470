package waypoint

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	stdlog "log"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sync/errgroup"

	"github.com/fairlead-mesh/fairlead/internal/admin"
	"github.com/fairlead-mesh/fairlead/internal/hbone"
	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/xds"
)

// lateStreams is how long streams may still come after GOAWAY was sent.
const lateStreams = 100 * time.Millisecond

// Proxy is one waypoint. Run makes it; tests make its parts.
type Proxy struct {
	cfg       Config
	log       *zap.Logger
	access    *zap.Logger
	quiet     *stdlog.Logger // net/http's own complaints, at debug
	resources *resources
	forwarder *forwarder
	metrics   *metrics
	tcp       tcpConnections
	reverse   *httputil.ReverseProxy
	handOver  *handOver
	http      *http.Server
	hbone     *hbone.Server
}

// Run serves until ctx ends, then drains.
func Run(ctx context.Context, cfg Config) error {
	level, err := zap.ParseAtomicLevel(cfg.LogLevel)
	if err != nil {
		return fmt.Errorf("LOG_LEVEL: %w", err)
	}
	log := newLog(level)
	defer func() { _ = log.Sync() }()

	// What serves requests outlives ctx by the grace period.
	working, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	ca := identity.NewCA(identity.ClientConfig{Dial: cfg.CA.Dial, ClusterID: cfg.ClusterID, Self: cfg.self()})
	certificates := identity.NewCertificates(working, ca, log.Named("ca"))
	certificates.Warm(cfg.self())
	pool := hbone.NewPool(hbone.PoolConfig{Log: log.Named("hbone")})
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))

	p := newProxy(working, cfg, certificates, pool, registry, log)
	client := xds.NewClient(xds.ClientConfig{Dial: cfg.XDS.Dial, Node: cfg.node(), Log: log.Named("xds")})
	p.resources.subscribe(client)

	ready := func() error { return p.ready(client, certificates) }
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", cfg.HBONEAddr)
	if err != nil {
		return fmt.Errorf("listen for tunnels: %w", err)
	}
	log.Info("waypoint started", zap.String("gateway", cfg.PodNamespace+"/"+cfg.GatewayName), zap.Stringer("hbone", listener.Addr()))

	group, failed := errgroup.WithContext(working)
	group.Go(func() error { return ended(client.Run(working)) })
	group.Go(func() error { return p.hbone.Serve(working, listener) })
	group.Go(func() error { return p.serveHandOver() })
	group.Go(func() error { return admin.Serve(working, cfg.StatsAddr, admin.Stats(registry)) })
	group.Go(func() error { return admin.Serve(working, cfg.ReadinessAddr, admin.Readiness(ready)) })
	group.Go(func() error { return admin.Serve(working, cfg.AdminAddr, admin.Admin(p.dump(certificates), level)) })
	select {
	case <-ctx.Done():
		p.drain(cfg.TerminationGrace)
	case <-failed.Done():
	}
	stop()
	p.http.Close()
	err = group.Wait()
	p.forwarder.close()
	certificates.Wait()
	return errors.Join(err, ca.Close())
}

// newProxy wires the parts that serve. ctx ends them.
func newProxy(ctx context.Context, cfg Config, certificates identity.Certificater, pool *hbone.Pool, registry prometheus.Registerer, log *zap.Logger) *Proxy {
	p := &Proxy{
		cfg: cfg, log: log, access: log.Named("access"),
		quiet:     zap.NewStdLog(log.Named("http").WithOptions(zap.IncreaseLevel(zap.ErrorLevel))),
		forwarder: newForwarder(cfg, certificates, pool),
		metrics:   newMetrics(registry),
		tcp:       tcpConnections{live: map[*tcpConnection]struct{}{}},
		handOver:  newHandOver(&net.TCPAddr{Port: int(cfg.HBONEPort)}),
	}
	p.resources = newResources(p.tcp.recheck)
	p.http = p.newHTTPServer()
	server := identity.ServerTLS(ctx, certificates, cfg.self())
	p.hbone = hbone.NewServer(hbone.ServerConfig{Handle: p.handle, Log: log.Named("hbone"),
		TLS: func(_ context.Context, hello *tls.ClientHelloInfo) (*tls.Config, error) {
			return server.GetConfigForClient(hello)
		}})
	return p
}

func newLog(level zap.AtomicLevel) *zap.Logger {
	encoder := zap.NewProductionEncoderConfig()
	encoder.TimeKey, encoder.EncodeTime = "time", zapcore.ISO8601TimeEncoder
	return zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(encoder), zapcore.Lock(os.Stdout), level))
}

// serveHandOver runs the HTTP server over the streams that handle gives it.
func (p *Proxy) serveHandOver() error {
	err := p.http.Serve(p.handOver)
	if errors.Is(err, http.ErrServerClosed) || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// ready says what is missing before the waypoint can take requests.
func (p *Proxy) ready(client *xds.Client, certificates *identity.Certificates) error {
	select {
	case <-client.Synced():
	default:
		return errors.New("waiting for configuration from the control plane")
	}
	if p.resources.current.Load() == nil {
		return fmt.Errorf("configuration is not whole: %w", p.resources.status())
	}
	for _, s := range certificates.All() {
		if s.Identity == p.cfg.self() && s.Bundle != nil {
			return nil
		}
	}
	return errors.New("waiting for a certificate")
}

// drain lets requests under way end, for at most grace.
func (p *Proxy) drain(grace time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	p.log.Info("draining", zap.Duration("grace", grace))
	var group errgroup.Group
	group.Go(func() error { return p.hbone.Drain(ctx) })
	// Streams that were under way when the peers were told may still come; then idle connections end, and with them
	// their tunnels.
	time.Sleep(min(lateStreams, grace))
	group.Go(func() error { return p.http.Shutdown(ctx) })
	if err := group.Wait(); err != nil {
		p.log.Info("drained in part", zap.Error(err))
	}
}

// dump is what /config_dump tells.
func (p *Proxy) dump(certificates *identity.Certificates) func() any {
	return func() any {
		var certs []map[string]any
		for _, s := range certificates.All() {
			c := map[string]any{"identity": s.Identity.String()}
			if s.Bundle != nil {
				c["not_after"] = s.Bundle.NotAfter
			}
			if s.Err != nil {
				c["error"] = s.Err.Error()
			}
			certs = append(certs, c)
		}
		return map[string]any{
			"gateway": p.cfg.PodNamespace + "/" + p.cfg.GatewayName, "certificates": certs, "resources": p.resources.dump(),
		}
	}
}

// ended makes the end of a context no error.
func ended(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}
