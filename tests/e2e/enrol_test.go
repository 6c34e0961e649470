package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"
)

// observe sends marked requests from client to the server's Service and returns the answers, how often the mark was
// readable between the nodes, and how many packets of HBONE there were.
func (w *world) observe(t *testing.T, client string) (got []answer, readable, hbone int) {
	t.Helper()
	mark := fmt.Sprintf("readable-%d", time.Now().UnixNano())
	c := startCapture(t, "node2")
	got = w.client(t, client, "http://server/", "-n", "5", "-timeout", "3s", "-method", "POST", "-d", mark, "-H", "X-Mark: "+mark)
	hbone = c.packets(t, "tcp port 15008")
	return got, bytes.Count(c.stop(t), []byte(mark)), hbone
}

// packets counts what of the recording so far matches a capture filter.
func (c *capture) packets(t *testing.T, filter string) int {
	t.Helper()
	time.Sleep(300 * time.Millisecond)
	out, err := testLab.exec(c.node, "sh", "-c", "tcpdump -n -r "+c.file+" '"+filter+"' 2>/dev/null || true")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(out, "\n")
}

func host(t *testing.T, address string) string {
	t.Helper()
	h, _, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatalf("address %q: %v", address, err)
	}
	return h
}

func allOK(t *testing.T, when string, got []answer) {
	t.Helper()
	for _, a := range got {
		if !a.ok() {
			t.Errorf("%s: request %d: %v", when, a.N, a)
		}
	}
}

// life is what a restart of any container would change.
func (w *world) life(t *testing.T) map[string]string {
	t.Helper()
	life := map[string]string{}
	for _, p := range w.pods(t) {
		life[p.Metadata.Name] = p.Metadata.UID + " " + p.Status.ContainerStatuses[0].ContainerID
	}
	return life
}

func TestLabelPutsPodsOnMutualTLS(t *testing.T) {
	w := newWorld(t, "enrol", "alice")
	before := w.life(t)

	got, readable, hbone := w.observe(t, "alice")
	allOK(t, "before the label", got)
	if readable == 0 || hbone != 0 {
		t.Fatalf("control: before the label the payload was readable %d times, %d HBONE packets", readable, hbone)
	}

	w.join(t)
	got, readable, hbone = w.observe(t, "alice")
	allOK(t, "in the mesh", got)
	if readable != 0 || hbone == 0 {
		t.Errorf("in the mesh the payload was readable %d times, %d HBONE packets", readable, hbone)
	}
	alice := w.podIP(t, "alice")
	for _, a := range got {
		if a.ok() && host(t, a.Reply.Remote) != alice {
			t.Errorf("the server saw %s, the client is %s", a.Reply.Remote, alice)
		}
	}
	direct := w.get(t, "alice", "http://"+net.JoinHostPort(w.podIP(t, "server-v1"), "8080")+"/")
	if !direct.ok() || direct.Reply.Pod != "server-v1" {
		t.Errorf("to the pod's own address: %v", direct)
	}

	w.leave(t)
	got, readable, hbone = w.observe(t, "alice")
	allOK(t, "after the label was removed", got)
	if readable == 0 || hbone != 0 {
		t.Errorf("after the label was removed the payload was readable %d times, %d HBONE packets", readable, hbone)
	}
	for name, was := range before {
		if is := w.life(t)[name]; is != was {
			t.Errorf("pod %s was restarted: %s, was %s", name, is, was)
		}
	}
}

func TestPodStartedInTheMeshIsCapturedFromItsFirstPacket(t *testing.T) {
	w := newWorld(t, "first-packet", "alice")
	w.join(t)
	c := startCapture(t, "node2")
	mark := fmt.Sprintf("first-%d", time.Now().UnixNano())
	apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: early, namespace: %s, labels: {app: early}}
spec:
  nodeName: node1
  restartPolicy: Never
  containers: [{name: box, image: docker.io/fairlead/testbox:dev, args: [client, "http://server/", -n, "50", -interval, 20ms, -timeout, 2s, -method, POST, -d, %q]}]
`, w.namespace, mark))
	eventually(t, 60*time.Second, "pod early ends", func() error {
		phase := kubectl(t, "-n", w.namespace, "get", "pod", "early", "-o", "jsonpath={.status.phase}")
		if phase != "Succeeded" && phase != "Failed" {
			return fmt.Errorf("phase %s", phase)
		}
		return nil
	})
	got := parse(t, kubectl(t, "-n", w.namespace, "logs", "early"))
	hbone := c.packets(t, "tcp port 15008")
	if n := bytes.Count(c.stop(t), []byte(mark)); n != 0 || hbone == 0 {
		t.Errorf("readable %d times, %d HBONE packets", n, hbone)
	}
	allOK(t, "from its start", got)
	if len(got) != 50 {
		t.Errorf("%d answers, want 50", len(got))
	}
}

// plainGET speaks HTTP from a node's own network, as a process of the host that is not the kubelet.
func plainGET(node, address string) (string, error) {
	h, port, _ := net.SplitHostPort(address)
	user := "0"
	if redirection() == "nftables" {
		user = "1000" // root is taken for the kubelet
	}
	return testLab.exec(node, "setpriv", "--reuid", user, "--clear-groups", "bash", "-c", fmt.Sprintf(
		`exec 3<>/dev/tcp/%s/%s && printf 'GET /healthz HTTP/1.0\r\n\r\n' >&3 && timeout 3 cat <&3`, h, port))
}

// grpcManifest is a pod that the kubelet asks by gRPC.
const grpcManifest = `
apiVersion: v1
kind: Pod
metadata: {name: by-grpc, namespace: %[1]s, labels: {app: by-grpc}}
spec:
  nodeName: node2
  terminationGracePeriodSeconds: 1
  containers:
  - name: box
    image: docker.io/fairlead/testbox:dev
    args: [server]
    readinessProbe: {grpc: {port: 8080}, periodSeconds: 1, failureThreshold: 1, timeoutSeconds: 1}
    livenessProbe: {grpc: {port: 8080}, periodSeconds: 1, failureThreshold: 2, timeoutSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: front, namespace: %[1]s}
spec:
  type: NodePort
  selector: {app: server}
  ports: [{port: 80, targetPort: 8080}]
---
`

// probeSource is where the last probe of a pod came from, as its application saw it.
func (w *world) probeSource(t *testing.T, pod string) string {
	t.Helper()
	var last struct{ Probe, UserAgent string }
	for line := range strings.Lines(kubectl(t, "-n", w.namespace, "logs", pod, "--tail=20")) {
		var said struct{ Probe, UserAgent string }
		if json.Unmarshal([]byte(line), &said) == nil && strings.HasPrefix(said.UserAgent, "kube-probe/") {
			last = said
		}
	}
	if last.Probe == "" {
		return "no probe"
	}
	return host(t, last.Probe)
}

// TestKubeletProbesPassUnderStrictDenyAll: probes by HTTP, TCP and gRPC go on where nobody else may, come from the address
// that is set aside for them, and neither other processes of the host nor who comes by a NodePort pass for the kubelet.
func TestKubeletProbesPassUnderStrictDenyAll(t *testing.T) {
	const probes = "169.254.7.127"
	w := newWorld(t, "probes", "alice")
	apply(t, fmt.Sprintf(grpcManifest, w.namespace))
	kubectl(t, "-n", w.namespace, "wait", "--for=condition=Ready", "pod/by-grpc", "--timeout=90s")
	for _, pod := range []string{"server-v1", "by-grpc"} {
		if from := w.probeSource(t, pod); from == probes || net.ParseIP(from) == nil {
			t.Fatalf("control: outside the mesh the probes of %s came from %s", pod, from)
		}
	}
	w.join(t)
	for _, pod := range []string{"server-v1", "by-grpc"} {
		eventually(t, 10*time.Second, "probes of "+pod+" come from their own address", func() error {
			if from := w.probeSource(t, pod); from != probes {
				return fmt.Errorf("from %s", from)
			}
			return nil
		})
	}
	nodePort := kubectl(t, "-n", w.namespace, "get", "service", "front", "-o", "jsonpath={.spec.ports[0].nodePort}")
	node2 := kubectl(t, "get", "node", "node2", "-o", `jsonpath={.status.addresses[?(@.type=="InternalIP")].address}`)
	others := map[string]struct{ node, address string }{
		"a process of the host":  {"node2", net.JoinHostPort(w.podIP(t, "server-v1"), "8080")},
		"somebody by a NodePort": {"node1", net.JoinHostPort(node2, nodePort)},
	}
	for who, o := range others {
		eventually(t, 10*time.Second, "control: "+who+" is answered while nothing forbids it", func() error {
			if out, err := plainGET(o.node, o.address); err != nil || !strings.Contains(out, "ok") {
				return fmt.Errorf("%q %v", out, err)
			}
			return nil
		})
	}
	apply(t, fmt.Sprintf(`
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: %[1]s}
spec: {mtls: {mode: STRICT}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny-all, namespace: %[1]s}
spec: {}
`, w.namespace))
	for who, o := range others {
		eventually(t, 5*time.Second, who+" is refused", func() error {
			if out, err := plainGET(o.node, o.address); err == nil && strings.Contains(out, "ok") {
				return fmt.Errorf("answered %q", out)
			}
			return nil
		})
	}
	w.staysReady(t)
}
