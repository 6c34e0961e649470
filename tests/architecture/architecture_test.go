// Package architecture holds the rules of the house as tests: who may import whom, what a package says of itself, and
// that the two roads of docs/architecture.md can be followed from file to file.
package architecture

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"go/parser"
	"go/token"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/fairlead-mesh/fairlead/"

type goPackage struct {
	ImportPath string
	Dir        string
	Doc        string
	Imports    []string
	Deps       []string
	GoFiles    []string
}

func root(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		t.Fatalf("find the module: %v", err)
	}
	return strings.TrimSpace(string(out))
}

// packages lists the module's own packages, keyed by their path below the module.
func packages(t *testing.T) map[string]goPackage {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Dir,Doc,Imports,Deps,GoFiles", "./...")
	cmd.Dir = root(t)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	all := map[string]goPackage{}
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p goPackage
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatalf("read go list: %v", err)
		}
		all[strings.TrimPrefix(p.ImportPath, module)] = p
	}
}

// rule says what the packages below one of From may not have among all they depend on, directly or not. A trailing slash
// stands for everything below.
type rule struct {
	name   string
	from   []string
	forbid []string
	except []string
}

var rules = []rule{
	{name: "ztunnel stands alone", from: []string{"ztunnel"},
		forbid: []string{"k8s.io/", module + "waypoint", module + "cni/", module + "istiod-lite"}},
	{name: "waypoint stands alone", from: []string{"waypoint"},
		forbid: []string{"k8s.io/", module + "ztunnel", module + "cni/", module + "istiod-lite"}},
	{name: "the plugin is small", from: []string{"cni/plugin"},
		forbid: []string{"k8s.io/", module + "cni/agent", "google.golang.org/grpc"}},
	{name: "Kubernetes only where it is watched", from: []string{"internal", "bpf", "cni/redirect", "api"},
		forbid: []string{"k8s.io/client-go", "k8s.io/api/"}, except: []string{"internal/kubedir", "internal/kubescheme"}},
	{name: "the agent is small", from: []string{"cmd/cni-agent", "cni"},
		forbid: []string{"k8s.io/client-go/kubernetes", "istio.io/", "sigs.k8s.io/gateway-api"}},
	{name: "decisions do no I/O", from: []string{"internal/route", "internal/authz", "internal/httproute", "internal/balance", "internal/membership"},
		forbid: []string{"go.uber.org/zap", "google.golang.org/grpc", module + "api/", "os/exec"}},
	{name: "xds knows no noun", from: []string{"internal/xds"},
		forbid: []string{module + "internal/mesh", module + "api/"}},
	{name: "components do not import the control plane", from: []string{"cni", "ztunnel", "waypoint"},
		forbid: []string{module + "istiod-lite"}},
	{name: "the control plane does not import the data plane", from: []string{"istiod-lite"},
		forbid: []string{module + "ztunnel", module + "waypoint", module + "cni/"}},
}

func below(path string, roots []string) bool {
	return slices.ContainsFunc(roots, func(r string) bool {
		return path == strings.TrimSuffix(r, "/") || strings.HasPrefix(path, strings.TrimSuffix(r, "/")+"/")
	})
}

func TestImports(t *testing.T) {
	all := packages(t)
	for _, r := range rules {
		t.Run(r.name, func(t *testing.T) {
			found := false
			for path, p := range all {
				if !below(path, r.from) || below(path, r.except) {
					continue
				}
				found = true
				for _, dep := range p.Deps {
					if below(dep, r.forbid) {
						t.Errorf("%s depends on %s", path, dep)
					}
				}
			}
			if !found {
				t.Errorf("no package below %v: the rule guards nothing", r.from)
			}
		})
	}
}

func TestMeshImportsStandardLibraryOnly(t *testing.T) {
	for _, dep := range packages(t)["internal/mesh"].Deps {
		if strings.Contains(strings.SplitN(dep, "/", 2)[0], ".") {
			t.Errorf("internal/mesh depends on %s", dep)
		}
	}
}

func TestOnlyWireSeesModelAndWireTypes(t *testing.T) {
	for path, p := range packages(t) {
		if path == "internal/wire" || strings.HasPrefix(path, "tests/") {
			continue
		}
		sees := func(s string) bool { return slices.Contains(p.Imports, module+s) }
		if sees("internal/mesh") && (sees("api/workload") || sees("api/security")) {
			t.Errorf("%s imports both internal/mesh and a wire type", path)
		}
	}
}

func TestCommandImportsOneComponent(t *testing.T) {
	components := []string{"ztunnel", "waypoint", "istiod-lite", "cni/agent", "cni/plugin", "cli"}
	for path, p := range packages(t) {
		if !strings.HasPrefix(path, "cmd/") {
			continue
		}
		var used []string
		for _, c := range components {
			if slices.Contains(p.Imports, module+c) {
				used = append(used, c)
			}
		}
		if len(used) > 1 {
			t.Errorf("%s imports %v: one component each", path, used)
		}
	}
}

var forbiddenNames = []string{"util", "utils", "common", "helper", "helpers", "types", "base", "misc"}

// kinds of the rooms below internal/; the test environment is plumbing too.
var kind = regexp.MustCompile(`^Package \w+ \((words|state|decisions|protocols|plumbing)\) `)

func TestPackagesSayWhatTheyAre(t *testing.T) {
	for path, p := range packages(t) {
		if slices.Contains(forbiddenNames, filepath.Base(path)) {
			t.Errorf("%s: a name that says nothing", path)
		}
		if len(p.GoFiles) == 0 || strings.HasPrefix(path, "api/") {
			continue
		}
		if p.Doc == "" {
			t.Errorf("%s has no package comment", path)
		}
		if strings.HasPrefix(path, "internal/") && !kind.MatchString(firstComment(t, p)) {
			t.Errorf("%s: the package comment does not open with its kind, `// Package x (words|state|decisions|protocols|plumbing) …`: %q", path, p.Doc)
		}
	}
}

// firstComment is the package comment as written; go list shortens its Doc to one sentence.
func firstComment(t *testing.T, p goPackage) string {
	t.Helper()
	for _, name := range p.GoFiles {
		f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, name), nil, parser.ParseComments|parser.PackageClauseOnly)
		if err != nil {
			t.Fatalf("parse %s: %v", name, err)
		}
		if f.Doc != nil {
			return f.Doc.Text()
		}
	}
	return ""
}

func TestNoInitAndNoTodo(t *testing.T) {
	generated := regexp.MustCompile(`(\.pb|_bpfel|_bpfeb)\.go$`)
	bad := map[*regexp.Regexp]string{
		regexp.MustCompile(`(?m)^func init\(\)`):       "init() runs unseen: wire it in main",
		regexp.MustCompile(`\b(TODO|FIXME|XXX)\b:? *`): "an open end: do it, or write it in an issue",
	}
	for path, p := range packages(t) {
		if path == "tests/architecture" {
			continue
		}
		for _, name := range p.GoFiles {
			if generated.MatchString(name) {
				continue
			}
			src, err := os.ReadFile(filepath.Join(p.Dir, name))
			if err != nil {
				t.Fatal(err)
			}
			for re, why := range bad {
				if re.Match(src) {
					t.Errorf("%s/%s: %s", path, name, why)
				}
			}
		}
	}
}

// The two roads of docs/architecture.md: each file says in its opening comment where the reader goes next.
var roads = map[string][]string{
	"a connection": {"cni/redirect/redirect.go", "ztunnel/outbound.go", "internal/route/outbound.go", "internal/hbone/client.go",
		"internal/hbone/server.go", "ztunnel/inbound.go", "internal/authz/authz.go", "internal/relay/relay.go"},
	"a request": {"waypoint/serve.go", "internal/httproute/httproute.go", "waypoint/forward.go"},
	"a policy": {"istiod-lite/pipeline.go", "istiod-lite/translate/authorization.go", "internal/wire/authorization.go",
		"internal/xds/server.go", "internal/xds/client.go", "internal/state/store.go", "internal/authz/authz.go"},
}

func TestRoadsCanBeFollowed(t *testing.T) {
	top := root(t)
	next := regexp.MustCompile(`Next: ([\w./-]+)`)
	for name, files := range roads {
		t.Run(name, func(t *testing.T) {
			for _, file := range files {
				f, err := os.Open(filepath.Join(top, file))
				if err != nil {
					t.Errorf("the road is cut: %v", err)
					continue
				}
				found := ""
				for s := bufio.NewScanner(f); s.Scan() && found == ""; {
					if m := next.FindStringSubmatch(s.Text()); m != nil {
						found = strings.TrimSuffix(m[1], ".")
					}
				}
				f.Close()
				if found == "" {
					t.Errorf("%s has no `Next: path` in its opening comment", file)
				} else if _, err := os.Stat(filepath.Join(top, found)); err != nil {
					t.Errorf("%s: `Next: %s` leads nowhere", file, found)
				}
			}
		})
	}
}
