package agent

import (
	"testing"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"
)

// unlisted is a cluster of which nothing is followed.
type unlisted struct{ cluster }

func (unlisted) podLists() cache.ListerWatcher       { return nil }
func (unlisted) namespaceLists() cache.ListerWatcher { return nil }

// Whatever a pod is to be looked at for, one worker does it at a time, and asks the kernel if one of the reasons wants that.
func TestOneLookAtAPodAtATime(t *testing.T) {
	w := newWatcher(zap.NewNop(), unlisted{}, nil, Config{NodeName: "node1"})
	defer w.queue.ShutDown()
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "app", Name: "web"}, Spec: corev1.PodSpec{NodeName: "node1"}}
	audited := func() { w.look(pod) }
	changed := func() { w.replaced(pod, pod) }
	for name, tc := range map[string]struct {
		before, during []func()
		first, second  bool // whether the kernel is asked
	}{
		"a change":                  {[]func(){changed}, []func(){changed}, false, false},
		"an audit and a change":     {[]func(){audited, changed}, []func(){changed}, true, false},
		"a change and an audit":     {[]func(){changed, audited}, []func(){audited, changed}, true, true},
		"an audit during the first": {[]func(){changed}, []func(){audited}, false, true},
	} {
		for _, add := range tc.before {
			add()
		}
		if n := w.queue.Len(); n != 1 {
			t.Errorf("%s: %d looks in the queue, want 1", name, n)
		}
		item, _ := w.queue.Get()
		if got := w.doubts(item.key); got != tc.first {
			t.Errorf("%s: the kernel is asked: %v", name, got)
		}
		for _, add := range tc.during {
			add()
		}
		if n := w.queue.Len(); n != 0 {
			t.Errorf("%s: %d looks for another worker, want none", name, n)
		}
		w.queue.Done(item)
		if n := w.queue.Len(); n != 1 {
			t.Fatalf("%s: %d looks after the first, want 1", name, n)
		}
		item, _ = w.queue.Get()
		if got := w.doubts(item.key); got != tc.second {
			t.Errorf("%s: the second time the kernel is asked: %v", name, got)
		}
		w.queue.Done(item)
	}
}
