package build

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestModuleVersion(t *testing.T) {
	mod := []byte("module x\n\nrequire k8s.io/kubernetes v1.36.3\n\nrequire (\n\tgithub.com/a/b v1.2.3 // indirect\n\tgithub.com/a/bc v9.0.0\n)\n")
	for module, want := range map[string]string{"k8s.io/kubernetes": "v1.36.3", "github.com/a/b": "v1.2.3", "": "", "github.com/a": "error"} {
		got, err := moduleVersion(mod, module)
		if err != nil {
			got = "error"
		}
		if got != want {
			t.Errorf("%q: got %q (%v), want %q", module, got, err, want)
		}
	}
}

// Every component's module must be there and require what the component says.
func TestComponentsHaveTheirModules(t *testing.T) {
	for _, c := range components() {
		for _, f := range []string{"go.mod", "go.sum"} {
			path := filepath.Join("..", "..", "build", c.name, f)
			b, err := os.ReadFile(path)
			if err != nil && (c.module != "" || f == "go.mod") {
				t.Error(err)
			}
			if f != "go.mod" {
				continue
			}
			if _, err := moduleVersion(b, c.module); err != nil {
				t.Errorf("%s: %v", path, err)
			}
		}
	}
}

func TestInputs(t *testing.T) {
	write := func(dir, name, content string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	c := component{name: "c", programs: []program{{".", "c"}}}
	hash := func(dir, toolchain string) string {
		t.Helper()
		h, err := c.inputs(dir, "v1", toolchain)
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	dir := t.TempDir()
	write(dir, "go.mod", "module a")
	write(dir, "main.go", "package main")
	base := hash(dir, "go1")
	write(dir, "README", "no input")
	write(dir, "main_test.go", "package main")
	if got := hash(dir, "go1"); got != base {
		t.Error("what is no input changed the hash")
	}
	if hash(dir, "go2") == base {
		t.Error("another toolchain did not change the hash")
	}
	write(dir, "main.go", "package main // changed")
	if hash(dir, "go1") == base {
		t.Error("another source did not change the hash")
	}
}

func TestByDirectory(t *testing.T) {
	got := byDirectory([]program{{"x/cmd/a", "a"}, {"x/cmd/b", "b"}, {"x/server/v3", "etcd"}, {"x/p/c", "cni/c"}, {".", "box"}})
	var names [][]string
	for _, g := range got {
		var n []string
		for _, p := range g {
			n = append(n, p.out)
		}
		names = append(names, n)
	}
	if d := cmp.Diff([][]string{{"a", "b"}, {"etcd"}, {"cni/c"}, {"box"}}, names); d != "" {
		t.Error(d)
	}
}

func TestFollowKeepsWhatIsNoPackage(t *testing.T) {
	b := Builder{Out: io.Discard}
	got := b.follow(strings.NewReader("go: downloading a v1\nk8s.io/api\n# pkg\na.go:1:2: undefined: x\n"), "c")
	if d := cmp.Diff("# pkg\na.go:1:2: undefined: x", got); d != "" {
		t.Error(d)
	}
}
