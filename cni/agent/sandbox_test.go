package agent

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"github.com/fairlead-mesh/fairlead/cni/plugin"
)

// expectNoTrace waits until nothing is left of pods on the node: neither records nor anything that is pinned.
func (n *node) expectNoTrace() {
	n.t.Helper()
	n.eventually("nothing is left", func() error {
		for _, dir := range []string{filepath.Join(n.cfg.RunDir, "pods"), filepath.Join(n.cfg.BPFFS, "pods"), filepath.Join(n.cfg.BPFFS, "refused")} {
			left, err := os.ReadDir(dir)
			if err != nil || len(left) > 0 {
				return fmt.Errorf("in %s: %v, %v", dir, left, err)
			}
		}
		return nil
	})
}

// A pod that is deleted while it starts, with its sandbox, leaves nothing behind, whatever its start is told; and the next
// one starts.
func TestPodDeletedWhileItStarts(t *testing.T) {
	for _, at := range []string{"start: asked", "start: recorded", "start: redirected", "start: accepted"} {
		t.Run(at, func(t *testing.T) {
			n := newNode(t)
			proxy, _ := n.proxy()
			p := n.pod("short", 9, ambient)
			n.object(p, ambient, false)
			n.stop()
			reached := false
			n.cfg.Steps = func(step string) {
				if step != at || reached {
					return
				}
				reached = true
				if err := os.Remove(filepath.Join(n.dir, "pod-"+p.name+".yaml")); err != nil {
					t.Error(err)
				}
				p.ns.Close() // the agent has it open still, nobody else
			}
			n.run()
			event := p.event()
			_, err := n.call(http.MethodPost, plugin.AddPath, event)
			t.Logf("the start was told: %v", err)
			if !reached {
				t.Fatal("the step was not reached")
			}
			// The runtime takes the sandbox down, also one that failed.
			if _, err := n.call(http.MethodPost, plugin.DelPath, event); err != nil {
				t.Errorf("del: %v", err)
			}
			n.expectNoTrace()
			n.eventually("the proxy forgets the pod", func() error {
				if _, ok := proxy.workload(p.uid); ok {
					return fmt.Errorf("it has it")
				}
				return nil
			})
			next := n.pod("next", 10, ambient)
			if answer := n.add(next); !answer.Redirected {
				t.Errorf("the next pod: %+v", answer)
			}
			n.expect(next, "proxy")
		})
	}
}

// A network namespace that is gone before the agent looks at it is an error that says so, and leaves nothing.
func TestSandboxGoneBeforeItsStart(t *testing.T) {
	n := newNode(t)
	n.proxy()
	p := n.pod("short", 9, ambient)
	n.object(p, ambient, false)
	event := p.event()
	p.ns.Close()
	if answer, err := n.call(http.MethodPost, plugin.AddPath, event); err == nil {
		t.Errorf("answered %+v", answer)
	} else {
		t.Logf("as it must be: %v", err)
	}
	n.expectNoTrace()
}

// A pod whose sandbox is made anew is captured there, and the old one's end, which the runtime may tell of later, does not
// change that.
func TestSandboxRecreated(t *testing.T) {
	n := newNode(t)
	n.proxy()
	old := n.pod("web", 9, ambient)
	n.object(old, ambient, false)
	if _, err := n.call(http.MethodPost, plugin.AddPath, old.eventOf("container-first")); err != nil {
		t.Fatal(err)
	}
	n.expect(old, "proxy")
	end := old.eventOf("container-first")
	renewed := n.pod("web", 9, ambient)
	n.object(renewed, ambient, false)
	if _, err := n.call(http.MethodPost, plugin.AddPath, renewed.eventOf("container-second")); err != nil {
		t.Fatal(err)
	}
	n.expect(renewed, "proxy")
	n.expect(old, "out")
	if _, err := n.call(http.MethodPost, plugin.DelPath, end); err != nil {
		t.Fatal(err)
	}
	n.expect(renewed, "proxy")
	if _, err := n.call(http.MethodPost, plugin.DelPath, renewed.eventOf("container-second")); err != nil {
		t.Fatal(err)
	}
	n.expectNoTrace()
}
