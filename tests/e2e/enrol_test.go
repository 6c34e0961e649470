package e2e

import (
	"bytes"
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

func TestKubeletProbesPassUnderStrictDenyAll(t *testing.T) {
	w := newWorld(t, "probes", "alice")
	w.join(t)
	address := net.JoinHostPort(w.podIP(t, "server-v1"), "8080")
	if out, err := plainGET("node2", address); err != nil || !strings.Contains(out, "ok") {
		t.Fatalf("control: a host process is answered while nothing forbids it: %q %v", out, err)
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
	eventually(t, 5*time.Second, "a host process is refused", func() error {
		if out, err := plainGET("node2", address); err == nil && strings.Contains(out, "ok") {
			return fmt.Errorf("answered %q", out)
		}
		return nil
	})
	for start := time.Now(); time.Since(start) < 6*time.Second; time.Sleep(500 * time.Millisecond) {
		for _, p := range w.pods(t) {
			if s := p.Status.ContainerStatuses[0]; !s.Ready || s.RestartCount != 0 {
				t.Fatalf("pod %s: ready %v, %d restarts", p.Metadata.Name, s.Ready, s.RestartCount)
			}
		}
	}
}
