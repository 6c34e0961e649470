package bpf

import (
	"fmt"
	"path/filepath"

	"github.com/cilium/ebpf"
)

// Supported tells whether the kernel takes the programs, by loading them; it returns what it says against them. Nothing
// is attached or pinned.
func Supported() error {
	var node connectObjects
	if err := loadConnectObjects(&node, nil); err != nil {
		return fmt.Errorf("load the connect programs (Linux 5.18 or later is needed): %w", err)
	}
	defer node.Close()
	var pod lookupPrograms
	err := loadLookupObjects(&pod, &ebpf.CollectionOptions{MapReplacements: map[string]*ebpf.Map{
		lookupMapListeners: node.Listeners, lookupMapCounters: node.Counters,
	}})
	if err != nil {
		return fmt.Errorf("load the lookup program (Linux 5.18 or later is needed): %w", err)
	}
	return pod.Close()
}

// Present tells whether programs are pinned under dir.
func Present(dir string) bool {
	links, err := filepath.Glob(filepath.Join(dir, "links", "*"))
	return err == nil && len(links) > 0
}
