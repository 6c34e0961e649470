package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/cilium/ebpf"

	"github.com/fairlead-mesh/fairlead/bpf"
)

// Usage is what a node's ztunnel, and the redirection of the node's pods, hold at one moment.
type Usage struct {
	Goroutines, Descriptors float64
	// Heap is what is live of it, in bytes; Resident is the process's memory.
	Heap, Resident float64
	// Entries are those of the pinned BPF maps, by the map's path.
	Entries map[string]int
}

// Usage asks the node's ztunnel, after a garbage collection, and counts what is in the pinned maps.
func (n *Node) Usage(ctx context.Context) (Usage, error) {
	if _, err := n.Get(ctx, n.ports.admin, "/debug/pprof/heap?gc=1&debug=1"); err != nil {
		return Usage{}, err
	}
	var u Usage
	for name, into := range map[string]*float64{
		"go_goroutines": &u.Goroutines, "process_open_fds": &u.Descriptors,
		"go_memstats_heap_alloc_bytes": &u.Heap, "process_resident_memory_bytes": &u.Resident,
	} {
		var err error
		if *into, err = n.Metric(ctx, name, nil); err != nil {
			return u, err
		}
	}
	var err error
	u.Entries, err = n.mapEntries()
	return u, err
}

// mapEntries counts the entries of the maps that are pinned on the node.
func (n *Node) mapEntries() (map[string]int, error) {
	entries := map[string]int{}
	err := n.thread.do(func() error {
		return filepath.WalkDir(bpf.DefaultDir, func(path string, d fs.DirEntry, err error) error {
			switch {
			case errors.Is(err, fs.ErrNotExist): // redirected in another way
				return nil
			case err != nil || d.IsDir() || filepath.Base(filepath.Dir(path)) != "maps":
				return err
			}
			m, err := ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: true})
			if err != nil {
				return fmt.Errorf("open map %s: %w", path, err)
			}
			defer m.Close()
			if t := m.Type(); t == ebpf.RingBuf || t == ebpf.SkStorage { // of one size, or gone with its sockets; without keys
				return nil
			}
			entries[path], err = countEntries(m)
			return err
		})
	})
	return entries, err
}

// countEntries follows the keys of a map from the first to the last.
func countEntries(m *ebpf.Map) (n int, err error) {
	var at any // nil: before the first
	for {
		next := make([]byte, m.KeySize())
		if err := m.NextKey(at, next); errors.Is(err, ebpf.ErrKeyNotExist) {
			return n, nil
		} else if err != nil {
			return n, fmt.Errorf("list %v: %w", m, err)
		}
		n++
		at = next
	}
}
