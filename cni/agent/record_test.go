package agent

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestRecordsSurviveARestart(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pods")
	first, _, err := openRecords(dir)
	if err != nil {
		t.Fatal(err)
	}
	want := record{UID: "u-1", Namespace: "app", Name: "web", Netns: "/var/run/netns/cni-1", Cookie: 1 << 60,
		IPs: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")}, Redirected: true}
	for _, rec := range []record{want, {UID: "u-2"}} {
		if err := first.put(rec); err != nil {
			t.Fatal(err)
		}
	}
	if err := first.remove("u-2"); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{"u-3.json": `{"UID":"u-4"}`, "u-5.json": `{`, "u-6.json.new": `{"UID":"u-6"}`} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	second, skipped, err := openRecords(dir)
	if err != nil {
		t.Fatal(err)
	}
	same := cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	if diff := cmp.Diff([]record{want}, second.all(), same); diff != "" {
		t.Errorf("records read back (-want +got):\n%s", diff)
	}
	if len(skipped) != 3 {
		t.Errorf("skipped %v, want three files", skipped)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left in the directory: %v, %v", left, err)
	}
	for _, uid := range []string{"", "..", "a/b", "../a", "a\x00"} {
		if err := second.put(record{UID: uid}); err == nil {
			t.Errorf("UID %q was recorded", uid)
		}
	}
}
