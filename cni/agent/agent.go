// Package agent (plumbing) is the node's CNI agent: it decides which pods of its node are in the mesh, redirects their
// TCP to the node proxy, and tells the proxy of them.
//
// A pod comes to it in one of two ways. When its sandbox is made, the CNI plugin asks and waits (events.go); when it
// runs already and a label changes, the watch brings it (watch.go). Both end in enrol.go, which redirects the pod and
// waits for the proxy's word. What the agent set up stays in force when it ends.
//
// Next: cni/redirect/redirect.go
package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	goruntime "runtime"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/cache"

	"github.com/fairlead-mesh/fairlead/cni/plugin"
	"github.com/fairlead-mesh/fairlead/cni/redirect"
	"github.com/fairlead-mesh/fairlead/internal/kubedir"
	"github.com/fairlead-mesh/fairlead/internal/netns"
	"github.com/fairlead-mesh/fairlead/internal/zds"
)

// DefaultEventSocket is where the CNI plugin looks for the agent.
const DefaultEventSocket = plugin.DefaultEventSocket

// Config is the agent's configuration; the flags of cmd/cni-agent give its defaults.
type Config struct {
	// NodeName is the node whose pods are the agent's.
	NodeName string
	// ConfigDir is a directory of Kubernetes YAML to use in place of an API server.
	ConfigDir string
	// Kubeconfig is a client configuration file; empty means that of the pod the agent runs in.
	Kubeconfig string
	// EventSocket, ZDSSocket are where the CNI plugin and the node proxy find the agent.
	EventSocket, ZDSSocket string
	// RunDir is where the agent keeps what it must know after a restart, but not after a reboot.
	RunDir string
	// Redirection is how pods' connections are redirected; empty means redirect.Auto.
	Redirection redirect.Mode
	// Record is the file on the node's disk that tells the plugin, when it cannot ask, who is in the mesh; empty: none.
	Record string
	// PluginAccount is NAMESPACE/NAME of the service account as which the plugin asks the API server when it cannot ask the agent;
	// empty: it does not. PluginAccess is the file on the node's disk with what it needs for that.
	PluginAccount, PluginAccess string
	// Steps is called at each step of taking a pod in or out; nil but in tests, which end the agent there.
	Steps func(step string) `json:"-"`
	// BPFFS is the directory that redirection is pinned in.
	BPFFS string
	// HostMounts is a file of the mount namespace in which BPFFS is mounted if it must be; empty: the agent's own.
	HostMounts string
	// Cgroup is the cgroup2 directory that all pods, and the node proxy, run below; empty means the root.
	Cgroup string
	// HostNetns is a file of the network namespace that the kubelet runs in.
	HostNetns string
	// Proc is a proc file system with the node's processes; NetnsDir is where the runtime keeps network namespaces.
	Proc, NetnsDir string
	// HealthAddr, MetricsAddr are where the agent listens for HTTP.
	HealthAddr, MetricsAddr string
	// ExcludeNamespaces are never in the mesh.
	ExcludeNamespaces []string
	// CaptureDNS: the proxy answers the names that pods ask for, where they do not say otherwise.
	CaptureDNS bool
	// AckTimeout bounds the wait for the proxy to accept a pod.
	AckTimeout time.Duration
	// DaemonSet is NAMESPACE/NAME of the agent's own: when it says at the agent's end that the mesh is withdrawn, the node is
	// cleaned.
	DaemonSet string
	// Ready are further conditions of readiness.
	Ready []func() error
	// Clean are further things to take off the node when the agent is uninstalled; they come first.
	Clean []func() error
}

// agent is one run of the agent.
type agent struct {
	cfg   Config
	log   *zap.Logger
	enrol *enroller
	watch *watcher
	// started is set once all pods of the node have been named to the proxies' server.
	started atomic.Bool
}

// Run is the agent. It returns when ctx ends, with nil, or when something it cannot do without fails. Redirection stays
// in force.
func Run(ctx context.Context, cfg Config, log *zap.Logger) error {
	a := &agent{cfg: cfg, log: log}
	lock, err := alone(ctx, cfg.RunDir, log)
	if errors.Is(err, context.Canceled) {
		return nil
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	host, err := netns.Open(cfg.HostNetns)
	if err != nil {
		return err
	}
	defer host.Close()
	redirector, err := redirect.New(redirectConfig(cfg, host))
	if err != nil {
		return err
	}
	defer redirector.Close()
	mode, why := redirector.Mode()
	if why != nil {
		log.Warn("redirection is by nftables, because this node cannot redirect by eBPF", zap.Error(why))
	}
	if a.enrol, err = newEnroller(cfg, log, redirector, host); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	group, ctx := errgroup.WithContext(ctx)
	c, err := a.openCluster(ctx, group)
	if err != nil {
		return err
	}
	a.watch = newWatcher(log, c, a.enrol, cfg)
	if d, ok := c.(*directory); ok {
		d.caches = func() (cache.Store, cache.Store) { return a.watch.pods, a.watch.namespaces }
	}
	a.enrol.metrics.watch(a.enrol, a.watch)
	a.enrol.proxies.Admit(a.admitProxy)
	if err := a.enrol.recover(); err != nil {
		return fmt.Errorf("take over the pods of the agent before: %w", err)
	}
	if err := a.serve(ctx, group); err != nil {
		cancel() // what runs already would be waited for without end
		return errors.Join(err, group.Wait())
	}
	group.Go(func() error { return a.start(ctx) })
	group.Go(func() error { return a.followAttempts(ctx) })
	group.Go(func() error { return a.keepMembership(ctx) })
	group.Go(func() error { return a.keepAccess(ctx, c) })
	group.Go(func() error {
		keepStock(ctx, log, redirector.Stock)
		return nil
	})
	group.Go(func() error { return a.trim(ctx) })
	log.Info("cni-agent runs", zap.String("node", cfg.NodeName), zap.String("eventSocket", cfg.EventSocket),
		zap.String("zdsSocket", cfg.ZDSSocket), zap.String("redirection", string(mode)), zap.String("bpffs", cfg.BPFFS), zap.String("cgroup", cfg.Cgroup))
	err = group.Wait()
	if err == nil || errors.Is(err, context.Canceled) {
		return a.leave(c, host)
	}
	return err
}

func redirectConfig(cfg Config, host *os.File) redirect.Config {
	return redirect.Config{Mode: cfg.Redirection, BPFFS: cfg.BPFFS, HostMounts: cfg.HostMounts, Cgroup: cfg.Cgroup, HostNetns: host}
}

// newEnroller reads the records of the agent before.
func newEnroller(cfg Config, log *zap.Logger, redirector *redirect.Redirector, host *os.File) (*enroller, error) {
	recs, skipped, err := openRecords(filepath.Join(cfg.RunDir, "pods"))
	if err != nil {
		return nil, err
	}
	for _, path := range skipped {
		log.Warn("dropped a pod record that cannot be understood", zap.String("path", path))
	}
	cookie, err := netns.Cookie(host)
	if err != nil {
		return nil, err
	}
	return &enroller{
		log: log, redirector: redirector, proxies: zds.NewServer(log), records: recs, metrics: newMetrics(),
		finder:     finder{proc: cfg.Proc, dir: cfg.NetnsDir, host: cookie},
		steps:      cfg.Steps,
		ackTimeout: cfg.AckTimeout, turns: map[string]*turn{}, acked: map[string]bool{}, starting: make(chan struct{}, goruntime.GOMAXPROCS(0)),
		used: make(chan struct{}, 1), looked: make(chan struct{}, 1),
	}, nil
}

func (a *agent) openCluster(ctx context.Context, group *errgroup.Group) (cluster, error) {
	if a.cfg.ConfigDir == "" {
		return newAPI(a.cfg.Kubeconfig, a.cfg.NodeName)
	}
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	dir, err := kubedir.Open(a.cfg.ConfigDir, scheme, a.log)
	if err != nil {
		return nil, err
	}
	group.Go(func() error { return dir.Run(ctx) })
	return &directory{dir: dir, node: a.cfg.NodeName, log: a.log}, nil
}

// admitProxy exempts a node proxy that has connected from redirection, before it is told of any pod. One whose connections
// could not be told from those of applications would be redirected to itself: it is turned away.
func (a *agent) admitProxy(pid int) error {
	if err := a.enrol.redirector.EnsureProxy(pid); err != nil {
		return fmt.Errorf("the node proxy's own connections would be redirected to itself: %w", err)
	}
	return nil
}

// start brings the pods of the node in line once they are all known, and keeps them so.
func (a *agent) start(ctx context.Context) error {
	if err := a.watch.follow(ctx); err != nil {
		return err
	}
	for _, rec := range a.enrol.records.all() {
		if a.watch.exists(rec.UID) {
			continue
		}
		if err := a.enrol.forget(ctx, rec.UID, ""); err != nil {
			return err
		}
	}
	if err := a.enrol.prune(a.watch.exists); err != nil {
		return err
	}
	a.enrol.proxies.Synced()
	a.started.Store(true)
	a.enrol.use()
	a.watch.run(ctx)
	return ctx.Err()
}

// ready tells what the agent still waits for.
func (a *agent) ready() error {
	if !a.started.Load() {
		return errors.New("the node's pods and the namespaces are not known yet: the API server has not answered")
	}
	for _, condition := range a.cfg.Ready {
		if err := condition(); err != nil {
			return err
		}
	}
	return nil
}

// serve starts the agent's listeners.
func (a *agent) serve(ctx context.Context, group *errgroup.Group) error {
	plugins, err := zds.Listen("unix", a.cfg.EventSocket)
	if err != nil {
		return fmt.Errorf("serve the CNI plugin: %w", err)
	}
	health, err := net.Listen("tcp", a.cfg.HealthAddr)
	if err != nil {
		return errors.Join(fmt.Errorf("listen for health checks: %w", err), plugins.Close())
	}
	monitoring, err := net.Listen("tcp", a.cfg.MetricsAddr)
	if err != nil {
		return errors.Join(fmt.Errorf("listen for metrics: %w", err), plugins.Close(), health.Close())
	}
	answer := &events{log: a.log, watch: a.watch, enrol: a.enrol, ready: func() error {
		if !a.started.Load() {
			return a.ready()
		}
		return nil
	}}
	for _, s := range []struct {
		l net.Listener
		h http.Handler
	}{{plugins, answer.handler()}, {health, healthHandler(a.ready)}, {monitoring, a.enrol.metrics.handler()}} {
		server := &http.Server{Handler: s.h, ReadHeaderTimeout: 10 * time.Second, ErrorLog: zap.NewStdLog(a.log)}
		group.Go(func() error {
			if err := server.Serve(s.l); !errors.Is(err, http.ErrServerClosed) {
				return err
			}
			return nil
		})
		context.AfterFunc(ctx, func() { server.Close() })
	}
	group.Go(func() error { return a.enrol.proxies.Serve(ctx, a.cfg.ZDSSocket) })
	return nil
}

// leave is the agent's end. Everything stays in force, also when the agent's DaemonSet has just been deleted, unless that was
// to withdraw the mesh (cni/install/withdraw.go).
func (a *agent) leave(c cluster, host *os.File) error {
	if a.cfg.DaemonSet == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	namespace, name := filepath.Split(a.cfg.DaemonSet)
	withdrawn, err := c.withdrawn(ctx, filepath.Clean(namespace), name)
	if err != nil || !withdrawn {
		return err
	}
	a.log.Info("the mesh is withdrawn: the node is cleaned")
	if err := a.clean(host); err != nil {
		return err
	}
	// The pods no longer are what their annotation says. Nothing depends on it, so that a failure is only told of.
	for _, object := range a.watch.pods.List() {
		if err := a.watch.annotate(ctx, object.(*corev1.Pod), false); err != nil {
			a.log.Warn("the node is clean; a pod's annotation still says that it is captured", zap.Error(err))
		}
	}
	return nil
}

// Uninstall takes all pods of the node out of the mesh and removes every trace. The agent must not run.
func Uninstall(cfg Config, log *zap.Logger) error {
	host, err := netns.Open(cfg.HostNetns)
	if err != nil {
		return err
	}
	defer host.Close()
	redirector, err := redirect.New(redirectConfig(cfg, host))
	if err != nil {
		return err
	}
	defer redirector.Close()
	a := &agent{cfg: cfg, log: log}
	if a.enrol, err = newEnroller(cfg, log, redirector, host); err != nil {
		return err
	}
	if err := a.enrol.recover(); err != nil {
		return err
	}
	return a.clean(host)
}

// clean removes all that the agent made on the node.
func (a *agent) clean(host *os.File) error {
	var errs []error
	for _, further := range a.cfg.Clean {
		errs = append(errs, further())
	}
	errs = append(errs,
		a.enrol.removeAll(), redirect.Uninstall(redirectConfig(a.cfg, host)), os.RemoveAll(filepath.Join(a.cfg.RunDir, "pods")))
	if a.cfg.PluginAccess != "" {
		errs = append(errs, plugin.ForgetHeld(a.cfg.PluginAccess))
	}
	for _, path := range []string{a.cfg.EventSocket, a.cfg.ZDSSocket, a.cfg.Record, a.cfg.PluginAccess} {
		if path == "" {
			continue
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
