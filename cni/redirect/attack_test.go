package redirect_test

import (
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/fairlead-mesh/fairlead/cni/redirect"
	"github.com/fairlead-mesh/fairlead/internal/netns"
	"github.com/fairlead-mesh/fairlead/internal/testenv"
)

// unguard takes the guard off the pod, for controls, and returns how to put it back.
func (l *lab) unguard(t testing.TB) (restore func()) {
	t.Helper()
	pins, err := filepath.Glob(filepath.Join(l.cfg.BPFFS, "pods", "*", "guard-*"))
	switch {
	case err == nil && len(pins) == 1: // a link
		err = os.Remove(pins[0])
	case err == nil:
		end, _ := l.guardFilter(t)
		err = netns.Do(l.host, func() error {
			return netlink.QdiscDel(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: end.Attrs().Index, Parent: netlink.HANDLE_CLSACT}})
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		l.ensureFresh(t)
	}
}

// ensureFresh redirects the pod as one that starts.
func (l *lab) ensureFresh(t testing.TB) {
	t.Helper()
	pod := l.podOf(pod4, pod6)
	pod.Fresh = true
	if _, err := l.redirector.Ensure(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
}

// guardFilter finds the guard on the host's end of the pod's interface.
func (l *lab) guardFilter(t testing.TB) (end netlink.Link, guard *netlink.BpfFilter) {
	t.Helper()
	err := netns.Do(l.host, func() (err error) {
		if end, err = netlink.LinkByName("pod"); err != nil {
			return err
		}
		filters, err := netlink.FilterList(end, netlink.HANDLE_MIN_INGRESS)
		if err == nil && len(filters) == 1 {
			guard, _ = filters[0].(*netlink.BpfFilter)
		}
		return err
	})
	if err != nil || guard == nil {
		t.Fatalf("the guard's filter is not found: %v", err)
	}
	return end, guard
}

func (l *lab) dropped(t *testing.T) uint64 {
	t.Helper()
	counters, err := l.redirector.Counters()
	if err != nil {
		t.Fatal(err)
	}
	return counters["bypass_dropped"]
}

func (l *lab) linkAddress(t *testing.T, ns *os.File, device string) (mac net.HardwareAddr) {
	t.Helper()
	err := netns.Do(ns, func() error {
		link, err := netlink.LinkByName(device)
		if err == nil {
			mac = link.Attrs().HardwareAddr
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return mac
}

// guarded are the families in the mode that has a guard.
func guarded() []family {
	return slices.DeleteFunc(slices.Clone(families), func(f family) bool { return f.mode != redirect.EBPF })
}

// A pod with CAP_NET_RAW has no TCP of its own making.
func TestForgedPacketsDoNotLeaveThePod(t *testing.T) {
	for _, f := range guarded() {
		t.Run(f.name, func(t *testing.T) {
			l := newLab(t, redirect.EBPF)
			taken := make(chan accepted, 16)
			listen(t, "server", l.host, f.at(f.remote, 80), taken)
			l.ensureFresh(t)
			l.proxy(t, taken)
			ways := []string{wayPacket, wayDirect, wayRaw, wayFragments, wayTagged}
			if f.pod.Is6() {
				ways = append(ways, wayOptions)
			}
			from, to := l.linkAddress(t, l.pod, "eth0"), l.linkAddress(t, l.host, "pod")
			for i, way := range ways {
				syn := forgery{Src: f.at(f.pod, uint16(20000+i)), Dst: f.at(f.remote, 80), From: from, To: to, Way: way}
				restore := l.unguard(t)
				if got := l.forge(t, syn); got != "answered" {
					t.Errorf("control: a SYN by %s, without the guard: %s", way, got)
				}
				restore()
				before := l.dropped(t)
				syn.Src = f.at(f.pod, uint16(21000+i))
				if got := l.forge(t, syn); got != "silence" || l.dropped(t) == before {
					t.Errorf("a SYN by %s: %s, %d dropped", way, got, l.dropped(t)-before)
				}
			}
		})
	}
}

// A pod with CAP_NET_ADMIN that changes its network namespace has no way round the proxy either.
func TestChangedNamespaceIsNoWayRound(t *testing.T) {
	for _, f := range guarded() {
		for _, attack := range []struct {
			name   string
			change func(*testing.T, *lab) (ns *os.File)
		}{
			{"rules removed", removeRules},
			{"interface moved away", moveInterface},
			{"interface of its own on top", macvlan},
		} {
			t.Run(f.name+" "+attack.name, func(t *testing.T) {
				l := newLab(t, redirect.EBPF)
				taken := make(chan accepted, 16)
				listen(t, "server", l.host, f.at(f.remote, 80), taken)
				l.ensure(t, pod4, pod6)
				l.proxy(t, taken)
				ns := attack.change(t, l)
				listen(t, "app", ns, f.anyPort(8080), taken)
				out := func(patience time.Duration) outcome {
					t.Helper()
					return l.connect(t, "app", "app", ns, attempt{Dst: f.at(f.remote, 80), Patience: patience})
				}
				in := func() outcome {
					t.Helper()
					return l.connect(t, "client", "client", l.host, attempt{Dst: f.at(f.pod, 8080), Patience: 500 * time.Millisecond})
				}
				before := l.dropped(t)
				if o := out(500 * time.Millisecond); o.Error == "" {
					t.Errorf("a connection went out, to %v", next(t, taken).by)
				}
				if ns != l.pod {
					// The listener is this process's, which plays the proxy: but in another namespace than the pod's.
					if o := in(); o.Error == "" {
						t.Errorf("a connection came in, to %v", next(t, taken).by)
					}
				}
				if l.dropped(t) == before {
					t.Error("nothing was counted")
				}
				l.unguard(t)
				if o := out(5 * time.Second); o.Error != "" {
					t.Errorf("control: without the guard: %s", o.Error)
				} else if a := next(t, taken); a.by != "server" {
					t.Errorf("control: taken by %s", a.by)
				}
			})
		}
	}
}

func removeRules(t *testing.T, l *lab) *os.File {
	t.Helper()
	err := netns.Do(l.pod, func() error {
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			for priority := 1; priority <= 2; priority++ {
				rule := netlink.NewRule()
				rule.Priority, rule.Family = priority, family
				if err := netlink.RuleDel(rule); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return l.pod
}

func moveInterface(t *testing.T, l *lab) *os.File {
	t.Helper()
	own := testenv.Netns(t)
	err := netns.Do(l.pod, func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.LinkSetNsFd(link, int(own.Fd()))
	})
	if err != nil {
		t.Fatal(err)
	}
	l.settle(t, own, "eth0")
	return own
}

func macvlan(t *testing.T, l *lab) *os.File {
	t.Helper()
	own := testenv.Netns(t)
	err := netns.Do(l.pod, func() error {
		parent, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		// The address of the pod's own interface, which must be another's then, or the host would not answer it.
		mac := parent.Attrs().HardwareAddr
		if err := netlink.LinkSetHardwareAddr(parent, net.HardwareAddr{2, 0, 0, 0, 0, 9}); err != nil {
			return err
		}
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			addrs, err := netlink.AddrList(parent, family)
			if err != nil {
				return err
			}
			for _, a := range addrs {
				if err := netlink.AddrDel(parent, &a); err != nil {
					return err
				}
			}
		}
		return netlink.LinkAdd(&netlink.Macvlan{Mode: netlink.MACVLAN_MODE_BRIDGE, LinkAttrs: netlink.LinkAttrs{
			Name: "own", ParentIndex: parent.Attrs().Index, HardwareAddr: mac, Namespace: netlink.NsFd(int(own.Fd()))}})
	})
	if err != nil {
		t.Fatal(err)
	}
	l.settle(t, own, "own")
	return own
}

// settle gives an interface the pod's addresses, routes and neighbours.
func (l *lab) settle(t *testing.T, ns *os.File, device string) {
	t.Helper()
	mac := l.linkAddress(t, l.host, "pod")
	err := netns.Do(ns, func() error {
		if err := configure(device, []string{"10.78.0.2/24", "fd78::2/64"}, nil, []netip.Addr{host4, host6}); err != nil {
			return err
		}
		return know(device, []netip.Addr{host4, host6}, mac)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A pod that cannot be redirected is known by its cgroup, and has no TCP but on its loopback.
func TestRefusedPodHasNoTCP(t *testing.T) {
	for _, f := range guarded() {
		t.Run(f.name, func(t *testing.T) {
			l := newLab(t, redirect.EBPF)
			const uid = "0c6e1cc9-2ed5-4c5c-8cf6-7a4a2d1b0f11"
			cgroup := "kubepods/pod" + strings.ReplaceAll(uid, "-", "_") + ".slice"
			l.makeCgroup(t, cgroup)
			taken := make(chan accepted, 16)
			listen(t, "server", l.host, f.at(f.remote, 80), taken)
			listen(t, "app", l.pod, f.anyPort(8080), taken)
			out := func(patience time.Duration) outcome {
				t.Helper()
				return l.connect(t, "app", cgroup, l.pod, attempt{Dst: f.at(f.remote, 80), Patience: patience})
			}
			if o := out(5 * time.Second); o.Error != "" {
				t.Fatalf("control: %s", o.Error)
			}
			for range 2 {
				if err := l.redirector.Refuse(uid); err != nil {
					t.Fatal(err)
				}
			}
			if o := out(500 * time.Millisecond); o.Error == "" {
				t.Error("a connection went out")
			}
			if o := l.connect(t, "app", cgroup, l.pod, attempt{Dst: f.at(f.pod, 8080)}); o.Error != "" {
				t.Errorf("to itself: %s", o.Error)
			}
			if uids, err := l.redirector.Refused(); err != nil || len(uids) != 1 || uids[0] != uid {
				t.Errorf("refused: %v, %v", uids, err)
			}
			for range 2 {
				if err := l.redirector.Admit(uid); err != nil {
					t.Fatal(err)
				}
			}
			if o := out(5 * time.Second); o.Error != "" {
				t.Errorf("after Admit: %s", o.Error)
			}
			if err := l.redirector.Refuse("no-such-pod"); err == nil {
				t.Error("a pod without a cgroup was refused")
			}
		})
	}
}
