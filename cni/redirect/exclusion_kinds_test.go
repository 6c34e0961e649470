package redirect_test

import (
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/fairlead-mesh/fairlead/cni/redirect"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/netns"
	"github.com/fairlead-mesh/fairlead/internal/testenv"
)

// TestExclusionsOfEachKind: what is left out goes straight, also past the guard; the proxy takes the rest.
func TestExclusionsOfEachKind(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			l := newLab(t, f.mode)
			taken := make(chan accepted, 16)
			listen(t, "server", l.host, f.at(f.remote, 80), taken)
			listen(t, "server", l.host, f.at(f.remote, 81), taken)
			listen(t, "server", l.host, f.at(f.host, 80), taken)
			listen(t, "app", l.pod, f.anyPort(8080), taken)
			listen(t, "app", l.pod, f.anyPort(8081), taken)
			l.ensure(t, pod4, pod6)
			l.proxy(t, taken)
			for _, k := range kindsOfExclusion(f) {
				t.Run(k.name, func(t *testing.T) { k.take(t, l, f, taken) })
			}
		})
	}
}

// kindOfExclusion is one, and who then takes what the pod opens to remote:80, remote:81 and host:80, and what arrives from the
// host for the pod's ports 8080, 8081 and 15008.
type kindOfExclusion struct {
	name    string
	exclude mesh.Exclusions
	want    [6]string
}

func kindsOfExclusion(f family) []kindOfExclusion {
	whole := func(ip netip.Addr) netip.Prefix { return netip.PrefixFrom(ip, ip.BitLen()) }
	everything, around := netip.PrefixFrom(f.host, 0).Masked(), netip.PrefixFrom(f.remote, 24).Masked()
	if f.remote.Is6() {
		around = netip.PrefixFrom(f.remote, 48).Masked() // without the host, as the other
	}
	const outbound, server, app, plaintext, hbone = "outbound", "server", "app", "plaintext", "hbone"
	return []kindOfExclusion{
		{"nothing", mesh.Exclusions{}, [6]string{outbound, outbound, outbound, plaintext, plaintext, hbone}},
		{"a port out", mesh.Exclusions{Out: mesh.Exclusion{Ports: []uint16{81}}},
			[6]string{outbound, server, outbound, plaintext, plaintext, hbone}},
		{"a network out", mesh.Exclusions{Out: mesh.Exclusion{Networks: []netip.Prefix{whole(f.remote)}}},
			[6]string{server, server, outbound, plaintext, plaintext, hbone}},
		{"only a network out", mesh.Exclusions{Out: mesh.Exclusion{Listed: true, CapturedNetworks: []netip.Prefix{whole(f.remote)}}},
			[6]string{outbound, outbound, server, plaintext, plaintext, hbone}},
		{"only a port out", mesh.Exclusions{Out: mesh.Exclusion{Listed: true, CapturedPorts: []uint16{81}}},
			[6]string{server, outbound, server, plaintext, plaintext, hbone}},
		{"what is left out wins", mesh.Exclusions{Out: mesh.Exclusion{
			Listed: true, CapturedPorts: []uint16{81}, CapturedNetworks: []netip.Prefix{whole(f.host)}, Networks: []netip.Prefix{everything},
		}}, [6]string{server, server, server, plaintext, plaintext, hbone}},
		// Nested networks: it is not the longest that counts, but that what is left out wins.
		{"a network out, within what is captured", mesh.Exclusions{Out: mesh.Exclusion{
			Listed: true, CapturedNetworks: []netip.Prefix{everything}, Networks: []netip.Prefix{whole(f.remote)},
		}}, [6]string{server, server, outbound, plaintext, plaintext, hbone}},
		{"a network out, around and within what is captured", mesh.Exclusions{Out: mesh.Exclusion{
			Listed: true, CapturedNetworks: []netip.Prefix{whole(f.remote), everything}, Networks: []netip.Prefix{around},
		}}, [6]string{server, server, outbound, plaintext, plaintext, hbone}},
		{"captured around and within a network out, the same twice", mesh.Exclusions{Out: mesh.Exclusion{
			Listed: true, CapturedNetworks: []netip.Prefix{around, around, whole(f.host)}, Networks: []netip.Prefix{whole(f.host), whole(f.host)},
		}}, [6]string{outbound, outbound, server, plaintext, plaintext, hbone}},
		{"a network in, within what is captured", mesh.Exclusions{In: mesh.Exclusion{
			Listed: true, CapturedNetworks: []netip.Prefix{everything}, Networks: []netip.Prefix{whole(f.host)},
		}}, [6]string{outbound, outbound, outbound, app, app, hbone}},
		{"a network in, within a larger one that is captured", mesh.Exclusions{In: mesh.Exclusion{
			Listed: true, CapturedNetworks: []netip.Prefix{whole(f.host), everything}, Networks: []netip.Prefix{around},
		}}, [6]string{outbound, outbound, outbound, plaintext, plaintext, hbone}},
		{"a port in", mesh.Exclusions{In: mesh.Exclusion{Ports: []uint16{8081}}},
			[6]string{outbound, outbound, outbound, plaintext, app, hbone}},
		{"only a port in", mesh.Exclusions{In: mesh.Exclusion{Listed: true, CapturedPorts: []uint16{8081}}},
			[6]string{outbound, outbound, outbound, app, plaintext, hbone}},
		{"a network in", mesh.Exclusions{In: mesh.Exclusion{Networks: []netip.Prefix{whole(f.host)}}},
			[6]string{outbound, outbound, outbound, app, app, hbone}},
		{"all in", mesh.Exclusions{Inbound: true}, [6]string{outbound, outbound, outbound, app, app, hbone}},
		{"an interface", mesh.Exclusions{Interfaces: []string{"eth0"}}, [6]string{server, server, server, app, app, hbone}},
		{"an interface that is not there", mesh.Exclusions{Interfaces: []string{"net9"}},
			[6]string{outbound, outbound, outbound, plaintext, plaintext, hbone}},
		{"nothing again", mesh.Exclusions{}, [6]string{outbound, outbound, outbound, plaintext, plaintext, hbone}},
	}
}

// take wants the pod's exclusion to be held, and everything to be taken by whom it says.
func (k kindOfExclusion) take(t *testing.T, l *lab, f family, taken <-chan accepted) {
	pod := l.podOf(pod4, pod6)
	pod.Exclude = k.exclude
	if _, err := l.redirector.Ensure(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	if held, err := l.redirector.Holds(pod); err != nil || !held {
		t.Errorf("held: %v %v", held, err)
	}
	if !k.exclude.IsZero() {
		if held, err := l.redirector.Holds(l.podOf(pod4, pod6)); err != nil || held {
			t.Errorf("held without the exclusion: %v %v", held, err)
		}
	}
	for i, dst := range []netip.AddrPort{f.at(f.remote, 80), f.at(f.remote, 81), f.at(f.host, 80),
		f.at(f.pod, 8080), f.at(f.pod, 8081), f.at(f.pod, 15008)} {
		from := l.pod
		if i > 2 {
			from = l.host
		}
		conn, err := dialAs(soon(t), 1000, from, dst)
		if err != nil {
			t.Errorf("to %s: %v", dst, err)
			continue
		}
		a := next(t, taken)
		if a.by != k.want[i] {
			t.Errorf("to %s: taken by %s, want %s", dst, a.by, k.want[i])
		} else {
			exchange(t, conn, a.conn)
			exchange(t, a.conn, conn)
		}
		conn.Close()
		a.conn.Close()
	}
}

// TestExcludedInterfaceAmongOthers: only what is reached through it is left out.
func TestExcludedInterfaceAmongOthers(t *testing.T) {
	l := newLab(t, redirect.EBPF)
	far := testenv.Netns(t)
	if err := netns.Do(far, func() error {
		veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "far"}, PeerName: "net1", PeerNamespace: netlink.NsFd(int(l.pod.Fd()))}
		if err := netlink.LinkAdd(veth); err != nil {
			return err
		}
		return configure("far", []string{"10.80.0.1/24"}, nil, nil)
	}); err != nil {
		t.Fatal(err)
	}
	pod := l.podOf(pod4, pod6)
	pod.Exclude = mesh.Exclusions{Interfaces: []string{"net1"}}
	if _, err := l.redirector.Ensure(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	// The interface is configured later, as by a plugin that comes after: that is seen, and made good.
	if err := netns.Do(l.pod, func() error { return configure("net1", []string{"10.80.0.2/24"}, nil, nil) }); err != nil {
		t.Fatal(err)
	}
	if held, err := l.redirector.Holds(pod); err != nil || held {
		t.Errorf("held though the interface has new routes: %v %v", held, err)
	}
	if _, err := l.redirector.Ensure(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	taken := make(chan accepted, 16)
	l.proxy(t, taken)
	listen(t, "far", far, netip.MustParseAddrPort("10.80.0.1:80"), taken)
	listen(t, "server", l.host, netip.AddrPortFrom(remote4, 80), taken)
	listen(t, "app", l.pod, netip.MustParseAddrPort("0.0.0.0:8080"), taken)
	for _, tc := range []struct {
		from, to, by string
	}{
		{"pod", "10.80.0.1:80", "far"}, {"pod", remote4.String() + ":80", "outbound"},
		{"far", "10.80.0.2:8080", "app"}, {"host", pod4.String() + ":8080", "plaintext"},
	} {
		from := l.pod
		switch tc.from {
		case "far":
			from = far
		case "host":
			from = l.host
		}
		conn, err := netns.Dial(soon(t), from, netns.DialOptions{}, netip.MustParseAddrPort(tc.to))
		if err != nil {
			t.Errorf("%s to %s: %v", tc.from, tc.to, err)
			continue
		}
		if a := next(t, taken); a.by != tc.by {
			t.Errorf("%s to %s: taken by %s, want %s", tc.from, tc.to, a.by, tc.by)
		} else {
			exchange(t, conn, a.conn)
		}
		conn.Close()
	}
}
