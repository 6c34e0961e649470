package ztunnel

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/zds"
)

// Config is what one ztunnel process needs to know.
type Config struct {
	NodeName     string
	PodName      string
	PodNamespace string
	// InstanceIP is ztunnel's own pod address, which it tells the control plane.
	InstanceIP  netip.Addr
	ClusterID   string
	Network     string
	TrustDomain string
	// ClusterDomain is the end of the cluster's names.
	ClusterDomain string
	// ResolvConf names the resolvers that are asked for pods whose own resolver cannot be told.
	ResolvConf string

	// XDS and CA are the control plane's two services, usually at the same address.
	XDS identity.ControlPlane
	CA  identity.ControlPlane
	// FakeCA: certificates are self-made; only for trying things out alone.
	FakeCA bool
	// FakeCADir holds the root that proxies with self-made certificates share; empty: a root of this process.
	FakeCADir string
	// LocalXDSPath is a file that takes the control plane's place, LocalXDS such a file's content.
	LocalXDSPath string
	LocalXDS     string
	// Dedicated is the one workload that is served, whose network namespace is the process's own; zero: ZDS names the pods.
	Dedicated zds.Workload
	// SecretTTL is how long a certificate is asked to live; 0 means 24 hours.
	SecretTTL time.Duration
	// MaxStreams is how many streams share a tunnel, TunnelIdle how long one without streams is kept; 0 means the pool's own.
	MaxStreams int
	TunnelIdle time.Duration
	// Workers is the number of event loops; 0 means as many as suit the machine.
	Workers int

	ZDSSocket string
	// HandoverSocket is where a proxy that ends finds its successor.
	HandoverSocket string
	// BPFFS is where the CNI agent of this project pins what it shares with the proxy.
	BPFFS string

	AdminAddr     string
	StatsAddr     string
	ReadinessAddr string
	// TerminationGrace is how long open connections may go on after SIGTERM.
	TerminationGrace time.Duration
	LogLevel         string
	// Limits are what each pod may use.
	Limits Limits
	// ForceHBONE: connections between two pods of this node go through a tunnel too.
	ForceHBONE bool
	// Goroutines: tunnels are driven by goroutines instead of event loops.
	Goroutines bool
}

const (
	defaultXDSAddress = "https://istiod.istio-system.svc:15012"
	defaultRootCA     = "/var/run/secrets/istio/root-cert.pem"
)

// ConfigFromEnv reads the configuration from the environment variables of Istio's ztunnel and a few of our own.
func ConfigFromEnv(getenv func(string) string) (Config, error) {
	get := func(name, otherwise string) string {
		if v := getenv(name); v != "" {
			return v
		}
		return otherwise
	}
	var errs []error
	host, _ := os.Hostname()
	c := Config{
		NodeName:      get("NODE_NAME", host),
		PodName:       get("POD_NAME", host),
		PodNamespace:  get("POD_NAMESPACE", "istio-system"),
		ClusterID:     clusterID(getenv),
		Network:       getenv("NETWORK"),
		TrustDomain:   get("TRUST_DOMAIN", mesh.DefaultTrustDomain),
		ClusterDomain: get("CLUSTER_DOMAIN", "cluster.local"),
		ResolvConf:    "/etc/resolv.conf",
		ZDSSocket:     get("INPOD_UDS", zds.DefaultSocket),
		BPFFS:         get("FAIRLEAD_BPFFS", "/sys/fs/bpf/fairlead"),
		AdminAddr:     get("ADMIN_ADDR", "localhost:15000"),
		StatsAddr:     get("STATS_ADDR", ":15020"),
		ReadinessAddr: get("READINESS_ADDR", ":15021"),
		LogLevel:      get("LOG_LEVEL", get("RUST_LOG", "info")),
	}
	c.HandoverSocket = get("FAIRLEAD_HANDOVER_SOCKET", filepath.Join(filepath.Dir(c.ZDSSocket), "handover.sock"))
	c.FakeCA = boolean(getenv, "FAKE_CA", &errs)
	c.FakeCADir, c.LocalXDSPath = getenv("FAIRLEAD_FAKE_CA_DIR"), getenv("LOCAL_XDS_PATH")
	c.LocalXDS = getenv("LOCAL_XDS")
	unsupportedFromEnv(getenv, &errs)
	var err error
	if c.Dedicated, err = dedicatedFromEnv(getenv); err != nil {
		errs = append(errs, err)
	}
	c.SecretTTL = tuned(getenv, "SECRET_TTL", duration, &errs)
	c.MaxStreams = tuned(getenv, "POOL_MAX_STREAMS_PER_CONNECTION", positive, &errs)
	c.TunnelIdle = tuned(getenv, "POOL_UNUSED_RELEASE_TIMEOUT", duration, &errs)
	c.Workers = tuned(getenv, "ZTUNNEL_WORKER_THREADS", workers, &errs)
	c.Limits = limitsFromEnv(getenv, &errs)
	c.ForceHBONE = boolean(getenv, "FAIRLEAD_FORCE_HBONE", &errs)
	c.Goroutines = boolean(getenv, "FAIRLEAD_GOROUTINES", &errs)
	token := get("AUTH_TOKEN", "/var/run/secrets/tokens/istio-token")
	c.XDS = identity.ControlPlane{
		Address: withScheme(get("XDS_ADDRESS", defaultXDSAddress)), RootFile: get("XDS_ROOT_CA", defaultRootCA),
		TokenFile: token, ServerName: getenv("ALT_XDS_HOSTNAME"),
	}
	c.CA = identity.ControlPlane{
		Address: withScheme(get("CA_ADDRESS", c.XDS.Address)), RootFile: get("CA_ROOT_CA", c.XDS.RootFile),
		TokenFile: token, ServerName: get("ALT_CA_HOSTNAME", c.XDS.ServerName),
	}
	if ip := getenv("INSTANCE_IP"); ip != "" {
		addr, err := netip.ParseAddr(ip)
		if err != nil {
			errs = append(errs, fmt.Errorf("INSTANCE_IP: %w", err))
		}
		c.InstanceIP = addr
	}
	c.TerminationGrace = terminationFromEnv(getenv, &errs)
	return c, errors.Join(errs...)
}

// boolean reads a switch: unset is off.
func boolean(getenv func(string) string, name string, errs *[]error) bool {
	text := getenv(name)
	if text == "" {
		return false
	}
	on, err := strconv.ParseBool(text)
	if err != nil {
		*errs = append(*errs, fmt.Errorf("%s: %w", name, err))
	}
	return on
}

// duration reads "10s" or a number of seconds.
func duration(text string) (time.Duration, error) {
	if seconds, err := strconv.ParseUint(text, 10, 32); err == nil {
		return time.Duration(seconds) * time.Second, nil
	}
	return time.ParseDuration(text)
}
