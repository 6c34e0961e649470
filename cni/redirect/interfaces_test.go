package redirect_test

import (
	"bufio"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/fairlead-mesh/fairlead/cni/redirect"
	"github.com/fairlead-mesh/fairlead/internal/netns"
	"github.com/fairlead-mesh/fairlead/internal/testenv"
)

// TestPodWithTwoInterfaces: what another interface of the pod carries, whose address Kubernetes does not know, is the
// mesh's too, in and out, and guarded.
func TestPodWithTwoInterfaces(t *testing.T) {
	inEachMode(t, func(t *testing.T, mode redirect.Mode) {
		l := newLab(t, mode)
		host, pod := netip.MustParseAddr("10.79.0.1"), netip.MustParseAddr("10.79.0.2")
		l.addInterface(t, host, pod)
		taken := make(chan accepted, 16)
		listen(t, "server", l.host, netip.AddrPortFrom(host, 80), taken)
		listen(t, "app", l.pod, netip.MustParseAddrPort("0.0.0.0:8080"), taken)
		port := uint16(20000)
		forge := func() string {
			port++
			return l.forge(t, forgery{Src: netip.AddrPortFrom(pod, port), Dst: netip.AddrPortFrom(host, 80), Way: wayPacket, Device: "net1",
				From: l.linkAddress(t, l.pod, "net1"), To: l.linkAddress(t, l.host, "pod2")})
		}
		for _, captured := range []bool{false, true} {
			out, in, forged := "server", "app", "answered"
			if captured {
				l.ensureFresh(t)
				l.proxy(t, taken)
				out, in, forged = "outbound", "plaintext", "silence"
			}
			if o := l.app(t, attempt{Dst: netip.AddrPortFrom(host, 80), Patience: 10 * time.Second}); o.Error != "" {
				t.Errorf("captured %v: out: %s", captured, o.Error)
			} else if a := next(t, taken); a.by != out {
				t.Errorf("captured %v: out: taken by %s, want %s", captured, a.by, out)
			}
			o := l.connect(t, "client", "client", l.host, attempt{Dst: netip.AddrPortFrom(pod, 8080), Patience: 10 * time.Second, User: 1000})
			if o.Error != "" {
				t.Errorf("captured %v: in: %s", captured, o.Error)
			} else if a := next(t, taken); a.by != in {
				t.Errorf("captured %v: in: taken by %s, want %s", captured, a.by, in)
			}
			if mode != redirect.EBPF {
				continue // there is no guard
			}
			if got := forge(); got != forged {
				t.Errorf("captured %v: a SYN by a packet socket: %s, want %s", captured, got, forged)
			}
		}
		if others, err := l.redirector.Unguarded(l.podOf(pod4, pod6)); err != nil || len(others) != 0 {
			t.Errorf("not guarded: %v, %v", others, err)
		}
	})
}

// addInterface joins host and pod once more, by net1 in the pod and pod2 on the host.
func (l *lab) addInterface(t *testing.T, host, pod netip.Addr) {
	t.Helper()
	err := netns.Do(l.host, func() error {
		veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "pod2"}, PeerName: "net1", PeerNamespace: netlink.NsFd(int(l.pod.Fd()))}
		if err := netlink.LinkAdd(veth); err != nil {
			return err
		}
		return configure("pod2", []string{host.String() + "/24"}, nil, nil)
	})
	if err == nil {
		err = netns.Do(l.pod, func() error { return configure("net1", []string{pod.String() + "/24"}, nil, nil) })
	}
	if err == nil {
		err = netns.Do(l.pod, func() error { return testenv.Settle("net1", pod) })
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestPodInAUserNamespace: a pod whose network namespace belongs to a user namespace of its own is captured like any other,
// and its root, which has all capabilities over that network namespace, does not get past the gate.
func TestPodInAUserNamespace(t *testing.T) {
	child := exec.Command("/proc/self/exe")
	child.Env = append(os.Environ(), "FAIRLEAD_TEST_UNDO=1")
	child.Stderr = os.Stderr
	maps := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100_000, Size: 1}}
	child.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET, UidMappings: maps, GidMappings: maps,
		Credential: &syscall.Credential{NoSetGroups: true}, // its root
	}
	in, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); child.Wait() })
	ns, err := netns.Open(fmt.Sprintf("/proc/%d/ns/net", child.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })

	l := newLabOf(t, redirect.EBPF, ns)
	taken := make(chan accepted, 16)
	dst := netip.AddrPortFrom(remote4, 80)
	listen(t, "server", l.host, dst, taken)
	l.ensureFresh(t)
	l.proxy(t, taken)
	if o := l.app(t, attempt{Dst: dst}); o.Error != "" || next(t, taken).by != "outbound" {
		t.Errorf("captured: %s", o.Error)
	}
	words := bufio.NewScanner(out)
	change := func() {
		t.Helper()
		fmt.Fprintln(in, "undo")
		if !words.Scan() || words.Text() != "undone" {
			t.Fatalf("the pod's root could not change its rules: %s", words.Text())
		}
	}
	change()
	before := l.dropped(t)
	if o := l.app(t, attempt{Dst: dst, Patience: 500 * time.Millisecond}); o.Error == "" {
		t.Errorf("a connection went out, to %s", next(t, taken).by)
	}
	if l.dropped(t) == before {
		t.Error("nothing was counted")
	}
	l.ensureFresh(t)
	if o := l.app(t, attempt{Dst: dst}); o.Error != "" || next(t, taken).by != "outbound" {
		t.Errorf("after the repair: %s", o.Error)
	}
	l.unguard(t)
	change()
	if o := l.app(t, attempt{Dst: dst, Patience: 10 * time.Second}); o.Error != "" {
		t.Errorf("control: without the guard: %s", o.Error)
	} else if a := next(t, taken); a.by != "server" {
		t.Errorf("control: taken by %s", a.by)
	}
}

// undo is the root of TestPodInAUserNamespace: it removes all rules that redirect, as often as it is told to.
func undo() {
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		var errs []error
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			for priority := 1; priority <= 2; priority++ {
				rule := netlink.NewRule()
				rule.Priority, rule.Family = priority, family
				errs = append(errs, netlink.RuleDel(rule))
			}
		}
		if err := errors.Join(errs...); err != nil {
			fmt.Println(err)
		} else {
			fmt.Println("undone")
		}
	}
}
