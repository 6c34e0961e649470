package istiod

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"github.com/fairlead-mesh/fairlead/api/security"
	"github.com/fairlead-mesh/fairlead/api/workload"
	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/testenv"
	"github.com/fairlead-mesh/fairlead/internal/wire"
	"github.com/fairlead-mesh/fairlead/internal/xds"
)

// These tests run the whole control plane on a directory, and meet it as proxies do: over xDS and the CA, in TLS.

const twoNodes = `
apiVersion: v1
kind: Namespace
metadata: {name: default, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Node
metadata: {name: one, labels: {topology.kubernetes.io/zone: z1}}
---
apiVersion: v1
kind: Node
metadata: {name: two}
---
apiVersion: v1
kind: Pod
metadata: {name: ztunnel-one, namespace: istio-system}
spec: {nodeName: one, serviceAccountName: ztunnel, hostNetwork: true}
status: {phase: Running, podIP: 192.0.2.1}
---
apiVersion: v1
kind: Pod
metadata: {name: client, labels: {app: client}}
spec: {nodeName: one, serviceAccountName: client}
status: {phase: Running, podIP: 10.0.1.1, podIPs: [{ip: 10.0.1.1}, {ip: "fd00::1:1"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: server, labels: {app: server}}
spec: {nodeName: two, serviceAccountName: server}
status: {phase: Running, podIP: 10.0.2.1, podIPs: [{ip: 10.0.2.1}]}
---
apiVersion: v1
kind: Service
metadata: {name: server}
spec: {clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1], ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: server-1, labels: {kubernetes.io/service-name: server}}
addressType: IPv4
ports: [{name: http, port: 8080, protocol: TCP}]
endpoints: [{addresses: [10.0.2.1], targetRef: {kind: Pod, namespace: default, name: server}}]
`

// world is a control plane on a directory.
type world struct {
	t   *testing.T
	dir string
	cfg Config
}

func start(t *testing.T, files map[string]string) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir()}
	for name, text := range files {
		w.write(name, text)
	}
	tokens := filepath.Join(t.TempDir(), "tokens")
	if err := os.WriteFile(tokens, []byte("zt,istio-system/ztunnel,ztunnel-one\nwp,default/waypoint,waypoint-1\nmallory,default/client,client\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	w.cfg = Config{
		ConfigDir: w.dir, Namespace: "istio-system", TrustDomain: "cluster.local", ClusterID: "Kubernetes",
		GRPCAddr: testenv.FreeAddr(t), TLSAddr: testenv.FreeAddr(t), MonitoringAddr: testenv.FreeAddr(t), CADir: t.TempDir(), TokenFile: tokens,
		Log: zaptest.NewLogger(t, zaptest.Level(zap.WarnLevel)),
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, w.cfg) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("control plane: %v", err)
		}
	})
	w.wait("ready", func() bool {
		_, err := os.Stat(filepath.Join(w.cfg.CADir, "root-cert.pem"))
		return err == nil && get(w.cfg.MonitoringAddr, "/ready") == 200
	})
	return w
}

func (w *world) write(name, text string) {
	w.t.Helper()
	if err := os.WriteFile(filepath.Join(w.dir, name), []byte(text), 0o644); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) wait(what string, ok func() bool) {
	w.t.Helper()
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		if ok() {
			return
		}
	}
	w.t.Fatalf("%s: not within 5 s", what)
}

// plane is how the bearer of a token reaches the control plane.
func (w *world) plane(token string) identity.ControlPlane {
	w.t.Helper()
	file := filepath.Join(w.t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		w.t.Fatal(err)
	}
	return identity.ControlPlane{
		Address: "https://" + w.cfg.TLSAddr, RootFile: filepath.Join(w.cfg.CADir, "root-cert.pem"), TokenFile: file,
		ServerName: "istiod.istio-system.svc",
	}
}

// proxy is an xDS client that keeps what it was sent.
type proxy struct {
	mu        sync.Mutex
	workloads map[string]*mesh.Workload
	services  map[string]*mesh.Service
	policies  map[string]*mesh.Authorization
	pushes    int
	config    map[string][]string
}

func (w *world) ztunnel() *proxy {
	w.t.Helper()
	p := &proxy{workloads: map[string]*mesh.Workload{}, services: map[string]*mesh.Service{}, policies: map[string]*mesh.Authorization{}}
	client := w.client("zt", "ztunnel~192.0.2.1~ztunnel-one.istio-system~istio-system.svc.cluster.local")
	client.Subscribe(wire.AddressType, xds.HandlerFunc(p.addresses))
	client.Subscribe(wire.AuthorizationType, xds.HandlerFunc(p.authorizations))
	w.run(client)
	return p
}

func (w *world) client(token, node string) *xds.Client {
	return xds.NewClient(xds.ClientConfig{Dial: w.plane(token).Dial, Node: &core.Node{Id: node}, Log: zap.NewNop()})
}

func (w *world) run(client *xds.Client) {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = client.Run(ctx) }()
	w.t.Cleanup(func() { cancel(); <-done })
	select {
	case <-client.Synced():
	case <-time.After(5 * time.Second):
		w.t.Fatal("xDS client is not synced within 5 s")
	}
}

func (p *proxy) addresses(updated []xds.Resource, removed []string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pushes++
	for _, r := range updated {
		var a workload.Address
		if err := r.Body.UnmarshalTo(&a); err != nil {
			return err
		}
		wl, svc, err := wire.DecodeAddress(&a)
		if err != nil {
			return err
		}
		if wl != nil {
			p.workloads[r.Name] = wl
		} else {
			p.services[r.Name] = svc
		}
	}
	for _, name := range removed {
		delete(p.workloads, name)
		delete(p.services, name)
	}
	return nil
}

func (p *proxy) authorizations(updated []xds.Resource, removed []string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pushes++
	for _, r := range updated {
		var a security.Authorization
		if err := r.Body.UnmarshalTo(&a); err != nil {
			return err
		}
		policy, err := wire.DecodeAuthorization(&a)
		if err != nil {
			return err
		}
		p.policies[r.Name] = policy
	}
	for _, name := range removed {
		delete(p.policies, name)
	}
	return nil
}

func (p *proxy) workload(uid string) *mesh.Workload {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.workloads[uid]
}

func (p *proxy) policy(key string) *mesh.Authorization {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.policies[key]
}

func (p *proxy) names() (workloads, services, policies []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Sorted(maps.Keys(p.workloads)), slices.Sorted(maps.Keys(p.services)), slices.Sorted(maps.Keys(p.policies))
}

func TestNodeProxyIsGivenTheMesh(t *testing.T) {
	w := start(t, map[string]string{"mesh.yaml": twoNodes})
	zt := w.ztunnel()
	workloads, services, policies := zt.names()
	if diff := cmp.Diff([]string{"Kubernetes//Pod/default/client", "Kubernetes//Pod/default/server", "Kubernetes//Pod/istio-system/ztunnel-one"}, workloads); diff != "" {
		t.Errorf("workloads (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"default/server.default.svc.cluster.local"}, services); diff != "" {
		t.Errorf("services (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"istio-system/istio_converted_static_strict"}, policies); diff != "" {
		t.Errorf("policies (-want +got):\n%s", diff)
	}
	server := zt.workload("Kubernetes//Pod/default/server")
	if server.Protocol != mesh.ProtocolHBONE || !server.Healthy || server.Node != "two" || server.ServiceAccount != "server" {
		t.Errorf("server: %+v", server)
	}
	key := mesh.NamespacedHostname{Namespace: "default", Hostname: "server.default.svc.cluster.local"}
	if diff := cmp.Diff([]mesh.Port{{ServicePort: 80, TargetPort: 8080}}, server.Services[key]); diff != "" {
		t.Errorf("ports of the server (-want +got):\n%s", diff)
	}

	// The label taken away takes the pods out; what did not change is not pushed again.
	zt.mu.Lock()
	before := zt.pushes
	zt.mu.Unlock()
	w.write("mesh.yaml", strings.Replace(twoNodes, "istio.io/dataplane-mode: ambient", "a: b", 1))
	w.wait("client leaves the mesh", func() bool {
		return zt.workload("Kubernetes//Pod/default/client").Protocol == mesh.ProtocolNone &&
			zt.workload("Kubernetes//Pod/default/server").Protocol == mesh.ProtocolNone
	})
	w.write("mesh.yaml", strings.Replace(twoNodes, "istio.io/dataplane-mode: ambient", "a: c", 1))
	time.Sleep(200 * time.Millisecond)
	zt.mu.Lock()
	defer zt.mu.Unlock()
	if zt.pushes != before+1 {
		t.Errorf("%d pushes for one change of outputs", zt.pushes-before)
	}
}

const denyClient = `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny-client}
spec:
  selector: {matchLabels: {app: server}}
  action: DENY
  rules: [{from: [{source: {principals: [cluster.local/ns/default/sa/client]}}]}]
`

func TestPolicyReachesNodeProxies(t *testing.T) {
	w := start(t, map[string]string{"mesh.yaml": twoNodes})
	zt := w.ztunnel()
	began := time.Now()
	w.write("policy.yaml", denyClient)
	w.wait("policy in force", func() bool {
		server := zt.workload("Kubernetes//Pod/default/server")
		return zt.policy("default/deny-client") != nil && slices.Equal(server.Policies, []string{"default/deny-client"})
	})
	took := time.Since(began)
	t.Logf("policy in force after %s", took)
	if took > 500*time.Millisecond {
		t.Errorf("policy in force after %s, want well within a second", took)
	}
	if client := zt.workload("Kubernetes//Pod/default/client"); len(client.Policies) != 0 {
		t.Errorf("the policy selects the server, and the client lists %v", client.Policies)
	}
	w.status("authorizationpolicy.default.deny-client.yaml", "reason: Accepted")

	// An invalid edit changes nothing that is in force, and the status says what is wrong.
	w.write("policy.yaml", strings.Replace(denyClient, "principals: [cluster.local/ns/default/sa/client]", "ipBlocks: [10.0.0.300]", 1))
	w.status("authorizationpolicy.default.deny-client.yaml", "rules[0].from[0].source.ipBlocks[0]")
	if p := zt.policy("default/deny-client"); p == nil || p.Rules[0].Clauses[0].Matches[0].Principals == nil {
		t.Errorf("what was in force is not any more: %+v", p)
	}

	if err := os.Remove(filepath.Join(w.dir, "policy.yaml")); err != nil {
		t.Fatal(err)
	}
	w.wait("policy gone", func() bool {
		return zt.policy("default/deny-client") == nil && len(zt.workload("Kubernetes//Pod/default/server").Policies) == 0
	})
	w.wait("status gone", func() bool {
		_, err := os.Stat(filepath.Join(w.dir, ".status", "authorizationpolicy.default.deny-client.yaml"))
		return os.IsNotExist(err)
	})
}

// status waits until a status file says something.
func (w *world) status(file, want string) {
	w.t.Helper()
	var text []byte
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		text, _ = os.ReadFile(filepath.Join(w.dir, ".status", file))
		if strings.Contains(string(text), want) {
			return
		}
	}
	w.t.Fatalf("status %s does not say %q:\n%s", file, want, text)
}

func TestStrictIsInherited(t *testing.T) {
	w := start(t, map[string]string{"mesh.yaml": twoNodes})
	zt := w.ztunnel()
	const static = "istio-system/istio_converted_static_strict"
	pa := func(name, namespace, spec string) string {
		return fmt.Sprintf("apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: %s, namespace: %s}\nspec: %s\n---\n", name, namespace, spec)
	}
	has := func(pod string, want ...string) func() bool {
		return func() bool { return slices.Equal(zt.workload("Kubernetes//Pod/default/"+pod).Policies, want) }
	}
	strict := pa("mesh", "istio-system", "{mtls: {mode: STRICT}}")
	w.write("pa.yaml", strict)
	w.wait("mesh-wide STRICT", has("server", static))
	w.write("pa.yaml", strict+pa("ns", "default", "{mtls: {mode: PERMISSIVE}}"))
	w.wait("namespace PERMISSIVE", has("server"))
	w.write("pa.yaml", strict+pa("ns", "default", "{mtls: {mode: PERMISSIVE}}")+
		pa("one", "default", "{selector: {matchLabels: {app: server}}, mtls: {mode: STRICT}, portLevelMtls: {9090: {mode: DISABLE}}}"))
	w.wait("workload STRICT but for a port", has("server", "default/converted_peer_authentication_one"))
	if !has("client")() {
		t.Errorf("client lists %v", zt.workload("Kubernetes//Pod/default/client").Policies)
	}
	want := []uint16{9090}
	if diff := cmp.Diff(want, zt.policy("default/converted_peer_authentication_one").Rules[0].Clauses[0].Matches[0].NotDestinationPorts); diff != "" {
		t.Error(diff)
	}
	w.write("pa.yaml", strict)
	w.wait("the policy of the port goes", func() bool {
		return zt.policy("default/converted_peer_authentication_one") == nil && has("server", static)()
	})
}

func TestCertificatesGoToTheRightNode(t *testing.T) {
	w := start(t, map[string]string{"mesh.yaml": twoNodes})
	id := func(sa string) mesh.Identity {
		return mesh.Identity{TrustDomain: "cluster.local", Namespace: "default", ServiceAccount: sa}
	}
	ask := func(token string, want mesh.Identity) error {
		c := identity.NewCA(identity.ClientConfig{Dial: w.plane(token).Dial, ClusterID: "Kubernetes"})
		defer c.Close()
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		bundle, err := c.Fetch(ctx, want)
		if err == nil && bundle.Identity != want {
			return fmt.Errorf("certificate is for %s", bundle.Identity)
		}
		return err
	}
	if err := ask("zt", id("client")); err != nil {
		t.Errorf("node proxy asks for a pod of its node: %v", err)
	}
	for name, err := range map[string]error{
		"a pod of another node":         ask("zt", id("server")),
		"no pod at all":                 ask("zt", id("nobody")),
		"a pod that asks for another":   ask("mallory", id("server")),
		"a token that nobody was given": ask("guess", id("client")),
	} {
		if err == nil {
			t.Errorf("%s: a certificate was given", name)
		}
	}
	if err := ask("mallory", id("client")); err != nil {
		t.Errorf("a pod asks for its own certificate: %v", err)
	}
}

func TestOnlyNodeProxiesSeeTheMesh(t *testing.T) {
	w := start(t, map[string]string{"mesh.yaml": twoNodes})
	client := w.client("mallory", "ztunnel~192.0.2.1~ztunnel-one.istio-system~istio-system.svc.cluster.local")
	client.Subscribe(wire.AddressType, xds.HandlerFunc(func(updated []xds.Resource, _ []string) error {
		t.Errorf("sent %d resources", len(updated))
		return nil
	}))
	ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer cancel()
	_ = client.Run(ctx)
	select {
	case <-client.Synced():
		t.Error("a pod that is no node proxy was answered")
	default:
	}
}
