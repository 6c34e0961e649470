package redirect

import (
	"os"
	"testing"

	"github.com/fairlead-mesh/fairlead/bpf"
	"github.com/fairlead-mesh/fairlead/internal/testenv"
)

func TestHostCgroup2(t *testing.T) {
	testenv.RequireRoot(t)
	own, err := bpf.FindCgroup2("/proc/self/mounts")
	testenv.Require(t, err == nil, "a cgroup2 mount")
	// This process stands for process 1 here; both paths are the same directory then.
	seen, err := hostCgroup2("/proc/self")
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.Stat(own)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.Stat(seen)
	if err != nil || !os.SameFile(want, got) {
		t.Errorf("found %s (%v), want the directory %s", seen, err, own)
	}
	if _, err := bpf.CgroupID(seen); err != nil {
		t.Error(err)
	}
}
