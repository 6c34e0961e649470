package e2e

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// talkerManifest is a pod that calls from its first moment on, again whenever it is started.
const talkerManifest = `
apiVersion: v1
kind: Pod
metadata: {name: %[2]s, namespace: %[1]s, labels: {app: %[2]s}}
spec:
  nodeName: node1
  terminationGracePeriodSeconds: 1
  containers: [{name: box, image: docker.io/fairlead/testbox:dev, args: [client, "http://server/", -n, "100000", -interval, 20ms, -timeout, 2s, -method, POST, -d, %[3]q]}]
---
`

// TestPowerCutOpensNothing: a node loses its power and comes back while the API server is away. When that answers again, the
// node's pods start together with the agent and the proxy, and none of them says a word in clear.
func TestPowerCutOpensNothing(t *testing.T) {
	w := newWorld(t, "power-cut", "alice")
	mark := fmt.Sprintf("power-%d", time.Now().UnixNano())
	apply(t, fmt.Sprintf(talkerManifest, w.namespace, "talker", mark))
	kubectl(t, "-n", w.namespace, "wait", "--for=condition=Ready", "pod/talker", "--timeout=60s")
	c := startCapture(t, "node2")
	time.Sleep(time.Second)
	if n := bytes.Count(c.stop(t), []byte(mark)); n == 0 {
		t.Fatal("control: before the label nothing of the talker was readable")
	}
	w.join(t)
	allOK(t, "in the mesh", w.client(t, "alice", "http://server/", "-n", "1"))
	// Connections from before the label go on in clear, so that the talker begins anew.
	kubectl(t, "-n", w.namespace, "delete", "pod", "talker", "--wait")
	apply(t, fmt.Sprintf(talkerManifest, w.namespace, "talker", mark))
	kubectl(t, "-n", w.namespace, "wait", "--for=condition=Ready", "pod/talker", "--timeout=60s")

	c = startCapture(t, "node2")
	resume := stopAPIServer(t)
	cmd := exec.Command(filepath.Join(testLab.top, "hack/cluster.sh"), "power-cut", "node1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("power cut: %v: %s", err, out)
	}
	eventually(t, 60*time.Second, "the node's runtime is back", func() error {
		_, err := testLab.exec("node1", "ctr", "--namespace", "k8s.io", "containers", "list")
		return err
	})
	time.Sleep(3 * time.Second) // in which whatever does not wait for the API server starts
	cut := c.packets(t, "tcp port 15008")
	resume()
	eventually(t, 120*time.Second, "the talker talks again, in the mesh", func() error {
		if n := c.packets(t, "tcp port 15008"); n < cut+20 {
			return fmt.Errorf("%d HBONE packets since the power came back", n-cut)
		}
		return nil
	})
	if n := bytes.Count(c.stop(t), []byte(mark)); n != 0 {
		t.Errorf("readable %d times", n)
	}
	kubectl(t, "-n", "istio-system", "rollout", "status", "daemonset/istio-cni-node", "--timeout=120s")
	kubectl(t, "-n", "istio-system", "rollout", "status", "daemonset/ztunnel", "--timeout=120s")
}

// stopAPIServer makes the API server neither answer nor refuse, as behind a network that is cut, until the returned function
// is called.
func stopAPIServer(t *testing.T) (resume func()) {
	t.Helper()
	signal := func(name string) error {
		_, err := testLab.exec("control-plane", "pkill", "-"+name, "-x", "kube-apiserver")
		return err
	}
	if err := signal("STOP"); err != nil {
		t.Fatal(err)
	}
	resume = sync.OnceFunc(func() {
		if err := signal("CONT"); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(resume)
	if out, err := command(20*time.Second, nil, "kubectl", "get", "--raw", "/readyz", "--request-timeout=1s"); err == nil {
		t.Fatalf("control: the API server answers %q", out)
	}
	return resume
}

// TestDeletedAgentOpensNothing: somebody deletes the agent's DaemonSet. What runs stays in the mesh, what starts in it waits
// and says for what, and pods outside start: as the API server has it, and without that, as the agent's record.
func TestDeletedAgentOpensNothing(t *testing.T) {
	w := newWorld(t, "no-agent", "alice")
	for _, namespace := range []string{"no-agent-outside", "no-agent-single", "no-agent-late"} {
		apply(t, "apiVersion: v1\nkind: Namespace\nmetadata: {name: "+namespace+"}\n")
		t.Cleanup(func() { kubectl(t, "delete", "namespace", namespace, "--wait=false") })
	}
	w.join(t)
	restore := deleteAgent(t)
	got, readable, hbone := w.observe(t, "alice")
	allOK(t, "without the agent", got)
	if readable != 0 || hbone == 0 {
		t.Errorf("without the agent the payload was readable %d times, %d HBONE packets", readable, hbone)
	}

	// Of the namespaces of these pods the nodes' records know nothing, but of the first.
	kubectl(t, "label", "namespace", "no-agent-late", "istio.io/dataplane-mode=ambient")
	mark := fmt.Sprintf("-%d;", time.Now().UnixNano())
	waiting := []struct{ namespace, name, labels, why string }{
		{w.namespace, "waits", "", "the namespace's label opts in"},
		{"no-agent-single", "labelled", ", istio.io/dataplane-mode: ambient", "the pod's label opts in"},
		{"no-agent-late", "inherits", "", "the namespace's label opts in"},
	}
	outside := []struct{ namespace, name, labels string }{
		{"no-agent-outside", "starts", ""}, {"no-agent-single", "plain", ""}, {"no-agent-late", "opts-out", ", istio.io/dataplane-mode: none"},
		{w.namespace, "leaves", ", istio.io/dataplane-mode: none"},
	}
	c := startCapture(t, "node2")
	for _, p := range waiting {
		apply(t, talker(p.namespace, p.name, p.labels, p.name+mark))
	}
	for _, p := range outside {
		apply(t, talker(p.namespace, p.name, p.labels, p.name+mark))
	}
	for _, p := range outside {
		kubectl(t, "-n", p.namespace, "wait", "--for=condition=Ready", "pod/"+p.name, "--timeout=60s")
	}
	for _, p := range waiting {
		eventually(t, 60*time.Second, "the pod says what it waits for", func() error {
			out := kubectl(t, "-n", p.namespace, "describe", "pod", p.name)
			if !strings.Contains(out, "waits for the mesh's cni-agent") || !strings.Contains(out, p.why) {
				return fmt.Errorf("%s", out)
			}
			return nil
		})
	}
	w.restartWithoutAPIServer(t)
	restore()
	for _, p := range waiting {
		kubectl(t, "-n", p.namespace, "wait", "--for=condition=Ready", "pod/"+p.name, "--timeout=120s")
		eventually(t, 30*time.Second, p.name+" is captured", func() error {
			if out := kubectl(t, "-n", p.namespace, "get", "pod", p.name, "-o", "yaml"); !strings.Contains(out, "ambient.istio.io/redirection: enabled") {
				return fmt.Errorf("%s", out)
			}
			return nil
		})
	}
	kubectl(t, "-n", w.namespace, "wait", "--for=condition=Ready", "pod/alice", "--timeout=120s")
	allOK(t, "with the agent again", w.client(t, "alice", "http://server/", "-n", "1"))
	time.Sleep(time.Second) // in which they talk
	recorded := c.stop(t)
	for _, p := range waiting {
		if n := bytes.Count(recorded, []byte(p.name+mark)); n != 0 {
			t.Errorf("%s/%s was readable %d times", p.namespace, p.name, n)
		}
	}
	for _, p := range outside {
		if bytes.Count(recorded, []byte(p.name+mark)) == 0 {
			t.Errorf("control: %s/%s is outside the mesh, and was never readable", p.namespace, p.name)
		}
	}
}

// talker is a talkerManifest with further labels, whose server is that of no-agent.
func talker(namespace, name, labels, mark string) string {
	return strings.NewReplacer("labels: {app: "+name, "labels: {app: "+name+labels, "http://server/", "http://server.no-agent/").
		Replace(fmt.Sprintf(talkerManifest, namespace, name, mark))
}

// deleteAgent deletes the agent's DaemonSet, until the returned function is called.
func deleteAgent(t *testing.T) (restore func()) {
	t.Helper()
	var set map[string]any
	if err := json.Unmarshal([]byte(kubectl(t, "-n", "istio-system", "get", "daemonset", "istio-cni-node", "-o", "json")), &set); err != nil {
		t.Fatal(err)
	}
	delete(set, "status")
	for _, field := range []string{"uid", "resourceVersion", "creationTimestamp", "generation", "managedFields"} {
		delete(set["metadata"].(map[string]any), field)
	}
	manifest, err := json.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second) // until the nodes' records say what the namespaces are
	kubectl(t, "-n", "istio-system", "delete", "daemonset", "istio-cni-node", "--wait")
	restore = sync.OnceFunc(func() {
		apply(t, string(manifest))
		kubectl(t, "-n", "istio-system", "rollout", "status", "daemonset/istio-cni-node", "--timeout=120s")
	})
	t.Cleanup(restore)
	eventually(t, 60*time.Second, "the agents are gone", func() error {
		if left := kubectl(t, "-n", "istio-system", "get", "pods", "-l", "k8s-app=istio-cni-node", "-o", "name"); left != "" {
			return fmt.Errorf("left: %s", left)
		}
		return nil
	})
	return restore
}

// restartWithoutAPIServer lets the sandboxes of a pod outside the mesh and of one in it end, while neither the agent nor the API
// server answers: the former starts again by the record on its node, the latter waits. So does a pod that the record does not
// know: the API server had it in the mesh.
func (w *world) restartWithoutAPIServer(t *testing.T) {
	t.Helper()
	labelled := kubectl(t, "-n", "no-agent-single", "get", "pod", "labelled", "-o", "jsonpath={.metadata.uid}")
	resume := stopAPIServer(t)
	before := running(t, "starts", "container")
	for _, pod := range []string{"starts", "alice"} {
		if _, err := testLab.exec("node1", "ctr", "-n", "k8s.io", "tasks", "kill", "-s", "SIGKILL", running(t, pod, "sandbox")); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, 90*time.Second, "the pod outside starts again", func() error {
		if now := running(t, "starts", "container"); now == "" || now == before {
			return fmt.Errorf("its container is %q, and was %q", now, before)
		}
		return nil
	})
	for _, tc := range []struct {
		namespace, pod, uid string
		starts              bool
		says                string
	}{
		{w.namespace, "alice", "", false, "the agent's record on the node has it, or others of its namespace, in the mesh; the API server does not say"},
		{"no-agent-single", "labelled", labelled, false, "the API server had it in the mesh before; the API server does not say"},
		{"no-agent-single", "labelled", "", true, ""}, // control: by the record alone
		{"no-agent-outside", "starts", "", true, ""},
	} {
		out, err := addSandbox(t, tc.namespace, tc.pod, tc.uid)
		if (err == nil) != tc.starts || !strings.Contains(out, tc.says) {
			t.Errorf("the plugin says of pod %s with UID %q: %s, %v", tc.pod, tc.uid, out, err)
		}
	}
	if now := running(t, "alice", "container"); now != "" {
		t.Errorf("the pod in the mesh runs without the agent: %s", now)
	}
	resume()
}

// running names the containers of a pod on node1 that run; kind is sandbox, or container for those of the pod's specification.
func running(t *testing.T, pod, kind string) string {
	t.Helper()
	out, err := testLab.exec("node1", "sh", "-c", `running=$(ctr -n k8s.io tasks ls | awk '$3 == "RUNNING" {print $1}')
for id in $(ctr -n k8s.io containers ls -q 'labels."io.kubernetes.pod.name"==`+pod+`,labels."io.cri-containerd.kind"==`+kind+`'); do
	case $running in *$id*) echo $id ;; esac
done`)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// addSandbox calls the plugin on node1 as a runtime does that starts a pod; with an empty UID it is one that nobody has seen yet.
func addSandbox(t *testing.T, namespace, pod, uid string) (string, error) {
	t.Helper()
	text, err := testLab.exec("node1", "sh", "-c", "cat /etc/cni/net.d/*.conflist")
	if err != nil {
		t.Fatal(err)
	}
	var list struct{ Plugins []map[string]any }
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		t.Fatal(err)
	}
	conf := list.Plugins[len(list.Plugins)-1]
	conf["cniVersion"], conf["name"], conf["prevResult"] = "1.0.0", "lab", map[string]any{"cniVersion": "1.0.0"}
	stdin, err := json.Marshal(conf)
	if err != nil {
		t.Fatal(err)
	}
	return command(time.Minute, stdin, filepath.Join(testLab.top, "hack/cluster.sh"), "exec", "node1", "env", "CNI_COMMAND=ADD",
		"CNI_CONTAINERID=by-hand", "CNI_NETNS=/proc/self/ns/net", "CNI_NETNS_OVERRIDE=1", "CNI_IFNAME=eth0", "CNI_PATH=/opt/cni/bin",
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE="+namespace+";K8S_POD_NAME="+pod+";K8S_POD_UID="+uid, "/opt/cni/bin/fairlead-cni")
}

// TestRewrittenConfigurationIsMended: another tool takes the plugin out of a node's CNI configuration.
func TestRewrittenConfigurationIsMended(t *testing.T) {
	state := func() string {
		t.Helper()
		out, err := testLab.exec("node1", "sh", "-c", "cat /etc/cni/net.d/*.conflist")
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	const entry = `"type":"fairlead-cni"`
	before := state()
	if !strings.Contains(before, entry) {
		t.Fatalf("control: the plugin is not in %s", before)
	}
	// As a tool does that knows of its own plugins only.
	_, err := testLab.exec("node1", "sh", "-c", `cd /etc/cni/net.d && f=$(ls *.conflist | head -n 1) && sed -i 's/"type":"fairlead-cni"/"type":"loopback"/' "$f"`)
	if err != nil {
		t.Fatal(err)
	}
	took := eventually(t, 10*time.Second, "the plugin is back", func() error {
		if now := state(); !strings.Contains(now, entry) {
			return fmt.Errorf("%s", now)
		}
		return nil
	})
	t.Logf("the plugin was back after %v or less", took)
	text := base64.StdEncoding.EncodeToString([]byte(before))
	if _, err := testLab.exec("node1", "sh", "-c", "cd /etc/cni/net.d && f=$(ls *.conflist | head -n 1) && echo "+text+" | base64 -d >$f"); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, "the configuration is as it was", func() error {
		if now := state(); now != before {
			return fmt.Errorf("%s\nwas\n%s", now, before)
		}
		return nil
	})
}
