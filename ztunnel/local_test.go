package ztunnel

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/zap"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/state"
)

const localYAML = `
workloads:
- uid: cluster1//v1/Pod/default/local
  name: local
  namespace: default
  serviceAccount: web
  workloadIps: ["127.0.0.1"]
  protocol: HBONE
  node: n
  network: ""
  authorizationPolicies: ["default/only-web"]
  services:
    default/example.com:
      80: 8080
policies:
- name: only-web
  namespace: default
  scope: WorkloadSelector
  action: Allow
  dryRun: false
  rules:
  - - - principals: [!Suffix "/sa/web", {Exact: cluster.local/ns/a/sa/b}]
        notDestinationPorts: [9999]
services:
- name: local
  namespace: default
  hostname: example.com
  vips: [/127.10.0.1]
  ports: {80: 8080}
  canonical: true
  waypoint: {destination: default/waypoint.example, hboneMtlsPort: 15008}
`

func TestParseLocal(t *testing.T) {
	got, err := parseLocal([]byte(localYAML), "c")
	if err != nil {
		t.Fatal(err)
	}
	key := mesh.NamespacedHostname{Namespace: "default", Hostname: "example.com"}
	want := state.Change{
		Workloads: []*mesh.Workload{{
			UID: "c//Pod/default/local", Name: "local", Namespace: "default", ServiceAccount: "web", ClusterID: "c", Node: "n",
			Addresses: []netip.Addr{netip.MustParseAddr("127.0.0.1")}, Protocol: mesh.ProtocolHBONE, WorkloadType: "pod",
			Services: map[mesh.NamespacedHostname][]mesh.Port{key: {{ServicePort: 80, TargetPort: 8080}}},
			Policies: []string{"default/only-web"}, Healthy: true, Capacity: 1,
		}},
		Services: []*mesh.Service{{
			Name: "local", Namespace: "default", Hostname: "example.com", Canonical: true,
			Addresses: []mesh.NetworkAddress{{Address: netip.MustParseAddr("127.10.0.1")}},
			Ports:     []mesh.Port{{ServicePort: 80, TargetPort: 8080}},
			Waypoint: &mesh.GatewayAddress{
				Hostname: mesh.NamespacedHostname{Namespace: "default", Hostname: "waypoint.example"}, HBONEPort: 15008,
			},
		}},
		Policies: []*mesh.Authorization{{
			Name: "only-web", Namespace: "default", Scope: mesh.ScopeSelector,
			Rules: []mesh.Rule{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{
				Principals: []mesh.StringMatch{
					{Kind: mesh.MatchSuffix, Value: "/sa/web"}, {Kind: mesh.MatchExact, Value: "cluster.local/ns/a/sa/b"},
				},
				NotDestinationPorts: []uint16{9999},
			}}}}}},
		}},
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestParseLocalRefuses(t *testing.T) {
	for name, text := range map[string]string{
		"nothing":              "",
		"an unknown field":     "workloads: [{name: a, namespace: b, surprise: 1}]",
		"an unknown action":    "policies: [{name: a, namespace: b, scope: Global, action: Audit}]",
		"a policy of no scope": "policies: [{name: a, namespace: b, action: Deny}]",
		"an unknown match":     "policies: [{name: a, namespace: b, scope: Global, action: Deny, rules: [[[{namespaces: [!Regex x]}]]]}]",
		"a match of no kind":   "policies: [{name: a, namespace: b, scope: Global, action: Deny, rules: [[[{namespaces: [x]}]]]}]",
		"a bad address":        "services: [{name: a, namespace: b, hostname: c, vips: [10.0.0.1]}]",
		"a bad service name":   "workloads: [{name: a, namespace: b, services: {c: {80: 80}}}]",
	} {
		if _, err := parseLocal([]byte(text), "c"); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
}

func TestLocalConfigurationFollowsItsFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "local.yaml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(localYAML)
	store := state.New()
	local := newLocalConfiguration(Config{LocalXDSPath: path, ClusterID: "c"}, store, zap.NewNop())
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- local.Run(ctx) }()
	<-local.Synced()
	if store.Load().Workload("c//Pod/default/local") == nil {
		t.Fatal("the file's workload is not known")
	}
	changed := store.Changed()
	write("workloads: [{broken")
	write("workloads: [{name: other, namespace: default, protocol: TCP}]")
	select {
	case <-changed:
	case <-time.After(10 * time.Second):
		t.Fatal("the change was not seen")
	}
	snap := store.Load()
	if snap.Workload("c//Pod/default/local") != nil || snap.Workload("c//Pod/default/other") == nil {
		t.Error("the store does not hold what the file says now")
	}
	if w, s, p := snap.Sizes(); w != 1 || s != 0 || p != 0 {
		t.Errorf("%d workloads, %d services, %d policies left; want 1, 0, 0", w, s, p)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
