package plugin

import (
	"os"
	"path/filepath"
	"testing"
)

// Without an agent that can answer, pods of the mesh wait, and those that are known to be outside do not.
func TestRecordDecidesWithoutAnAgent(t *testing.T) {
	dir := t.TempDir()
	record := filepath.Join(dir, "mesh.json")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(record, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	starting, _ := fakeAgent(t, 503, "the node's cni-agent is starting")
	refusing, _ := fakeAgent(t, 400, "no such network namespace")
	away := filepath.Join(dir, "nowhere.sock")
	for _, tc := range []struct {
		name, socket, record string
		ok                   bool
	}{
		{"no record", away, "", false},
		{"a broken record", away, "{", false},
		{"the pod's namespace is in the mesh", away, `{"Namespaces":["app"]}`, false},
		{"another namespace is", away, `{"Namespaces":["shop"]}`, true},
		{"a pod of the namespace was once", away, `{"Namespaces":["shop"],"Single":["app"]}`, false},
		{"the pod opts out, another of the namespace is in", away, `{"Namespaces":[],"Single":["app"],"Pods":{"u-1":false}}`, true},
		{"the pod is, its namespace is not", away, `{"Namespaces":[],"Pods":{"u-1":true}}`, false},
		{"the pod opts out, its namespace is", away, `{"Namespaces":["app"],"Pods":{"u-1":false}}`, true},
		{"the agent is starting, the pod outside", starting, `{"Namespaces":["shop"]}`, true},
		{"the agent is starting, the pod inside", starting, `{"Namespaces":["app"]}`, false},
		{"the agent refuses", refusing, `{"Namespaces":["shop"]}`, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			os.Remove(record)
			if tc.record != "" {
				write(tc.record)
			}
			out, ok := run(t, "ADD", "1.0.0", kubernetes, `,"eventSocket":"`+tc.socket+`","record":"`+record+`"`, previous)
			if ok != tc.ok {
				t.Errorf("succeeded %v: %s", ok, out)
			}
			if ok {
				sameJSON(t, previous, out)
			}
		})
	}
}
