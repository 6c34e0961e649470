package agent

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/fairlead-mesh/fairlead/cni/plugin"
)

// A release of the agent works with the plugin of the one before and of the one after (docs/upgrades.md): what they say is
// pinned here, as it was when it was first said. Add to it; never change it.

func TestEventsOfOtherReleases(t *testing.T) {
	one := 1
	full := plugin.Event{
		Netns: "/var/run/netns/cni-1", PodName: "web-0", PodNamespace: "app", PodUID: "0c6e1cc9", ContainerID: "abc",
		IPs: []plugin.IPConfig{{Interface: &one, Address: "10.0.0.2/24"}},
	}
	least := full
	least.PodUID, least.ContainerID = "", ""
	for name, tc := range map[string]struct {
		text string
		want plugin.Event
	}{
		"this release's": {`{"Netns":"/var/run/netns/cni-1","PodName":"web-0","PodNamespace":"app","IPs":[{"Interface":1,"Address":"10.0.0.2/24"}],"PodUID":"0c6e1cc9","ContainerID":"abc"}`, full},
		"the least":      {`{"Netns":"/var/run/netns/cni-1","PodName":"web-0","PodNamespace":"app","IPs":[{"Interface":1,"Address":"10.0.0.2/24"}]}`, least},
		"a later one's":  {`{"Netns":"/var/run/netns/cni-1","PodName":"web-0","PodNamespace":"app","IPs":[{"Interface":1,"Address":"10.0.0.2/24","Later":[1]}],"PodUID":"0c6e1cc9","ContainerID":"abc","Later":{"a":null}}`, full},
	} {
		got, err := readEvent(strings.NewReader(tc.text))
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if d := cmp.Diff(tc.want, got); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
}

func TestAnswersForOtherReleases(t *testing.T) {
	const want = `{"Redirected":true,"Reason":"the pod's label opts in"}`
	got, err := json.Marshal(plugin.Answer{Redirected: true, Reason: "the pod's label opts in"})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, string(got)); d != "" {
		t.Errorf("plugins that are there already would not understand it (-want +got):\n%s", d)
	}
}

// TestRecordsOfOtherReleases: what an agent left on the node, its successor of another release takes over.
func TestRecordsOfOtherReleases(t *testing.T) {
	want := record{
		UID: "u1", Namespace: "app", Name: "web", ServiceAccount: "sa", Netns: "/var/run/netns/cni-1", Cookie: 4711,
		IPs: []netip.Addr{netip.MustParseAddr("10.0.0.2")}, Redirected: true, Routed: true,
	}
	for name, text := range map[string]string{
		"the first release's": `{"UID":"u1","Namespace":"app","Name":"web","ServiceAccount":"sa","Netns":"/var/run/netns/cni-1","Cookie":4711,"IPs":["10.0.0.2"],"Redirected":true,"Routed":true}`,
		"a later one's":       `{"UID":"u1","Namespace":"app","Name":"web","ServiceAccount":"sa","Netns":"/var/run/netns/cni-1","Cookie":4711,"IPs":["10.0.0.2"],"Redirected":true,"Routed":true,"Later":[1]}`,
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "u1.json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		r, skipped, err := openRecords(dir)
		if err != nil || len(skipped) != 0 {
			t.Fatalf("%s: skipped %v, %v", name, skipped, err)
		}
		got, _ := r.get("u1")
		if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
		if err := r.put(got); err != nil {
			t.Fatal(err)
		}
		written, err := os.ReadFile(filepath.Join(dir, "u1.json"))
		if err != nil || !strings.HasPrefix(text, strings.TrimSuffix(string(written), "}")) {
			t.Errorf("%s: it is written as %s, %v, which agents of the first release may not understand", name, written, err)
		}
	}
}
