// Package testenv (plumbing) decides whether a privileged test can run here. A test that cannot run is skipped with
// the name of what is missing; where FAIRLEAD_REQUIRE_ALL=1 is set (continuous integration) it fails instead, so that
// no check is skipped unseen.
package testenv

import (
	"os"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/features"
)

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
