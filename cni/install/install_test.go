package install

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"

	"github.com/fairlead-mesh/fairlead/cni/plugin"
)

const ours = `{"type":"fairlead-cni","eventSocket":"/run/s","excludeNamespaces":["istio-system"]}`

// node is a node's directories, with files by path under it.
func node(t *testing.T, files map[string]string) (Config, string) {
	t.Helper()
	dir := t.TempDir()
	cfg := Config{
		Binary: filepath.Join(dir, "cni-plugin"), BinDir: filepath.Join(dir, "bin"), ConfDir: filepath.Join(dir, "net.d"),
		EventSocket: "/run/s", ExcludeNamespaces: []string{"istio-system"}, Log: zap.NewNop(),
	}
	write(t, cfg.Binary, "program 1", 0o644)
	if err := os.MkdirAll(cfg.ConfDir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, content := range files {
		write(t, filepath.Join(cfg.ConfDir, name), content, 0o600)
	}
	return cfg, dir
}

func write(t *testing.T, path, content string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
}

// contents are the files of a directory.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		out[e.Name()] = string(b)
	}
	return out
}

const pretty = `{
  "cniVersion": "1.0.0",
  "name": "lab", "number": 1.50,
  "plugins": [
    {"type": "ptp",   "ipam": {"type": "host-local"}},
    {
      "type": "portmap"
    }
  ],
  "after": [ ]
}
`

func TestEnsureAndRemove(t *testing.T) {
	for _, tc := range []struct {
		name   string
		before map[string]string
		after  map[string]string
	}{
		{"a list, laid out", map[string]string{"10-lab.conflist": pretty}, map[string]string{
			"10-lab.conflist": strings.Replace(pretty, "\"portmap\"\n    }", "\"portmap\"\n    },\n    "+ours, 1),
		}},
		{"a list on one line", map[string]string{"a.conflist": `{"name":"x","plugins":[{"type":"bridge"}]}`}, map[string]string{
			"a.conflist": `{"name":"x","plugins":[{"type":"bridge"},` + ours + `]}`,
		}},
		{"the first by name only", map[string]string{
			"10-a.conflist": `{"plugins":[{"type":"a"}]}`, "20-b.conflist": `{"plugins":[{"type":"b"}]}`, "05-note.txt": "x",
		}, map[string]string{
			"10-a.conflist": `{"plugins":[{"type":"a"},` + ours + `]}`, "20-b.conflist": `{"plugins":[{"type":"b"}]}`, "05-note.txt": "x",
		}},
		{"a single plugin", map[string]string{"10-f.conf": `{"cniVersion":"0.3.1","name":"n","type":"flannel"}`}, map[string]string{
			"10-f.conf.fairlead-replaced": `{"cniVersion":"0.3.1","name":"n","type":"flannel"}`,
			"10-f.conflist":               `{"cniVersion":"0.3.1","name":"n","plugins":[{"cniVersion":"0.3.1","name":"n","type":"flannel"},` + ours + "]}\n",
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg, _ := node(t, tc.before)
			changed, err := Ensure(cfg)
			if err != nil || len(changed) != 2 {
				t.Fatalf("changed %v, error %v", changed, err)
			}
			if diff := cmp.Diff(tc.after, contents(t, cfg.ConfDir)); diff != "" {
				t.Errorf("configurations (-want +got):\n%s", diff)
			}
			binary := filepath.Join(cfg.BinDir, "fairlead-cni")
			if info, err := os.Stat(binary); err != nil || info.Mode().Perm() != 0o755 {
				t.Errorf("plugin: %v, %v", info, err)
			}
			if changed, err := Ensure(cfg); err != nil || len(changed) != 0 {
				t.Errorf("second time: changed %v, error %v", changed, err)
			}
			for range 2 {
				if err := Remove(cfg); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(tc.before, contents(t, cfg.ConfDir)); diff != "" {
					t.Errorf("after removal (-want +got):\n%s", diff)
				}
			}
			if left := contents(t, cfg.BinDir); len(left) != 0 {
				t.Errorf("left of the plugin: %v", left)
			}
		})
	}
}

func TestEnsureRepairs(t *testing.T) {
	for _, tc := range []struct{ name, before string }{
		{"another's entry after ours", `{"plugins":[{"type":"a"},` + ours + `,{"type":"b"}]}`},
		{"ours first", `{"plugins":[` + ours + `, {"type":"a"},{"type":"b"}]}`},
		{"ours twice", `{"plugins":[` + ours + `,` + ours + `,{"type":"a"},{"type":"b"},` + ours + `]}`},
		{"ours of an older version", `{"plugins":[{"type":"a"},{"type":"b"},{"type":"fairlead-cni"}]}`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg, _ := node(t, map[string]string{"a.conflist": tc.before})
			if _, err := Ensure(cfg); err != nil {
				t.Fatal(err)
			}
			got := strings.ReplaceAll(contents(t, cfg.ConfDir)["a.conflist"], " ", "")
			if want := `{"plugins":[{"type":"a"},{"type":"b"},` + ours + `]}`; got != want {
				t.Errorf("got  %s\nwant %s", got, want)
			}
		})
	}
}

func TestEnsureFollowsTheActiveConfiguration(t *testing.T) {
	cfg, _ := node(t, map[string]string{"10-a.conflist": `{"plugins":[{"type":"a"}]}`})
	if _, err := Ensure(cfg); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(cfg.ConfDir, "05-b.conflist"), `{"plugins":[{"type":"b"}]}`, 0o644)
	if _, err := Ensure(cfg); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"05-b.conflist": `{"plugins":[{"type":"b"},` + ours + `]}`, "10-a.conflist": `{"plugins":[{"type":"a"}]}`}
	if diff := cmp.Diff(want, contents(t, cfg.ConfDir)); diff != "" {
		t.Errorf("configurations (-want +got):\n%s", diff)
	}
}

func TestEnsureRefuses(t *testing.T) {
	for _, tc := range []struct{ name, file, content, want string }{
		{"cut short", "a.conflist", `{"plugins":[{"type":"a"}`, "EOF"},
		{"no plugins", "a.conflist", `{"name":"x"}`, "no list of plugins"},
		{"nothing but ours", "a.conflist", `{"plugins":[` + ours + `]}`, "no other plugin"},
		{"not an object", "a.conflist", `[]`, "not a JSON object"},
		{"no type", "a.conf", `{"name":"x"}`, "names no plugin type"},
		{"none", "a.txt", "", "no CNI configuration yet"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg, _ := node(t, map[string]string{tc.file: tc.content})
			if _, err := Ensure(cfg); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want one with %q", err, tc.want)
			}
			if diff := cmp.Diff(map[string]string{tc.file: tc.content}, contents(t, cfg.ConfDir)); diff != "" {
				t.Errorf("the configuration was touched (-want +got):\n%s", diff)
			}
		})
	}
}

// TestRun: a node without configuration is waited for, and what others undo is done again.
func TestRun(t *testing.T) {
	cfg, _ := node(t, nil)
	i := New(cfg)
	if i.Ready() == nil {
		t.Error("ready before anything was done")
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- i.Run(ctx) }()
	eventually := func(what string, ok func() bool) {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("not within 10 s: %s; %v; %v", what, i.Ready(), contents(t, cfg.ConfDir))
			}
		}
	}
	eventually("waiting", func() bool {
		err := i.Ready()
		return err != nil && strings.Contains(err.Error(), "no CNI configuration yet")
	})
	conf := filepath.Join(cfg.ConfDir, "10-a.conflist")
	in := func() bool { b, _ := os.ReadFile(conf); return strings.Contains(string(b), "fairlead-cni") }
	write(t, conf, `{"plugins":[{"type":"a"}]}`, 0o644)
	eventually("installed", func() bool { return in() && i.Ready() == nil })
	write(t, conf, `{"plugins":[{"type":"b"}]}`, 0o644)
	eventually("repaired after a rewrite", func() bool { return in() && i.Ready() == nil })
	if err := os.Remove(filepath.Join(cfg.BinDir, "fairlead-cni")); err != nil {
		t.Fatal(err)
	}
	eventually("binary back", func() bool { _, err := os.Stat(filepath.Join(cfg.BinDir, "fairlead-cni")); return err == nil })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if !in() {
		t.Error("the plugin was taken out when the agent ended")
	}
}

func TestEntryIsWhatThePluginReads(t *testing.T) {
	for _, access := range []string{"", "/access.json"} {
		entry, err := configEntry(Config{EventSocket: "/run/s", Record: "/mesh.json", Access: access, ExcludeNamespaces: []string{"a"}})
		if err != nil {
			t.Fatal(err)
		}
		var got plugin.Conf
		if err := json.Unmarshal(entry, &got); err != nil {
			t.Fatal(err)
		}
		want := plugin.Conf{EventSocket: "/run/s", Record: "/mesh.json", Access: access, ExcludeNamespaces: []string{"a"}}
		want.Type = plugin.Type
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", entry, diff)
		}
	}
}
