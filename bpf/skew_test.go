package bpf

import (
	"fmt"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
)

// TestPinnedMapsKeepTheirShape: an agent takes over the maps that the one before pinned, by name; one of another shape it
// cannot load its programs with. So a map that must change gets a new name (docs/upgrades.md), and its line here stays as
// long as an agent of a release with it may be met.
func TestPinnedMapsKeepTheirShape(t *testing.T) {
	want := map[string]string{ // type, bytes of a key, bytes of a value, entries, flags
		"attempts":          "RingBuf 0 0 65536 0",
		"counters":          "PerCPUArray 4 8 32 0",
		"excluded_networks": "LPMTrie 32 4 65536 1",
		"exclusions":        "Hash 16 4 65536 1",
		"exempt":            "SkStorage 4 4 0 1",
		"host_config":       "Array 4 40 1 0",
		"instances":         "Array 4 16 8192 0",
		"listeners":         "SockHash 16 8 40960 0",
		"pod_addrs":         "Hash 16 8 32768 1",
		"pods":              "Hash 8 208 4096 1",
		"proxies":           "Hash 8 4 4096 0",
		"wires":             "Hash 4 24 4096 1",
		"workloads":         "Hash 8 4 64 0",
	}
	got := map[string]string{}
	for _, load := range []func() (*ebpf.CollectionSpec, error){loadConnect, loadGuard, loadLookup} {
		spec, err := load()
		if err != nil {
			t.Fatal(err)
		}
		for name, m := range spec.Maps {
			if strings.HasPrefix(name, ".") {
				continue // constants of one program, not pinned
			}
			got[name] = fmt.Sprintf("%v %d %d %d %d", m.Type, m.KeySize, m.ValueSize, m.MaxEntries, m.Flags)
		}
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}
