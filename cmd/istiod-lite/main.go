// Command istiod-lite is the control plane.
//
//	istiod-lite [flags]                    on the cluster it runs in, or that of --kubeconfig
//	istiod-lite --config-dir DIR [flags]   on a directory of Kubernetes YAML
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"go.uber.org/zap"

	istiod "github.com/fairlead-mesh/fairlead/istiod-lite"
)

// version is set at build time.
var version = "dev"

func main() {
	cfg, logLevel, err := parse(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "istiod-lite:", err)
		os.Exit(2)
	}
	if err := run(cfg, logLevel); err != nil {
		fmt.Fprintln(os.Stderr, "istiod-lite:", err)
		os.Exit(1)
	}
}

func parse(arguments []string) (cfg istiod.Config, logLevel string, err error) {
	flags := flag.NewFlagSet("istiod-lite", flag.ContinueOnError)
	flags.StringVar(&cfg.ConfigDir, "config-dir", "", "a directory of Kubernetes YAML, in place of an API server")
	flags.StringVar(&cfg.Kubeconfig, "kubeconfig", os.Getenv("KUBECONFIG"), "Kubernetes client configuration; empty: that of the pod")
	flags.StringVar(&cfg.Namespace, "namespace", env("POD_NAMESPACE", "istio-system"), "namespace of the control plane, and root namespace of policies")
	flags.StringVar(&cfg.GRPCAddr, "grpc-addr", ":15010", "plain address of xDS and the CA; empty: none")
	flags.StringVar(&cfg.TLSAddr, "tls-addr", ":15012", "TLS address of xDS and the CA")
	flags.StringVar(&cfg.MonitoringAddr, "monitoring-addr", ":15014", "address of /ready, /metrics and /debug")
	flags.StringVar(&cfg.TrustDomain, "trust-domain", env("TRUST_DOMAIN", "cluster.local"), "trust domain of the mesh's identities")
	flags.StringVar(&cfg.ClusterID, "cluster-id", env("CLUSTER_ID", "Kubernetes"), "name of the cluster")
	flags.StringVar(&cfg.Network, "network", os.Getenv("NETWORK"), "network of workloads that no label puts elsewhere")
	flags.StringVar(&cfg.CADir, "ca-dir", "", "with --config-dir: where the CA's key and certificates are kept; empty: .ca in the directory")
	flags.StringVar(&cfg.TokenFile, "token-auth-file", "", "with --config-dir: lines of token,namespace/serviceaccount,podname")
	flags.StringVar(&cfg.WaypointImage, "waypoint-image", env("WAYPOINT_IMAGE", "docker.io/fairlead/waypoint:dev"), "image of waypoints")
	flags.StringVar(&logLevel, "log-level", "info", "debug, info, warn or error")
	accounts := flags.String("node-accounts", os.Getenv("CA_TRUSTED_NODE_ACCOUNTS"), "namespace/serviceaccount of node proxies, with commas between; empty: ztunnel in --namespace")
	if err := flags.Parse(arguments); err != nil {
		return cfg, logLevel, err
	}
	if flags.NArg() > 0 {
		return cfg, logLevel, fmt.Errorf("unknown argument %q", flags.Arg(0))
	}
	cfg.NodeAccounts = strings.FieldsFunc(*accounts, func(r rune) bool { return r == ',' })
	return cfg, logLevel, nil
}

func env(name, absent string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return absent
}

func run(cfg istiod.Config, logLevel string) error {
	level, err := zap.ParseAtomicLevel(logLevel)
	if err != nil {
		return err
	}
	logging := zap.NewProductionConfig()
	logging.Level = level
	logging.DisableStacktrace = true
	log, err := logging.Build()
	if err != nil {
		return fmt.Errorf("start log: %w", err)
	}
	defer func() { _ = log.Sync() }() // standard error cannot always be synced
	cfg.Log = log
	log.Info("istiod-lite", zap.String("version", version))
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return istiod.Run(ctx, cfg)
}
