package kubedir

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/google/uuid"
	"go.uber.org/zap"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
)

const (
	// settle is how long the directory must be quiet before it is read again: editors truncate, then write.
	settle = 15 * time.Millisecond
	// settleMost bounds the wait while the directory keeps changing.
	settleMost = 100 * time.Millisecond
	// poll is for file systems that report no changes.
	poll = 5 * time.Second
	// historyLength is how many events of a kind a watcher may lag behind before it must list again.
	historyLength = 4096
)

// Dir is a directory of Kubernetes objects. It is safe for concurrent use.
type Dir struct {
	path   string
	scheme *runtime.Scheme
	log    *zap.Logger

	mu      sync.Mutex
	files   map[string]file
	kinds   map[schema.GroupVersionKind]*kind
	version uint64
}

// file is what was last read from a file; objects are those of its last valid content.
type file struct {
	content []byte
	modTime time.Time
	objects []object
}

// key names an object of any kind.
type key struct {
	gvk  schema.GroupVersionKind
	name types.NamespacedName
}

// kind is what the directory holds of one kind, what happened to it, and who watches it.
type kind struct {
	objects  map[types.NamespacedName]entry
	history  []event
	trimmed  uint64 // the version of the newest event that is no longer in history
	watchers map[*watcher]struct{}
}

// entry is an object as served (never changed once served) and its canonical source text.
type entry struct {
	source []byte
	obj    runtime.Object
	meta   metav1.Object
}

type event struct {
	version uint64
	watch.Event
}

// Open reads the directory once, so that lists are complete from the start; Run keeps it current. The directory must
// exist; files in it that are invalid are logged and do not fail Open. Objects of groups that scheme does not know are passed
// over.
func Open(path string, scheme *runtime.Scheme, log *zap.Logger) (*Dir, error) {
	d := &Dir{path: path, scheme: scheme, log: log, files: map[string]file{}, kinds: map[schema.GroupVersionKind]*kind{}}
	if err := d.reload(); err != nil {
		return nil, fmt.Errorf("open configuration directory: %w", err)
	}
	return d, nil
}

// ListerWatcher lists and watches the objects of obj's type, which must be one that the scheme knows; for another kind
// every list fails. Selectors are not served: a caller filters.
func (d *Dir) ListerWatcher(obj runtime.Object) cache.ListerWatcher {
	gvks, _, err := d.scheme.ObjectKinds(obj)
	if err != nil {
		return &listerWatcher{dir: d, err: fmt.Errorf("list %T from a directory: %w", obj, err)}
	}
	return &listerWatcher{dir: d, gvk: gvks[0]}
}

// Run follows the directory until ctx ends. It fails only when the directory cannot be watched.
func (d *Dir) Run(ctx context.Context) error {
	notify, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch configuration directory: %w", err)
	}
	defer notify.Close()
	if err := notify.Add(d.path); err != nil {
		return fmt.Errorf("watch configuration directory %s: %w", d.path, err)
	}
	ticker := time.NewTicker(poll)
	defer ticker.Stop()
	// What changed between Open and the watch is read by the first turn.
	quiet := time.NewTimer(0)
	defer quiet.Stop()
	var since time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case ev := <-notify.Events:
			if !isConfigFile(filepath.Base(ev.Name)) {
				continue
			}
			if since.IsZero() {
				since = time.Now()
			}
			if time.Since(since) < settleMost {
				quiet.Reset(settle)
			}
			continue
		case err := <-notify.Errors:
			d.log.Warn("watch configuration directory", zap.String("dir", d.path), zap.Error(err))
		case <-ticker.C:
		case <-quiet.C:
		}
		since = time.Time{}
		if err := d.reload(); err != nil {
			d.log.Warn("read configuration directory; what was read before stays", zap.Error(err))
		}
	}
}

// reload reads the files whose content changed and tells the watchers what that changed.
func (d *Dir) reload() error {
	entries, err := os.ReadDir(d.path)
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	present := map[string]bool{}
	changed := false
	for _, e := range entries {
		if e.IsDir() || !isConfigFile(e.Name()) {
			continue
		}
		present[e.Name()] = true
		changed = d.readFile(e.Name()) || changed
	}
	for name := range d.files {
		if !present[name] {
			delete(d.files, name)
			changed = true
		}
	}
	if changed {
		d.merge()
	}
	return nil
}

// readFile takes in one file and tells whether its objects may have changed. Called with mu held.
func (d *Dir) readFile(name string) bool {
	log := d.log.With(zap.String("file", filepath.Join(d.path, name)))
	old, known := d.files[name]
	content, modTime, err := readStable(filepath.Join(d.path, name))
	if errors.Is(err, fs.ErrNotExist) {
		return false
	}
	if err != nil {
		log.Warn("read configuration file; its earlier objects stay", zap.Error(err))
		return false
	}
	if known && bytes.Equal(content, old.content) {
		return false
	}
	objects, ignored, err := parseFile(d.scheme, content)
	if err != nil {
		log.Error("invalid configuration file; its earlier objects stay", zap.Error(err))
		d.files[name] = file{content: content, modTime: modTime, objects: old.objects}
		return false
	}
	for _, what := range ignored {
		log.Info("object of an API that is not read here", zap.String("object", what))
	}
	d.files[name] = file{content: content, modTime: modTime, objects: objects}
	return true
}

func readStable(path string) ([]byte, time.Time, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, time.Time{}, err
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, time.Time{}, err
	}
	return content, info.ModTime(), nil
}

// merge makes the kinds hold what the files say together. Called with mu held.
func (d *Dir) merge() {
	names := make([]string, 0, len(d.files))
	for name := range d.files {
		names = append(names, name)
	}
	sort.Strings(names)
	wanted := map[key]string{}
	for _, name := range names {
		for _, o := range d.files[name].objects {
			k := key{gvk: o.gvk, name: types.NamespacedName{Namespace: o.meta.GetNamespace(), Name: o.meta.GetName()}}
			if first, dup := wanted[k]; dup {
				d.log.Warn("object is defined twice; the first counts", zap.String("kind", k.gvk.Kind), zap.Stringer("object", k.name),
					zap.String("first", first), zap.String("second", name), zap.Int("line", o.line))
				continue
			}
			wanted[k] = name
			d.put(k, o, d.files[name].modTime)
		}
	}
	for gvk, held := range d.kinds {
		for name, e := range held.objects {
			if _, ok := wanted[key{gvk: gvk, name: name}]; !ok {
				delete(held.objects, name)
				d.publish(held, watch.Deleted, e)
			}
		}
	}
}

// put stores one object when it differs from what is held. Called with mu held.
func (d *Dir) put(k key, o object, modTime time.Time) {
	source, err := json.Marshal(o.obj)
	if err != nil {
		d.log.Error("encode object", zap.String("kind", k.gvk.Kind), zap.Stringer("object", k.name), zap.Error(err))
		return
	}
	held := d.kind(k.gvk)
	old, exists := held.objects[k.name]
	if exists && bytes.Equal(source, old.source) {
		return
	}
	e := entry{source: source, obj: o.obj.DeepCopyObject()}
	e.meta = e.obj.(metav1.Object)
	if e.meta.GetUID() == "" {
		e.meta.SetUID(types.UID(uuid.NewSHA1(uuid.NameSpaceOID, []byte(k.gvk.String()+"/"+k.name.String())).String()))
	}
	eventType := watch.Added
	created, generation := metav1.NewTime(modTime.Truncate(time.Second)), int64(1)
	if exists {
		eventType = watch.Modified
		created, generation = old.meta.GetCreationTimestamp(), old.meta.GetGeneration()
		if !sameSpec(source, old.source) {
			generation++
		}
	}
	if t := e.meta.GetCreationTimestamp(); t.IsZero() {
		e.meta.SetCreationTimestamp(created)
	}
	e.meta.SetGeneration(generation)
	held.objects[k.name] = e
	d.publish(held, eventType, e)
}

// sameSpec tells whether two objects differ at most in metadata and status, as generations count.
func sameSpec(a, b []byte) bool {
	var x, y map[string]any
	if json.Unmarshal(a, &x) != nil || json.Unmarshal(b, &y) != nil {
		return false
	}
	for _, m := range []map[string]any{x, y} {
		delete(m, "metadata")
		delete(m, "status")
	}
	return equality.Semantic.DeepEqual(x, y)
}

// publish gives the object its version and tells the watchers. Called with mu held.
func (d *Dir) publish(held *kind, eventType watch.EventType, e entry) {
	d.version++
	obj := e.obj
	if eventType == watch.Deleted {
		obj = obj.DeepCopyObject()
	}
	obj.(metav1.Object).SetResourceVersion(strconv.FormatUint(d.version, 10))
	ev := event{version: d.version, Event: watch.Event{Type: eventType, Object: obj}}
	held.history = append(held.history, ev)
	if over := len(held.history) - historyLength; over > 0 {
		held.trimmed = held.history[over-1].version
		held.history = append([]event(nil), held.history[over:]...)
	}
	for w := range held.watchers {
		w.send(own(ev.Event))
	}
}

// kind is the table of a kind, made when first asked for. Called with mu held.
func (d *Dir) kind(gvk schema.GroupVersionKind) *kind {
	held, ok := d.kinds[gvk]
	if !ok {
		held = &kind{objects: map[types.NamespacedName]entry{}, watchers: map[*watcher]struct{}{}}
		d.kinds[gvk] = held
	}
	return held
}
