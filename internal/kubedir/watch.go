package kubedir

import (
	"errors"
	"fmt"
	"sort"
	"strconv"
	"sync"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
)

// listerWatcher is the list/watch API of one kind.
type listerWatcher struct {
	dir *Dir
	gvk schema.GroupVersionKind
	err error
}

// IsWatchListSemanticsUnSupported tells reflectors to list first and then watch.
func (l *listerWatcher) IsWatchListSemanticsUnSupported() bool { return true }

// List returns the kind's objects, sorted by namespace and name, at the directory's present version.
func (l *listerWatcher) List(options metav1.ListOptions) (runtime.Object, error) {
	if err := l.check(options); err != nil {
		return nil, err
	}
	l.dir.mu.Lock()
	defer l.dir.mu.Unlock()
	items := l.dir.sorted(l.gvk)
	listKind := l.gvk.GroupVersion().WithKind(l.gvk.Kind + "List")
	list, err := l.dir.scheme.New(listKind)
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", l.gvk, err)
	}
	if err := meta.SetList(list, items); err != nil {
		return nil, fmt.Errorf("list %s: %w", l.gvk, err)
	}
	list.(metav1.ListInterface).SetResourceVersion(strconv.FormatUint(l.dir.version, 10))
	return list, nil
}

// Watch sends what happened since options.ResourceVersion; without one, what there is and then what happens.
func (l *listerWatcher) Watch(options metav1.ListOptions) (watch.Interface, error) {
	if err := l.check(options); err != nil {
		return nil, err
	}
	l.dir.mu.Lock()
	defer l.dir.mu.Unlock()
	held := l.dir.kind(l.gvk)
	var backlog []watch.Event
	if options.ResourceVersion == "" || options.ResourceVersion == "0" {
		for _, obj := range l.dir.sorted(l.gvk) {
			backlog = append(backlog, watch.Event{Type: watch.Added, Object: obj})
		}
	} else {
		since, err := strconv.ParseUint(options.ResourceVersion, 10, 64)
		if err != nil {
			return nil, apierrors.NewBadRequest(fmt.Sprintf("resource version %q is not a number", options.ResourceVersion))
		}
		if since < held.trimmed || since > l.dir.version {
			return nil, apierrors.NewResourceExpired(fmt.Sprintf("resource version %d is too old", since))
		}
		for _, ev := range held.history {
			if ev.version > since {
				backlog = append(backlog, own(ev.Event))
			}
		}
	}
	w := newWatcher(backlog)
	w.forget = func() {
		l.dir.mu.Lock()
		defer l.dir.mu.Unlock()
		delete(held.watchers, w)
	}
	held.watchers[w] = struct{}{}
	go w.run()
	return w, nil
}

func (l *listerWatcher) check(options metav1.ListOptions) error {
	if l.err != nil {
		return l.err
	}
	if options.LabelSelector != "" || options.FieldSelector != "" {
		return apierrors.NewBadRequest(errors.New("selectors are not served from a directory").Error())
	}
	return nil
}

// sorted are copies of the kind's objects by namespace and name. Called with mu held.
func (d *Dir) sorted(gvk schema.GroupVersionKind) []runtime.Object {
	held := d.kind(gvk)
	entries := make([]entry, 0, len(held.objects))
	for _, e := range held.objects {
		entries = append(entries, e)
	}
	sort.Slice(entries, func(i, j int) bool {
		a, b := entries[i].meta, entries[j].meta
		if a.GetNamespace() != b.GetNamespace() {
			return a.GetNamespace() < b.GetNamespace()
		}
		return a.GetName() < b.GetName()
	})
	objects := make([]runtime.Object, len(entries))
	for i, e := range entries {
		objects[i] = e.obj.DeepCopyObject()
	}
	return objects
}

// own is an event whose object the receiver may change, as informers do.
func own(ev watch.Event) watch.Event {
	return watch.Event{Type: ev.Type, Object: ev.Object.DeepCopyObject()}
}

// watcher is one open watch. Its queue is unbounded, so that a slow reader never holds up the directory.
type watcher struct {
	forget func()
	result chan watch.Event
	wake   chan struct{}
	done   chan struct{}
	once   sync.Once

	mu    sync.Mutex
	queue []watch.Event
}

func newWatcher(backlog []watch.Event) *watcher {
	w := &watcher{result: make(chan watch.Event), wake: make(chan struct{}, 1), done: make(chan struct{}), queue: backlog}
	w.wake <- struct{}{}
	return w
}

// ResultChan is closed after Stop.
func (w *watcher) ResultChan() <-chan watch.Event { return w.result }

// Stop ends the watch.
func (w *watcher) Stop() {
	w.once.Do(func() {
		close(w.done)
		w.forget()
	})
}

// send queues an event; it never blocks.
func (w *watcher) send(ev watch.Event) {
	w.mu.Lock()
	w.queue = append(w.queue, ev)
	w.mu.Unlock()
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (w *watcher) run() {
	defer close(w.result)
	for {
		select {
		case <-w.done:
			return
		case <-w.wake:
		}
		w.mu.Lock()
		batch := w.queue
		w.queue = nil
		w.mu.Unlock()
		for _, ev := range batch {
			select {
			case <-w.done:
				return
			case w.result <- ev:
			}
		}
	}
}
