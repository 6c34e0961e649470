package e2e

import (
	"bytes"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// enforce runs an engine that enforces NetworkPolicy on the nodes, hack/cluster's netpol, until the test ends.
func enforce(t *testing.T, nodes ...string) {
	t.Helper()
	// The lab's Services have 65,536 addresses, the first of which is the API server's.
	services := kubectl(t, "get", "service", "kubernetes", "-o", "jsonpath={.spec.clusterIP}") + "/16"
	for _, node := range nodes {
		cmd := exec.Command(filepath.Join(testLab.top, "hack/cluster.sh"), "exec", node, "netpol", "-node", node, "-cluster-ips", services)
		var log bytes.Buffer
		cmd.Stdout, cmd.Stderr = &log, &log
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			stdin.Close() // for which it takes its rules away
			if err := cmd.Wait(); err != nil || t.Failed() {
				t.Logf("netpol on %s: %v\n%s", node, err, &log)
			}
		})
	}
}

// reaches waits until a client's new connections to a port of server-v1 come through, or are refused.
func (w *world) reaches(t *testing.T, client, port string, want bool) {
	t.Helper()
	address := net.JoinHostPort(w.podIP(t, "server-v1"), port)
	eventually(t, 20*time.Second, fmt.Sprintf("%s reaches port %s: %v", client, port, want), func() error {
		args := []string{"-n", w.namespace, "exec", client, "--", "box", "client", "http://" + address + "/", "-timeout", "2s"}
		if port != "8080" {
			args = []string{"-n", w.namespace, "exec", client, "--", "box", "tcp", address, "-timeout", "2s"}
		}
		out, err := command(time.Minute, nil, "kubectl", args...)
		if (err == nil) != want {
			return fmt.Errorf("%s %v", out, err)
		}
		return nil
	})
}

const onlyAlice = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: only-alice, namespace: %s}
spec:
  podSelector: {matchLabels: {app: server}}
  policyTypes: [Ingress]
  ingress:
  - from: [{podSelector: {matchLabels: {app: alice}}}]
    ports: [%s]
`

const aliceMay = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: alice-may, namespace: %s}
spec:
  podSelector: {matchLabels: {app: alice}}
  policyTypes: [Egress]
  egress:
  - to: [{podSelector: {matchLabels: {app: server}}}]
    ports: [{port: %d}]
`

// TestNetworkPolicyHolds: an engine that knows nothing of the mesh sees its tunnels (port 15008) with the addresses of the
// pods at both ends, so that who may reach whom stays as it was, and lets probes pass; docs/networkpolicy.md says what else
// is to be known, and what is here first is its control.
func TestNetworkPolicyHolds(t *testing.T) {
	w := newWorld(t, "netpol", "alice", "mallory")
	apply(t, strings.Replace(fmt.Sprintf(clientManifest, w.namespace, "near"), "nodeName: node1", "nodeName: node2", 1))
	kubectl(t, "-n", w.namespace, "wait", "--for=condition=Ready", "pod/near", "--timeout=90s")
	enforce(t, nodes...)
	w.reaches(t, "near", "8080", true)

	apply(t, fmt.Sprintf(onlyAlice, w.namespace, "{port: 8080}"))
	w.reaches(t, "mallory", "8080", false)
	w.reaches(t, "near", "8080", false)
	w.reaches(t, "alice", "9090", false)
	w.reaches(t, "alice", "8080", true)
	apply(t, fmt.Sprintf(aliceMay, w.namespace, 15008))
	w.reaches(t, "alice", "8080", false)

	w.join(t)
	w.reaches(t, "alice", "8080", false) // may leave, but not arrive
	apply(t, fmt.Sprintf(onlyAlice, w.namespace, "{port: 15008}"))
	w.reaches(t, "alice", "8080", true)
	w.reaches(t, "alice", "9090", true) // in the tunnel, where the engine does not look
	w.reaches(t, "mallory", "8080", false)

	// Pods of one node are joined without a packet, if the engine lets one through that asks.
	w.reaches(t, "near", "8080", false)
	apply(t, strings.Replace(fmt.Sprintf(onlyAlice, w.namespace, "{port: 15008}"), "{app: alice}", "{app: near}", 1))
	w.reaches(t, "near", "8080", true)
	w.staysReady(t)
}

// staysReady watches the world's pods for some periods of their probes.
func (w *world) staysReady(t *testing.T) {
	t.Helper()
	for start := time.Now(); time.Since(start) < 5*time.Second; time.Sleep(500 * time.Millisecond) {
		for _, p := range w.pods(t) {
			if s := p.Status.ContainerStatuses[0]; !s.Ready || s.RestartCount != 0 {
				t.Fatalf("pod %s: ready %v, %d restarts", p.Metadata.Name, s.Ready, s.RestartCount)
			}
		}
	}
}
