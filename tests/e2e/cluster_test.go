// Package e2e tests Fairlead on a real Kubernetes: the cluster of hack/cluster.sh, two nodes, our chart by Helm. The tests
// run in the order of their files' names: nothing here runs at the same time as anything else, because a policy in the root
// namespace, a killed proxy or an uninstall touches everybody. Each statement about the mesh has a control without it.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// lab is the cluster under test; hack/test.sh brings it up, names it in CLUSTER and exports KUBECONFIG.
type lab struct {
	top    string
	before map[string]string
}

var testLab *lab

func TestMain(m *testing.M) {
	if os.Getenv("FAIRLEAD_E2E") != "1" {
		fmt.Println("e2e: FAIRLEAD_E2E is not 1; `make test-e2e` brings a cluster up and runs these tests")
		os.Exit(0)
	}
	l, err := prepare()
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		os.Exit(1)
	}
	testLab = l
	os.Exit(m.Run())
}

// prepare remembers what the nodes are like and installs Fairlead.
func prepare() (*lab, error) {
	top, err := filepath.Abs("../..")
	if err != nil {
		return nil, err
	}
	l := &lab{top: top}
	if l.before, err = l.nodeState(); err != nil {
		return nil, err
	}
	arguments := []string{"install"}
	if way := redirection(); way != "" {
		arguments = append(arguments, "--", "--set", "cni.redirection="+way)
	}
	cmd := exec.Command(filepath.Join(top, "hack/cluster.sh"), arguments...)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("install: %w", err)
	}
	return l, nil
}

// redirection is how pods' connections are to be redirected; empty leaves it to the agent, which takes eBPF here.
func redirection() string { return os.Getenv("FAIRLEAD_REDIRECTION") }

var nodes = []string{"node1", "node2"}

// nodeState is what an uninstall must give back: CNI configuration and binaries, addresses, rules, tables, pinned BPF objects, and
// the agent's files.
func (l *lab) nodeState() (map[string]string, error) {
	script := `cd /etc/cni/net.d && for f in *; do echo "== $f"; cat "$f"; done; echo; echo "== bin"; ls /opt/cni/bin
echo "== addresses"; ip -o addr show dev lo | sed 's/ valid_lft.*//'; echo "== rules"; ip rule; ip -6 rule; echo "== bpf"; find /sys/fs/bpf
echo "== records"; find /var/lib/fairlead-cni -type f 2>/dev/null; echo "== table"; nft list tables | grep fairlead || true`
	state := map[string]string{}
	for _, n := range nodes {
		out, err := l.exec(n, "sh", "-c", script)
		if err != nil {
			return nil, fmt.Errorf("look at %s: %w", n, err)
		}
		state[n] = out
	}
	return state, nil
}

// exec runs a command in the namespaces of a node.
func (l *lab) exec(node string, args ...string) (string, error) {
	return command(time.Minute, nil, filepath.Join(l.top, "hack/cluster.sh"), append([]string{"exec", node}, args...)...)
}

// command runs a program to its end and returns what it printed; the error holds what it complained of.
func command(limit time.Duration, stdin []byte, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	if stdin != nil {
		cmd.Stdin = bytes.NewReader(stdin)
	}
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w: %s", filepath.Base(name), strings.Join(args, " "), err, strings.TrimSpace(complaint.String()))
	}
	return out.String(), nil
}

func kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := command(2*time.Minute, nil, "kubectl", args...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

func fairlead(t *testing.T, args ...string) string {
	t.Helper()
	out, err := command(2*time.Minute, nil, filepath.Join(testLab.top, "bin/fairlead"), args...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

func apply(t *testing.T, manifest string) {
	t.Helper()
	if _, err := command(time.Minute, []byte(manifest), "kubectl", "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
}

// remove deletes what apply made; it is for the middle of a test, where the effect of the removal is looked at.
func remove(t *testing.T, manifest string) {
	t.Helper()
	if _, err := command(time.Minute, []byte(manifest), "kubectl", "delete", "--wait=true", "-f", "-"); err != nil {
		t.Fatal(err)
	}
}

// eventually retries check until it returns nil, and fails the test with its last error.
func eventually(t *testing.T, limit time.Duration, what string, check func() error) time.Duration {
	t.Helper()
	start := time.Now()
	for {
		err := check()
		if err == nil {
			return time.Since(start)
		}
		if time.Since(start) > limit {
			t.Fatalf("%s: not within %v: %v", what, limit, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// world is a namespace with a server on node2 (two versions behind one Service) and clients on node1, one service account each.
type world struct {
	namespace string
	clients   []string
}

const worldManifest = `
apiVersion: v1
kind: Service
metadata: {name: server, namespace: %[1]s}
spec:
  selector: {app: server}
  ports: [{name: http, port: 80, targetPort: 8080}, {name: tcp-echo, port: 9090}, {name: tcp-whoami, port: 9091}]
---
apiVersion: v1
kind: Service
metadata: {name: server-v1, namespace: %[1]s}
spec:
  selector: {app: server, version: v1}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Service
metadata: {name: server-v2, namespace: %[1]s}
spec:
  selector: {app: server, version: v2}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: server, namespace: %[1]s}
---
`

const serverManifest = `
apiVersion: v1
kind: Pod
metadata: {name: server-%[2]s, namespace: %[1]s, labels: {app: server, version: %[2]s}}
spec:
  nodeName: node2
  serviceAccountName: server
  terminationGracePeriodSeconds: 1
  containers:
  - name: box
    image: docker.io/fairlead/testbox:dev
    args: [server]
    env:
    - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
    - {name: VERSION, value: %[2]s}
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1, failureThreshold: 1, timeoutSeconds: 1}
    livenessProbe: {tcpSocket: {port: 9090}, periodSeconds: 1, failureThreshold: 2, timeoutSeconds: 1}
---
`

const clientManifest = `
apiVersion: v1
kind: ServiceAccount
metadata: {name: %[2]s, namespace: %[1]s}
---
apiVersion: v1
kind: Pod
metadata: {name: %[2]s, namespace: %[1]s, labels: {app: %[2]s}}
spec:
  nodeName: node1
  serviceAccountName: %[2]s
  terminationGracePeriodSeconds: 1
  containers: [{name: box, image: docker.io/fairlead/testbox:dev, args: [sleep]}]
---
`

// newWorld makes the namespace, outside the mesh, with its pods ready and its services reachable, and deletes it when the test ends.
func newWorld(t *testing.T, namespace string, clients ...string) *world {
	t.Helper()
	w := &world{namespace: namespace, clients: clients}
	eventually(t, time.Minute, "namespace "+namespace, func() error { // one of that name may still be going
		_, err := command(10*time.Second, nil, "kubectl", "create", "namespace", namespace)
		return err
	})
	t.Cleanup(func() {
		if t.Failed() {
			w.explain(t)
		}
		kubectl(t, "delete", "namespace", namespace, "--wait=false")
	})
	eventually(t, 30*time.Second, "default service account of "+namespace, func() error {
		_, err := command(10*time.Second, nil, "kubectl", "-n", namespace, "get", "serviceaccount", "default")
		return err
	})
	manifest := fmt.Sprintf(worldManifest, namespace)
	for _, v := range []string{"v1", "v2"} {
		manifest += fmt.Sprintf(serverManifest, namespace, v)
	}
	for _, c := range clients {
		manifest += fmt.Sprintf(clientManifest, namespace, c)
	}
	apply(t, manifest)
	kubectl(t, "-n", namespace, "wait", "--for=condition=Ready", "pod", "--all", "--timeout=90s")
	for _, c := range clients {
		eventually(t, 30*time.Second, "the nodes know the service", func() error {
			if a := w.get(t, c, "http://server/"); !a.ok() {
				return fmt.Errorf("got %v", a)
			}
			return nil
		})
	}
	return w
}

// explain prints what a person would look at first.
func (w *world) explain(t *testing.T) {
	for _, args := range [][]string{
		{"-n", w.namespace, "get", "pods", "-o", "wide", "--show-labels"},
		{"-n", w.namespace, "get", "events", "--sort-by=.lastTimestamp"},
		{"-n", "istio-system", "get", "pods", "-o", "wide"},
		{"-n", "istio-system", "logs", "-l", "app=ztunnel", "--tail=40", "--prefix"},
		{"-n", "istio-system", "logs", "-l", "app=istiod", "--tail=40", "--prefix"},
		{"-n", "istio-system", "logs", "-l", "k8s-app=istio-cni-node", "--tail=40", "--prefix"},
		{"-n", w.namespace, "logs", "-l", "gateway.networking.k8s.io/gateway-name", "--tail=40", "--prefix"},
	} {
		out, err := command(20*time.Second, nil, "kubectl", args...)
		t.Logf("kubectl %s\n%s%v", strings.Join(args, " "), out, err)
	}
}

// join labels the namespace and waits until every pod says that it is captured.
func (w *world) join(t *testing.T) {
	t.Helper()
	kubectl(t, "label", "namespace", w.namespace, "istio.io/dataplane-mode=ambient", "--overwrite")
	w.waitCaptured(t, true)
}

func (w *world) leave(t *testing.T) {
	t.Helper()
	kubectl(t, "label", "namespace", w.namespace, "istio.io/dataplane-mode-")
	w.waitCaptured(t, false)
}

func (w *world) waitCaptured(t *testing.T, want bool) {
	t.Helper()
	eventually(t, 30*time.Second, fmt.Sprintf("pods of %s captured: %v", w.namespace, want), func() error {
		for _, p := range w.pods(t) {
			if got := p.Metadata.Annotations["ambient.istio.io/redirection"] == "enabled"; got != want {
				return fmt.Errorf("pod %s captured: %v", p.Metadata.Name, got)
			}
		}
		return nil
	})
}

type pod struct {
	Metadata struct {
		Name, UID   string
		Annotations map[string]string
	}
	Status struct {
		PodIP             string
		ContainerStatuses []struct {
			RestartCount int
			Ready        bool
			ContainerID  string
		}
	}
}

// pods are the world's own, without waypoints.
func (w *world) pods(t *testing.T) []pod {
	t.Helper()
	var list struct{ Items []pod }
	out := kubectl(t, "-n", w.namespace, "get", "pods", "-l", "app", "-o", "json")
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatal(err)
	}
	return list.Items
}

func (w *world) podIP(t *testing.T, name string) string {
	t.Helper()
	return kubectl(t, "-n", w.namespace, "get", "pod", name, "-o", "jsonpath={.status.podIP}")
}

// answer is one line of `box client` or `box tcp`.
type answer struct {
	N      int
	Time   time.Time
	Status int
	Error  string
	Local  string
	Body   string
	Reply  struct {
		Pod, Version, Remote, Method, Body string
		Headers                            map[string]string
	}
}

func (a answer) String() string {
	return fmt.Sprintf("%d %s %q %s", a.Status, a.Error, a.Body, a.Reply.Pod)
}

// ok tells whether the server answered, the application's refusals aside.
func (a answer) ok() bool { return a.Error == "" && a.Status == 200 }

// client runs `box client` in a client pod and returns its lines. A refused request is an answer, not an error.
func (w *world) client(t *testing.T, pod string, args ...string) []answer {
	t.Helper()
	out, err := command(3*time.Minute, nil, "kubectl", append([]string{"-n", w.namespace, "exec", pod, "--", "box", "client"}, args...)...)
	got := parse(t, out)
	if len(got) == 0 {
		t.Fatalf("no answer from the client program: %v", err)
	}
	return got
}

func (w *world) get(t *testing.T, pod, url string, args ...string) answer {
	t.Helper()
	return w.client(t, pod, append([]string{url, "-timeout", "3s"}, args...)...)[0]
}

func parse(t *testing.T, out string) []answer {
	t.Helper()
	var got []answer
	for line := range strings.Lines(out) {
		if !strings.HasPrefix(line, "{") {
			continue
		}
		var a answer
		if err := json.Unmarshal([]byte(line), &a); err != nil {
			t.Fatalf("client line %q: %v", line, err)
		}
		got = append(got, a)
	}
	return got
}

// background is a client that goes on while the test acts; its answers carry their times.
type background struct {
	cmd *exec.Cmd
	out output
}

// output keeps what a program prints and tells when it has begun to. The buffer has a name, because its ReadFrom would be
// used in place of Write.
type output struct {
	text  bytes.Buffer
	begin sync.Once
	begun chan struct{}
}

func (o *output) Write(b []byte) (int, error) {
	if o.begun != nil {
		o.begin.Do(func() { close(o.begun) })
	}
	return o.text.Write(b)
}

// start returns when the first request has been answered.
func (w *world) start(t *testing.T, pod string, args ...string) *background {
	t.Helper()
	return w.startBox(t, pod, append([]string{"client"}, args...)...)
}

// startBox starts one of box's programs in a pod and returns when it has printed something.
func (w *world) startBox(t *testing.T, pod string, args ...string) *background {
	t.Helper()
	b := &background{cmd: exec.Command("kubectl", append([]string{"-n", w.namespace, "exec", pod, "--", "box"}, args...)...)}
	b.out.begun = make(chan struct{})
	b.cmd.Stdout = &b.out
	if err := b.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.cmd.Process.Kill() })
	select {
	case <-b.out.begun:
	case <-time.After(time.Minute):
		t.Fatalf("the program %q in %s prints nothing", args, pod)
	}
	return b
}

// wait ends with the client program, which is told a number of requests.
func (b *background) wait(t *testing.T) []answer {
	t.Helper()
	_ = b.cmd.Wait() // its exit status says that some request failed, which the answers say better
	return parse(t, b.out.text.String())
}

// capture records what crosses a node's link until stop is called, which returns the bytes.
type capture struct {
	cmd  *exec.Cmd
	file string
	node string
}

// startCapture records node2's link; the file is in the node's own /tmp.
func startCapture(t *testing.T, node string) *capture {
	t.Helper()
	c := &capture{node: node, file: fmt.Sprintf("/tmp/e2e-%d.pcap", time.Now().UnixNano())}
	c.cmd = exec.Command(filepath.Join(testLab.top, "hack/cluster.sh"), "exec", node, "tcpdump", "-i", "eth0", "-s", "0", "-U", "--immediate-mode", "-n", "-w", c.file, "tcp")
	var complaint bytes.Buffer
	c.cmd.Stderr = &complaint
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.cmd.Process.Kill() })
	eventually(t, 10*time.Second, "tcpdump on "+node, func() error {
		_, err := testLab.exec(node, "test", "-s", c.file)
		return err
	})
	return c
}

// stop returns all that was recorded.
func (c *capture) stop(t *testing.T) []byte {
	t.Helper()
	time.Sleep(300 * time.Millisecond) // what the kernel still holds reaches the file
	// The brackets keep the shell's own command line from matching.
	if _, err := testLab.exec(c.node, "pkill", "-f", "[t]cpdump.*"+c.file); err != nil {
		t.Logf("stop tcpdump: %v", err)
	}
	_ = c.cmd.Wait()
	out, err := testLab.exec(c.node, "cat", c.file)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = testLab.exec(c.node, "rm", "-f", c.file)
	return []byte(out)
}
