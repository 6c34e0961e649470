package kubedir

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	istiosecurity "istio.io/client-go/pkg/apis/security/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/cache"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/fairlead-mesh/fairlead/internal/kubescheme"
)

const twoPods = `# a comment
apiVersion: v1
kind: Pod
metadata: {name: a, labels: {app: a}}
spec: {containers: [{name: c, image: i}]}
---
apiVersion: v1
kind: Pod
metadata: {name: b, namespace: other}
`

func write(t *testing.T, dir, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// follow runs an informer on the directory and returns a function that waits until its pods are the ones named.
func follow(t *testing.T, d *Dir) func(want ...string) []*corev1.Pod {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	go func() {
		if err := d.Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	informer := cache.NewSharedIndexInformer(d.ListerWatcher(&corev1.Pod{}), &corev1.Pod{}, 0, cache.Indexers{})
	go informer.Run(ctx.Done())
	return func(want ...string) []*corev1.Pod {
		t.Helper()
		var got []string
		for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
			var pods []*corev1.Pod
			got = nil
			list := informer.GetStore().List()
			for _, o := range list {
				pods = append(pods, o.(*corev1.Pod))
			}
			for _, p := range pods {
				got = append(got, p.Namespace+"/"+p.Name+"@"+p.Labels["app"])
			}
			if sameSet(got, want) {
				return pods
			}
		}
		t.Fatalf("pods: got %v, want %v", got, want)
		return nil
	}
}

func sameSet(a, b []string) bool {
	if len(a) != len(b) {
		return false
	}
	seen := map[string]bool{}
	for _, x := range a {
		seen[x] = true
	}
	for _, x := range b {
		if !seen[x] {
			return false
		}
	}
	return true
}

func TestInformerFollowsDirectory(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "z.yaml", twoPods)
	core, logs := observer.New(zap.WarnLevel)
	d, err := Open(dir, scheme(t), zap.New(core))
	if err != nil {
		t.Fatal(err)
	}
	wait := follow(t, d)
	pods := wait("default/a@a", "other/b@")
	for _, p := range pods {
		if p.UID == "" || p.ResourceVersion == "" || p.Generation != 1 || p.CreationTimestamp.IsZero() {
			t.Errorf("metadata not filled in: %+v", p.ObjectMeta)
		}
	}
	write(t, dir, "more.yml", "apiVersion: v1\nkind: Pod\nmetadata: {name: c}\n")
	wait("default/a@a", "other/b@", "default/c@")

	write(t, dir, "z.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: a, labels: {app: a2}}\nspec: {nodeName: node1}\n")
	for _, p := range wait("default/a@a2", "default/c@") {
		if want := map[string]int64{"a": 2, "c": 1}[p.Name]; p.Generation != want {
			t.Errorf("generation of %s: got %d, want %d", p.Name, p.Generation, want)
		}
	}
	// An invalid file changes nothing and is reported with its line (the parser counts some of them one short).
	write(t, dir, "z.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: [}\n")
	write(t, dir, "more.yml", "apiVersion: v1\nkind: Pod\nmetadata: {name: d}\n")
	wait("default/a@a2", "default/d@")
	found := false
	for _, l := range logs.FilterMessageSnippet("invalid configuration file").All() {
		err, _ := l.ContextMap()["error"].(string)
		found = found || len(err) > 7 && (err[:7] == "line 6:" || err[:7] == "line 7:")
	}
	if !found {
		t.Errorf("no report that names the line: %v", logs.All())
	}
	if err := os.Remove(filepath.Join(dir, "more.yml")); err != nil {
		t.Fatal(err)
	}
	wait("default/a@a2")
}

func scheme(t *testing.T) *runtime.Scheme {
	t.Helper()
	s, err := kubescheme.New()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestParseFile(t *testing.T) {
	scheme := scheme(t)
	tests := []struct {
		name, text string
		want       []string
		err        string
		ignored    []string
	}{
		{name: "empty", text: "\n---\n# nothing\n---\n"},
		{name: "older version served as v1", text: "apiVersion: security.istio.io/v1beta1\nkind: AuthorizationPolicy\nmetadata: {name: p}\nspec: {action: DENY}\n",
			want: []string{"security.istio.io/v1, Kind=AuthorizationPolicy default/p"}},
		{name: "cluster scoped", text: "apiVersion: gateway.networking.k8s.io/v1\nkind: GatewayClass\nmetadata: {name: g}\nspec: {controllerName: a/b}\n",
			want: []string{"gateway.networking.k8s.io/v1, Kind=GatewayClass /g"}},
		{name: "list", text: "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Namespace\n  metadata: {name: ns}\n",
			want: []string{"/v1, Kind=Namespace /ns"}},
		{name: "unknown group", text: "apiVersion: example.com/v1\nkind: Thing\nmetadata: {name: p}\n", ignored: []string{"line 1: example.com/v1, Kind=Thing"}},
		{name: "unknown kind of a known group", text: "\n---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolcy\nmetadata: {name: p}\n",
			err: "line 3: unknown kind security.istio.io/v1, Kind=AuthorizationPolcy"},
		{name: "unknown field", text: "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {containrs: []}\n", err: `line 1: Pod: unknown field "spec.containrs"`},
		{name: "no name", text: "apiVersion: v1\nkind: Pod\n", err: "line 1: Pod: metadata.name is missing"},
		{name: "not an object", text: "a: b\n", err: "line 1: not a Kubernetes object: apiVersion and kind are needed"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			objects, ignored, err := parseFile(scheme, []byte(tt.text))
			var got []string
			for _, o := range objects {
				got = append(got, o.gvk.String()+" "+o.meta.GetNamespace()+"/"+o.meta.GetName())
			}
			message := ""
			if err != nil {
				message = err.Error()
			}
			if diff := cmp.Diff(tt.err, message); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("objects (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.ignored, ignored); diff != "" {
				t.Errorf("ignored (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDuplicateCountsOnce(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "1.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: a, labels: {app: first}}\n")
	write(t, dir, "2.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: a, labels: {app: second}}\n")
	d, err := Open(dir, scheme(t), zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	wait := follow(t, d)
	wait("default/a@first")
	if err := os.Remove(filepath.Join(dir, "1.yaml")); err != nil {
		t.Fatal(err)
	}
	wait("default/a@second")
}

func TestWatchVersions(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "1.yaml", twoPods)
	d, err := Open(dir, scheme(t), zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	lw := d.ListerWatcher(&corev1.Pod{})
	if _, err := lw.Watch(metav1.ListOptions{ResourceVersion: "99"}); err == nil {
		t.Error("a version from the future (of an earlier process) must make the reader list again")
	}
	if _, err := lw.List(metav1.ListOptions{LabelSelector: "a=b"}); err == nil {
		t.Error("a selector must be refused, not ignored")
	}
	w, err := lw.Watch(metav1.ListOptions{ResourceVersion: "1"})
	if err != nil {
		t.Fatal(err)
	}
	if ev := <-w.ResultChan(); ev.Object.(*corev1.Pod).Name != "b" {
		t.Errorf("first event after version 1: got %s, want pod b", ev.Object.(*corev1.Pod).Name)
	}
	w.Stop()
	if _, open := <-w.ResultChan(); open {
		t.Error("an event after Stop")
	}
}

// Every kind the mesh reads must be listable.
func TestKinds(t *testing.T) {
	d, err := Open(t.TempDir(), scheme(t), zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	for _, lw := range []cache.ListerWatcher{
		d.ListerWatcher(&istiosecurity.AuthorizationPolicy{}), d.ListerWatcher(&istiosecurity.PeerAuthentication{}),
		d.ListerWatcher(&gatewayv1.Gateway{}), d.ListerWatcher(&gatewayv1.HTTPRoute{}), d.ListerWatcher(&gatewayv1.GRPCRoute{}),
		d.ListerWatcher(&corev1.Namespace{}), d.ListerWatcher(&corev1.Node{}),
	} {
		if _, err := lw.List(metav1.ListOptions{}); err != nil {
			t.Error(err)
		}
	}
}
