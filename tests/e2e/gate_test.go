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
// and says for what, and pods outside start.
func TestDeletedAgentOpensNothing(t *testing.T) {
	w := newWorld(t, "no-agent", "alice")
	apply(t, "apiVersion: v1\nkind: Namespace\nmetadata: {name: no-agent-outside}\n")
	t.Cleanup(func() { kubectl(t, "delete", "namespace", "no-agent-outside", "--wait=false") })
	w.join(t)
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
	t.Cleanup(func() {
		apply(t, string(manifest))
		kubectl(t, "-n", "istio-system", "rollout", "status", "daemonset/istio-cni-node", "--timeout=120s")
	})
	eventually(t, 60*time.Second, "the agents are gone", func() error {
		if left := kubectl(t, "-n", "istio-system", "get", "pods", "-l", "k8s-app=istio-cni-node", "-o", "name"); left != "" {
			return fmt.Errorf("left: %s", left)
		}
		return nil
	})
	got, readable, hbone := w.observe(t, "alice")
	allOK(t, "without the agent", got)
	if readable != 0 || hbone == 0 {
		t.Errorf("without the agent the payload was readable %d times, %d HBONE packets", readable, hbone)
	}
	apply(t, fmt.Sprintf(talkerManifest, w.namespace, "waits", "m")+fmt.Sprintf(talkerManifest, "no-agent-outside", "starts", "m"))
	kubectl(t, "-n", "no-agent-outside", "wait", "--for=condition=Ready", "pod/starts", "--timeout=60s")
	eventually(t, 60*time.Second, "the pod says what it waits for", func() error {
		if out := kubectl(t, "-n", w.namespace, "describe", "pod", "waits"); !strings.Contains(out, "waits for the mesh's cni-agent") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	apply(t, string(manifest))
	kubectl(t, "-n", w.namespace, "wait", "--for=condition=Ready", "pod/waits", "--timeout=120s")
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
