package redirect_test

import (
	"cmp"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/cni/redirect"
	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// forgery is a TCP SYN that an attacker makes by itself, in a process of the pod's.
type forgery struct {
	Src, Dst netip.AddrPort
	// From and To are the link's ends.
	From, To net.HardwareAddr
	// Way is how it is sent.
	Way string
	// Device is the pod's interface; empty means eth0.
	Device string
}

// The ways to send a packet past the kernel's TCP.
const (
	wayPacket    = "packet socket"
	wayDirect    = "packet socket past the queue"
	wayRaw       = "raw socket"
	wayFragments = "fragments"
	wayTagged    = "VLAN tag"
	wayOptions   = "IPv6 options"
)

func init() {
	if f := os.Getenv("FAIRLEAD_TEST_FORGE"); f != "" {
		forge(f)
		os.Exit(0)
	}
}

// forge sends the SYN from the namespace in descriptor 3 and tells whether it was answered.
func forge(arguments string) {
	var f forgery
	must := func(err error) {
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	must(json.Unmarshal([]byte(arguments), &f))
	must(netns.Do(os.NewFile(3, "netns"), func() error {
		eth, err := net.InterfaceByName(cmp.Or(f.Device, "eth0"))
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, int(htons(unix.ETH_P_ALL)))
		if err != nil {
			return err
		}
		if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: eth.Index}); err != nil {
			return err
		}
		if f.Way == wayDirect {
			if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1); err != nil {
				return err
			}
		}
		if f.Way == wayRaw {
			err = f.sendRaw()
		} else {
			for _, frame := range f.frames() {
				err = unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: eth.Index, Halen: 6})
			}
		}
		if err != nil {
			return err
		}
		return f.await(fd)
	}))
}

// await prints whether a segment comes back.
func (f forgery) await(fd int) error {
	timeout := unix.Timeval{Usec: 50_000}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return err
	}
	buf := make([]byte, 2048)
	for end := time.Now().Add(400 * time.Millisecond); time.Now().Before(end); {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			continue
		}
		ports := make([]byte, 4)
		binary.BigEndian.PutUint16(ports, f.Dst.Port())
		binary.BigEndian.PutUint16(ports[2:], f.Src.Port())
		if strings.Contains(string(buf[:n]), string(ports)) {
			fmt.Print("answered")
			return nil
		}
	}
	fmt.Print("silence")
	return nil
}

func (f forgery) sendRaw() error {
	family, addr := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Addr: f.Dst.Addr().As16()})
	if f.Dst.Addr().Is4() {
		family, addr = unix.AF_INET, &unix.SockaddrInet4{Addr: f.Dst.Addr().As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	return unix.Sendto(fd, f.packet(f.segment(), unix.IPPROTO_TCP, 0), 0, addr)
}

// frames are the Ethernet frames to send.
func (f forgery) frames() [][]byte {
	segment := f.segment()
	head := append(append([]byte{}, f.To...), f.From...)
	kind := []byte{0x08, 0x00}
	if f.Dst.Addr().Is6() {
		kind = []byte{0x86, 0xdd}
	}
	var frames [][]byte
	for _, packet := range f.packets(segment) {
		frame := append([]byte{}, head...)
		if f.Way == wayTagged {
			frame = append(frame, 0x81, 0x00, 0, 0) // priority tag: the host takes it as untagged
		}
		frames = append(frames, append(append(frame, kind...), packet...))
	}
	return frames
}

func (f forgery) packets(segment []byte) [][]byte {
	switch f.Way {
	case wayFragments:
		if f.Dst.Addr().Is6() {
			first := append([]byte{unix.IPPROTO_TCP, 0, 0, 1, 0, 0, 0, 9}, segment[:24]...)
			second := append([]byte{unix.IPPROTO_TCP, 0, 0, 24, 0, 0, 0, 9}, segment[24:]...)
			return [][]byte{f.packet(first, 44, 0), f.packet(second, 44, 0)}
		}
		return [][]byte{f.packet(segment[:24], unix.IPPROTO_TCP, 0x2000), f.packet(segment[24:], unix.IPPROTO_TCP, 3)}
	case wayOptions:
		options := []byte{60, 0, 1, 4, 0, 0, 0, 0, unix.IPPROTO_TCP, 0, 1, 4, 0, 0, 0, 0}
		return [][]byte{f.packet(append(options, segment...), 0, 0)}
	}
	return [][]byte{f.packet(segment, unix.IPPROTO_TCP, 0)}
}

// packet is an IP packet; fragment is the field of that name of IPv4's header.
func (f forgery) packet(payload []byte, protocol byte, fragment uint16) []byte {
	src, dst := f.Src.Addr().AsSlice(), f.Dst.Addr().AsSlice()
	if f.Dst.Addr().Is6() {
		h := append([]byte{0x60, 0, 0, 0, 0, byte(len(payload)), protocol, 64}, src...)
		return append(append(h, dst...), payload...)
	}
	h := append([]byte{0x45, 0, 0, byte(20 + len(payload)), 0, 9, byte(fragment >> 8), byte(fragment), 64, protocol, 0, 0}, src...)
	h = append(h, dst...)
	binary.BigEndian.PutUint16(h[10:], checksum(h))
	return append(h, payload...)
}

// segment is a TCP SYN with padding, so that it can be cut in pieces.
func (f forgery) segment() []byte {
	s := make([]byte, 32)
	binary.BigEndian.PutUint16(s, f.Src.Port())
	binary.BigEndian.PutUint16(s[2:], f.Dst.Port())
	copy(s[12:], []byte{8 << 4, 0x02, 0xff, 0xff})
	copy(s[20:], []byte{2, 4, 5, 0xb4})
	pseudo := append(append([]byte{}, f.Src.Addr().AsSlice()...), f.Dst.Addr().AsSlice()...)
	pseudo = append(pseudo, 0, unix.IPPROTO_TCP, 0, byte(len(s)))
	binary.BigEndian.PutUint16(s[16:], checksum(append(pseudo, s...)))
	return s
}

func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// forge runs a forgery in a process of the pod's.
func (l *lab) forge(t *testing.T, f forgery) string {
	t.Helper()
	group, err := os.Open(l.makeCgroup(t, "app"))
	if err != nil {
		t.Fatal(err)
	}
	defer group.Close()
	arguments, err := json.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "FAIRLEAD_TEST_FORGE="+string(arguments))
	cmd.ExtraFiles = []*os.File{l.pod}
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(group.Fd())}
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("forge by %s: %v: %s", f.Way, err, out)
	}
	return string(out)
}

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
	own := newNetns(t)
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
	own := newNetns(t)
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
