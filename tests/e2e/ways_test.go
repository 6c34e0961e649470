package e2e

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"
)

// TestHostPortIsUnderPolicy: what the plugin portmap leads to a pod from a port of its node arrives at the pod's proxy.
func TestHostPortIsUnderPolicy(t *testing.T) {
	w := newWorld(t, "hostport", "alice")
	front := strings.NewReplacer("server-v1", "front", "{app: server, version: v1}", "{app: front}",
		"args: [server]", "args: [server]\n    ports: [{containerPort: 8080, hostPort: 18080}]").Replace(fmt.Sprintf(serverManifest, w.namespace, "v1"))
	apply(t, front)
	kubectl(t, "-n", w.namespace, "wait", "--for=condition=Ready", "pod", "front", "--timeout=90s")
	w.join(t)
	address := net.JoinHostPort(kubectl(t, "get", "node", "node2", "-o", `jsonpath={.status.addresses[?(@.type=="InternalIP")].address}`), "18080")
	eventually(t, 5*time.Second, "control: the port is answered while nothing forbids it", func() error {
		if out, err := plainGET("node1", address); err != nil || !strings.Contains(out, "ok") {
			return fmt.Errorf("%q %v", out, err)
		}
		return nil
	})
	apply(t, fmt.Sprintf(`
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: %s}
spec: {mtls: {mode: STRICT}}
`, w.namespace))
	eventually(t, 5*time.Second, "the port is refused under STRICT", func() error {
		if out, err := plainGET("node1", address); err == nil && strings.Contains(out, "ok") {
			return fmt.Errorf("answered %q", out)
		}
		return nil
	})
	allOK(t, "alice under STRICT", w.client(t, "alice", "http://"+w.podIP(t, "front")+":8080/"))
}
