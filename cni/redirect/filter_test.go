package redirect_test

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/cni/redirect"
	"github.com/fairlead-mesh/fairlead/internal/netns"
	"github.com/fairlead-mesh/fairlead/internal/testenv"
)

// passing is a program of somebody else's that ends the way through an interface's programs: what it passes, no filter
// after it sees.
func passing(t *testing.T) *ebpf.Program {
	t.Helper()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { program.Close() })
	return program
}

// tcxOf attaches it to the host's end of the pod's interface, before all others.
func tcxOf(t *testing.T, program *ebpf.Program, end netlink.Link) error {
	t.Helper()
	made, err := link.AttachTCX(link.TCXOptions{
		Interface: end.Attrs().Index, Program: program, Attach: ebpf.AttachTCXIngress, Anchor: link.Head(),
	})
	if err == nil {
		t.Cleanup(func() { made.Close() })
	}
	return err
}

// filterOf adds it to that end as a filter, to a queueing discipline that it makes if there is none.
func filterOf(t *testing.T, program *ebpf.Program, end netlink.Link) error {
	t.Helper()
	qdisc := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: end.Attrs().Index, Parent: netlink.HANDLE_CLSACT, Handle: netlink.MakeHandle(0xffff, 0)}}
	if err := netlink.QdiscReplace(qdisc); err != nil {
		return err
	}
	return netlink.FilterAdd(&netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: end.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 7, Priority: 7, Protocol: unix.ETH_P_ALL,
		},
		Fd: program.FD(), Name: "other", DirectAction: true,
	})
}

// Whatever others have on the host's end of a pod's interface, before or after, the guard decides first once it is ensured;
// and what is others' stays.
func TestGuardBesideOthersPrograms(t *testing.T) {
	for _, tc := range []struct {
		name   string
		attach func(*testing.T, *ebpf.Program, netlink.Link) error
		before bool
		// holds tells whether nothing has to be done when others come after.
		holds bool
	}{
		{"tcx before", tcxOf, true, true},
		{"tcx after", tcxOf, false, false},
		{"filter before", filterOf, true, true},
		{"filter after", filterOf, false, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := newLab(t, redirect.EBPF)
			taken := make(chan accepted, 16)
			listen(t, "server", l.host, guarded()[0].at(remote4, 80), taken)
			other := passing(t)
			attach := func() {
				t.Helper()
				err := netns.Do(l.host, func() error {
					end, err := netlink.LinkByName("pod")
					if err != nil {
						return err
					}
					return tc.attach(t, other, end)
				})
				if err != nil {
					t.Fatal(err)
				}
			}
			from, to := l.linkAddress(t, l.pod, "eth0"), l.linkAddress(t, l.host, "pod")
			port := uint16(20000)
			forge := func() string {
				port++
				f := guarded()[0]
				return l.forge(t, forgery{Src: f.at(pod4, port), Dst: f.at(remote4, 80), From: from, To: to, Way: wayPacket})
			}
			if got := forge(); got != "answered" {
				t.Fatalf("control: a SYN without the guard: %s", got)
			}
			if tc.before {
				attach()
			}
			l.ensureFresh(t)
			if !tc.before {
				attach()
			}
			if holds, err := l.redirector.Holds(l.podOf(pod4, pod6)); err != nil || holds != tc.holds {
				t.Errorf("holds: %v, %v; want %v", holds, err, tc.holds)
			}
			l.ensure(t, pod4, pod6)
			if holds, err := l.redirector.Holds(l.podOf(pod4, pod6)); err != nil || !holds {
				t.Errorf("holds after Ensure: %v, %v", holds, err)
			}
			if got := forge(); got != "silence" {
				t.Errorf("a SYN: %s", got)
			}
			if err := l.redirector.Remove(l.pod); err != nil {
				t.Fatal(err)
			}
			if got := forge(); got != "answered" {
				t.Errorf("a SYN after the pod has left: %s", got)
			}
			l.expectOther(t, other)
		})
	}
}

// expectOther looks for the other's program, by tcx or as a filter, and for nothing of ours.
func (l *lab) expectOther(t *testing.T, other *ebpf.Program) {
	t.Helper()
	info, err := other.Info()
	if err != nil {
		t.Fatal(err)
	}
	id, _ := info.ID()
	var have []ebpf.ProgramID
	err = netns.Do(l.host, func() error {
		end, err := netlink.LinkByName("pod")
		if err != nil {
			return err
		}
		programs, err := link.QueryPrograms(link.QueryOptions{Target: end.Attrs().Index, Attach: ebpf.AttachTCXIngress})
		if err == nil {
			for _, p := range programs.Programs {
				have = append(have, p.ID)
			}
		}
		filters, err := netlink.FilterList(end, netlink.HANDLE_MIN_INGRESS)
		for _, f := range filters {
			have = append(have, ebpf.ProgramID(f.(*netlink.BpfFilter).Id))
		}
		return err
	})
	if err != nil || len(have) != 1 || have[0] != id {
		t.Errorf("programs on the interface: %v, %v; want %v alone", have, err, id)
	}
}

// A pod that runs loses nothing that is sent to it while it is enrolled, as it would if its interface got a filter.
func TestRunningPodGetsALink(t *testing.T) {
	l := newLab(t, redirect.EBPF)
	l.ensure(t, pod4, pod6)
	pins, err := filepath.Glob(filepath.Join(l.cfg.BPFFS, "pods", "*", "guard-*"))
	if err != nil || len(pins) != 1 {
		t.Errorf("the guard is no link: %v, %v", pins, err)
	}
	// And stays what it was.
	l.ensureFresh(t)
	if again, err := filepath.Glob(filepath.Join(l.cfg.BPFFS, "pods", "*", "*-*")); err != nil || !slices.Equal(again, pins) {
		t.Errorf("guards %v, %v; before %v", again, err, pins)
	}
}

// What others may have come to rely on stays when a pod leaves the mesh, and with it the interface in service.
func TestEndOfAFilterLeavesTheQueueingDiscipline(t *testing.T) {
	l := newLab(t, redirect.EBPF)
	has := func() (qdisc bool, filters int) {
		t.Helper()
		err := netns.Do(l.host, func() error {
			end, err := netlink.LinkByName("pod")
			if err != nil {
				return err
			}
			qdiscs, err := netlink.QdiscList(end)
			if err != nil {
				return err
			}
			qdisc = slices.ContainsFunc(qdiscs, func(q netlink.Qdisc) bool { return q.Type() == "clsact" })
			list, err := netlink.FilterList(end, netlink.HANDLE_MIN_INGRESS)
			filters = len(list)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return qdisc, filters
	}
	l.ensureFresh(t)
	if qdisc, filters := has(); !qdisc || filters != 1 {
		t.Fatalf("control: with the guard a queueing discipline %v, %d filters", qdisc, filters)
	}
	for range 2 {
		if err := l.redirector.Remove(l.pod); err != nil {
			t.Fatal(err)
		}
		if qdisc, filters := has(); !qdisc || filters != 0 {
			t.Errorf("after the pod has left: a queueing discipline %v, %d filters", qdisc, filters)
		}
	}
	l.ensureFresh(t)
	if qdisc, filters := has(); !qdisc || filters != 1 {
		t.Errorf("with the guard again: a queueing discipline %v, %d filters", qdisc, filters)
	}
}

// Each pod has its own instance of the lookup program, also those that are captured by the agent after, and those that
// were made before there was a pod.
func TestPodsOfSeveralAgents(t *testing.T) {
	l := newLab(t, redirect.EBPF)
	l.ensure(t, pod4, pod6)
	taken := make(chan accepted, 16)
	l.proxy(t, taken)
	for range 3 {
		r, err := redirect.New(l.cfg)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		stocked := make(chan error, 1)
		go func() { stocked <- r.Stock(ctx) }()
		other := testenv.Netns(t)
		// Nobody listens in that pod: what it had of the first pod's instance would be taken there.
		pod := redirect.Pod{UID: "other", Netns: other, IPs: l.podOf(pod4).IPs}
		if err := netns.Do(other, func() error { return configure("lo", nil, []string{pod4.String() + "/32"}, nil) }); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Ensure(t.Context(), pod); err != nil {
			t.Fatal(err)
		}
		if o := l.app(t, attempt{Dst: guarded()[0].at(remote4, 80)}); o.Error != "" || next(t, taken).by != "outbound" {
			t.Errorf("the first pod: %s", o.Error)
		}
		if o := l.connect(t, "app", "app", other, attempt{Dst: guarded()[0].at(remote4, 80)}); o.Error == "" {
			t.Error("the other pod was connected, by nobody that listens there")
		}
		if err := r.Remove(other); err != nil {
			t.Fatal(err)
		}
		cancel()
		if err := errors.Join(<-stocked, r.Close()); err != nil {
			t.Fatal(err)
		}
	}
}
