package source

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/cache"

	"github.com/fairlead-mesh/fairlead/internal/kubedir"
	"github.com/fairlead-mesh/fairlead/internal/kubescheme"
)

// origin is a directory whose custom kinds come and go as a test says.
type origin struct {
	Directory
	appear, vanish func(string)
}

func (o *origin) Served(_ context.Context, appear, vanish func(string)) error {
	o.appear, o.vanish = appear, vanish
	return nil
}

func (o *origin) ListerWatcher(obj runtime.Object) (cache.ListerWatcher, error) {
	return o.Directory.ListerWatcher(obj)
}

type changes struct {
	mu  sync.Mutex
	all []Change
}

func (c *changes) add(change Change) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.all = append(c.all, change)
}

func (c *changes) any(match func(Change) bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, change := range c.all {
		if match(change) {
			return true
		}
	}
	return false
}

func wait(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("%s: not within 5 s", what)
}

const objects = `
apiVersion: v1
kind: Pod
metadata: {name: a, managedFields: [{manager: x}]}
spec: {nodeName: node1, containers: [{name: c, image: i}]}
status: {podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: host}
spec: {nodeName: node1, hostNetwork: true}
status: {podIPs: [{ip: 10.0.0.1}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: s-1, labels: {kubernetes.io/service-name: s}}
addressType: IPv4
endpoints: []
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p}
`

func open(t *testing.T) (Directory, string) {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "in.yaml")
	if err := os.WriteFile(file, []byte(objects), 0o644); err != nil {
		t.Fatal(err)
	}
	scheme, err := kubescheme.New()
	if err != nil {
		t.Fatal(err)
	}
	d, err := kubedir.Open(dir, scheme, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	return Directory{Dir: d}, file
}

func TestStoresAnswerFromIndices(t *testing.T) {
	d, _ := open(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s := New(d, zap.NewNop(), func(Change) {})
	if err := s.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if got := s.PodsOn("node1"); len(got) != 2 {
		t.Errorf("pods on node1: %d, want 2", len(got))
	}
	// The address of a host-network pod is its node's.
	if got := s.PodsAt("10.0.0.1"); len(got) != 1 || got[0].Name != "a" {
		t.Errorf("pods at the address: %v", got)
	}
	if got := s.SlicesOf("default", "s"); len(got) != 1 {
		t.Errorf("slices: %d, want 1", len(got))
	}
	if pod, ok := s.Pods.Get("default", "a"); !ok || len(pod.Spec.Containers) != 0 || pod.ManagedFields != nil || pod.Spec.NodeName != "node1" {
		t.Errorf("pod is not slim: %+v", pod)
	}
	if _, ok := s.Nodes.Get("", "node1"); ok {
		t.Error("a node that is not there")
	}
}

func TestKindsComeAndGo(t *testing.T) {
	d, _ := open(t)
	o := &origin{Directory: d}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var seen changes
	s := New(o, zap.NewNop(), seen.add)
	if err := s.Start(ctx); err != nil {
		t.Fatalf("kinds that are not served must not stop the rest: %v", err)
	}
	if len(s.AuthorizationPolicys.List()) != 0 || len(s.Pods.List()) != 2 {
		t.Errorf("%d policies, %d pods", len(s.AuthorizationPolicys.List()), len(s.Pods.List()))
	}
	const crd = "authorizationpolicies.security.istio.io"
	for range 2 {
		o.appear(crd)
		wait(t, "policy is known", func() bool { return len(s.AuthorizationPolicys.Namespace(metav1.NamespaceDefault)) == 1 })
		o.vanish(crd)
		if len(s.AuthorizationPolicys.List()) != 0 {
			t.Error("policies outlive their kind")
		}
		wait(t, "policy is told to be gone", func() bool {
			return seen.any(func(c Change) bool { _, ok := c.Old.(*securityv1.AuthorizationPolicy); return ok && c.New == nil })
		})
	}
}

func TestChangesHaveOldAndNew(t *testing.T) {
	d, file := open(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		if err := d.Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	var seen changes
	s := New(d, zap.NewNop(), seen.add)
	if err := s.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("apiVersion: v1\nkind: Pod\nmetadata: {name: a, labels: {x: z}}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	pod := func(o runtime.Object) string {
		p, ok := o.(*corev1.Pod)
		if !ok {
			return ""
		}
		return p.Name + p.Labels["x"]
	}
	wait(t, "update", func() bool { return seen.any(func(c Change) bool { return pod(c.Old) == "a" && pod(c.New) == "az" }) })
	wait(t, "delete", func() bool { return seen.any(func(c Change) bool { return pod(c.Old) == "host" && c.New == nil }) })
}

func TestStartFailsWithItsContext(t *testing.T) {
	d, _ := open(t)
	ctx, cancel := context.WithCancelCause(context.Background())
	why := errors.New("told to stop")
	cancel(why)
	if err := New(d, zap.NewNop(), func(Change) {}).Start(ctx); !errors.Is(err, why) {
		t.Errorf("got %v, want %v", err, why)
	}
}
