// Command cni-agent captures the pods of one node: it serves the CNI plugin and the node proxy.
//
//	cni-agent [flags]             runs
//	cni-agent uninstall [flags]   leaves the node as it was before the first run; the agent must not be running
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/fairlead-mesh/fairlead/bpf"
	"github.com/fairlead-mesh/fairlead/cni/agent"
	"github.com/fairlead-mesh/fairlead/cni/plugin"
	"github.com/fairlead-mesh/fairlead/internal/zds"
)

// version is set at build time.
var version = "dev"

func main() {
	arguments := os.Args[1:]
	uninstall := len(arguments) > 0 && arguments[0] == "uninstall"
	if uninstall {
		arguments = arguments[1:]
	}
	cfg, logLevel, err := parse(arguments)
	if err != nil {
		fmt.Fprintln(os.Stderr, "cni-agent:", err)
		os.Exit(2)
	}
	if err := run(cfg, logLevel, uninstall); err != nil {
		fmt.Fprintln(os.Stderr, "cni-agent:", err)
		os.Exit(1)
	}
}

func parse(arguments []string) (cfg agent.Config, logLevel string, err error) {
	flags := flag.NewFlagSet("cni-agent", flag.ContinueOnError)
	flags.StringVar(&cfg.NodeName, "node-name", os.Getenv("NODE_NAME"), "the node whose pods are this agent's")
	flags.StringVar(&cfg.ConfigDir, "config-dir", "", "a directory of Kubernetes YAML, in place of an API server")
	flags.StringVar(&cfg.Kubeconfig, "kubeconfig", os.Getenv("KUBECONFIG"), "Kubernetes client configuration; empty: that of the pod")
	flags.StringVar(&cfg.EventSocket, "cni-event-socket", plugin.DefaultEventSocket, "Unix socket for the CNI plugin")
	flags.StringVar(&cfg.ZDSSocket, "zds-socket", zds.DefaultSocket, "Unix socket for the node proxy")
	flags.StringVar(&cfg.RunDir, "run-dir", "/var/run/istio-cni", "where the agent keeps what it must know after a restart")
	flags.StringVar(&cfg.BPFFS, "bpffs", bpf.DefaultDir, "directory to pin redirection in; a BPF file system is mounted if it is on none")
	flags.StringVar(&cfg.Cgroup, "cgroup", "", "cgroup2 directory that all pods and the node proxy run below; empty: the root of the hierarchy")
	flags.StringVar(&cfg.HostNetns, "host-netns", "/proc/1/ns/net", "network namespace that the kubelet runs in")
	flags.StringVar(&cfg.Proc, "proc", "/proc", "proc file system with the node's processes")
	flags.StringVar(&cfg.NetnsDir, "netns-dir", "/var/run/netns", "where the container runtime keeps network namespaces")
	flags.StringVar(&cfg.HealthAddr, "health-addr", ":8000", "address of /healthz and /readyz")
	flags.StringVar(&cfg.MetricsAddr, "metrics-addr", ":15014", "address of /metrics")
	flags.StringVar(&cfg.DaemonSet, "daemonset", "", "NAMESPACE/NAME of the agent's DaemonSet: when it is deleted, the agent cleans the node at its end")
	flags.DurationVar(&cfg.AckTimeout, "ack-timeout", 8*time.Second, "how long a starting pod waits for the node proxy")
	flags.StringVar(&logLevel, "log-level", "info", "debug, info, warn or error")
	exclude := flags.String("exclude-namespaces", "istio-system,kube-system", "namespaces that are never in the mesh, with commas between")
	if err := flags.Parse(arguments); err != nil {
		return cfg, logLevel, err
	}
	if flags.NArg() > 0 {
		return cfg, logLevel, fmt.Errorf("unknown argument %q", flags.Arg(0))
	}
	if cfg.NodeName == "" {
		return cfg, logLevel, fmt.Errorf("--node-name (or NODE_NAME) is needed")
	}
	cfg.ExcludeNamespaces = strings.FieldsFunc(*exclude, func(r rune) bool { return r == ',' })
	return cfg, logLevel, nil
}

func run(cfg agent.Config, logLevel string, uninstall bool) error {
	level, err := zap.ParseAtomicLevel(logLevel)
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
	if uninstall {
		return agent.Uninstall(cfg, log)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	log.Info("cni-agent starts", zap.String("version", version))
	return agent.Run(ctx, cfg, log)
}
