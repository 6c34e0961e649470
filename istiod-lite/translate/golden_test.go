package translate

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/tools/txtar"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/fairlead-mesh/fairlead/internal/kubedir"
	"github.com/fairlead-mesh/fairlead/internal/kubescheme"
)

var update = flag.Bool("update", false, "rewrite the wanted output in testdata")

// testMesh is the mesh of all cases.
var testMesh = Mesh{TrustDomain: "cluster.local", ClusterID: "Kubernetes", RootNamespace: "istio-system", DNSDomain: "cluster.local"}

// goldens runs every txtar below testdata/<stage>: in.yaml holds Kubernetes objects, want what is made of them.
func goldens(t *testing.T, stage string, translate func(t *testing.T, in *kubedir.Dir) string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("testdata", stage, "*.txtar"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no cases for %s: %v", stage, err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			archive, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if len(archive.Files) == 0 || archive.Files[0].Name != "in.yaml" {
				t.Fatalf("%s: want in.yaml first", file)
			}
			got := translate(t, open(t, archive.Files[0].Data))
			if *update {
				archive.Files = append(archive.Files[:1], txtar.File{Name: "want", Data: []byte(got)})
				if err := os.WriteFile(file, txtar.Format(archive), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			want := ""
			if len(archive.Files) > 1 {
				want = string(archive.Files[1].Data)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// open reads objects as a control plane would from a directory; a file that is not valid fails the test.
func open(t *testing.T, yaml []byte) *kubedir.Dir {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "in.yaml"), yaml, 0o644); err != nil {
		t.Fatal(err)
	}
	core, logs := observer.New(zap.ErrorLevel)
	scheme, err := kubescheme.New()
	if err != nil {
		t.Fatal(err)
	}
	d, err := kubedir.Open(dir, scheme, zap.New(core))
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range logs.All() {
		t.Fatalf("%s: %v", l.Message, l.ContextMap())
	}
	return d
}

// list is the objects of T's kind, by namespace and name.
func list[T runtime.Object](t *testing.T, d *kubedir.Dir, kind T) []T {
	t.Helper()
	l, err := d.ListerWatcher(kind).List(metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var out []T
	if err := meta.EachListItem(l, func(o runtime.Object) error {
		out = append(out, o.(T))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return out
}
