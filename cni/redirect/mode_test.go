package redirect_test

import (
	"encoding/binary"
	"net/netip"
	"os"
	"testing"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/bpf"
	"github.com/fairlead-mesh/fairlead/cni/redirect"
	"github.com/fairlead-mesh/fairlead/internal/netns"
	"github.com/fairlead-mesh/fairlead/internal/testenv"
)

func TestParseMode(t *testing.T) {
	for text, want := range map[string]redirect.Mode{
		"auto": redirect.Auto, "ebpf": redirect.EBPF, "nftables": redirect.NFTables, "": "", "iptables": "", "eBPF": "",
	} {
		got, err := redirect.ParseMode(text)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v; want %q", text, got, err, want)
		}
	}
}

// TestAutoFallsBack: without cgroup2 there are no programs, and what is missing is said.
func TestAutoFallsBack(t *testing.T) {
	testenv.RequireBPF(t)
	root, err := bpf.FindCgroup2("/proc/self/mounts")
	testenv.Require(t, err == nil, "a cgroup2 mount")
	for _, tc := range []struct {
		name, cgroup string
		want         redirect.Mode
	}{
		{"all that eBPF needs", root, redirect.EBPF},
		{"no cgroup2", t.TempDir(), redirect.NFTables},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg := redirect.Config{Mode: redirect.Auto, BPFFS: t.TempDir() + "/bpf", Cgroup: tc.cgroup, HostNetns: testenv.Netns(t)}
			t.Cleanup(func() {
				if err := redirect.Uninstall(cfg); err != nil {
					t.Error(err)
				}
			})
			r, err := redirect.New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			mode, why := r.Mode()
			if mode != tc.want || (why != nil) != (tc.want == redirect.NFTables) {
				t.Errorf("mode %s because of %v, want %s", mode, why, tc.want)
			}
		})
	}
}

// TestModeChange: an agent that is told to redirect in another way than the one before takes pod by pod over, without a
// moment in which a pod is not redirected, and leaves nothing of the former way.
func TestModeChange(t *testing.T) {
	for _, tc := range []struct{ from, to redirect.Mode }{
		{redirect.EBPF, redirect.NFTables}, {redirect.NFTables, redirect.EBPF},
	} {
		t.Run(string(tc.from)+" to "+string(tc.to), func(t *testing.T) {
			l := newLab(t, tc.from)
			taken := make(chan accepted, 16)
			listen(t, "server", l.host, netip.AddrPortFrom(remote4, 80), taken)
			l.ensure(t, pod4, pod6)
			former := l.proxy(t, taken)
			through := func(when string) {
				t.Helper()
				if o := l.app(t, attempt{Dst: netip.AddrPortFrom(remote4, 80)}); o.Error != "" {
					t.Errorf("%s: %s", when, o.Error)
				} else if by := next(t, taken).by; by != "outbound" {
					t.Errorf("%s: taken by %s", when, by)
				}
			}
			through("before")
			l.cfg.Mode = tc.to
			r, err := redirect.New(l.cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			pod := l.podOf(pod4, pod6)
			if pods, err := r.Pods(); err != nil || len(pods) != 1 {
				t.Errorf("the new agent knows the pods %v, %v", pods, err)
			}
			if held, err := r.Holds(pod); err != nil || held {
				t.Errorf("holds in the new way before it was made: %v, %v", held, err)
			}
			through("with the new agent")
			if _, err := r.Ensure(t.Context(), pod); err != nil {
				t.Fatal(err)
			}
			for _, listener := range former {
				listener.Close()
			}
			if o := l.app(t, attempt{Dst: netip.AddrPortFrom(remote4, 80)}); o.Errno != unix.ECONNREFUSED {
				t.Errorf("until the proxy listens in the new way: %q, want it refused", o.Error)
			}
			l.proxy(t, taken)
			through("in the new way")
			if held, err := r.Holds(pod); err != nil || !held {
				t.Errorf("holds in the new way: %v, %v", held, err)
			}
			if pods, err := r.Pods(); err != nil || len(pods) != 1 {
				t.Errorf("pods after the change: %v, %v", pods, err)
			}
			if err := r.Remove(l.pod); err != nil {
				t.Fatal(err)
			}
			if err := redirect.Uninstall(l.cfg); err != nil {
				t.Fatal(err)
			}
			if bpf.Present(l.cfg.BPFFS) || len(tables(t, l.pod))+len(tables(t, l.host)) > 0 {
				t.Errorf("left: programs %v, tables %v %v", bpf.Present(l.cfg.BPFFS), tables(t, l.pod), tables(t, l.host))
			}
		})
	}
}

// TestTablesAreRepaired: what somebody does to the tables is seen and undone.
func TestTablesAreRepaired(t *testing.T) {
	for name, tc := range map[string]struct {
		ns   func(*lab) *os.File
		harm func(*nftables.Conn, *nftables.Table, []*nftables.Chain)
	}{
		"all of the pod's": {(*lab).podNetns, func(c *nftables.Conn, _ *nftables.Table, _ []*nftables.Chain) { c.FlushRuleset() }},
		"a chain":          {(*lab).podNetns, func(c *nftables.Conn, _ *nftables.Table, all []*nftables.Chain) { c.FlushChain(all[3]) }},
		"one more chain": {(*lab).podNetns, func(c *nftables.Conn, t *nftables.Table, _ []*nftables.Chain) {
			c.AddChain(&nftables.Chain{Name: "mine", Table: t})
		}},
		"all of the host's": {(*lab).hostNetns, func(c *nftables.Conn, _ *nftables.Table, _ []*nftables.Chain) { c.FlushRuleset() }},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, redirect.NFTables)
			pod := l.podOf(pod4, pod6)
			l.ensure(t, pod4, pod6)
			if held, err := l.redirector.Holds(pod); err != nil || !held {
				t.Fatalf("holds: %v, %v", held, err)
			}
			err := netns.Do(tc.ns(l), func() error {
				conn, err := nftables.New()
				if err != nil {
					return err
				}
				chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
				if err != nil {
					return err
				}
				tc.harm(conn, &nftables.Table{Family: nftables.TableFamilyINet, Name: redirect.TableName}, chains)
				return conn.Flush()
			})
			if err != nil {
				t.Fatal(err)
			}
			if held, err := l.redirector.Holds(pod); err != nil || held {
				t.Errorf("holds after the harm: %v, %v", held, err)
			}
			l.ensure(t, pod4, pod6)
			if held, err := l.redirector.Holds(pod); err != nil || !held {
				t.Errorf("holds after the repair: %v, %v", held, err)
			}
		})
	}
}

func (l *lab) podNetns() *os.File  { return l.pod }
func (l *lab) hostNetns() *os.File { return l.host }

func tables(t *testing.T, ns *os.File) (names []string) {
	t.Helper()
	err := netns.Do(ns, func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		all, err := conn.ListTables()
		for _, table := range all {
			names = append(names, table.Name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// TestForgedConnectionIsNoWayRound: nftables asks its NAT chains only about the first packet of a connection. An
// application that sends a raw packet first, one that opens nothing, does not get past with the second.
func TestForgedConnectionIsNoWayRound(t *testing.T) {
	for name, guarded := range map[string]bool{"guarded": true, "control": false} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, redirect.NFTables)
			taken := make(chan accepted, 16)
			listen(t, "server", l.host, netip.AddrPortFrom(remote4, 80), taken)
			l.ensure(t, pod4, pod6)
			l.proxy(t, taken)
			if !guarded {
				err := netns.Do(l.pod, func() error {
					conn, err := nftables.New()
					if err != nil {
						return err
					}
					table := &nftables.Table{Family: nftables.TableFamilyINet, Name: redirect.TableName}
					conn.FlushChain(&nftables.Chain{Name: "last_out", Table: table})
					return conn.Flush()
				})
				if err != nil {
					t.Fatal(err)
				}
			}
			source, dst := netip.AddrPortFrom(pod4, 4000), netip.AddrPortFrom(remote4, 80)
			if err := netns.Do(l.pod, func() error { return sendACK(source, dst) }); err != nil {
				t.Fatal(err)
			}
			o := l.app(t, attempt{Dst: dst, Source: source})
			if guarded {
				if o.Error == "" {
					t.Errorf("taken by %s", next(t, taken).by)
				}
				return
			}
			if o.Error != "" || next(t, taken).by != "server" {
				t.Errorf("the attack that is defended against does not work: %s", o.Error)
			}
		})
	}
}

// sendACK sends a TCP segment that acknowledges, with a wrong checksum, so that nobody answers.
func sendACK(from, to netip.AddrPort) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	segment := make([]byte, 20)
	binary.BigEndian.PutUint16(segment[0:], from.Port())
	binary.BigEndian.PutUint16(segment[2:], to.Port())
	segment[12], segment[13] = 5<<4, 0x10
	return unix.Sendto(fd, segment, 0, &unix.SockaddrInet4{Addr: to.Addr().As4()})
}
