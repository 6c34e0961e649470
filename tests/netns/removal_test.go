package netns

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/fairlead-mesh/fairlead/tests/netns/lab"
)

// TestRemovalLeavesNothing: pods that go take all of their redirection with them, and a world leaves no trace.
func TestRemovalLeavesNothing(t *testing.T) {
	f := newFixture(t, ambient)
	perPod := func() (traces []string) {
		for _, n := range f.Nodes {
			all, err := n.Traces()
			f.must(err)
			for _, p := range all {
				if strings.Contains(p, "/pods/") {
					traces = append(traces, p)
				}
			}
		}
		return traces
	}
	if len(perPod()) == 0 { // the control
		t.Error("there is no trace of the pods of the mesh")
	}
	for _, p := range f.Pods() {
		f.must(f.RemovePod(f.ctx, p))
	}
	if traces := perPod(); len(traces) > 0 {
		t.Errorf("left on the nodes: %v", traces)
	}
	for _, n := range f.Nodes {
		f.must(n.Uninstall(f.ctx))
		if traces, err := n.Traces(); err != nil || len(traces) > 0 {
			t.Errorf("left on %s after the uninstall: %v %v", n.Name, traces, err)
		}
		if after, err := n.CNIFiles(); err != nil || after != f.cniBefore[n.Name] {
			t.Errorf("CNI files of %s after the uninstall:\n%s\nbefore:\n%s\n%v", n.Name, after, f.cniBefore[n.Name], err)
		}
	}
	world := filepath.Base(f.Dir)
	f.must(f.Close())
	for _, path := range []string{f.Dir, "/sys/fs/cgroup/fairlead-lab-" + world, "/sys/fs/cgroup/unified/fairlead-lab-" + world} {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left behind (%v)", path, err)
		}
	}
	commands, err := filepath.Glob("/proc/[0-9]*/cmdline")
	f.must(err)
	for _, file := range commands {
		text, err := os.ReadFile(file)
		if err == nil && strings.Contains(string(text), world) {
			t.Errorf("a process is left behind: %q", text)
		}
	}
}

// TestTwoWorldsAtOnce: they do not know of each other.
func TestTwoWorldsAtOnce(t *testing.T) {
	first, second := newFixture(t, ambient), newFixture(t, ambient)
	for _, f := range []*fixture{first, second} {
		f.mustBeHBONE(f.web, f.v1, tcp(f.v1))
	}
	first.must(first.Apply("deny-batch", denyBatch))
	first.until(first.batch, tcp(first.v1), lab.Answer.Failed)
	second.mustAnswer(second.batch, tcp(second.v1))
}
