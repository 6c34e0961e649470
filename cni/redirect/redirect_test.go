package redirect_test

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/cni/redirect"
	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// family is one row of the table that every datapath test runs over.
type family struct {
	mode              redirect.Mode
	name              string
	pod, host, remote netip.Addr
	probe             netip.Addr
	any               string
}

var families = []family{
	{redirect.EBPF, "IPv4", pod4, host4, remote4, redirect.ProbeSource4, "0.0.0.0"},
	{redirect.EBPF, "IPv6", pod6, host6, remote6, redirect.ProbeSource6, "::"},
	{redirect.NFTables, "IPv4 by nftables", pod4, host4, remote4, redirect.ProbeSource4, "0.0.0.0"},
	{redirect.NFTables, "IPv6 by nftables", pod6, host6, remote6, redirect.ProbeSource6, "::"},
}

func inEachMode(t *testing.T, test func(*testing.T, redirect.Mode)) {
	for _, mode := range []redirect.Mode{redirect.EBPF, redirect.NFTables} {
		t.Run(string(mode), func(t *testing.T) { test(t, mode) })
	}
}

func (f family) at(ip netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(ip, port) }

func (f family) anyPort(port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(f.any), port)
}

func TestOutbound(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			l := newLab(t, f.mode)
			taken := make(chan accepted, 16)
			listen(t, "server", l.host, f.at(f.remote, 80), taken)
			dst := f.at(f.remote, 80)

			// The control: without redirection the connection goes out in clear.
			if o := l.app(t, attempt{Dst: dst}); o.Error != "" {
				t.Fatalf("before: %v", o.Error)
			}
			if a := next(t, taken); a.by != "server" || a.remote.Addr() != f.pod {
				t.Fatalf("before: %s took the connection from %v", a.by, a.remote)
			}
			open, err := netns.Dial(soon(t), l.pod, netns.DialOptions{}, dst)
			if err != nil {
				t.Fatal(err)
			}
			defer open.Close()
			openAtServer := next(t, taken)

			l.ensure(t, pod4, pod6)
			l.proxy(t, taken)
			exchange(t, open, openAtServer.conn)
			exchange(t, openAtServer.conn, open)
			for _, tc := range []struct {
				name string
				attempt
				// nftables is who takes the connection where the modes differ; "" is nobody.
				nftables string
			}{
				{"plain", attempt{Dst: dst}, "outbound"},
				{"a port nobody serves", attempt{Dst: f.at(f.remote, 4321)}, "outbound"},
				{"bound to the pod's address", attempt{Dst: dst, Source: f.at(f.pod, 0)}, "outbound"},
				{"bound to a device", attempt{Dst: dst, Device: "eth0"}, ""},
				{"with the proxy's mark", attempt{Dst: dst, Mark: netns.ProxyMark}, "server"},
				{"with some mark", attempt{Dst: dst, Mark: 7}, "outbound"},
				{"the host", attempt{Dst: f.at(f.host, 80)}, "outbound"},
				{"as Go does", attempt{Dst: dst, Dialer: true}, "outbound"},
				{"Multipath TCP", attempt{Dst: dst, Dialer: true, Multipath: true}, "outbound"},
			} {
				t.Run(tc.name, func(t *testing.T) {
					by := "outbound"
					if f.mode == redirect.NFTables {
						by = tc.nftables
					}
					o := l.app(t, tc.attempt)
					if by == "" {
						if o.Error == "" {
							t.Fatalf("taken by %s, want it refused", next(t, taken).by)
						}
						return
					}
					if o.Error != "" {
						t.Fatal(o.Error)
					}
					a := next(t, taken)
					got := []string{a.by, a.local.String(), a.remote.String(), o.Remote.String(), o.Local.Addr().String()}
					want := []string{by, tc.Dst.String(), o.Local.String(), tc.Dst.String(), f.pod.String()}
					if diff := cmp.Diff(want, got); diff != "" {
						t.Errorf("taken by, proxy's local and remote, application's remote and local (-want +got):\n%s", diff)
					}
				})
			}
			if f.mode == redirect.NFTables {
				return // nothing is counted
			}
			counters, err := l.redirector.Counters()
			if err != nil || counters["forged_mark"] != 1 {
				t.Errorf("counted %d forged marks (%v), want 1", counters["forged_mark"], err)
			}
		})
	}
}

// The application has closed, and what is left of its socket (TIME-WAIT) must still reach the proxy with its last ACK:
// else the proxy's end stays in LAST-ACK for minutes, and the application's next connection from the same port hangs.
func TestClosedApplicationStillAnswersTheProxy(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			l := newLab(t, f.mode)
			taken := make(chan accepted, 1)
			l.ensure(t, pod4, pod6)
			l.proxy(t, taken)
			l.app(t, attempt{Dst: f.at(f.remote, 80)}) // it ends, which closes its socket
			conn := next(t, taken).conn
			if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
				t.Fatalf("the application's end: %v", err)
			}
			state := func() (state uint8) {
				raw, err := conn.SyscallConn()
				if err != nil {
					t.Fatal(err)
				}
				err = raw.Control(func(fd uintptr) {
					if info, err := unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO); err == nil {
						state = info.State
					}
				})
				if err != nil {
					t.Fatal(err)
				}
				return state
			}
			// The FIN is acknowledged by itself, late, before the proxy's own FIN: only then does TIME-WAIT answer it.
			time.Sleep(150 * time.Millisecond)
			if err := conn.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			const closed = 7 // TCP_CLOSE
			for deadline := time.Now().Add(3 * time.Second); state() != closed; time.Sleep(10 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("the proxy's end is still in state %d", state())
				}
			}
		})
	}
}

// An IPv6 address of the link can only be reached by naming the interface, which no route to the proxy does: refused
// outwards, taken by the proxy inwards.
func TestLinkLocalAddressesAreNoWayRound(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode redirect.Mode) {
		l := newLab(t, mode)
		taken := make(chan accepted, 16)
		listen(t, "server", l.host, netip.MustParseAddrPort("[::]:80"), taken)
		listen(t, "app", l.pod, netip.MustParseAddrPort("[::]:8080"), taken)
		outwards := attempt{Dst: netip.AddrPortFrom(linkLocal(t, l.host, "pod").WithZone("eth0"), 80), Dialer: true}
		inwards := attempt{Dst: netip.AddrPortFrom(linkLocal(t, l.pod, "eth0").WithZone("pod"), 8080), Dialer: true}
		reached := func(o outcome) string {
			t.Helper()
			switch {
			case o.Errno != 0:
				return o.Errno.Error()
			case o.Error != "":
				return "lost"
			}
			return next(t, taken).by
		}
		inside := func() string { t.Helper(); return reached(l.app(t, outwards)) }
		outside := func() string { t.Helper(); return reached(l.connect(t, "client", "app", l.host, inwards)) }
		if in, out := outside(), inside(); in != "app" || out != "server" {
			t.Fatalf("before: inwards %s, outwards %s", in, out)
		}
		l.ensure(t, pod4, pod6)
		l.proxy(t, taken)
		want := map[redirect.Mode]string{redirect.EBPF: syscall.ENETUNREACH.Error(), redirect.NFTables: "lost"}[mode]
		if in, out := outside(), inside(); in != "plaintext" || out != want {
			t.Errorf("inwards %s, outwards %s", in, out)
		}
	})
}

// linkLocal waits for the interface's link-local address to be settled.
func linkLocal(t *testing.T, ns *os.File, device string) (found netip.Addr) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		err := netns.Do(ns, func() error {
			link, err := netlink.LinkByName(device)
			if err != nil {
				return err
			}
			addrs, err := netlink.AddrList(link, netlink.FAMILY_V6)
			for _, a := range addrs {
				if a.IP.IsLinkLocalUnicast() && a.Flags&unix.IFA_F_TENTATIVE == 0 {
					found, _ = netip.AddrFromSlice(a.IP)
				}
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		if found.IsValid() {
			return found
		}
	}
	t.Fatalf("%s has no link-local address", device)
	return found
}

func TestLeftAlone(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			l := newLab(t, f.mode)
			l.ensure(t, pod4, pod6)
			taken := make(chan accepted, 16)
			l.proxy(t, taken)
			listen(t, "server", l.host, f.at(f.remote, 80), taken)
			listen(t, "app", l.pod, f.anyPort(8080), taken)
			loopback := netip.MustParseAddr("127.0.0.1")
			if f.pod.Is6() {
				loopback = netip.IPv6Loopback()
			}
			for name, dst := range map[string]netip.Addr{"loopback": loopback, "own address": f.pod, "unspecified": netip.MustParseAddr(f.any)} {
				if o := l.app(t, attempt{Dst: f.at(dst, 8080)}); o.Error != "" {
					t.Errorf("%s: %s", name, o.Error)
				} else if a := next(t, taken); a.by != "app" {
					t.Errorf("%s: taken by %s", name, a.by)
				}
			}
			// The proxy's own connection to the world.
			conn, err := netns.Dial(soon(t), l.pod, netns.DialOptions{Mark: netns.ProxyMark}, f.at(f.remote, 80))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if a := next(t, taken); a.by != "server" || a.remote.Addr() != f.pod {
				t.Errorf("the proxy's connection was taken by %s, from %v", a.by, a.remote)
			}
		})
	}
}

func TestInbound(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			l := newLab(t, f.mode)
			taken := make(chan accepted, 16)
			listen(t, "app", l.pod, f.anyPort(8080), taken)
			client := func(comm, cgroup string, port uint16, user int) accepted {
				t.Helper()
				o := l.connect(t, comm, cgroup, l.host, attempt{Dst: f.at(f.pod, port), User: user})
				if o.Error != "" {
					t.Fatalf("%s to port %d: %s", comm, port, o.Error)
				}
				return next(t, taken)
			}
			if a := client("client", "app", 8080, 0); a.by != "app" {
				t.Fatalf("before: taken by %s", a.by)
			}
			open, err := dialAs(soon(t), 1000, l.host, f.at(f.pod, 8080))
			if err != nil {
				t.Fatal(err)
			}
			defer open.Close()
			openAtApp := next(t, taken)
			l.makeCgroup(t, "kubepods/pod1")
			reopened, err := redirect.New(l.cfg) // as the agent, which starts when there are pods
			if err != nil {
				t.Fatal(err)
			}
			defer reopened.Close()
			l.ensure(t, pod4, pod6)
			l.proxy(t, taken)
			exchange(t, open, openAtApp.conn)
			exchange(t, openAtApp.conn, open)
			for _, tc := range []struct {
				name, comm, cgroup string
				port               uint16
				by                 string
				from               netip.Addr
			}{
				{"plaintext", "client", "app", 8080, "plaintext", f.host},
				{"plaintext to a port nobody serves", "client", "app", 4321, "plaintext", f.host},
				{"HBONE", "client", "app", 15008, "hbone", f.host},
				{"a probe", "kubelet", "app", 8080, "app", f.probe},
				{"a pod called kubelet", "kubelet", "kubepods/pod1", 8080, "plaintext", f.host},
				{"one whose name begins like the kubelet's", "kubelet-not", "app", 8080, "plaintext", f.host},
			} {
				user := 0
				if f.mode == redirect.NFTables && tc.by != "app" {
					user = 1000 // of the host's processes, those of root are taken for the kubelet
				}
				a := client(tc.comm, tc.cgroup, tc.port, user)
				if a.by != tc.by || a.remote.Addr() != tc.from || a.local != f.at(f.pod, tc.port) {
					t.Errorf("%s: taken by %s, from %v to %v; want %s, from %v", tc.name, a.by, a.remote, a.local, tc.by, tc.from)
				}
			}
		})
	}
}

// TestProxyToApplicationKeepsTheClientsAddress also has the proxy call as soon as the pod is prepared, before anything is
// redirected: that is when it has listeners, and others may know of them.
func TestProxyToApplicationKeepsTheClientsAddress(t *testing.T) {
	for _, f := range families {
		for name, begin := range map[string]func(*lab) error{
			"prepared": func(l *lab) error { _, err := l.redirector.Prepare(t.Context(), l.podOf(pod4, pod6)); return err },
			"captured": func(l *lab) error { _, err := l.redirector.Ensure(t.Context(), l.podOf(pod4, pod6)); return err },
		} {
			t.Run(f.name+"/"+name, func(t *testing.T) {
				l := newLab(t, f.mode)
				if err := begin(l); err != nil {
					t.Fatal(err)
				}
				taken := make(chan accepted, 16)
				listen(t, "app", l.pod, f.anyPort(8080), taken)
				opts := netns.DialOptions{Source: f.at(f.remote, 0), Mark: netns.RedirectMark, Device: "lo", Transparent: true}
				if f.mode == redirect.NFTables {
					opts.Mark, opts.Device = netns.ProxyMark, ""
				}
				conn, err := netns.Dial(soon(t), l.pod, opts, f.at(f.pod, 8080))
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				a := next(t, taken)
				if a.by != "app" || a.remote.Addr() != f.remote || a.local != f.at(f.pod, 8080) {
					t.Errorf("taken by %s from %v to %v", a.by, a.remote, a.local)
				}
				exchange(t, conn, a.conn)
				if _, err := netns.Dial(soon(t), l.pod, opts, f.at(f.pod, 4321)); !errors.Is(err, syscall.ECONNREFUSED) {
					t.Errorf("a port nobody serves: %v, want ECONNREFUSED", err)
				}
			})
		}
	}
}

// A network namespace whose lo is down, as no CNI plugin has set it up, gets one that is up: marked packets go over it.
func TestLoIsSetUp(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode redirect.Mode) {
		l := newLab(t, mode)
		up := func() (up bool) {
			t.Helper()
			err := netns.Do(l.pod, func() error {
				lo, err := net.InterfaceByName("lo")
				up = err == nil && lo.Flags&net.FlagUp != 0
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			return up
		}
		err := netns.Do(l.pod, func() error { return netlink.LinkSetDown(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: 1}}) })
		if err != nil || up() {
			t.Fatalf("control: lo is up: %v", err)
		}
		if l.ensure(t, pod4, pod6); !up() {
			t.Error("lo is down in a pod that is redirected")
		}
	})
}

// In a pod without IPv6 the rules for IPv4 are all that is asked for.
func TestPodWithoutIPv6(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode redirect.Mode) {
		l := newLab(t, mode)
		pod := l.podOf(pod4)
		err := netns.Do(l.pod, func() error {
			return os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0)
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, pod.Fresh = range []bool{true, false} {
			if _, err := l.redirector.Ensure(t.Context(), pod); err != nil {
				t.Fatal(err)
			}
			if held, err := l.redirector.Holds(pod); !held || err != nil {
				t.Errorf("fresh: %v: held: %v, %v", pod.Fresh, held, err)
			}
		}
		taken := make(chan accepted, 16)
		listen(t, "server", l.host, netip.AddrPortFrom(remote4, 80), taken)
		l.proxy(t, taken)
		if o := l.app(t, attempt{Dst: netip.AddrPortFrom(remote4, 80)}); o.Error != "" {
			t.Error(o.Error)
		} else if a := next(t, taken); a.by != "outbound" {
			t.Errorf("taken by %s", a.by)
		}
		if err := l.redirector.Remove(l.pod); err != nil {
			t.Error(err)
		}
	})
}

func TestRefusedWhileTheProxyIsAway(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			l := newLab(t, f.mode)
			l.ensure(t, pod4, pod6)
			taken := make(chan accepted, 16)
			listen(t, "server", l.host, f.at(f.remote, 80), taken)
			listen(t, "app", l.pod, f.anyPort(8080), taken)
			check := func(when string) {
				t.Helper()
				for name, o := range map[string]outcome{
					"outbound":      l.app(t, attempt{Dst: f.at(f.remote, 80)}),
					"inbound":       l.connect(t, "client", "app", l.host, attempt{Dst: f.at(f.pod, 8080), User: 1000}),
					"inbound HBONE": l.connect(t, "client", "app", l.host, attempt{Dst: f.at(f.pod, 15008), User: 1000}),
				} {
					if o.Errno != syscall.ECONNREFUSED || o.Took > time.Second {
						t.Errorf("%s, %s: %q after %v, want a refusal at once", when, name, o.Error, o.Took)
					}
				}
			}
			check("before the proxy came")
			for _, listener := range l.proxy(t, taken) {
				listener.Close()
			}
			check("after the proxy went")
			l.proxy(t, taken)
			if o := l.app(t, attempt{Dst: f.at(f.remote, 80)}); o.Error != "" {
				t.Errorf("after the proxy's return: %s", o.Error)
			} else if a := next(t, taken); a.by != "outbound" {
				t.Errorf("after the proxy's return: taken by %s", a.by)
			}
		})
	}
}
