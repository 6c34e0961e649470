package waypoint

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// Config is what one waypoint process needs to know.
type Config struct {
	GatewayName    string
	PodName        string
	PodNamespace   string
	ServiceAccount string
	// InstanceIP is the waypoint's own pod address.
	InstanceIP  netip.Addr
	NodeName    string
	ClusterID   string
	TrustDomain string

	XDS identity.ControlPlane
	CA  identity.ControlPlane

	HBONEAddr     string
	StatsAddr     string
	ReadinessAddr string
	AdminAddr     string
	// HBONEPort is the port that endpoints' proxies listen on.
	HBONEPort uint16
	// TerminationGrace is how long requests may go on after SIGTERM.
	TerminationGrace time.Duration
	LogLevel         string
}

const (
	defaultControlPlane = "https://istiod.istio-system.svc:15012"
	defaultRootCA       = "/var/run/secrets/istio/root-cert.pem"
	defaultToken        = "/var/run/secrets/tokens/istio-token"
)

// ConfigFromEnv reads the configuration from environment variables, named as Istio's.
func ConfigFromEnv(getenv func(string) string) (Config, error) {
	get := func(name, otherwise string) string { return cmp.Or(getenv(name), otherwise) }
	var errs []error
	host, _ := os.Hostname()
	token := get("AUTH_TOKEN", defaultToken)
	xds := get("XDS_ADDRESS", defaultControlPlane)
	c := Config{
		GatewayName:   getenv("GATEWAY_NAME"),
		PodName:       get("POD_NAME", host),
		PodNamespace:  get("POD_NAMESPACE", "default"),
		NodeName:      getenv("NODE_NAME"),
		ClusterID:     get("CLUSTER_ID", "Kubernetes"),
		TrustDomain:   get("TRUST_DOMAIN", mesh.DefaultTrustDomain),
		XDS:           controlPlane(xds, get("XDS_ROOT_CA", defaultRootCA), token, getenv("ALT_XDS_HOSTNAME")),
		CA:            controlPlane(get("CA_ADDRESS", xds), get("CA_ROOT_CA", defaultRootCA), token, getenv("ALT_CA_HOSTNAME")),
		HBONEAddr:     get("HBONE_ADDR", ":15008"),
		StatsAddr:     get("STATS_ADDR", ":15020"),
		ReadinessAddr: get("READINESS_ADDR", ":15021"),
		AdminAddr:     get("ADMIN_ADDR", "localhost:15000"),
		HBONEPort:     15008,
		LogLevel:      get("LOG_LEVEL", "info"),
	}
	if c.GatewayName == "" {
		errs = append(errs, errors.New("GATEWAY_NAME is not set: it names the Gateway that this waypoint serves"))
	}
	c.ServiceAccount = get("SERVICE_ACCOUNT", c.GatewayName)
	if ip := getenv("INSTANCE_IP"); ip != "" {
		addr, err := netip.ParseAddr(ip)
		if err != nil {
			errs = append(errs, fmt.Errorf("INSTANCE_IP: %w", err))
		}
		c.InstanceIP = addr
	}
	grace, err := duration(get("TERMINATION_GRACE_PERIOD", "5s"))
	if err != nil {
		errs = append(errs, fmt.Errorf("TERMINATION_GRACE_PERIOD: %w", err))
	}
	c.TerminationGrace = grace
	return c, errors.Join(errs...)
}

// controlPlane reads an address with or without its scheme; https is meant where there is none.
func controlPlane(address, root, token, serverName string) identity.ControlPlane {
	if !strings.Contains(address, "://") {
		address = "https://" + address
	}
	return identity.ControlPlane{Address: address, RootFile: root, TokenFile: token, ServerName: serverName}
}

// duration reads "10s" or a number of seconds.
func duration(text string) (time.Duration, error) {
	if seconds, err := strconv.ParseUint(text, 10, 32); err == nil {
		return time.Duration(seconds) * time.Second, nil
	}
	return time.ParseDuration(text)
}

// self is the identity that the waypoint proves.
func (c Config) self() mesh.Identity {
	return mesh.Identity{TrustDomain: c.TrustDomain, Namespace: c.PodNamespace, ServiceAccount: c.ServiceAccount}
}

// node is how the waypoint names itself to the control plane.
func (c Config) node() *core.Node {
	ip := ""
	if c.InstanceIP.IsValid() {
		ip = c.InstanceIP.String()
	}
	text := structpb.NewStringValue
	return &core.Node{
		Id: fmt.Sprintf("waypoint~%s~%s.%s~%s.svc.cluster.local", ip, c.PodName, c.PodNamespace, c.PodNamespace),
		Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{
			"NAME": text(c.PodName), "NAMESPACE": text(c.PodNamespace), "INSTANCE_IPS": text(ip), "NODE_NAME": text(c.NodeName),
			"CLUSTER_ID": text(c.ClusterID), "SERVICE_ACCOUNT": text(c.ServiceAccount), "GATEWAY_NAME": text(c.GatewayName),
			"LABELS": structpb.NewStructValue(&structpb.Struct{Fields: map[string]*structpb.Value{
				"gateway.networking.k8s.io/gateway-name": text(c.GatewayName)}}),
		}},
	}
}
