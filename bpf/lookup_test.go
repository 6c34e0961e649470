package bpf

import (
	"net/netip"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/fairlead-mesh/fairlead/internal/testenv"
)

// numbers are those that instances have, in the kernel and in the process, by the cookie they are for.
func (l *lookups) numbers(t *testing.T) (kernel, process map[uint64][]uint32) {
	t.Helper()
	kernel, process = map[uint64][]uint32{}, map[uint64][]uint32{}
	var number uint32
	var value connectInstance
	entries := l.instances.Iterate()
	for entries.Next(&number, &value) {
		if value.Netns != 0 {
			kernel[value.Netns] = append(kernel[value.Netns], number)
		}
	}
	if err := entries.Err(); err != nil {
		t.Fatal(err)
	}
	for number, value := range l.taken {
		process[value.Netns] = append(process[value.Netns], number)
	}
	return kernel, process
}

// A pod that cannot be captured is tried again for ever, and needs no more numbers for it than one; one that can has one.
func TestFailedAttachGivesItsNumberBack(t *testing.T) {
	n := openNode(t, &fakeFilters{})
	nothing, err := os.Open("/dev/null") // no network namespace: the kernel does not attach to it
	if err != nil {
		t.Fatal(err)
	}
	defer nothing.Close()
	want := map[uint64][]uint32{}
	expect := func(what string) {
		t.Helper()
		kernel, process := n.lookups.numbers(t)
		for place, got := range map[string]map[uint64][]uint32{"kernel": kernel, "process": process, "index": n.lookups.of} {
			if d := cmp.Diff(want, got, cmpopts.EquateEmpty()); d != "" {
				t.Errorf("%s: numbers in the %s (-want +got):\n%s", what, place, d)
			}
		}
	}
	bad := Pod{Cookie: 7, UID: "bad", IPs: []netip.Addr{netip.MustParseAddr("10.1.2.3")}}
	for range 3 {
		if err := n.EnsurePod(nothing, bad); err == nil {
			t.Fatal("attached to /dev/null")
		}
	}
	expect("after three failures")
	good := Pod{Cookie: 8, UID: "good", IPs: bad.IPs}
	ns := testenv.Netns(t)
	for range 2 {
		if err := n.EnsurePod(ns, good); err != nil {
			t.Fatal(err)
		}
	}
	want[8] = []uint32{3}
	expect("with a pod")
	n.lookups.version++ // of another agent
	for range 2 {
		if err := n.EnsurePod(ns, good); err != nil {
			t.Fatal(err)
		}
	}
	want[8] = []uint32{4}
	expect("with another program")
	if holds, err := n.Holds(good); err != nil || !holds {
		t.Errorf("holds %v, %v", holds, err)
	}
	if err := n.RemovePod(good.Cookie); err != nil {
		t.Fatal(err)
	}
	delete(want, 8)
	expect("without a pod")
}
