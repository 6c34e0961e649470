package netns_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/netns"
	"github.com/fairlead-mesh/fairlead/internal/testenv"
)

// newNetns makes a network namespace with lo up.
func newNetns(t *testing.T) *os.File {
	t.Helper()
	testenv.RequireRoot(t)
	ns := testenv.Netns(t)
	err := netns.Do(ns, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

func TestCookieTellsNamespacesApart(t *testing.T) {
	a, b := newNetns(t), newNetns(t)
	ca, err := netns.Cookie(a)
	if err != nil {
		t.Fatal(err)
	}
	again, err := netns.Cookie(a)
	if err != nil {
		t.Fatal(err)
	}
	cb, err := netns.Cookie(b)
	if err != nil {
		t.Fatal(err)
	}
	own, err := netns.Cookie(nil)
	if err != nil {
		t.Fatal(err)
	}
	if ca != again || ca == cb || ca == own || ca == 0 {
		t.Errorf("cookies: a %d, a again %d, b %d, own %d", ca, again, cb, own)
	}
	if same, err := netns.Same(a, b); err != nil || same {
		t.Errorf("Same of two namespaces: %v, %v", same, err)
	}
}

func TestListenAndDialInsideANamespace(t *testing.T) {
	ns := newNetns(t)
	for _, tc := range []struct{ name, network, addr, source string }{
		{"IPv4", "tcp4", "127.0.0.1:0", ""},
		{"IPv6", "tcp6", "[::1]:0", ""},
		{"IPv4 from a source", "tcp4", "127.0.0.1:0", "127.0.0.9:0"},
		{"IPv4 from a source and port", "tcp4", "127.0.0.1:0", "127.0.0.9:7777"},
		{"dual stack", "tcp", "[::]:0", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l, err := netns.Listen(ns, tc.network, netip.MustParseAddrPort(tc.addr), netns.ProxyMark, true)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			dst := l.Addr().(*net.TCPAddr).AddrPort()
			if dst.Addr().IsUnspecified() {
				dst = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), dst.Port())
			}
			opts := netns.DialOptions{Mark: netns.ProxyMark, Device: "lo", Transparent: true}
			if tc.source != "" {
				opts.Source = netip.MustParseAddrPort(tc.source)
			}
			if _, err := netns.Dial(t.Context(), nil, netns.DialOptions{}, dst); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("dial from outside the namespace: %v, want ECONNREFUSED", err)
			}
			conn, err := netns.Dial(t.Context(), ns, opts, dst)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			peer, err := l.AcceptTCP()
			if err != nil {
				t.Fatal(err)
			}
			defer peer.Close()
			exchange(t, conn, peer)
			got := peer.RemoteAddr().(*net.TCPAddr).AddrPort()
			if tc.source != "" && got.Addr().Unmap() != opts.Source.Addr() {
				t.Errorf("peer sees source %v, want %v", got, opts.Source)
			}
			if mark := sockopt(t, peer, unix.SOL_SOCKET, unix.SO_MARK); mark != int(netns.ProxyMark) {
				t.Errorf("accepted connection has mark %#x", mark)
			}
			if proto := sockopt(t, peer, unix.SOL_SOCKET, unix.SO_PROTOCOL); proto != unix.IPPROTO_TCP {
				t.Errorf("accepted connection has protocol %d", proto)
			}
		})
	}
}

func TestDialErrors(t *testing.T) {
	ns := newNetns(t)
	for _, tc := range []struct {
		name, dst string
		want      error
	}{
		{"nobody listens", "127.0.0.1:9", syscall.ECONNREFUSED},
		{"nobody listens, IPv6", "[::1]:9", syscall.ECONNREFUSED},
		{"no route", "192.0.2.1:80", syscall.ENETUNREACH},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := netns.Dial(t.Context(), ns, netns.DialOptions{}, netip.MustParseAddrPort(tc.dst))
			var op *net.OpError
			if !errors.Is(err, tc.want) || !errors.As(err, &op) {
				t.Errorf("error %v, want a net.OpError of %v", err, tc.want)
			}
		})
	}
}

// TestSocketsNoticeAPeerThatIsGone: connections in either direction probe an idle peer, and take urgent bytes in line.
func TestSocketsNoticeAPeerThatIsGone(t *testing.T) {
	l, err := netns.Listen(nil, "tcp4", netip.MustParseAddrPort("127.0.0.1:0"), 0, false)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	beginner, err := netns.NewBeginner()
	if err != nil {
		t.Fatal(err)
	}
	defer beginner.Close()
	dialled, _, err := beginner.Begin(nil, netns.DialOptions{}, l.Addr().(*net.TCPAddr).AddrPort())
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(dialled)
	accepted, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	file, err := accepted.File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for name, fd := range map[string]int{"dialled": dialled, "accepted": int(file.Fd())} {
		for option, want := range map[[2]int]int{
			{unix.SOL_SOCKET, unix.SO_KEEPALIVE}: 1, {unix.IPPROTO_TCP, unix.TCP_KEEPIDLE}: 15, {unix.SOL_SOCKET, unix.SO_OOBINLINE}: 1,
		} {
			if got, err := unix.GetsockoptInt(fd, option[0], option[1]); err != nil || got != want {
				t.Errorf("%s: option %v is %d, %v; want %d", name, option, got, err, want)
			}
		}
	}
}

func TestDialEndsWithItsContext(t *testing.T) {
	ns := newNetns(t)
	// The neighbour's hardware address is nobody's, so the SYN is lost.
	err := netns.Do(ns, func() error {
		link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "hole"}, PeerName: "end"}
		if err := netlink.LinkAdd(link); err != nil {
			return err
		}
		addr, err := netlink.ParseAddr("192.0.2.2/24")
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(link, addr); err != nil {
			return err
		}
		neighbour := &netlink.Neigh{
			LinkIndex: link.Attrs().Index, IP: net.IPv4(192, 0, 2, 1),
			State: netlink.NUD_PERMANENT, HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 1},
		}
		end, err := netlink.LinkByName("end")
		if err != nil {
			return err
		}
		for _, l := range []netlink.Link{link, end} {
			if err := netlink.LinkSetUp(l); err != nil {
				return err
			}
		}
		return netlink.NeighSet(neighbour)
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	start := time.Now()
	_, err = netns.Dial(ctx, ns, netns.DialOptions{}, netip.MustParseAddrPort("192.0.2.1:80"))
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v, want the context's", err)
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("took %v", took)
	}
}

func TestCheckRefusesWhatIsNoNetworkNamespace(t *testing.T) {
	plain := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{plain, "/proc/self/ns/uts", "/nowhere"} {
		if ns, err := netns.Open(path); err == nil {
			ns.Close()
			t.Errorf("%s was taken for a network namespace", path)
		}
	}
	ns, err := netns.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	ns.Close()
}

func TestDoComesHome(t *testing.T) {
	ns := newNetns(t)
	home, err := netns.Cookie(nil)
	if err != nil {
		t.Fatal(err)
	}
	failure := errors.New("failed inside")
	for range 50 {
		if err := netns.Do(ns, func() error { return failure }); !errors.Is(err, failure) {
			t.Fatalf("error %v", err)
		}
		if now, err := netns.Cookie(nil); err != nil || now != home {
			t.Fatalf("this process is in namespace %d, was in %d (%v)", now, home, err)
		}
	}
}

func exchange(t *testing.T, a, b net.Conn) {
	t.Helper()
	if _, err := a.Write([]byte("over")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4)
	b.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.ReadFull(b, buf); err != nil || string(buf) != "over" {
		t.Fatalf("read %q: %v", buf, err)
	}
}

func sockopt(t *testing.T, c syscall.Conn, level, name int) (value int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { value, err = unix.GetsockoptInt(int(fd), level, name) })
	if err != nil {
		t.Fatal(err)
	}
	return value
}
