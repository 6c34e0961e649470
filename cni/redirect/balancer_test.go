package redirect_test

import (
	"net/netip"
	"os"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/cni/redirect"
	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// Addresses of a service that the load balancer translates to remote4 and remote6.
var service4, service6 = netip.MustParseAddr("10.78.200.1"), netip.MustParseAddr("fd78:200::9")

// balance is the stand-in for a load balancer that works in connect(2), as Cilium's does: one word of the address that is
// asked for is compared and others are put in its place.
func balance(t *testing.T, attach ebpf.AttachType) *ebpf.Program {
	t.Helper()
	word := func(ip netip.Addr, at int) int32 {
		b := ip.AsSlice()[at:]
		return int32(uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 | uint32(b[3])<<24)
	}
	offset, from, to := int16(4), word(service4, 0), word(remote4, 0) // user_ip4 of struct bpf_sock_addr
	if attach == ebpf.AttachCGroupInet6Connect {
		offset, from, to = 8, word(service6, 0), word(remote6, 0) // first word of user_ip6; the others are the same
	}
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSockAddr, AttachType: attach, License: "GPL",
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R2, asm.R1, offset, asm.Word),
			asm.JNE.Imm32(asm.R2, from, "done"),
			asm.Mov.Imm32(asm.R2, to),
			asm.StoreMem(asm.R1, offset, asm.R2, asm.Word),
			asm.Mov.Imm(asm.R0, 1).WithSymbol("done"),
			asm.Return(),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { program.Close() })
	return program
}

// attachBalancer attaches the stand-in to the lab's cgroup: by links, or as older programs do.
func (l *lab) attachBalancer(t *testing.T, links bool) {
	t.Helper()
	for _, attach := range []ebpf.AttachType{ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect} {
		program := balance(t, attach)
		if links {
			made, err := link.AttachCgroup(link.CgroupOptions{Path: l.cgroup, Attach: attach, Program: program})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { made.Close() })
			continue
		}
		cgroup, err := os.Open(l.cgroup)
		if err != nil {
			t.Fatal(err)
		}
		defer cgroup.Close()
		err = link.RawAttachProgram(link.RawAttachProgramOptions{
			Target: int(cgroup.Fd()), Program: program, Attach: attach, Flags: unix.BPF_F_ALLOW_MULTI,
		})
		if err != nil {
			t.Fatal(err) // the attachment ends with the cgroup
		}
	}
}

// TestBesideALoadBalancerInConnect: whichever of the two is attached first, what is called by a service's address comes
// to the proxy, with the address of the backend that was chosen, or is refused.
func TestBesideALoadBalancerInConnect(t *testing.T) {
	for _, tc := range []struct {
		name         string
		links, first bool
	}{
		{"attached before ours, by links", true, true}, {"attached after ours, by links", true, false},
		{"attached before ours, without links", false, true}, {"attached after ours, without links", false, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := newLab(t, redirect.EBPF)
			if tc.first {
				l.reopen(t, func() { l.attachBalancer(t, tc.links) })
			} else {
				l.attachBalancer(t, tc.links)
			}
			taken := make(chan accepted, 16)
			backends := []netip.AddrPort{netip.AddrPortFrom(remote4, 80), netip.AddrPortFrom(remote6, 80)}
			for i, service := range []netip.Addr{service4, service6} {
				listen(t, "server", l.host, backends[i], taken)
				// The control: the stand-in works.
				if o := l.app(t, attempt{Dst: netip.AddrPortFrom(service, 80)}); o.Error != "" {
					t.Fatalf("before: %s", o.Error)
				} else if by := next(t, taken).by; by != "server" {
					t.Fatalf("before: taken by %s", by)
				}
			}
			l.ensure(t, pod4, pod6)
			for _, service := range []netip.Addr{service4, service6} {
				if o := l.app(t, attempt{Dst: netip.AddrPortFrom(service, 80)}); o.Errno != unix.ECONNREFUSED {
					t.Errorf("without the proxy: %q, want it refused", o.Error)
				}
			}
			l.proxy(t, taken)
			for i, service := range []netip.Addr{service4, service6} {
				if o := l.app(t, attempt{Dst: netip.AddrPortFrom(service, 80)}); o.Error != "" {
					t.Errorf("%s: %s", service, o.Error)
				} else if a := next(t, taken); a.by != "outbound" || a.local != backends[i] {
					t.Errorf("%s: taken by %s as a connection to %s, want the proxy and %s", service, a.by, a.local, backends[i])
				}
				// The proxy's own connections are balanced, and not redirected.
				conn, err := netns.Dial(soon(t), l.pod, netns.DialOptions{Mark: netns.ProxyMark}, netip.AddrPortFrom(service, 80))
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				if by := next(t, taken).by; by != "server" {
					t.Errorf("the proxy's connection to %s was taken by %s", service, by)
				}
			}
		})
	}
}

// reopen takes redirection off the node, does something, and makes it anew.
func (l *lab) reopen(t *testing.T, between func()) {
	t.Helper()
	if err := l.redirector.Close(); err != nil {
		t.Fatal(err)
	}
	if err := redirect.Uninstall(l.cfg); err != nil {
		t.Fatal(err)
	}
	between()
	r, err := redirect.New(l.cfg)
	if err != nil {
		t.Fatal(err)
	}
	l.redirector = r
	t.Cleanup(func() { r.Close() })
	if err := r.EnsureProxy(os.Getpid()); err != nil {
		t.Fatal(err)
	}
}
