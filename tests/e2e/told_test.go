package e2e

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"
)

// agentMetric reads a metric of a node's agent; it is 0 while nobody has counted.
func agentMetric(t *testing.T, node, name string) float64 {
	t.Helper()
	agent := kubectl(t, "-n", "istio-system", "get", "pods", "-l", "k8s-app=istio-cni-node", "--field-selector", "spec.nodeName="+node,
		"-o", "jsonpath={.items[0].metadata.name}")
	for line := range strings.Lines(kubectl(t, "get", "--raw", "/api/v1/namespaces/istio-system/pods/"+agent+":15014/proxy/metrics")) {
		if rest, ok := strings.CutPrefix(line, name+" "); ok {
			value, err := strconv.ParseFloat(strings.TrimSpace(rest), 64)
			if err != nil {
				t.Fatalf("metric %q: %v", line, err)
			}
			return value
		}
	}
	return 0
}

// told waits until an event of a reason is on a pod, and returns its message.
func (w *world) told(t *testing.T, pod, reason string) (message string) {
	t.Helper()
	eventually(t, 30*time.Second, "event "+reason+" on "+pod, func() error {
		message = kubectl(t, "-n", w.namespace, "get", "events", "--field-selector", "reason="+reason+",involvedObject.name="+pod,
			"-o", "jsonpath={.items[*].message}")
		if message == "" {
			return fmt.Errorf("there is none")
		}
		return nil
	})
	return message
}

// captured is the condition that the agent writes on pods, as "<status> <reason>", or "".
func (w *world) captured(t *testing.T, pod string) string {
	t.Helper()
	return strings.TrimSpace(kubectl(t, "-n", w.namespace, "get", "pod", pod, "-o",
		`jsonpath={.status.conditions[?(@.type=="fairlead-mesh.io/Captured")]['status','reason']}`))
}

// TestUncapturedPodsAreRefusedAndTold: a namespace is labelled while there is no node proxy. Its pods are not captured, say so in
// a condition and an event, are counted, and say nothing in clear; when the proxy is back they are captured and say that too.
func TestUncapturedPodsAreRefusedAndTold(t *testing.T) {
	const uncaptured = "fairlead_cni_uncaptured_pods"
	w := newWorld(t, "uncaptured", "alice")
	eventually(t, 60*time.Second, "control: outside the mesh nothing is said", func() error { // pods of other tests may still be going
		if is, n := w.captured(t, "alice"), agentMetric(t, "node1", uncaptured); is != "" || n != 0 {
			return fmt.Errorf("%q, %v pods", is, n)
		}
		return nil
	})
	place := func(selector string) {
		t.Helper()
		kubectl(t, "-n", "istio-system", "patch", "daemonset", "ztunnel", "-p",
			`{"spec":{"template":{"spec":{"nodeSelector":{"fairlead-mesh.io/nowhere":`+selector+`}}}}}`)
	}
	place(`"true"`)
	t.Cleanup(func() { place("null"); rolledOut(t) })
	eventually(t, 60*time.Second, "the node proxies are gone", func() error {
		if left := kubectl(t, "-n", "istio-system", "get", "pods", "-l", "app=ztunnel", "-o", "name"); left != "" {
			return fmt.Errorf("left: %s", left)
		}
		return nil
	})
	kubectl(t, "label", "namespace", w.namespace, "istio.io/dataplane-mode=ambient")
	if message := w.told(t, "alice", "FailedCapture"); !strings.Contains(message, "no node proxy is connected") {
		t.Errorf("the event says %q", message)
	}
	eventually(t, 60*time.Second, "condition and metric say that alice is not captured", func() error {
		if is, n := w.captured(t, "alice"), agentMetric(t, "node1", uncaptured); is != "False FailedCapture" || n != 1 {
			return fmt.Errorf("%q, %v pods", is, n)
		}
		return nil
	})
	c := startCapture(t, "node2")
	mark := fmt.Sprintf("uncaptured-%d", time.Now().UnixNano())
	for _, a := range w.client(t, "alice", "http://"+w.podIP(t, "server-v1")+":8080/", "-n", "3", "-timeout", "1s", "-method", "POST", "-d", mark) {
		if a.ok() {
			t.Errorf("answered without a proxy: %v", a)
		}
	}
	if n := bytes.Count(c.stop(t), []byte(mark)); n != 0 {
		t.Errorf("readable %d times", n)
	}

	place("null")
	rolledOut(t)
	w.waitCaptured(t, true)
	eventually(t, 60*time.Second, "condition and metric say that alice is captured", func() error {
		if is, n := w.captured(t, "alice"), agentMetric(t, "node1", uncaptured); is != "True Captured" || n != 0 {
			return fmt.Errorf("%q, %v pods", is, n)
		}
		return nil
	})
	allOK(t, "with the proxies back", w.client(t, "alice", "http://server/", "-n", "3"))
}

// TestBypassIsDroppedAndTold: a pod sends TCP by a raw socket, past its proxy.
func TestBypassIsDroppedAndTold(t *testing.T) {
	if redirection() == "nftables" {
		t.Skip("redirection by nftables cannot check what leaves pods")
	}
	const attempts = "fairlead_cni_bypass_attempts_total"
	w := newWorld(t, "bypass", "mallory")
	address := w.podIP(t, "server-v1") + ":8080"
	sent := func() int {
		t.Helper()
		c := startCapture(t, "node2")
		for range 3 {
			kubectl(t, "-n", w.namespace, "exec", "mallory", "--", "box", "syn", address)
		}
		defer c.stop(t)
		return c.packets(t, "tcp src port 4242 and tcp dst port 8080")
	}
	if n := sent(); n == 0 {
		t.Fatal("control: outside the mesh no SYN arrived")
	}
	w.join(t)
	before := agentMetric(t, "node1", attempts)
	if n := sent(); n != 0 {
		t.Errorf("%d SYNs arrived", n)
	}
	if message := w.told(t, "mallory", "MeshBypassAttempt"); !strings.Contains(message, address) {
		t.Errorf("the event says %q, want %s in it", message, address)
	}
	eventually(t, 20*time.Second, "attempts are counted", func() error {
		if n := agentMetric(t, "node1", attempts) - before; n < 3 {
			return fmt.Errorf("%v", n)
		}
		return nil
	})
}
