// Package istiod is the control plane. It watches Kubernetes (or a directory of the same objects), pushes workloads,
// services and policies to node proxies and their configuration to waypoints, signs certificates, deploys waypoints,
// and reports on the users' objects what became of them. This file is its composition; pipeline.go is its graph.
package istiod

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"sync/atomic"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	istioca "istio.io/api/security/v1alpha1"
	istioclient "istio.io/client-go/pkg/clientset/versioned"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	gatewayclient "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned"

	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/kubedir"
	"github.com/fairlead-mesh/fairlead/internal/kubescheme"
	"github.com/fairlead-mesh/fairlead/internal/xds"
	"github.com/fairlead-mesh/fairlead/istiod-lite/ca"
	"github.com/fairlead-mesh/fairlead/istiod-lite/deploy"
	"github.com/fairlead-mesh/fairlead/istiod-lite/push"
	"github.com/fairlead-mesh/fairlead/istiod-lite/source"
	"github.com/fairlead-mesh/fairlead/istiod-lite/status"
	"github.com/fairlead-mesh/fairlead/istiod-lite/translate"
)

// Config is what the control plane is told.
type Config struct {
	// ConfigDir is a directory of Kubernetes objects to use instead of a cluster; empty means a cluster.
	ConfigDir string
	// Kubeconfig names the cluster; empty means the one this process runs in.
	Kubeconfig string
	// Namespace of the control plane, and the root namespace of policies.
	Namespace string
	// GRPCAddr and TLSAddr serve xDS and the CA, plain and in TLS; MonitoringAddr serves HTTP.
	GRPCAddr, TLSAddr, MonitoringAddr string
	TrustDomain                       string
	ClusterID                         string
	Network                           string
	// NodeAccounts are the "<namespace>/<service account>" of node proxies; empty means ztunnel in Namespace.
	NodeAccounts []string
	// CADir keeps the CA's key and certificates, TokenFile says who brings which token; both for ConfigDir only.
	CADir, TokenFile string
	// WaypointImage is deployed for Gateways of class istio-waypoint.
	WaypointImage string
	Log           *zap.Logger
}

// backend is what differs between a cluster and a directory.
type backend struct {
	origin        source.Origin
	authority     *ca.Authority
	authenticator identity.Authenticator
	// follow runs what the origin needs; nil for nothing.
	follow func(context.Context) error
	writer func(status.Lookup) status.Writer
	// publisher and deployer are nil where there is no API to write to.
	publisher *ca.RootPublisher
	deployer  *deploy.Deployer
}

// Run is the control plane until ctx ends; an error means that it could not start or could not go on.
func Run(ctx context.Context, cfg Config) error {
	if len(cfg.NodeAccounts) == 0 {
		cfg.NodeAccounts = []string{cfg.Namespace + "/ztunnel"}
	}
	b, err := connect(ctx, cfg)
	if err != nil {
		return err
	}
	metrics := newMetrics()
	pusher := push.New(cfg.NodeAccounts, cfg.Log)
	metrics.serve(pusher.Server())
	p := newPipeline(translate.Mesh{
		TrustDomain: cfg.TrustDomain, ClusterID: cfg.ClusterID, RootNamespace: cfg.Namespace, Network: cfg.Network,
		DNSDomain: "cluster.local", CapturedByLabel: cfg.ConfigDir != "",
	}, pusher, metrics, cfg.Log)
	sources := source.New(b.origin, cfg.Log, func(c source.Change) {
		p.note(c)
		if ns, ok := c.New.(*corev1.Namespace); ok && b.publisher != nil {
			b.publisher.Namespace(ns)
		}
	})
	p.sources = sources
	p.board = status.NewBoard(b.writer(status.FromSources(sources)), cfg.Log)
	if b.deployer != nil {
		p.gateways = newDeployments(b.deployer, sources, cfg.Log)
	}

	group, ctx := errgroup.WithContext(ctx)
	var ready atomic.Bool
	if err := serveMonitoring(ctx, group, cfg.MonitoringAddr, monitoring(&ready, metrics, pusher.Server())); err != nil {
		return err
	}
	if b.follow != nil {
		group.Go(func() error { return b.follow(ctx) })
	}
	if err := sources.Start(ctx); err != nil {
		return errors.Join(err, ended(group, ctx))
	}
	check := ca.NodeCheck{TrustDomain: cfg.TrustDomain, NodeAccounts: cfg.NodeAccounts, Pods: pods{sources}}
	if err := serveGRPC(ctx, group, cfg, b, check, pusher.Server()); err != nil {
		return err
	}
	group.Go(func() error { p.board.Run(ctx); return nil })
	if p.gateways != nil {
		group.Go(func() error { p.gateways.Run(ctx); return nil })
	}
	if b.publisher != nil {
		group.Go(func() error { return b.publisher.Run(ctx) })
	}
	group.Go(func() error {
		p.Run(ctx, func() {
			ready.Store(true)
			cfg.Log.Info("ready", zap.Int("workloads", p.workloads.Len()), zap.Int("services", p.services.Len()), zap.Int("policies", p.policies.Len()))
		})
		return nil
	})
	return group.Wait()
}

// ended is the reason why a group's context ended before its time, if that is why.
func ended(group *errgroup.Group, ctx context.Context) error {
	if ctx.Err() == nil {
		return nil
	}
	return group.Wait()
}

func connect(ctx context.Context, cfg Config) (backend, error) {
	if cfg.ConfigDir != "" {
		return connectDirectory(cfg)
	}
	return connectCluster(ctx, cfg)
}

// connectDirectory makes do without an API: tokens come from a file, keys and statuses go to files.
func connectDirectory(cfg Config) (backend, error) {
	scheme, err := kubescheme.New()
	if err != nil {
		return backend{}, err
	}
	dir, err := kubedir.Open(cfg.ConfigDir, scheme, cfg.Log)
	if err != nil {
		return backend{}, err
	}
	if cfg.CADir == "" {
		cfg.CADir = filepath.Join(cfg.ConfigDir, ".ca")
	}
	authority, err := ca.FromDirectory(cfg.CADir, cfg.TrustDomain, cfg.Log)
	if err != nil {
		return backend{}, err
	}
	b := backend{
		origin: source.Directory{Dir: dir}, authority: authority, follow: dir.Run, authenticator: ca.Nobody{},
		writer: func(l status.Lookup) status.Writer {
			return status.Directory{Path: filepath.Join(cfg.ConfigDir, ".status"), Lookup: l}
		},
	}
	if cfg.TokenFile != "" {
		b.authenticator = ca.TokenFile{Path: cfg.TokenFile, TrustDomain: cfg.TrustDomain}
	}
	return b, nil
}

func connectCluster(ctx context.Context, cfg Config) (backend, error) {
	clients, err := newClients(cfg.Kubeconfig)
	if err != nil {
		return backend{}, err
	}
	authority, err := ca.FromCluster(ctx, clients.Kubernetes, cfg.Namespace, cfg.TrustDomain, cfg.Log)
	if err != nil {
		return backend{}, err
	}
	return backend{
		origin: source.Cluster{Clients: clients, Log: cfg.Log}, authority: authority,
		authenticator: ca.NewTokenReview(clients.Kubernetes, cfg.TrustDomain),
		writer: func(l status.Lookup) status.Writer {
			return status.Cluster{Clients: clients, Lookup: l}
		},
		publisher: ca.NewRootPublisher(clients.Kubernetes, authority.Roots(), cfg.Log),
		deployer: deploy.New(clients.Kubernetes, deploy.Config{
			Image: cfg.WaypointImage, SystemNamespace: cfg.Namespace, ClusterID: cfg.ClusterID, TrustDomain: cfg.TrustDomain, Network: cfg.Network,
		}),
	}, nil
}

func newClients(kubeconfig string) (source.Clients, error) {
	config, err := rest.InClusterConfig()
	if kubeconfig != "" {
		config, err = clientcmd.BuildConfigFromFlags("", kubeconfig)
	}
	if err != nil {
		return source.Clients{}, fmt.Errorf("reach the cluster: %w", err)
	}
	// The API server's own fairness bounds what a client may do; these keep a burst from waiting here.
	config.QPS, config.Burst = 100, 200
	var c source.Clients
	var errs [4]error
	c.Kubernetes, errs[0] = kubernetes.NewForConfig(config)
	c.Istio, errs[1] = istioclient.NewForConfig(config)
	c.Gateway, errs[2] = gatewayclient.NewForConfig(config)
	c.Metadata, errs[3] = metadata.NewForConfig(config)
	if err := errors.Join(errs[:]...); err != nil {
		return c, fmt.Errorf("make clients: %w", err)
	}
	return c, nil
}

// serveGRPC serves xDS and the CA, in TLS and plain; both ports want the caller's token.
func serveGRPC(ctx context.Context, group *errgroup.Group, cfg Config, b backend, check ca.NodeCheck, server *xds.Server) error {
	certificates := identity.NewServer(identity.ServerConfig{
		Authenticator: b.authenticator, Authorizer: check, Authority: b.authority, Log: cfg.Log,
	})
	names := []string{"istiod." + cfg.Namespace + ".svc", "istiod." + cfg.Namespace + ".svc.cluster.local", "istiod." + cfg.Namespace, "localhost"}
	for address, security := range map[string]grpc.ServerOption{
		cfg.GRPCAddr: nil,
		cfg.TLSAddr:  grpc.Creds(credentials.NewTLS(b.authority.ServingTLS(names))),
	} {
		if address == "" {
			continue
		}
		options := append(xds.ServerOptions(), grpc.StreamInterceptor(push.Authenticated(b.authenticator, cfg.Log)))
		if security != nil {
			options = append(options, security)
		}
		s := grpc.NewServer(options...)
		discovery.RegisterAggregatedDiscoveryServiceServer(s, server)
		istioca.RegisterIstioCertificateServiceServer(s, certificates)
		listener, err := net.Listen("tcp", address)
		if err != nil {
			return fmt.Errorf("listen for proxies: %w", err)
		}
		cfg.Log.Info("listening for proxies", zap.Stringer("address", listener.Addr()), zap.Bool("tls", security != nil))
		group.Go(func() error { return s.Serve(listener) })
		// Streams last as long as their proxies: they are cut, and come back to another replica.
		context.AfterFunc(ctx, s.Stop)
	}
	return nil
}

func serveMonitoring(ctx context.Context, group *errgroup.Group, address string, handler http.Handler) error {
	if address == "" {
		return nil
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return fmt.Errorf("listen for monitoring: %w", err)
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second}
	context.AfterFunc(ctx, func() { server.Close() })
	group.Go(func() error {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve monitoring: %w", err)
		}
		return nil
	})
	return nil
}

// pods answers the CA's node check from the sources.
type pods struct{ sources *source.Sources }

// Pod implements ca.Pods.
func (p pods) Pod(namespace, name string) (*corev1.Pod, bool) {
	return p.sources.Pods.Get(namespace, name)
}

// PodsOn implements ca.Pods.
func (p pods) PodsOn(node string) []*corev1.Pod { return p.sources.PodsOn(node) }
