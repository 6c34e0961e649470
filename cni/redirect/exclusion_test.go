package redirect_test

import (
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// TestExclusions: what is left out goes where it would without the mesh, the rest to the proxy, in either way to redirect.
func TestExclusions(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			l := newLab(t, f.mode)
			taken := make(chan accepted, 16)
			for _, port := range []uint16{80, 5432} {
				listen(t, "server", l.host, f.at(f.remote, port), taken)
				listen(t, "app", l.pod, f.anyPort(port), taken)
			}
			network := func(ip netip.Addr) []netip.Prefix { return []netip.Prefix{netip.PrefixFrom(ip, ip.BitLen())} }
			first := true
			for _, tc := range []struct {
				name    string
				exclude mesh.Exclusions
				// Who takes what leaves for ports 80 and 5432, and what arrives at them.
				out, in [2]string
			}{
				{"nothing", mesh.Exclusions{}, [2]string{"outbound", "outbound"}, [2]string{"plaintext", "plaintext"}},
				{"a port", mesh.Exclusions{Out: mesh.Exclusion{Ports: []uint16{5432}}, In: mesh.Exclusion{Ports: []uint16{5432}}},
					[2]string{"outbound", "server"}, [2]string{"plaintext", "app"}},
				{"a network", mesh.Exclusions{Out: mesh.Exclusion{Networks: network(f.remote)}},
					[2]string{"server", "server"}, [2]string{"plaintext", "plaintext"}},
				{"all but a port", mesh.Exclusions{
					Out: mesh.Exclusion{Listed: true, CapturedPorts: []uint16{80}}, In: mesh.Exclusion{Listed: true, CapturedPorts: []uint16{80}},
				}, [2]string{"outbound", "server"}, [2]string{"plaintext", "app"}},
				{"all but a network", mesh.Exclusions{Out: mesh.Exclusion{Listed: true, CapturedNetworks: network(f.remote)}},
					[2]string{"outbound", "outbound"}, [2]string{"plaintext", "plaintext"}},
				{"what arrives in clear", mesh.Exclusions{Inbound: true}, [2]string{"outbound", "outbound"}, [2]string{"app", "app"}},
				{"an interface", mesh.Exclusions{Interfaces: []string{"eth0"}}, [2]string{"server", "server"}, [2]string{"app", "app"}},
				{"nothing again", mesh.Exclusions{}, [2]string{"outbound", "outbound"}, [2]string{"plaintext", "plaintext"}},
			} {
				pod := l.podOf(pod4, pod6)
				pod.Exclude = tc.exclude
				if held, err := l.redirector.Holds(pod); err != nil || held {
					t.Errorf("%s: held before it was made: %v %v", tc.name, held, err)
				}
				if _, err := l.redirector.Ensure(t.Context(), pod); err != nil {
					t.Fatal(err)
				}
				if held, err := l.redirector.Holds(pod); err != nil || !held {
					t.Errorf("%s: not held: %v %v", tc.name, held, err)
				}
				if first {
					l.proxy(t, taken)
					first = false
				}
				by := func(o outcome) string {
					t.Helper()
					if o.Error != "" {
						return o.Error
					}
					return next(t, taken).by
				}
				for i, port := range []uint16{80, 5432} {
					if got := by(l.app(t, attempt{Dst: f.at(f.remote, port)})); got != tc.out[i] {
						t.Errorf("%s: what leaves for port %d is taken by %s, want %s", tc.name, port, got, tc.out[i])
					}
					if got := by(l.connect(t, "client", "app", l.host, attempt{Dst: f.at(f.pod, port), User: 1000})); got != tc.in[i] {
						t.Errorf("%s: what arrives at port %d is taken by %s, want %s", tc.name, port, got, tc.in[i])
					}
				}
			}
		})
	}
}

// TestChangedExclusionsCutNothing: a connection that an exclusion has let past the proxy goes on when the exclusion is gone,
// also one on which the pod has not sent anything yet; a new one does not.
func TestChangedExclusionsCutNothing(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			l := newLab(t, f.mode)
			taken := make(chan accepted, 16)
			l.ensure(t, pod4, pod6)
			l.proxy(t, taken)
			moveTo(t, l.makeCgroup(t, "app")) // sockets from here on are not the proxy's
			listen(t, "server", l.host, f.at(f.remote, 5432), taken)
			listen(t, "app", l.pod, f.anyPort(5432), taken)
			pod := l.podOf(pod4, pod6)
			pod.Exclude = mesh.Exclusions{Out: mesh.Exclusion{Ports: []uint16{5432}}, In: mesh.Exclusion{Ports: []uint16{5432}}}
			ensure := func() {
				t.Helper()
				if _, err := l.redirector.Ensure(t.Context(), pod); err != nil {
					t.Fatal(err)
				}
				if held, err := l.redirector.Holds(pod); err != nil || !held {
					t.Fatalf("not held: %v %v", held, err)
				}
			}
			ensure()
			open := func(from *os.File, dst netip.AddrPort, wanted string) (opened, taker net.Conn) {
				t.Helper()
				c, err := dialAs(soon(t), 1000, from, dst)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { c.Close() })
				a := next(t, taken)
				if a.by != wanted {
					t.Fatalf("%v is taken by %s, want %s", dst, a.by, wanted)
				}
				return c, a.conn
			}
			client, server := open(l.pod, f.at(f.remote, 5432), "server")
			peer, app := open(l.host, f.at(f.pod, 5432), "app")
			talking, talker := open(l.host, f.at(f.pod, 5432), "app")
			exchange(t, talker, talking)

			pod.Exclude = mesh.Exclusions{}
			ensure()
			exchange(t, client, server)
			exchange(t, server, client)
			exchange(t, app, peer)
			exchange(t, talker, talking)
			open(l.pod, f.at(f.remote, 5432), "outbound")
			open(l.host, f.at(f.pod, 5432), "plaintext")
		})
	}
}

// TestChangedExclusionsLetNothingOut: a change of a pod's exclusions spares what an exclusion let past the proxy, and not what
// is redirected: that gets nowhere when the pod takes away the rules that redirect it.
func TestChangedExclusionsLetNothingOut(t *testing.T) {
	for _, f := range guarded() {
		for _, way := range []string{"out", "in"} {
			t.Run(f.name+", "+way, func(t *testing.T) {
				l := newLab(t, f.mode)
				taken := make(chan accepted, 16)
				pod := l.podOf(pod4, pod6)
				pod.Exclude = mesh.Exclusions{Out: mesh.Exclusion{Ports: []uint16{5432}}}
				ensure := func() {
					t.Helper()
					if _, err := l.redirector.Ensure(t.Context(), pod); err != nil {
						t.Fatal(err)
					}
				}
				ensure()
				l.proxy(t, taken)
				moveTo(t, l.makeCgroup(t, "app"))
				listen(t, "server", l.host, f.at(f.remote, 5432), taken)
				listen(t, "app", l.pod, f.anyPort(80), taken)
				spared, err := dialAs(soon(t), 1000, l.pod, f.at(f.remote, 5432))
				if err != nil {
					t.Fatal(err)
				}
				defer spared.Close()
				server := next(t, taken).conn
				var redirected *net.TCPConn
				if way == "out" {
					redirected, err = dialAs(soon(t), 1000, l.pod, f.at(f.remote, 80))
				} else { // as the proxy brings what has arrived
					moveTo(t, l.makeCgroup(t, "proxy"))
					redirected, err = netns.Dial(soon(t), l.pod,
						netns.DialOptions{Source: f.at(f.host, 40000), Mark: netns.RedirectMark, Device: "lo", Transparent: true}, f.at(f.pod, 80))
					moveTo(t, l.makeCgroup(t, "app"))
				}
				if err != nil {
					t.Fatal(err)
				}
				defer redirected.Close()
				a := next(t, taken)
				if want := map[string]string{"out": "outbound", "in": "app"}[way]; a.by != want {
					t.Fatalf("taken by %s, want %s", a.by, want)
				}
				if way == "in" {
					redirected = a.conn
				}

				pod.Exclude = mesh.Exclusions{}
				ensure()
				removeRules(t, l)
				exchange(t, spared, server)
				before := l.dropped(t)
				if _, err := redirected.Write([]byte("over")); err != nil {
					t.Fatal(err)
				}
				for end := time.Now().Add(20 * time.Second); l.dropped(t) == before; time.Sleep(10 * time.Millisecond) {
					if time.Now().After(end) {
						t.Fatal("what was redirected left the pod")
					}
				}
			})
		}
	}
}
