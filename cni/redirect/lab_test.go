package redirect_test

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/bpf"
	"github.com/fairlead-mesh/fairlead/cni/redirect"
	"github.com/fairlead-mesh/fairlead/internal/netns"
	"github.com/fairlead-mesh/fairlead/internal/testenv"
)

// The addresses of the lab: a pod behind a veth, and a host that has the rest of the world on its lo.
var (
	pod4, pod6       = netip.MustParseAddr("10.78.0.2"), netip.MustParseAddr("fd78::2")
	host4, host6     = netip.MustParseAddr("10.78.0.1"), netip.MustParseAddr("fd78::1")
	remote4, remote6 = netip.MustParseAddr("10.78.9.9"), netip.MustParseAddr("fd78:9::9")
)

// lab is a host and one pod. This process plays the node proxy, in a cgroup of its own; applications are processes
// in other cgroups.
type lab struct {
	host, pod  *os.File
	cgroup     string
	cfg        redirect.Config
	redirector *redirect.Redirector
}

func newLab(t testing.TB, mode redirect.Mode) *lab {
	t.Helper()
	return newLabOf(t, mode, testenv.Netns(t))
}

// newLabOf is a lab whose pod has that network namespace.
func newLabOf(t testing.TB, mode redirect.Mode, pod *os.File) *lab {
	t.Helper()
	testenv.RequireBPF(t)
	l := &lab{host: testenv.Netns(t), pod: pod}
	connectNetns(t, l.host, l.pod)
	root, err := bpf.FindCgroup2("/proc/self/mounts")
	testenv.Require(t, err == nil, "a cgroup2 mount")
	l.cgroup = filepath.Join(root, fmt.Sprintf("fairlead-redirect-test-%d", os.Getpid()))
	home := moveTo(t, l.makeCgroup(t, "proxy"))
	t.Cleanup(func() { writeFile(t, filepath.Join(root, home, "cgroup.procs"), strconv.Itoa(os.Getpid())) })

	l.cfg = redirect.Config{Mode: mode, BPFFS: filepath.Join(t.TempDir(), "bpf"), Cgroup: l.cgroup, HostNetns: l.host}
	t.Cleanup(func() {
		if err := redirect.Uninstall(l.cfg); err != nil {
			t.Errorf("uninstall: %v", err)
		}
	})
	l.redirector, err = redirect.New(l.cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.redirector.Close() })
	if err := l.redirector.EnsureProxy(os.Getpid()); err != nil {
		t.Fatal(err)
	}
	if err := l.redirector.Guard(); err != nil && mode == redirect.EBPF {
		testenv.Require(t, false, err.Error())
	}
	return l
}

// makeCgroup makes a cgroup below the lab's and removes it at the end.
func (l *lab) makeCgroup(t testing.TB, name string) string {
	t.Helper()
	path := filepath.Join(l.cgroup, name)
	if err := os.MkdirAll(path, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for dir := path; dir != filepath.Dir(l.cgroup); dir = filepath.Dir(dir) {
			os.Remove(dir) // parents that still have children refuse, and go with the last of these
		}
	})
	return path
}

// moveTo moves this process into a cgroup and returns the path of the one it was in.
func moveTo(t testing.TB, cgroup string) string {
	t.Helper()
	content, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	home := "/"
	for line := range strings.Lines(string(content)) {
		if rest, ok := strings.CutPrefix(line, "0::"); ok {
			home = strings.TrimSpace(rest)
		}
	}
	writeFile(t, filepath.Join(cgroup, "cgroup.procs"), strconv.Itoa(os.Getpid()))
	return home
}

// connectNetns joins host and pod as a routed veth does in a cluster.
func connectNetns(t testing.TB, host, pod *os.File) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(netns.Do(host, func() error {
		veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "pod"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(pod.Fd()))}
		if err := netlink.LinkAdd(veth); err != nil {
			return err
		}
		return configure("pod", []string{"10.78.0.1/24", "fd78::1/64"}, []string{"10.78.9.9/32", "fd78:9::9/128"}, nil)
	}))
	must(netns.Do(pod, func() error {
		return configure("eth0", []string{"10.78.0.2/24", "fd78::2/64"}, nil, []netip.Addr{host4, host6})
	}))
	// The ends know each other from the start: to find an IPv6 neighbour takes seconds on a link that is new.
	ends := []struct {
		ns     *os.File
		device string
		addrs  []netip.Addr
		mac    net.HardwareAddr
	}{{host, "pod", []netip.Addr{host4, host6}, nil}, {pod, "eth0", []netip.Addr{pod4, pod6}, nil}}
	for i, end := range ends {
		must(netns.Do(end.ns, func() error {
			link, err := netlink.LinkByName(end.device)
			if err == nil {
				ends[i].mac = link.Attrs().HardwareAddr
			}
			return err
		}))
	}
	for i, end := range ends {
		must(netns.Do(end.ns, func() error { return know(end.device, ends[1-i].addrs, ends[1-i].mac) }))
		must(netns.Do(end.ns, func() error { return testenv.Settle(end.device, end.addrs...) }))
	}
	// The rest of the world is on the host's lo.
	must(netns.Do(host, func() error { return testenv.Settle("pod", remote4, remote6) }))
}

// know makes addresses neighbours on a device of the current namespace.
func know(device string, addrs []netip.Addr, mac net.HardwareAddr) error {
	link, err := netlink.LinkByName(device)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		n := &netlink.Neigh{LinkIndex: link.Attrs().Index, IP: a.AsSlice(), HardwareAddr: mac, State: netlink.NUD_PERMANENT}
		if err := netlink.NeighSet(n); err != nil {
			return err
		}
	}
	return nil
}

// configure gives the current namespace's interface and lo their addresses, and routes everything through gateways.
func configure(name string, addrs, loAddrs []string, gateways []netip.Addr) error {
	for device, list := range map[string][]string{name: addrs, "lo": loAddrs} {
		link, err := netlink.LinkByName(device)
		if err != nil {
			return err
		}
		for _, a := range list {
			addr, err := netlink.ParseAddr(a)
			if err != nil {
				return err
			}
			addr.Flags = unix.IFA_F_NODAD
			if err := netlink.AddrAdd(link, addr); err != nil {
				return err
			}
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
	}
	for _, gw := range gateways {
		if err := netlink.RouteAdd(&netlink.Route{Gw: gw.AsSlice()}); err != nil {
			return err
		}
	}
	return nil
}

// podOf is the lab's pod with the addresses given.
func (l *lab) podOf(ips ...netip.Addr) redirect.Pod {
	return redirect.Pod{UID: "pod-uid", Netns: l.pod, IPs: ips}
}

func (l *lab) ensure(t *testing.T, ips ...netip.Addr) {
	t.Helper()
	if _, err := l.redirector.Ensure(t.Context(), l.podOf(ips...)); err != nil {
		t.Fatal(err)
	}
}

// accepted is a connection that someone took, and who.
type accepted struct {
	by            string
	local, remote netip.AddrPort
	conn          *net.TCPConn
}

// serve reports the connections that a listener takes, until the test ends.
func serve(t *testing.T, by string, l *net.TCPListener, to chan<- accepted) {
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			t.Cleanup(func() { c.Close() })
			to <- accepted{by, askedFor(c), addrPort(c.RemoteAddr()), c}
		}
	}()
}

// listen listens in ns as any program does, and reports on to.
func listen(t *testing.T, by string, ns *os.File, addr netip.AddrPort, to chan<- accepted) {
	t.Helper()
	err := netns.Do(ns, func() error {
		l, err := net.Listen("tcp", addr.String())
		if err != nil {
			return err
		}
		serve(t, by, l.(*net.TCPListener), to)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// proxy opens the proxy's TCP listeners in the pod where redirection leads to.
func (l *lab) proxy(t *testing.T, to chan<- accepted) map[bpf.Slot]*net.TCPListener {
	t.Helper()
	listeners := map[bpf.Slot]*net.TCPListener{}
	for slot, row := range map[bpf.Slot]struct {
		by   string
		port uint16
	}{
		bpf.OutboundIPv4: {"outbound", 15001}, bpf.OutboundIPv6: {"outbound", 15001},
		bpf.InboundPlaintextIPv4: {"plaintext", 15006}, bpf.InboundPlaintextIPv6: {"plaintext", 15006},
		bpf.InboundHBONEIPv4: {"hbone", 15008}, bpf.InboundHBONEIPv6: {"hbone", 15008},
		bpf.DNSOverTCPIPv4: {"dns", 15053}, bpf.DNSOverTCPIPv6: {"dns", 15053},
	} {
		ip, port := netip.MustParseAddr("127.0.0.1"), uint16(0)
		if slot%2 == 1 {
			ip = netip.IPv6Loopback()
		}
		if l.cfg.Mode == redirect.NFTables {
			port = row.port
			if ip = netip.IPv4Unspecified(); slot%2 == 1 {
				ip = netip.IPv6Unspecified()
			}
		}
		network := map[bool]string{true: "tcp4", false: "tcp6"}[ip.Is4()]
		mark := netns.ProxyMark
		if (row.by == "outbound" || row.by == "dns") && l.cfg.Mode == redirect.EBPF {
			mark = netns.RedirectMark
		}
		listener, err := netns.Listen(l.pod, network, netip.AddrPortFrom(ip, port), mark, true)
		if err != nil {
			t.Fatal(err)
		}
		serve(t, row.by, listener, to)
		listeners[slot] = listener
	}
	if l.cfg.Mode == redirect.EBPF {
		fillSlots(t, l, listeners)
	}
	return listeners
}

func fillSlots[S syscall.Conn](t *testing.T, l *lab, listeners map[bpf.Slot]S) {
	t.Helper()
	cookie, err := netns.Cookie(l.pod)
	if err != nil {
		t.Fatal(err)
	}
	slots, err := bpf.OpenListeners(l.cfg.BPFFS, cookie)
	if err != nil {
		t.Fatal(err)
	}
	defer slots.Close()
	for slot, listener := range listeners {
		raw, err := listener.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		raw.Control(func(fd uintptr) { err = slots.Set(slot, int(fd)) })
		if err != nil {
			t.Fatal(err)
		}
	}
}

// askedFor is the address that a connection was opened to, which nftables has rewritten.
func askedFor(c *net.TCPConn) netip.AddrPort {
	const soOriginalDst = 80
	local := addrPort(c.LocalAddr())
	raw, err := c.SyscallConn()
	if err != nil {
		return local
	}
	raw.Control(func(fd uintptr) {
		var sa unix.RawSockaddrInet6
		size, level := uint32(unix.SizeofSockaddrInet6), uintptr(unix.SOL_IPV6)
		if local.Addr().Is4() {
			level = unix.SOL_IP
		}
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, level, soOriginalDst, uintptr(unsafe.Pointer(&sa)), uintptr(unsafe.Pointer(&size)), 0)
		if errno != 0 {
			return
		}
		port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&sa.Port))[:])
		if local.Addr().Is4() {
			four := (*unix.RawSockaddrInet4)(unsafe.Pointer(&sa))
			local = netip.AddrPortFrom(netip.AddrFrom4(four.Addr), port)
			return
		}
		local = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), port)
	})
	return local
}

// attempt is a connect made by an application, which is a process of its own.
type attempt struct {
	Dst    netip.AddrPort
	Mark   uint32
	Device string
	Source netip.AddrPort
	// Dialer makes the connection as Go programs do; it is the one that knows Zones, Multipath TCP and mapped addresses.
	Dialer bool
	// Multipath asks for Multipath TCP.
	Multipath bool
	// User is the user id of who connects.
	User int
	// Patience is how long it waits; 0 means two seconds.
	Patience time.Duration
}

// outcome is what the application saw.
type outcome struct {
	Local, Remote netip.AddrPort
	Errno         syscall.Errno
	Error         string
	Took          time.Duration
}

// connect runs an attempt in a process called comm, in ns and in a cgroup of the lab.
func (l *lab) connect(t *testing.T, comm, cgroup string, ns *os.File, a attempt) outcome {
	t.Helper()
	group, err := os.Open(l.makeCgroup(t, cgroup))
	if err != nil {
		t.Fatal(err)
	}
	defer group.Close()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(t.TempDir(), comm)
	if err := os.Symlink(self, program); err != nil {
		t.Fatal(err)
	}
	arguments, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program)
	cmd.Env = append(os.Environ(), "FAIRLEAD_TEST_CONNECT="+string(arguments))
	cmd.ExtraFiles = []*os.File{ns}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(group.Fd())}
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("application: %v", err)
	}
	var o outcome
	if err := json.Unmarshal(out, &o); err != nil {
		t.Fatalf("application said %q: %v", out, err)
	}
	return o
}

// app is connect by an ordinary application in the pod.
func (l *lab) app(t *testing.T, a attempt) outcome {
	t.Helper()
	return l.connect(t, "app", "app", l.pod, a)
}

// next waits for the next accepted connection.
func next(t *testing.T, from <-chan accepted) accepted {
	t.Helper()
	select {
	case a := <-from:
		return a
	case <-time.After(3 * time.Second):
		t.Fatal("nobody took the connection")
		return accepted{}
	}
}

func addrPort(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}
