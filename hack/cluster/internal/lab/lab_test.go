package lab

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/build"
	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/cgroup"
	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/network"
	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/plan"
)

// TestMain lets this test binary be what the cluster command is to its machines.
func TestMain(m *testing.M) {
	if len(os.Args) == 5 {
		if handled, err := MachineCommand(os.Args[1], os.Args[2:]); handled {
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			os.Exit(0)
		}
	}
	os.Exit(m.Run())
}

// The whole way, on this machine: two clusters at once, each usable, and nothing
// of either left behind. It builds Kubernetes if that was not done yet, so it
// runs only when asked for.
func TestTwoClustersComeAndGo(t *testing.T) {
	if os.Getenv("FAIRLEAD_TEST_CLUSTER") == "" && os.Getenv("FAIRLEAD_REQUIRE_ALL") == "" {
		t.Skip("FAIRLEAD_TEST_CLUSTER=1 is not set (it needs root, several minutes at first, and 2 GB of memory)")
	}
	var out bytes.Buffer
	l := Lab{State: filepath.Join(t.TempDir(), "state"), Out: &out, Builder: build.Builder{Source: "../../build", Cache: cache(t), Out: os.Stderr}}
	var clusters []cluster
	for i, spec := range []plan.Spec{
		{Name: "test-a", Nodes: 2, IPFamily: "dual", ProxyMode: "nftables", CNI: "ptp"},
		{Name: "test-b", Nodes: 1, IPFamily: "ipv4", ProxyMode: "iptables", CNI: "ptp"},
	} {
		t.Cleanup(func() { _ = l.Down(spec.Name) })
		if err := l.Up(context.Background(), spec); err != nil {
			t.Fatalf("%v\n%s", err, out.String())
		}
		c, err := l.cluster(spec.Name)
		if err != nil {
			t.Fatal(err)
		}
		clusters = append(clusters, c)
		if got := strings.Fields(kubectl(t, c, "get", "nodes", "-o", "name")); len(got) != spec.Nodes {
			t.Errorf("cluster %d: nodes %v", i, got)
		}
	}
	if clusters[0].Spec.Index == clusters[1].Spec.Index {
		t.Errorf("both clusters have index %d", clusters[0].Spec.Index)
	}
	talkAcrossNodes(t, clusters[0])
	if err := l.PowerCut("test-a", "node2", 0); err != nil {
		t.Fatal(err)
	}
	kubectl(t, clusters[0], "wait", "--for=jsonpath={.status.containerStatuses[0].restartCount}=1", "pod/b", "--timeout=60s")
	kubectl(t, clusters[0], "wait", "--for=condition=Ready", "pod/b", "--timeout=60s")
	for _, c := range clusters {
		if err := l.Down(c.Spec.Name); err != nil {
			t.Fatal(err)
		}
		checkGone(t, c)
	}
	if _, err := os.Stat(l.State); err == nil {
		t.Errorf("%s is still there", l.State)
	}
}

func cache(t *testing.T) string {
	t.Helper()
	if d := os.Getenv("FAIRLEAD_CACHE"); d != "" {
		return filepath.Join(d, "cluster")
	}
	d, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(d, "fairlead", "cluster")
}

func kubectl(t *testing.T, c cluster, args ...string) string {
	t.Helper()
	out, err := c.kubectl(nil, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

const twoPods = `apiVersion: v1
kind: Pod
metadata: {name: a}
spec: {nodeName: node1, terminationGracePeriodSeconds: 0, containers: [{name: box, image: "fairlead/testbox:dev", args: [server]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: b, labels: {app: b}}
spec:
  nodeName: node2
  terminationGracePeriodSeconds: 0
  containers:
  - {name: box, image: "fairlead/testbox:dev", args: [server], readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}}
---
apiVersion: v1
kind: Service
metadata: {name: b}
spec: {ipFamilyPolicy: RequireDualStack, selector: {app: b}, ports: [{port: 80, targetPort: 8080}]}
`

// talkAcrossNodes calls pod b from pod a by address and by name, over both families.
func talkAcrossNodes(t *testing.T, c cluster) {
	t.Helper()
	if _, err := c.kubectl(strings.NewReader(twoPods), "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	kubectl(t, c, "wait", "--for=condition=Ready", "pod/a", "pod/b", "--timeout=60s")
	list := func(resource, path string) []string {
		return strings.Fields(kubectl(t, c, "get", resource, "-o", "jsonpath={range "+path+"}{@}{\" \"}{end}"))
	}
	service := list("service/b", ".spec.clusterIPs[*]")
	if len(service) != 2 {
		t.Fatalf("the Service has addresses %v, want one of each family", service)
	}
	for _, url := range []string{"http://" + service[0], "http://[" + service[1] + "]", "http://b.default.svc.cluster.local"} {
		// A pod that has become ready takes a moment to reach every node's kube-proxy.
		for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(200 * time.Millisecond) {
			got, err := c.kubectl(nil, "exec", "a", "--", "box", "client", url)
			if err == nil && strings.Contains(got, `"pod":"b"`) {
				break
			}
			if time.Now().After(deadline) {
				t.Errorf("%s: %s, %v", url, got, err)
				break
			}
		}
	}
}

// checkGone looks everywhere a cluster puts something.
func checkGone(t *testing.T, c cluster) {
	t.Helper()
	if out, err := exec.Command("ip", "link", "show", c.plan.HostLink).Output(); err == nil {
		t.Errorf("link left: %s", out)
	}
	routed, err := network.Routed()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range routed {
		for _, p := range c.plan.Prefixes() {
			if p.Overlaps(r) {
				t.Errorf("route left: %v", r)
			}
		}
	}
	groups, err := cgroup.Discover()
	if err != nil {
		t.Fatal(err)
	}
	if groups.Exists(c.Spec.Name) {
		t.Errorf("cgroups of %s are left", c.Spec.Name)
	}
	if b, err := os.ReadFile("/proc/self/mountinfo"); err != nil || bytes.Contains(b, []byte(c.run)) {
		t.Errorf("mount left (%v)", err)
	}
	// A dead process may wait for its parent a moment longer.
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		left := processes(t, c.run)
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("processes left: %v", left)
		}
	}
}

// processes are those that have a path on their command line.
func processes(t *testing.T, path string) []string {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && bytes.Contains(b, []byte(path)) {
			found = append(found, f)
		}
	}
	return found
}
