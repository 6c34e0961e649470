package agent

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"

	"github.com/fairlead-mesh/fairlead/cni/plugin"
)

func TestMembership(t *testing.T) {
	w := &watcher{exclude: []string{"system"}, pods: cache.NewStore(cache.MetaNamespaceKeyFunc), namespaces: cache.NewStore(cache.MetaNamespaceKeyFunc)}
	for name, mode := range map[string]string{"shop": modeAmbient, "legacy": "", "mixed": "", "system": modeAmbient} {
		w.namespaces.Add(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{modeLabel: mode}}})
	}
	for _, p := range []struct{ namespace, name, mode, mirror string }{
		{"shop", "in", "", ""}, {"shop", "out", modeNone, ""}, {"shop", "static", "", "hash-of-file"}, {"legacy", "other", "", ""},
		{"mixed", "single", modeAmbient, ""}, {"system", "agent", "", ""},
	} {
		meta := metav1.ObjectMeta{Namespace: p.namespace, Name: p.name, UID: types.UID("uid-" + p.name), Labels: map[string]string{}, Annotations: map[string]string{}}
		if p.mode != "" {
			meta.Labels[modeLabel] = p.mode
		}
		if p.mirror != "" {
			meta.Annotations[mirrorAnnotation] = p.mirror
		}
		w.pods.Add(&corev1.Pod{ObjectMeta: meta})
	}
	w.namespaces.Add(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "once"}})
	want := plugin.Record{Namespaces: []string{"mixed", "shop"}, Single: []string{"mixed", "once"}, Pods: map[string]bool{
		"uid-in": true, "uid-out": false, "uid-static": true, "hash-of-file": true, "uid-other": false, "uid-single": true, "uid-agent": false,
	}}
	// Of those that the record before has, one had a pod, one is deleted, one is of the mesh itself now.
	got := w.membership([]string{"mixed", "once", "deleted", "shop"})
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("record (-want +got):\n%s", diff)
	}
	w.pods.Delete(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "mixed", Name: "single"}})
	if got = w.membership(got.Single); got.Outside("mixed", "new") || got.Outside("once", "new") || !got.Outside("legacy", "new") {
		t.Errorf("after the labelled pod is gone: %+v", got)
	}
}

// What the plugin remembers is for an agent that is away: one that is back has it in the record, and not before.
func TestRecordTakesThePlaceOfWhatThePluginRemembers(t *testing.T) {
	dir := t.TempDir()
	held := filepath.Join(dir, "held", "u-1")
	if err := writeDurably(held, nil); err != nil {
		t.Fatal(err)
	}
	pods, namespaces := cache.NewStore(cache.MetaNamespaceKeyFunc), cache.NewStore(cache.MetaNamespaceKeyFunc)
	a := &agent{log: zap.NewNop(), watch: &watcher{pods: pods, namespaces: namespaces},
		cfg: Config{Record: filepath.Join(dir, "mesh.json"), PluginAccess: filepath.Join(dir, "access.json")}}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- a.keepMembership(ctx) }()
	time.Sleep(10 * time.Millisecond)
	if _, err := os.Stat(held); err != nil {
		t.Errorf("before the agent knows its pods: %v", err)
	}
	a.started.Store(true)
	for _, err := os.Stat(held); err == nil; _, err = os.Stat(held) {
		time.Sleep(time.Millisecond)
	}
	if _, err := os.Stat(a.cfg.Record); err != nil {
		t.Errorf("forgotten without a record: %v", err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestRecordIsReplacedAsAWhole(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new", "mesh.json")
	for _, text := range []string{`{"Namespaces":["a"]}`, `{"Namespaces":["b"]}`} {
		if err := writeDurably(path, []byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	r, ok, err := plugin.ReadRecord(path)
	if err != nil || !ok || !cmp.Equal(r.Namespaces, []string{"b"}) {
		t.Errorf("%+v, %v, %v", r, ok, err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info, err)
	}
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 1 {
		t.Errorf("left: %v, %v", entries, err)
	}
}
