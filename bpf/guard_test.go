package bpf

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"github.com/fairlead-mesh/fairlead/internal/netns"
	"github.com/fairlead-mesh/fairlead/internal/testenv"
)

// fakeFilters are those of one interface, which others may have taken.
type fakeFilters struct{ taken, ours bool }

func (f *fakeFilters) Ensure(int, *ebpf.Program) (bool, error) {
	f.ours = !f.taken
	return f.taken, nil
}

func (f *fakeFilters) Has(int, *ebpf.Program) (bool, error) { return f.ours, nil }

func (f *fakeFilters) Remove(int) error {
	f.ours = false
	return nil
}

// wired is a node with a pod, and the host's end of its interface.
type wired struct {
	*Node
	filters fakeFilters
	host    *os.File
	pod     Pod
	wire    Wire
}

func newWired(t *testing.T) *wired {
	t.Helper()
	w := &wired{host: testenv.Netns(t), pod: Pod{Cookie: 7, UID: "u", IPs: []netip.Addr{netip.MustParseAddr("10.1.2.3")}}}
	w.Node = openNode(t, &w.filters)
	err := netns.Do(w.host, func() error {
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "pod"}, PeerName: "eth0"}); err != nil {
			return err
		}
		end, err := netlink.LinkByName("pod")
		if err == nil {
			w.wire = Wire{Ifindex: end.Attrs().Index, Nsid: 1}
		}
		return err
	})
	if err == nil {
		err = w.Prepare(w.pod.Cookie)
	}
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// openNode opens a node of its own, which is removed at the end.
func openNode(t *testing.T, filters Filters) *Node {
	t.Helper()
	testenv.RequireBPF(t)
	root, err := FindCgroup2("/proc/self/mounts")
	testenv.Require(t, err == nil, "a cgroup2 mount")
	cgroup := filepath.Join(root, fmt.Sprintf("fairlead-bpf-test-%d", os.Getpid()))
	if err := os.MkdirAll(cgroup, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(cgroup) })
	cfg := Config{Dir: filepath.Join(t.TempDir(), "bpf"), Cgroup: cgroup, Filters: filters}
	t.Cleanup(func() {
		if err := Remove(cfg.Dir, "", filters); err != nil {
			t.Error(err)
		}
	})
	n, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	testenv.Require(t, n.unguarded == nil, "a kernel that can run the guard")
	return n
}

// ensure guards the pod's wire, and wants it to be held.
func (w *wired) ensure(t *testing.T, fresh bool) {
	t.Helper()
	var guarded bool
	err := netns.Do(w.host, func() (err error) {
		if err = w.EnsureGuard(w.pod, []Wire{w.wire}, fresh); err == nil {
			guarded, err = w.Guarded(w.pod, []Wire{w.wire})
		}
		return err
	})
	if err != nil || !guarded {
		t.Errorf("guarded %v, %v; want true, fresh %v", guarded, err, fresh)
	}
}

// Before Linux 6.6 there are no tcx links: a pod that runs is guarded by a filter too; and where others have filters, not at
// all, which is said.
func TestGuardWithoutLinks(t *testing.T) {
	for _, tc := range []struct{ fresh, taken bool }{{true, false}, {false, false}, {true, true}, {false, true}} {
		t.Run(fmt.Sprintf("fresh %v, taken %v", tc.fresh, tc.taken), func(t *testing.T) {
			w := newWired(t)
			w.filters.taken = tc.taken
			w.attachTCX = func(link.TCXOptions) (link.Link, error) { return nil, fmt.Errorf("tcx: %w", ebpf.ErrNotSupported) }
			for range 2 {
				w.ensure(t, tc.fresh)
			}
			if reason := w.Unguarded(); w.filters.ours == tc.taken || (reason != nil) != tc.taken {
				t.Errorf("a filter %v, unguarded because of: %v", w.filters.ours, reason)
			}
			// Once the others' are gone, there is room.
			w.filters.taken = false
			w.ensure(t, tc.fresh)
			if reason := w.Unguarded(); !w.filters.ours || reason != nil {
				t.Errorf("alone: a filter %v, unguarded because of: %v", w.filters.ours, reason)
			}
			if err := w.RemovePod(w.pod.Cookie); err != nil || w.filters.ours {
				t.Errorf("removed: a filter %v, %v", w.filters.ours, err)
			}
		})
	}
}

// An agent may be killed between the making of the link and the end of the filter that it replaces.
func TestGuardLeftTwice(t *testing.T) {
	w := newWired(t)
	w.ensure(t, false)
	if err := makeNote(w.wirePath(w.pod.Cookie, filterPin, w.wire)); err != nil {
		t.Fatal(err)
	}
	w.filters.ours = true
	w.ensure(t, false)
	if w.filters.ours {
		t.Error("the filter is still there, beside the link")
	}
}
