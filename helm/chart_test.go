// Package helm_test checks the chart: its values against their schema and their table, its templates by Helm itself.
package helm_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"sort"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"

	"github.com/fairlead-mesh/fairlead/internal/testenv"
)

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// leaves are the values a user sets, as dotted names: a map is one value where the schema says nothing of its keys.
func leaves(prefix string, schema map[string]any) []string {
	properties, ok := schema["properties"].(map[string]any)
	if !ok || strings.HasSuffix(prefix, ".resources") {
		return []string{prefix}
	}
	var out []string
	for name, sub := range properties {
		path := strings.TrimPrefix(prefix+"."+name, ".")
		if path != "global" { // Helm's own
			out = append(out, leaves(path, sub.(map[string]any))...)
		}
	}
	sort.Strings(out)
	return out
}

func defined(values map[string]any, path string) bool {
	var at any = values
	for _, name := range strings.Split(path, ".") {
		m, ok := at.(map[string]any)
		if !ok {
			return false
		}
		if at, ok = m[name]; !ok {
			return false
		}
	}
	return true
}

func TestValuesAreDocumentedAndChecked(t *testing.T) {
	var schema, values map[string]any
	if err := json.Unmarshal(read(t, "fairlead/values.schema.json"), &schema); err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(read(t, "fairlead/values.yaml"), &values); err != nil {
		t.Fatal(err)
	}
	names := leaves("", schema)
	for _, name := range names {
		if !defined(values, name) {
			t.Errorf("%s is in values.schema.json and not in values.yaml", name)
		}
	}
	for section := range values {
		if !slices.ContainsFunc(names, func(name string) bool { return name == section || strings.HasPrefix(name, section+".") }) {
			t.Errorf("%s is in values.yaml and not in values.schema.json", section)
		}
	}
	var documented []string
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-zA-Z.]+)` \\|").FindAllSubmatch(read(t, "fairlead/README.md"), -1) {
		documented = append(documented, string(row[1]))
	}
	sort.Strings(documented)
	if diff := cmp.Diff(names, documented); diff != "" {
		t.Errorf("values and README's table (-values +README):\n%s", diff)
	}
}

// helm runs Helm, which hack/cluster builds; FAIRLEAD_HELM names another.
func helm(t *testing.T, arguments ...string) (string, error) {
	t.Helper()
	program := os.Getenv("FAIRLEAD_HELM")
	if program == "" {
		found, err := exec.LookPath("helm")
		testenv.Require(t, err == nil, "helm in PATH, or named by FAIRLEAD_HELM")
		program = found
	}
	out, err := exec.Command(program, arguments...).CombinedOutput()
	return string(out), err
}

func TestTemplates(t *testing.T) {
	for _, tc := range []struct {
		name     string
		set      []string
		want     []string
		unwanted []string
	}{
		{"defaults", nil, []string{
			"image: docker.io/fairlead/ztunnel:dev", `FAIRLEAD_POD_MAX_BUFFERED_BYTES, value: "268435456"`,
			"--waypoint-image=docker.io/fairlead/waypoint:dev",
			"--exclude-namespaces=kube-system,mesh", "https://istiod.mesh.svc:15012", "kind: GatewayClass",
		}, []string{"15010", "imagePullSecrets"}},
		{"everything changed", []string{
			"image.registry=registry.example/x", "image.tag=v1", "image.pullSecrets={one}", "istiod.plaintextPort=true",
			"gatewayClass=false", "ztunnel.env.A=b", "cni.cgroup=/sys/fs/cgroup/unified", "istiod.replicas=2",
		}, []string{
			"image: registry.example/x/cni:v1", "- name: one", "--grpc-addr=:15010", `{name: A, value: "b"}`,
			"--cgroup=/sys/fs/cgroup/unified", "replicas: 2",
		}, []string{"kind: GatewayClass"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			arguments := []string{"template", "fairlead", "fairlead", "--namespace", "mesh"}
			for _, s := range tc.set {
				arguments = append(arguments, "--set", s)
			}
			out, err := helm(t, arguments...)
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			for _, s := range tc.want {
				if !strings.Contains(out, s) {
					t.Errorf("%q is not in the templates' output", s)
				}
			}
			for _, s := range tc.unwanted {
				if strings.Contains(out, s) {
					t.Errorf("%q is in the templates' output", s)
				}
			}
			for i, document := range strings.Split(out, "\n---\n") {
				var object map[string]any
				if err := yaml.UnmarshalStrict([]byte(document), &object); err != nil {
					t.Errorf("document %d: %v", i, err)
				}
			}
		})
	}
}

func TestMisspeltValueIsRefused(t *testing.T) {
	for _, set := range []string{"cni.confdir=/x", "ztunnel.logLevel=loud", "mesh.trustDomain="} {
		if out, err := helm(t, "template", "fairlead", "fairlead", "--set", set); err == nil {
			t.Errorf("--set %s was accepted:\n%.200s", set, out)
		}
	}
}

// The CNI plugin's token lies on every node: its account may look at pods and namespaces, one at a time, and nothing else; and
// the agent may make tokens of no other.
func TestAccountOfThePlugin(t *testing.T) {
	out, err := helm(t, "template", "fairlead", "fairlead", "--namespace", "mesh")
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	type rule struct{ APIGroups, Resources, ResourceNames, Verbs []string }
	var roles, bound []string
	rules := map[string][]rule{}
	for document := range strings.SplitSeq(out, "\n---\n") {
		var object struct {
			Kind     string
			Metadata struct{ Name string }
			RoleRef  struct{ Name string }
			Subjects []struct{ Name, Namespace string }
			Rules    []rule
		}
		if err := yaml.Unmarshal([]byte(document), &object); err != nil {
			t.Fatal(err)
		}
		rules[object.Kind+" "+object.Metadata.Name] = object.Rules
		for _, subject := range object.Subjects {
			if subject.Name == "istio-cni-plugin" {
				roles, bound = append(roles, object.Kind+" "+object.RoleRef.Name), append(bound, subject.Namespace)
			}
		}
	}
	if diff := cmp.Diff([]string{"ClusterRoleBinding istio-cni-plugin-mesh"}, roles); diff != "" || !slices.Equal(bound, []string{"mesh"}) {
		t.Errorf("bound in %v (-want +got):\n%s", bound, diff)
	}
	want := []rule{{APIGroups: []string{""}, Resources: []string{"pods", "namespaces"}, Verbs: []string{"get"}}}
	if diff := cmp.Diff(want, rules["ClusterRole istio-cni-plugin-mesh"]); diff != "" {
		t.Errorf("the plugin may (-want +got):\n%s", diff)
	}
	token := rule{APIGroups: []string{""}, Resources: []string{"serviceaccounts/token"}, ResourceNames: []string{"istio-cni-plugin"}, Verbs: []string{"create"}}
	for name, all := range rules {
		for _, r := range all {
			if slices.Contains(r.Resources, "serviceaccounts/token") && (name != "Role istio-cni" || !cmp.Equal(r, token)) {
				t.Errorf("%s has %+v", name, r)
			}
		}
	}
	if !slices.ContainsFunc(rules["Role istio-cni"], func(r rule) bool { return cmp.Equal(r, token) }) {
		t.Errorf("the agent may make no token of the plugin's account: %+v", rules["Role istio-cni"])
	}
	if !strings.Contains(out, "--plugin-account=mesh/istio-cni-plugin") {
		t.Error("the agent is not told of the plugin's account")
	}
}
