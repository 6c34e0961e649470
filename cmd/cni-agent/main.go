// Command cni-agent captures the pods of one node: it serves the CNI plugin and the node proxy.
//
//	cni-agent [flags]             runs
//	cni-agent uninstall [flags]   leaves the node as it was before the first run; the agent must not be running
//	cni-agent withdraw [flags]    ends the agents of all nodes (--daemonset) and waits until each has cleaned its node
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/fairlead-mesh/fairlead/bpf"
	"github.com/fairlead-mesh/fairlead/cni/agent"
	"github.com/fairlead-mesh/fairlead/cni/install"
	"github.com/fairlead-mesh/fairlead/cni/redirect"
	"github.com/fairlead-mesh/fairlead/internal/zds"
)

// version is set at build time.
var version = "dev"

func main() {
	arguments, verb := os.Args[1:], "run"
	if len(arguments) > 0 && (arguments[0] == "uninstall" || arguments[0] == "withdraw") {
		verb, arguments = arguments[0], arguments[1:]
	}
	o, err := parse(arguments)
	if err == nil && o.agent.NodeName == "" && verb != "withdraw" {
		err = errors.New("--node-name (or NODE_NAME) is needed")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "cni-agent:", err)
		os.Exit(2)
	}
	if err := o.run(verb); err != nil {
		fmt.Fprintln(os.Stderr, "cni-agent:", err)
		os.Exit(1)
	}
}

// options are the flags.
type options struct {
	agent    agent.Config
	install  install.Config
	logLevel string
	timeout  time.Duration
}

func parse(arguments []string) (o options, err error) {
	cfg := &o.agent
	flags := flag.NewFlagSet("cni-agent", flag.ContinueOnError)
	flags.StringVar(&cfg.NodeName, "node-name", os.Getenv("NODE_NAME"), "the node whose pods are this agent's")
	flags.StringVar(&cfg.ConfigDir, "config-dir", "", "a directory of Kubernetes YAML, in place of an API server")
	flags.StringVar(&cfg.Kubeconfig, "kubeconfig", os.Getenv("KUBECONFIG"), "Kubernetes client configuration; empty: that of the pod")
	flags.StringVar(&cfg.EventSocket, "cni-event-socket", agent.DefaultEventSocket, "Unix socket for the CNI plugin")
	flags.StringVar(&cfg.ZDSSocket, "zds-socket", zds.DefaultSocket, "Unix socket for the node proxy")
	flags.StringVar(&cfg.RunDir, "run-dir", "/var/run/istio-cni", "where the agent keeps what it must know after a restart")
	mode := flags.String("redirection", string(redirect.Auto), "how pods' connections are redirected: ebpf, nftables, or auto, which is ebpf where the kernel can do it")
	flags.StringVar(&cfg.Record, "record", "/var/lib/fairlead-cni/mesh.json", "file on the node's disk that tells the plugin, when no agent answers, which pods need not wait")
	flags.StringVar(&cfg.PluginAccount, "plugin-account", "", "NAMESPACE/NAME of the service account as which the plugin asks the API server when no agent answers; empty: it does not ask")
	flags.StringVar(&cfg.PluginAccess, "plugin-access", "/var/lib/fairlead-cni/plugin/access.json", "file on the node's disk, in a directory of its own, with the plugin's access to the API server")
	flags.StringVar(&cfg.BPFFS, "bpffs", bpf.DefaultDir, "directory to pin redirection in; a BPF file system is mounted if it is on none")
	flags.StringVar(&cfg.HostMounts, "host-mounts", "", "mount namespace in which that is done, as /proc/1/ns/mnt; empty: the agent's own")
	flags.StringVar(&cfg.Cgroup, "cgroup", "", "cgroup2 directory that all pods and the node proxy run below; empty: the root of the hierarchy")
	flags.StringVar(&cfg.HostNetns, "host-netns", "/proc/1/ns/net", "network namespace that the kubelet runs in")
	flags.StringVar(&cfg.Proc, "proc", "/proc", "proc file system with the node's processes")
	flags.StringVar(&cfg.NetnsDir, "netns-dir", "/var/run/netns", "where the container runtime keeps network namespaces")
	flags.StringVar(&cfg.HealthAddr, "health-addr", ":8000", "address of /healthz and /readyz")
	flags.StringVar(&cfg.MetricsAddr, "metrics-addr", ":15014", "address of /metrics")
	flags.StringVar(&cfg.DaemonSet, "daemonset", "", "NAMESPACE/NAME of the agent's DaemonSet: when the mesh is withdrawn, the agent cleans the node at its end")
	flags.DurationVar(&cfg.AckTimeout, "ack-timeout", 8*time.Second, "how long a starting pod waits for the node proxy")
	flags.StringVar(&o.install.Binary, "plugin", "/usr/local/bin/cni-plugin", "the CNI plugin to install on the node")
	flags.StringVar(&o.install.BinDir, "cni-bin-dir", "/opt/cni/bin", "where the container runtime looks for CNI plugins")
	flags.StringVar(&o.install.ConfDir, "cni-conf-dir", "", "where the container runtime looks for CNI configurations (/etc/cni/net.d on most nodes); empty: nothing is installed")
	flags.DurationVar(&o.timeout, "timeout", time.Minute, "withdraw: how long to wait for the agents")
	flags.BoolVar(&cfg.CaptureDNS, "dns-capture", true, "the node proxy answers the names that pods ask for, where annotations do not say otherwise")
	flags.StringVar(&o.logLevel, "log-level", "info", "debug, info, warn or error")
	exclude := flags.String("exclude-namespaces", "istio-system,kube-system", "namespaces that are never in the mesh, with commas between")
	if err := flags.Parse(arguments); err != nil {
		return o, err
	}
	if flags.NArg() > 0 {
		return o, fmt.Errorf("unknown argument %q", flags.Arg(0))
	}
	if cfg.Redirection, err = redirect.ParseMode(*mode); err != nil {
		return o, err
	}
	cfg.ExcludeNamespaces = strings.FieldsFunc(*exclude, func(r rune) bool { return r == ',' })
	o.install.EventSocket, o.install.ExcludeNamespaces, o.install.Record = cfg.EventSocket, cfg.ExcludeNamespaces, cfg.Record
	if cfg.PluginAccount != "" {
		o.install.Access = cfg.PluginAccess
	}
	return o, nil
}

func (o options) run(verb string) error {
	level, err := zap.ParseAtomicLevel(o.logLevel)
	if err != nil {
		return err
	}
	logging := zap.NewProductionConfig()
	logging.Level, logging.Sampling, logging.DisableStacktrace = level, nil, true
	log, err := logging.Build()
	if err != nil {
		return err
	}
	defer func() { _ = log.Sync() }()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if verb == "withdraw" {
		return o.withdraw(ctx, log)
	}
	if o.install.ConfDir != "" {
		o.install.Log = log
		o.agent.Clean = append(o.agent.Clean, func() error { return install.Remove(o.install) })
	}
	if verb == "uninstall" {
		return agent.Uninstall(o.agent, log)
	}
	log.Info("cni-agent starts", zap.String("version", version))
	if o.install.ConfDir == "" {
		return agent.Run(ctx, o.agent, log)
	}
	return o.serve(ctx, log)
}

// serve runs the agent with the plugin's installer beside it. The agent comes to its end, where it may take the plugin
// off the node again, when the installer has.
func (o options) serve(ctx context.Context, log *zap.Logger) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	installer := install.New(o.install)
	ended := make(chan error, 1)
	go func() {
		defer cancel()
		ended <- installer.Run(ctx)
	}()
	o.agent.Ready = append(o.agent.Ready, installer.Ready)
	stopped := sync.OnceValue(func() error { cancel(); return <-ended })
	o.agent.Clean = append([]func() error{stopped}, o.agent.Clean...)
	err := agent.Run(ctx, o.agent, log)
	return errors.Join(err, stopped())
}

// withdraw reports the nodes that did not answer, and does not fail for them: a node that is down must not keep the
// chart from being uninstalled.
func (o options) withdraw(ctx context.Context, log *zap.Logger) error {
	namespace, name, ok := strings.Cut(o.agent.DaemonSet, "/")
	if !ok {
		return fmt.Errorf("--daemonset %q: want NAMESPACE/NAME", o.agent.DaemonSet)
	}
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	left, err := install.Withdraw(ctx, o.agent.Kubeconfig, namespace, name, log)
	if len(left) > 0 {
		log.Warn("nodes that were not seen to be clean; when one is back, run `cni-agent uninstall` on it", zap.Strings("nodes", left))
	}
	return err
}
