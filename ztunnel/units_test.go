package ztunnel

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/fairlead-mesh/fairlead/internal/authz"
	"github.com/fairlead-mesh/fairlead/internal/hbone"
	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/route"
	"github.com/fairlead-mesh/fairlead/internal/state"
	"github.com/fairlead-mesh/fairlead/internal/zds"
)

func TestConfigFromEnv(t *testing.T) {
	defaults := Config{
		NodeName: "n", PodName: "p", PodNamespace: "istio-system", ClusterID: "Kubernetes", TrustDomain: "cluster.local",
		ClusterDomain: "cluster.local", ResolvConf: "/etc/resolv.conf",
		XDS: identity.ControlPlane{Address: "https://istiod.istio-system.svc:15012", RootFile: "/var/run/secrets/istio/root-cert.pem",
			TokenFile: "/var/run/secrets/tokens/istio-token"},
		CA: identity.ControlPlane{Address: "https://istiod.istio-system.svc:15012", RootFile: "/var/run/secrets/istio/root-cert.pem",
			TokenFile: "/var/run/secrets/tokens/istio-token"},
		ZDSSocket: "/var/run/ztunnel/ztunnel.sock", HandoverSocket: "/var/run/ztunnel/handover.sock", BPFFS: "/sys/fs/bpf/fairlead",
		AdminAddr: "localhost:15000", StatsAddr: ":15020", ReadinessAddr: ":15021", TerminationGrace: 5 * time.Second, LogLevel: "info",
		Limits: Limits{Connections: 32768, Tunnels: 4096, PeerTunnels: 256, Streams: 1000, BufferedBytes: 256 << 20, HalfClosed: time.Hour},
	}
	for _, tc := range []struct {
		name   string
		env    map[string]string
		change func(*Config)
		err    string
	}{
		{"defaults", nil, func(*Config) {}, ""},
		{"the CA is where xDS is", map[string]string{"XDS_ADDRESS": "http://10.0.0.1:15010", "XDS_ROOT_CA": "/r", "ALT_XDS_HOSTNAME": "istiod"},
			func(c *Config) {
				c.XDS.Address, c.XDS.RootFile, c.XDS.ServerName = "http://10.0.0.1:15010", "/r", "istiod"
				c.CA = c.XDS
			}, ""},
		{"switches", map[string]string{"FAKE_CA": "true", "FAIRLEAD_FORCE_HBONE": "1", "FAIRLEAD_GOROUTINES": "false"},
			func(c *Config) { c.FakeCA, c.ForceHBONE = true, true }, ""},
		{"grace in seconds", map[string]string{"TERMINATION_GRACE_PERIOD": "30"}, func(c *Config) { c.TerminationGrace = 30 * time.Second }, ""},
		{"grace as a duration", map[string]string{"TERMINATION_GRACE_PERIOD": "1m30s"}, func(c *Config) { c.TerminationGrace = 90 * time.Second }, ""},
		{"grace of the pod", map[string]string{"TERMINATION_GRACE_PERIOD_SECONDS": "30"}, func(c *Config) { c.TerminationGrace = 25 * time.Second }, ""},
		{"short grace of the pod", map[string]string{"TERMINATION_GRACE_PERIOD_SECONDS": "3"}, func(c *Config) { c.TerminationGrace = 2 * time.Second }, ""},
		{"deadline", map[string]string{"TERMINATION_GRACE_PERIOD_SECONDS": "30", "CONNECTION_TERMINATION_DEADLINE": "7s"},
			func(c *Config) { c.TerminationGrace = 7 * time.Second }, ""},
		{"cluster by injection", map[string]string{"ISTIO_META_CLUSTER_ID": "east", "CLUSTER_ID": "west"}, func(c *Config) { c.ClusterID = "east" }, ""},
		{"addresses without a scheme", map[string]string{"XDS_ADDRESS": "istiod:15012", "CA_ADDRESS": "ca:443"},
			func(c *Config) { c.XDS.Address, c.CA.Address = "https://istiod:15012", "https://ca:443" }, ""},
		{"tunnels", map[string]string{"POOL_MAX_STREAMS_PER_CONNECTION": "7", "POOL_UNUSED_RELEASE_TIMEOUT": "1m", "SECRET_TTL": "1h", "ZTUNNEL_WORKER_THREADS": "3"},
			func(c *Config) { c.MaxStreams, c.TunnelIdle, c.SecretTTL, c.Workers = 7, time.Minute, time.Hour, 3 }, ""},
		{"few workers", map[string]string{"ZTUNNEL_WORKER_THREADS": "0%"}, func(c *Config) { c.Workers = 1 }, ""},
		{"dedicated", map[string]string{"PROXY_MODE": "dedicated", "PROXY_WORKLOAD_INFO": "ns/name/sa"},
			func(c *Config) {
				c.Dedicated = zds.Workload{UID: "dedicated", Namespace: "ns", Name: "name", ServiceAccount: "sa"}
			}, ""},
		{"dedicated to nothing", map[string]string{"PROXY_MODE": "dedicated"}, nil, "PROXY_WORKLOAD_INFO"},
		{"unknown mode", map[string]string{"PROXY_MODE": "both"}, nil, "PROXY_MODE"},
		{"revocation", map[string]string{"CRL_PATH": "/crl"}, nil, "CRL_PATH"},
		{"two sources", map[string]string{"LOCAL_XDS": "workloads: []", "LOCAL_XDS_PATH": "/f"}, nil, "LOCAL_XDS"},
		{"no workers", map[string]string{"ZTUNNEL_WORKER_THREADS": "0"}, nil, "ZTUNNEL_WORKER_THREADS"},
		{"hand-over", map[string]string{"FAIRLEAD_HANDOVER_SOCKET": "/h"}, func(c *Config) { c.HandoverSocket = "/h" }, ""},
		{"address", map[string]string{"INSTANCE_IP": "fd00::1"}, func(c *Config) { c.InstanceIP = netip.MustParseAddr("fd00::1") }, ""},
		{"limits", map[string]string{"FAIRLEAD_POD_MAX_CONNECTIONS": "1", "FAIRLEAD_POD_MAX_TUNNELS": "2", "FAIRLEAD_PEER_MAX_TUNNELS": "3",
			"FAIRLEAD_TUNNEL_MAX_STREAMS": "4", "FAIRLEAD_POD_MAX_BUFFERED_BYTES": "5", "FAIRLEAD_HALF_CLOSED_TIMEOUT": "0"},
			func(c *Config) {
				c.Limits = Limits{Connections: 1, Tunnels: 2, PeerTunnels: 3, Streams: 4, BufferedBytes: 5}
			}, ""},
		{"no connections", map[string]string{"FAIRLEAD_POD_MAX_CONNECTIONS": "0"}, nil, "FAIRLEAD_POD_MAX_CONNECTIONS"},
		{"bad number", map[string]string{"FAIRLEAD_POD_MAX_BUFFERED_BYTES": "1Gi"}, nil, "FAIRLEAD_POD_MAX_BUFFERED_BYTES"},
		{"negative time", map[string]string{"FAIRLEAD_HALF_CLOSED_TIMEOUT": "-1s"}, nil, "FAIRLEAD_HALF_CLOSED_TIMEOUT"},
		{"bad switch", map[string]string{"FAKE_CA": "perhaps"}, nil, "FAKE_CA"},
		{"bad grace", map[string]string{"TERMINATION_GRACE_PERIOD": "soon"}, nil, "TERMINATION_GRACE_PERIOD"},
		{"bad address", map[string]string{"INSTANCE_IP": "here"}, nil, "INSTANCE_IP"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := ConfigFromEnv(func(name string) string {
				if v, ok := tc.env[name]; ok {
					return v
				}
				return map[string]string{"NODE_NAME": "n", "POD_NAME": "p"}[name]
			})
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("error %v, want one about %s", err, tc.err)
				}
				return
			}
			want := defaults
			tc.change(&want)
			if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); err != nil || diff != "" {
				t.Errorf("config (-want +got), error %v:\n%s", err, diff)
			}
		})
	}
}

func TestClassify(t *testing.T) {
	given := fail(reasonIdentity, "no certificate")
	for _, tc := range []struct {
		name   string
		err    error
		flag   string
		status int
	}{
		{"denied by the peer", &hbone.StatusError{Code: 401, Reason: "denied by policy a/b"}, "DENY", 401},
		{"the peer could not connect", &hbone.StatusError{Code: 503}, "CONNECT", 503},
		{"handshake", &hbone.TLSError{Err: errors.New("bad certificate")}, "TLS_FAILURE", 503},
		{"no certificate of our own", &hbone.DialError{Err: given}, "IDENTITY_ERROR", 503},
		{"refused", &hbone.DialError{Err: syscall.ECONNREFUSED}, "CONNECT", 503},
		{"timeout", context.DeadlineExceeded, "CONNECT", 503},
		{"policy", denied(reasonDenied, authz.Verdict{Reason: authz.ReasonDenied, Policy: "a/b"}), "DENY", 401},
		{"no endpoint", refused(route.Decision{Why: route.NoEndpoint}), "NO_ROUTE", 503},
		{"not this pod's", refused(route.Decision{Why: route.NotThisWorkload}), "BAD_REQUEST", 400},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := classify(tc.err)
			if got.reason.flag() != tc.flag || reasons[got.reason].status != tc.status {
				t.Errorf("%s, status %d; want %s, %d", got.reason.flag(), reasons[got.reason].status, tc.flag, tc.status)
			}
		})
	}
}

func TestRequestHeader(t *testing.T) {
	w := &mesh.Workload{ClusterID: "c1", Namespace: "shop", WorkloadType: "deployment", WorkloadName: "web", CanonicalName: "web",
		CanonicalRevision: "v 1", Locality: mesh.Locality{Region: "r", Zone: "z"}}
	got := map[string]string{}
	for _, f := range requestHeader(netip.MustParseAddrPort("[fd00::1]:7"), w, &mesh.Service{Hostname: "web.shop.svc.cluster.local"}) {
		got[f.Name] = f.Value
	}
	parent := got["traceparent"]
	delete(got, "traceparent")
	want := map[string]string{
		"baggage": "k8s.cluster.name=c1,k8s.namespace.name=shop,k8s.deployment.name=web,service.name=web,service.version=v%201," +
			"cloud.region=r,cloud.availability_zone=z",
		"forwarded": `for="[fd00::1]:7";host=web.shop.svc.cluster.local`,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("header (-want +got):\n%s", diff)
	}
	if parts := strings.Split(parent, "-"); len(parts) != 4 || len(parts[1]) != 32 || len(parts[2]) != 16 || parts[0] != "00" {
		t.Errorf("traceparent %q", parent)
	}
	if host := forwardedHost(got["forwarded"]); host != "web.shop.svc.cluster.local" {
		t.Errorf("forwardedHost reads %q of what requestHeader wrote", host)
	}
	for header, want := range map[string]string{"": "", "for=1.2.3.4": "", `for=a; Host="b"`: "b", "host=a, host=b": "a"} {
		if got := forwardedHost(header); got != want {
			t.Errorf("forwardedHost(%q) = %q, want %q", header, got, want)
		}
	}
}

// TestDumpShape holds the dump to the keys that istioctl and Kiali read.
func TestDumpShape(t *testing.T) {
	store := state.New()
	key := mesh.NamespacedHostname{Namespace: "shop", Hostname: "web.shop.svc.cluster.local"}
	store.Apply(state.Change{
		Workloads: []*mesh.Workload{{
			UID: "Kubernetes//Pod/shop/web", Name: "web", Namespace: "shop", ServiceAccount: "web", ClusterID: "Kubernetes", Node: "n1",
			Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, Protocol: mesh.ProtocolHBONE, Healthy: true,
			WorkloadName: "web", WorkloadType: "deployment", CanonicalName: "web", CanonicalRevision: "v1",
			Waypoint: &mesh.GatewayAddress{Hostname: mesh.NamespacedHostname{Namespace: "shop", Hostname: "wp"}, HBONEPort: 15008},
			Services: map[mesh.NamespacedHostname][]mesh.Port{key: {{ServicePort: 80, TargetPort: 8080}}}, Policies: []string{"shop/p"},
		}},
		Services: []*mesh.Service{{
			Name: "web", Namespace: "shop", Hostname: key.Hostname, Ports: []mesh.Port{{ServicePort: 80, TargetPort: 8080}},
			Addresses: []mesh.NetworkAddress{{Network: "net", Address: netip.MustParseAddr("10.1.0.1")}},
		}},
		Policies: []*mesh.Authorization{{
			Name: "p", Namespace: "shop", Scope: mesh.ScopeSelector, Action: mesh.ActionDeny,
			Rules: []mesh.Rule{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{
				Principals: []mesh.StringMatch{{Value: "td/ns/a/sa/b"}}, SourceIPs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")},
				DestinationPorts: []uint16{80},
			}}}}}},
		}},
	})
	snap := store.Load()
	got := map[string]any{}
	for name, v := range map[string]any{
		"workload": describeWorkload(snap.AllWorkloads()[0]), "service": describeService(snap, snap.AllServices()[0]),
		"policy": describePolicy(snap.AllPolicies()[0]),
	} {
		text, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		var plain any
		if err := json.Unmarshal(text, &plain); err != nil {
			t.Fatal(err)
		}
		got[name] = plain
	}
	var want any
	err := json.Unmarshal([]byte(`{
	"workload": {"uid": "Kubernetes//Pod/shop/web", "workloadIps": ["10.0.0.1"], "waypoint": {"destination": "shop/wp", "hboneMtlsPort": 15008},
		"protocol": "HBONE", "name": "web", "namespace": "shop", "serviceAccount": "web", "workloadName": "web", "workloadType": "deployment",
		"canonicalName": "web", "canonicalRevision": "v1", "clusterId": "Kubernetes", "locality": {}, "node": "n1", "status": "Healthy",
		"capacity": 1, "authorizationPolicies": ["shop/p"]},
	"service": {"name": "web", "namespace": "shop", "hostname": "web.shop.svc.cluster.local", "vips": ["net/10.1.0.1"], "ports": {"80": 8080},
		"endpoints": {"Kubernetes//Pod/shop/web": {"workloadUid": "Kubernetes//Pod/shop/web", "service": "shop/web.shop.svc.cluster.local",
			"port": {"80": 8080}, "status": "Healthy"}}, "ipFamilies": "IPv4"},
	"policy": {"name": "p", "namespace": "shop", "scope": "WorkloadSelector", "action": "Deny", "rules": [[[
		{"principals": [{"Exact": "td/ns/a/sa/b"}], "sourceIps": ["10.0.0.0/8"], "destinationPorts": [80]}]]]}
	}`), &want)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, any(got)); diff != "" {
		t.Errorf("dump (-want +got):\n%s", diff)
	}
}

// TestReasonsAreDocumented: docs/observability.md has a row for each flag, with its status, and each metric's name.
func TestReasonsAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../docs/observability.md")
	if err != nil {
		t.Fatal(err)
	}
	own, _, _ := strings.Cut(string(text), "## Access log of a waypoint")
	for r := range reasons {
		if row := fmt.Sprintf("| `%s` | %d |", reasons[r].flag, reasons[r].status); !strings.Contains(own, row) {
			t.Errorf("no row %q", row)
		}
	}
	for _, c := range counters {
		if !strings.Contains(string(text), "`"+c.Name+"`") {
			t.Errorf("no row for metric %s", c.Name)
		}
	}
	for _, l := range []hbone.Limit{limitConnections, limitDNSConnections, hbone.LimitTunnels, hbone.LimitPeerTunnels, hbone.LimitStreams, hbone.LimitBufferedBytes} {
		if !strings.Contains(string(text), "`"+string(l)+"`") {
			t.Errorf("no word about limit %s", l)
		}
	}
}

func TestMemoryIsGivenBackAfterABurst(t *testing.T) {
	for name, c := range map[string]struct {
		moves, all, live int
		want             bool
	}{
		"after the start":          {0, leastMoves, 0, true},
		"nothing happened since":   {0, 0, 1000, false},
		"few came since":           {0, leastMoves - 1, 0, false},
		"a burst goes on":          {quietMoves, 5000, 5000, false},
		"a burst is over":          {quietMoves - 1, 5000, 5000, true},
		"few against what is open": {0, 5000, 20004, false},
		"many of what is open":     {0, 5000, 20000, true},
	} {
		if got := overdue(c.moves, c.all, c.live); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}
