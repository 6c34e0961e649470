package redirect_test

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/fairlead-mesh/fairlead/bpf"
	"github.com/fairlead-mesh/fairlead/cni/redirect"
	"github.com/fairlead-mesh/fairlead/internal/netns"
)

func TestReleaseAndRemove(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode redirect.Mode) {
		l := newLab(t, mode)
		taken := make(chan accepted, 16)
		listen(t, "server", l.host, netip.AddrPortFrom(remote4, 80), taken)
		listen(t, "app", l.pod, netip.MustParseAddrPort("0.0.0.0:8080"), taken)
		before := netnsState(t, l.pod)
		hostBefore := netnsState(t, l.host)
		l.ensure(t, pod4, pod6)
		l.proxy(t, taken)
		dst := netip.AddrPortFrom(remote4, 80)

		// A redirected connection in each direction that stays open. The application is this process, without the
		// proxy's mark.
		out, err := netns.Dial(soon(t), l.pod, netns.DialOptions{}, dst)
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		outAtProxy := next(t, taken)
		in, err := dialAs(soon(t), 1000, l.host, netip.AddrPortFrom(pod4, 8080))
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		inAtProxy := next(t, taken)
		if outAtProxy.by != "outbound" || inAtProxy.by != "plaintext" {
			t.Fatalf("taken by %s and %s", outAtProxy.by, inAtProxy.by)
		}

		cookie, err := netns.Cookie(l.pod)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := l.redirector.Release(cookie, l.pod); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := bpf.OpenListeners(l.cfg.BPFFS, cookie); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("listeners of a released pod: %v", err)
		}
		exchange(t, out, outAtProxy.conn)
		exchange(t, inAtProxy.conn, in)
		if o := l.app(t, attempt{Dst: dst}); o.Error != "" || next(t, taken).by != "server" {
			t.Errorf("released pod's connection did not go out as before: %s", o.Error)
		}
		if o := l.connect(t, "client", "app", l.host, attempt{Dst: netip.AddrPortFrom(pod4, 8080)}); o.Error != "" || next(t, taken).by != "app" {
			t.Errorf("connection to a released pod did not reach the application: %s", o.Error)
		}
		for range 2 {
			if err := l.redirector.Remove(l.pod); err != nil {
				t.Fatal(err)
			}
		}
		if diff := cmp.Diff(before, netnsState(t, l.pod)); diff != "" {
			t.Errorf("the pod's namespace after removal (-before +after):\n%s", diff)
		}
		l.uninstall(t, hostBefore)
	})
}

// uninstall wants no traces on the host, whose state before had them.
func (l *lab) uninstall(t *testing.T, before string) {
	t.Helper()
	if err := redirect.Uninstall(l.cfg); err != nil {
		t.Fatal(err)
	}
	after := netnsState(t, l.host)
	traces := []string{redirect.ProbeSource4.String(), redirect.ProbeSource6.String()}
	if l.cfg.Mode == redirect.NFTables {
		traces = []string{"table " + redirect.TableName}
	}
	for _, trace := range traces {
		if strings.Contains(after, trace) || !strings.Contains(before, trace) {
			t.Errorf("%s on the host: before %v, after %v", trace, before, after)
		}
	}
	if _, err := os.Stat(l.cfg.BPFFS); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the BPF file system is still there: %v", err)
	}
}

func TestEnsureIsIdempotentAndReadsBack(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode redirect.Mode) {
		l := newLab(t, mode)
		taken := make(chan accepted, 64)
		pod := l.podOf(pod4, pod6)
		if holds, err := l.redirector.Holds(pod); err != nil || holds {
			t.Errorf("holds before Ensure: %v, %v", holds, err)
		}
		l.ensure(t, pod4, pod6)
		state := netnsState(t, l.pod)
		l.proxy(t, taken)
		for range 3 {
			// Each round is another agent's life.
			r, err := redirect.New(l.cfg)
			if err != nil {
				t.Fatal(err)
			}
			pods, err := r.Pods()
			if err != nil {
				t.Fatal(err)
			}
			cookie, err := r.Ensure(t.Context(), pod)
			if err != nil {
				t.Fatal(err)
			}
			want := []bpf.Pod{{Cookie: cookie, UID: pod.UID, IPs: pod.IPs}}
			if diff := cmp.Diff(want, pods, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
				t.Errorf("pods read back (-want +got):\n%s", diff)
			}
			if holds, err := r.Holds(pod); err != nil || !holds {
				t.Errorf("holds after Ensure: %v, %v", holds, err)
			}
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			if o := l.app(t, attempt{Dst: netip.AddrPortFrom(remote4, 80)}); o.Error != "" || next(t, taken).by != "outbound" {
				t.Errorf("after taking over: %s", o.Error)
			}
		}
		if diff := cmp.Diff(state, netnsState(t, l.pod)); diff != "" {
			t.Errorf("the pod's namespace changed (-first +last):\n%s", diff)
		}
		// Someone takes a rule away: seen, and put back.
		err := netns.Do(l.pod, func() error {
			rule := netlink.NewRule()
			rule.Priority, rule.Family = 1, netlink.FAMILY_V6
			return netlink.RuleDel(rule)
		})
		if err != nil {
			t.Fatal(err)
		}
		if holds, err := l.redirector.Holds(pod); err != nil || holds {
			t.Errorf("holds without one of its rules: %v, %v", holds, err)
		}
		l.ensure(t, pod4, pod6)
		if holds, err := l.redirector.Holds(pod); err != nil || !holds {
			t.Errorf("holds after repair: %v, %v", holds, err)
		}
		if err := l.redirector.Prune(func(uint64) bool { return false }); err != nil {
			t.Fatal(err)
		}
		if pods, err := l.redirector.Pods(); err != nil || len(pods) != 0 {
			t.Errorf("pods after pruning all: %v, %v", pods, err)
		}
	})
}

func TestPodsOfOneFamily(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			l := newLab(t, f.mode)
			l.ensure(t, f.pod)
			taken := make(chan accepted, 4)
			l.proxy(t, taken)
			if o := l.app(t, attempt{Dst: f.at(f.remote, 80)}); o.Error != "" || next(t, taken).by != "outbound" {
				t.Errorf("outbound: %s", o.Error)
			}
			if o := l.connect(t, "client", "app", l.host, attempt{Dst: f.at(f.pod, 80), User: 1000}); o.Error != "" || next(t, taken).by != "plaintext" {
				t.Errorf("inbound: %s", o.Error)
			}
		})
	}
}

func TestRefusesTheHostItself(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode redirect.Mode) {
		l := newLab(t, mode)
		_, err := l.redirector.Ensure(t.Context(), redirect.Pod{UID: "x", Netns: l.host, IPs: []netip.Addr{host4}})
		if err == nil {
			t.Error("the host's network namespace was redirected")
		}
		if pods, err := l.redirector.Pods(); err != nil || len(pods) != 0 {
			t.Errorf("pods: %v, %v", pods, err)
		}
	})
}

// BenchmarkEnsure is the agent's own part of a pod's start.
func BenchmarkEnsure(b *testing.B) {
	l := newLab(b, redirect.EBPF)
	for b.Loop() {
		b.StopTimer()
		ns, err := netns.New()
		if err != nil {
			b.Fatal(err)
		}
		if err := netns.Do(ns, func() error { return configure("lo", nil, []string{pod4.String() + "/32"}, nil) }); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		if _, err := l.redirector.Ensure(b.Context(), redirect.Pod{UID: "u", Netns: ns, IPs: []netip.Addr{pod4, pod6}}); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := l.redirector.Remove(ns); err != nil {
			b.Fatal(err)
		}
		ns.Close()
		b.StartTimer()
	}
}
