package plugin

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// A release of the plugin works with the agent of the one before and of the one after (docs/upgrades.md): what they say is
// pinned here, as it was when it was first said. Add to it; never change it.

func TestEventsForOtherReleases(t *testing.T) {
	const want = `{"Netns":"/var/run/netns/cni-1","PodName":"web-0","PodNamespace":"app","IPs":[{"Interface":1,"Address":"10.0.0.2/24"}],"PodUID":"u-1","ContainerID":"c1"}`
	one := 1
	got, err := json.Marshal(Event{
		Netns: "/var/run/netns/cni-1", PodName: "web-0", PodNamespace: "app", PodUID: "u-1", ContainerID: "c1",
		IPs: []IPConfig{{Interface: &one, Address: "10.0.0.2/24"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, string(got)); d != "" {
		t.Errorf("agents that run already would not understand it (-want +got):\n%s", d)
	}
	paths := []string{AddPath, DelPath, CheckPath, StatusPath}
	if d := cmp.Diff([]string{"/cmdadd", "/cmddel", "/cmdcheck", "/status"}, paths); d != "" {
		t.Errorf("agents that run already listen elsewhere (-want +got):\n%s", d)
	}
}

// TestAnswersOfOtherReleases runs the plugin with the least that an agent of another release may say, and with more than
// this one knows, in its answer, in the configuration that it wrote, and in its record.
func TestAnswersOfOtherReleases(t *testing.T) {
	for _, body := range []string{`{}`, `{"Redirected":true}`, `{"Redirected":true,"Reason":"r","Later":{"a":[1]}}`} {
		socket, _ := fakeAgent(t, 200, body)
		out, ok := run(t, "ADD", "1.0.0", kubernetes, `,"eventSocket":"`+socket+`","later":{"a":[1]}`, previous)
		if !ok {
			t.Errorf("an agent that answered %s: %s", body, out)
		}
	}
}

func TestRecordsOfOtherReleases(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mesh.json")
	for name, text := range map[string]string{
		"the first release's": `{"Namespaces":["app"],"Pods":{"u-1":true,"u-2":false}}`,
		"a later one's":       `{"Namespaces":["app"],"Pods":{"u-1":true,"u-2":false},"Later":[{}]}`,
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		record, ok, err := ReadRecord(path)
		if !ok || err != nil {
			t.Fatalf("%s: %v, %v", name, ok, err)
		}
		if !record.Outside("shop", "new") || record.Outside("app", "new") || record.Outside("shop", "u-1") || !record.Outside("app", "u-2") {
			t.Errorf("%s is understood as %+v", name, record)
		}
	}
	got, err := json.Marshal(Record{Namespaces: []string{"app"}, Pods: map[string]bool{"u-1": true}})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(`{"Namespaces":["app"],"Pods":{"u-1":true}}`, string(got)); d != "" {
		t.Errorf("plugins that are there already would not understand it (-want +got):\n%s", d)
	}
}

func TestAccessOfOtherReleases(t *testing.T) {
	path := filepath.Join(t.TempDir(), "access.json")
	first := `{"Server":"https://10.0.0.1:443","ServerName":"api","CA":"pem","Token":"t"}`
	want := Access{Server: "https://10.0.0.1:443", ServerName: "api", CA: "pem", Token: "t"}
	for name, text := range map[string]string{"the first release's": first, "a later one's": first[:len(first)-1] + `,"Later":{"a":[1]}}`} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := readAccess(path)
		if d := cmp.Diff(want, got); d != "" || err != nil {
			t.Errorf("%s: %v (-want +got):\n%s", name, err, d)
		}
	}
	got, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(first, string(got)); d != "" {
		t.Errorf("plugins that are there already would not understand it (-want +got):\n%s", d)
	}
	var conf Conf
	if err := json.Unmarshal([]byte(`{"apiAccess":"/access.json"}`), &conf); err != nil || conf.Access != "/access.json" {
		t.Errorf("the entry that agents write is understood as %+v, %v", conf, err)
	}
}
