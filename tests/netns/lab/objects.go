package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/yaml"
)

// objects is the directory that stands for the API server: one file for each object.
type objects struct {
	dir string
	mu  sync.Mutex
	n   int
}

// put writes an object; apiVersion and kind are filled in.
func (o *objects) put(apiVersion, kind string, obj interface {
	runtime.Object
	metav1.Object
}) error {
	gv, err := schema.ParseGroupVersion(apiVersion)
	if err != nil {
		return err
	}
	obj.GetObjectKind().SetGroupVersionKind(gv.WithKind(kind))
	text, err := yaml.Marshal(obj)
	if err != nil {
		return fmt.Errorf("encode %s %s: %w", kind, obj.GetName(), err)
	}
	return o.write(fileName(kind, obj.GetNamespace(), obj.GetName()), text)
}

// write replaces a file at once, so that no reader sees half of it.
func (o *objects) write(name string, text []byte) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.n++
	temporary := filepath.Join(o.dir, fmt.Sprintf(".%d.tmp", o.n))
	if err := os.WriteFile(temporary, text, 0o644); err != nil {
		return err
	}
	return os.Rename(temporary, filepath.Join(o.dir, name))
}

func (o *objects) remove(name string) error {
	if err := os.Remove(filepath.Join(o.dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func fileName(kind, namespace, name string) string {
	parts := []string{strings.ToLower(kind), name, "yaml"}
	if namespace != "" {
		parts = []string{strings.ToLower(kind), namespace, name, "yaml"}
	}
	return strings.Join(parts, ".")
}

// Apply writes YAML documents under a name of the caller's choice; the same name again replaces them.
func (w *World) Apply(name, documents string) error {
	return w.objects.write(name+".yaml", []byte(documents))
}

// Delete removes what Apply wrote.
func (w *World) Delete(name string) error { return w.objects.remove(name + ".yaml") }

// Namespace writes a namespace with exactly these labels.
func (w *World) Namespace(name string, labels map[string]string) error {
	return w.objects.put("v1", "Namespace", &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}})
}

// StatusOf reads the status that istiod-lite wrote for an object; it is empty as long as there is none.
func (w *World) StatusOf(kind, namespace, name string) (string, error) {
	file := fmt.Sprintf("%s.%s.%s.yaml", strings.ToLower(kind), namespace, name)
	text, err := os.ReadFile(filepath.Join(w.objects.dir, ".status", file))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return string(text), err
}
