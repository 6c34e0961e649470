package redirect_test

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-mesh/fairlead/bpf"
	"github.com/fairlead-mesh/fairlead/cni/redirect"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// resolver answers every packet with its name and the packet, and from the address that it was sent to.
func resolver(t *testing.T, name string, ns *os.File, addr netip.AddrPort) {
	t.Helper()
	err := netns.Do(ns, func() error {
		conn, err := net.ListenPacket("udp", addr.String())
		if err != nil {
			return err
		}
		t.Cleanup(func() { conn.Close() })
		go func() {
			buf := make([]byte, 512)
			for {
				n, from, err := conn.ReadFrom(buf)
				if err != nil {
					return
				}
				conn.WriteTo(append([]byte(name+" "), buf[:n]...), from)
			}
		}()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// received is a query as the proxy got it.
type received struct {
	from netip.AddrPort
	to   netip.Addr
}

// proxyDNS opens the proxy's UDP listeners in the pod, which answer as "proxy".
func (l *lab) proxyDNS(t *testing.T) (map[bpf.Slot]*netns.PacketListener, <-chan received) {
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
	queries := make(chan received, 16)
	listeners := map[bpf.Slot]*netns.PacketListener{}
	for slot, addr := range map[bpf.Slot]string{bpf.DNSIPv4: "127.0.0.1:0", bpf.DNSIPv6: "[::1]:0"} {
		p, err := netns.ListenPacket(l.pod, netip.MustParseAddrPort(addr))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Close() })
		raw, err := p.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		raw.Control(func(fd uintptr) { err = slots.Set(slot, int(fd)) })
		if err != nil {
			t.Fatal(err)
		}
		listeners[slot] = p
		go func() {
			buf := make([]byte, 512)
			for {
				n, from, to, _, err := p.Read(buf)
				if err != nil {
					return
				}
				queries <- received{from, to}
				if err := p.Write(append([]byte("proxy "), buf[:n]...), netip.AddrPortFrom(to, 53), from); err != nil {
					t.Error(err)
				}
			}
		}()
	}
	return listeners, queries
}

// ask sends a query from the pod, on a socket that is connected, and returns the answer; empty for none.
func (l *lab) ask(t *testing.T, to netip.AddrPort, mark uint32) (answer string, from netip.AddrPort) {
	t.Helper()
	conn, err := netns.DialPacket(t.Context(), l.pod, mark, to)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("query")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 512)
	conn.SetReadDeadline(time.Now().Add(patience))
	n, err := conn.Read(buf)
	if err != nil {
		return "", netip.AddrPort{}
	}
	return string(buf[:n]), conn.LocalAddr().(*net.UDPAddr).AddrPort()
}

// patience is how long an answer is waited for, also one that must not come.
const patience = 500 * time.Millisecond

func TestDNS(t *testing.T) {
	for _, f := range families {
		if f.mode != redirect.EBPF {
			continue // there the rules lead to a port: TestDNSByRules
		}
		t.Run(f.name, func(t *testing.T) {
			l := newLab(t, f.mode)
			resolver(t, "server", l.host, f.at(f.remote, 53))
			resolver(t, "other", l.host, f.at(f.remote, 54))
			// The application may be a resolver itself.
			resolver(t, "app", l.pod, f.anyPort(53))
			want := func(when, want string, to netip.AddrPort, mark uint32) {
				t.Helper()
				if want != "" {
					want += " query"
				}
				if got, _ := l.ask(t, to, mark); got != want {
					t.Errorf("%s: answer %q, want %q", when, got, want)
				}
			}
			at := f.at(f.remote, 53)
			want("before", "server", at, 0) // the control
			l.ensure(t, pod4, pod6)
			want("without a proxy", "", at, 0)
			listeners, queries := l.proxyDNS(t)

			answer, local := l.ask(t, at, 0)
			if answer != "proxy query" {
				t.Errorf("answer %q", answer)
			}
			if diff := cmp.Diff([]string{f.remote.String(), f.pod.String(), local.String()},
				func() []string {
					q := <-queries
					return []string{q.to.String(), q.from.Addr().String(), q.from.String()}
				}()); diff != "" {
				t.Errorf("the proxy saw (-want +got):\n%s", diff)
			}
			want("nobody's address", "proxy", f.at(f.remote.Next(), 53), 0)
			want("the proxy's own", "server", at, netns.ProxyMark)
			want("another port", "other", f.at(f.remote, 54), 0)
			want("the pod's own resolver", "app", f.at(f.pod, 53), 0)
			want("a resolver on loopback", "app", f.at(loopbackOf(f), 53), 0)
			unconnected(t, l, f)

			if held, err := l.redirector.Holds(l.podOf(pod4, pod6)); err != nil || !held {
				t.Errorf("held: %v %v", held, err)
			}
			for _, p := range listeners {
				p.Close()
			}
			want("the proxy is gone", "", at, 0)

			off := l.podOf(pod4, pod6)
			off.Exclude = mesh.Exclusions{DNS: true}
			if held, err := l.redirector.Holds(off); err != nil || held {
				t.Errorf("held though another is wanted: %v %v", held, err)
			}
			if _, err := l.redirector.Ensure(t.Context(), off); err != nil {
				t.Fatal(err)
			}
			want("switched off", "server", at, 0)
			l.ensure(t, pod4, pod6)
			l.proxyDNS(t)
			want("switched on", "proxy", at, 0)
			cookie, err := netns.Cookie(l.pod)
			if err != nil {
				t.Fatal(err)
			}
			if err := l.redirector.Release(cookie, l.pod); err != nil {
				t.Fatal(err)
			}
			want("released", "server", at, 0)
		})
	}
}

// unconnected asks two resolvers on one socket: each answer comes from the one that was asked.
func unconnected(t *testing.T, l *lab, f family) {
	t.Helper()
	var conn *net.UDPConn
	err := netns.Do(l.pod, func() error {
		c, err := net.ListenPacket("udp", f.anyPort(0).String())
		conn, _ = c.(*net.UDPConn)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, to := range []netip.AddrPort{f.at(f.remote, 53), f.at(f.remote.Next(), 53)} {
		if _, err := conn.WriteToUDPAddrPort([]byte("query"), to); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 512)
		conn.SetReadDeadline(time.Now().Add(3 * time.Second))
		n, from, err := conn.ReadFromUDPAddrPort(buf)
		if got := netip.AddrPortFrom(from.Addr().Unmap(), from.Port()); err != nil || got != to || string(buf[:n]) != "proxy query" {
			t.Errorf("asked %s, answered by %s: %q (%v)", to, got, buf[:n], err)
		}
	}
}

func loopbackOf(f family) netip.Addr {
	if f.pod.Is6() {
		return netip.IPv6Loopback()
	}
	return netip.MustParseAddr("127.0.0.1")
}

func TestDNSOverTCP(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			l := newLab(t, f.mode)
			l.ensure(t, pod4, pod6)
			taken := make(chan accepted, 16)
			l.proxy(t, taken)
			dst := f.at(f.remote, 53)
			takenBy := func() string {
				t.Helper()
				if o := l.app(t, attempt{Dst: dst}); o.Error != "" {
					t.Fatal(o.Error)
				}
				a := next(t, taken)
				if f.mode == redirect.EBPF && a.local != dst {
					t.Errorf("opened to %s, the proxy sees %s", dst, a.local)
				}
				return a.by
			}
			if by := takenBy(); by != "dns" {
				t.Errorf("taken by %s", by)
			}
			off := l.podOf(pod4, pod6)
			off.Exclude = mesh.Exclusions{DNS: true}
			if _, err := l.redirector.Ensure(t.Context(), off); err != nil {
				t.Fatal(err)
			}
			if by := takenBy(); by != "outbound" {
				t.Errorf("switched off: taken by %s", by)
			}
		})
	}
}

// TestDNSByRules: nftables brings queries to the proxy's port and its answers back under the resolver's address.
func TestDNSByRules(t *testing.T) {
	for _, f := range families {
		if f.mode != redirect.NFTables {
			continue
		}
		t.Run(f.name, func(t *testing.T) {
			l := newLab(t, f.mode)
			resolver(t, "server", l.host, f.at(f.remote, 53))
			want := func(when, want string, to netip.AddrPort, mark uint32) {
				t.Helper()
				if got, _ := l.ask(t, to, mark); got != want {
					t.Errorf("%s: answer %q, want %q", when, got, want)
				}
			}
			at := f.at(f.remote, 53)
			want("before", "server query", at, 0) // the control
			l.ensure(t, pod4, pod6)
			want("without a proxy", "", at, 0)
			resolver(t, "proxy", l.pod, f.at(loopbackOf(f), 15053))
			want("redirected", "proxy query", at, 0)
			want("nobody's address", "proxy query", f.at(f.remote.Next(), 53), 0)
			want("the proxy's own", "server query", at, netns.ProxyMark)
			off := l.podOf(pod4, pod6)
			off.Exclude = mesh.Exclusions{DNS: true}
			if _, err := l.redirector.Ensure(t.Context(), off); err != nil {
				t.Fatal(err)
			}
			want("switched off", "server query", at, 0)
		})
	}
}

func TestDatagramsTooLarge(t *testing.T) {
	l := newLab(t, redirect.EBPF)
	p, err := netns.ListenPacket(l.pod, netip.MustParseAddrPort("127.0.0.1:0"))
	if err == nil {
		defer p.Close()
		err = p.Write(make([]byte, 65_508), netip.MustParseAddrPort("192.0.2.1:53"), netip.AddrPortFrom(pod4, 5353))
	}
	if err == nil || errors.Is(err, os.ErrClosed) {
		t.Errorf("error %v", err)
	}
}
