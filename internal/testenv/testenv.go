// Package testenv (plumbing) decides whether a privileged test can run here. A test that cannot run is skipped with
// the name of what is missing; where FAIRLEAD_REQUIRE_ALL=1 is set (continuous integration) it fails instead, so that
// no check is skipped unseen.
package testenv

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/features"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// Certificate is one, in PEM, that no server has; its key was thrown away.
const Certificate = `-----BEGIN CERTIFICATE-----
MIIBfDCCASGgAwIBAgIUKiQkyOca8UP1/WutTjvSCBRS11AwCgYIKoZIzj0EAwIw
EjEQMA4GA1UEAwwHYW5vdGhlcjAgFw0yNjExMjEyMTI3MzJaGA8yMTI2MTAyODIx
MjczMlowEjEQMA4GA1UEAwwHYW5vdGhlcjBZMBMGByqGSM49AgEGCCqGSM49AwEH
A0IABNpaRz+xqNyw/4DZAyPT4Kt+k5VQ83fgyc9fugMfhA/z1hqDfJ9oirxMT4dn
34KfV1Y41i0P6SeEp26a5AvDTgyjUzBRMB0GA1UdDgQWBBSi/LkZH2PRm/9opyoR
5ia/Xmok/DAfBgNVHSMEGDAWgBSi/LkZH2PRm/9opyoR5ia/Xmok/DAPBgNVHRMB
Af8EBTADAQH/MAoGCCqGSM49BAMCA0kAMEYCIQDXwCgTMc8cdaw8vBOuJXfywSsi
wRQRAK2hn+fK9SfsjwIhAJzEU04pbkh2+JjLnSVScG+R7m6uAmC1ywneU3vOVeEC
-----END CERTIFICATE-----
`

// Require skips (or, where everything is required, fails) the test unless ok; what names the missing thing.
func Require(t testing.TB, ok bool, what string) {
	t.Helper()
	if ok {
		return
	}
	if os.Getenv("FAIRLEAD_REQUIRE_ALL") == "1" {
		t.Fatalf("missing on this machine: %s", what)
	}
	t.Skipf("missing on this machine: %s", what)
}

// RequireRoot needs an effective user id of 0.
func RequireRoot(t testing.TB) {
	t.Helper()
	Require(t, os.Geteuid() == 0, "root")
}

// RequireBPF needs root and a kernel that can load sk_lookup and cgroup sock_addr programs.
func RequireBPF(t testing.TB) {
	t.Helper()
	RequireRoot(t)
	Require(t, features.HaveProgramType(ebpf.SkLookup) == nil, "BPF sk_lookup programs (kernel 5.9 or later)")
	Require(t, features.HaveProgramType(ebpf.CGroupSockAddr) == nil, "BPF cgroup sock_addr programs")
}

// RequireEnv needs the environment variable name and returns its value; what says what it names.
func RequireEnv(t testing.TB, name, what string) string {
	t.Helper()
	v := os.Getenv(name)
	if v == "" {
		t.Skipf("%s is not set: it names %s", name, what)
	}
	return v
}

// Netns makes a network namespace, with nothing but a lo that is down, until the test ends.
func Netns(t testing.TB) *os.File {
	t.Helper()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

// FreeAddr is an address and port on loopback that nobody listens on, for a program that is told where to listen. The address is
// one of its own: on 127.0.0.1 the kernel may give the port to somebody's connection before the program is there.
func FreeAddr(t testing.TB) string {
	t.Helper()
	n := rand.Uint32()
	ip := netip.AddrFrom4([4]byte{127, byte(n>>16) | 1, byte(n >> 8), byte(n) | 1})
	l, err := net.Listen("tcp", netip.AddrPortFrom(ip, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// Settle waits until a device of the calling thread's network namespace is connected and its addresses are in use, 10 s at
// most. The kernel does both later than it was asked: it looks for the former once a second at worst, and adds IPv6
// addresses in a work queue.
func Settle(device string, addrs ...netip.Addr) error {
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		link, err := netlink.LinkByName(device)
		if err != nil {
			return err
		}
		settled := link.Attrs().OperState == netlink.OperUp
		for _, a := range addrs {
			routes, err := netlink.RouteGet(a.AsSlice())
			settled = settled && err == nil && len(routes) == 1 && routes[0].Type == unix.RTN_LOCAL
		}
		if settled {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("device %s is not in use after 10 s", device)
		}
	}
}
