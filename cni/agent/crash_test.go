package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/fairlead-mesh/fairlead/cni/plugin"
	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// doomed is an agent in a process of its own, which ends itself at a step.
type doomed struct {
	Config Config
	// Verb and At tell the step: the one with number At, from 1, of those that begin with Verb.
	Verb string
	At   int
	// Said is the file that the step's name is written to before the end.
	Said string
}

func TestMain(m *testing.M) {
	if text := os.Getenv("FAIRLEAD_TEST_DOOMED"); text != "" {
		var d doomed
		if err := json.Unmarshal([]byte(text), &d); err != nil {
			panic(err)
		}
		d.run()
		return
	}
	os.Exit(m.Run())
}

func (d doomed) run() {
	passed := 0
	d.Config.Steps = func(step string) {
		if !strings.HasPrefix(step, d.Verb) {
			return
		}
		if passed++; passed == d.At {
			if err := os.WriteFile(d.Said, []byte(step), 0o600); err != nil {
				panic(err)
			}
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
		}
	}
	fmt.Fprintln(os.Stderr, Run(context.Background(), d.Config, zap.NewNop()))
}

// doom starts such an agent and waits until it is ready. said tells the step it ended at, or "" when it is still there
// once over says that what it was asked is done.
func (n *node) doom(verb string, at int) (said func(over func() bool) string) {
	n.t.Helper()
	d := doomed{n.cfg, verb, at, filepath.Join(n.t.TempDir(), "step")}
	d.Config.Ready, d.Config.Clean, d.Config.Steps = nil, nil, nil
	text, err := json.Marshal(d)
	if err != nil {
		n.t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "FAIRLEAD_TEST_DOOMED="+string(text))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { cmd.Wait(); close(ended) }()
	n.eventually("the doomed agent is ready", func() error {
		_, err := n.call(http.MethodGet, plugin.StatusPath, "")
		return err
	})
	return func(over func() bool) string {
		n.t.Helper()
		for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			select {
			case <-ended:
				step, err := os.ReadFile(d.Said)
				if err != nil {
					n.t.Fatalf("the agent ended by itself: %v", err)
				}
				return string(step)
			default:
			}
			if !over() {
				continue
			}
			select {
			case <-ended:
			case <-time.After(time.Second): // what was asked is seen a moment before the last step
				cmd.Process.Kill()
				<-ended
			}
			step, _ := os.ReadFile(d.Said)
			return string(step)
		}
		n.t.Fatal("the agent neither ended nor did what it was asked")
		return ""
	}
}

// TestKilledAtEachStep ends the agent, as by kill -9, at each step of each thing it does to a pod. The agent after it brings
// the pod to where it should be, and a pod whose start was not finished is started again.
func TestKilledAtEachStep(t *testing.T) {
	for _, tc := range []struct {
		verb string
		// steps is how many there are at least.
		steps         int
		before, after string // the pod's label
		outcome       string
	}{
		{"start", 4, modeAmbient, modeAmbient, "proxy"},
		{"capture", 5, modeNone, modeAmbient, "proxy"},
		{"withdraw", 2, modeAmbient, modeNone, "out"},
		{"forget", 2, modeAmbient, "", "out"},
	} {
		t.Run(tc.verb, func(t *testing.T) {
			at := 1
			for ; ; at++ {
				step := ""
				if !t.Run(fmt.Sprint(at), func(t *testing.T) { step = killAt(t, tc.verb, at, tc.before, tc.after, tc.outcome) }) || step == "" {
					break
				}
			}
			if at-1 < tc.steps {
				t.Errorf("%d steps, want %d or more", at-1, tc.steps)
			}
		})
	}
}

// killAt does one thing to a pod with an agent that ends at a step, whose name it returns: "" when there is none so late.
func killAt(t *testing.T, verb string, at int, before, after, outcome string) (step string) {
	n := newNode(t)
	proxy, _ := n.proxy()
	label := func(mode string) string { return modeLabel + ": " + mode }
	p := n.pod("web", 1, label(before))
	if verb != "start" {
		n.add(p)
	}
	n.stop()
	said := n.doom(verb, at)
	switch verb {
	case "start":
		_, err := n.call(http.MethodPost, plugin.AddPath, p.event())
		step = said(func() bool { return err == nil })
		if step != "" && err == nil {
			t.Errorf("the start was granted by an agent that ended at %q", step)
		}
	case "forget":
		if err := os.Remove(filepath.Join(n.dir, "pod-web.yaml")); err != nil {
			t.Fatal(err)
		}
		step = said(func() bool { _, err := os.Stat(filepath.Join(n.cfg.RunDir, "pods", p.uid+".json")); return err != nil })
	default:
		n.object(p, label(after), true)
		step = said(func() bool { return p.reach(t) == outcome && settled(n, p, verb) })
	}
	t.Logf("ended at %q", step)
	if before == modeAmbient && after == modeAmbient && strings.HasPrefix(step, "start: redirected") {
		n.expect(p, "refused")
	}
	n.run()
	if verb == "start" {
		if answer := n.add(p); !answer.Redirected { // the kubelet tries again
			t.Errorf("the second start: %+v", answer)
		}
	}
	n.expectSoon(p, outcome)
	n.eventually("the proxy knows the same", func() error {
		if _, ok := proxy.workload(p.uid); ok != (outcome == "proxy") {
			return fmt.Errorf("it has the pod: %v", ok)
		}
		return nil
	})
	n.eventually("the kernel holds what it should", func() error { return n.traces(p, outcome == "proxy") })
	return step
}

// settled tells whether the record on disk says what was asked.
func settled(n *node, p *pod, verb string) bool {
	text, err := os.ReadFile(filepath.Join(n.cfg.RunDir, "pods", p.uid+".json"))
	var rec record
	return err == nil && json.Unmarshal(text, &rec) == nil && rec.Redirected == (verb == "capture")
}

// traces tells whether exactly the captured pod has pins.
func (n *node) traces(p *pod, captured bool) error {
	cookie, err := netns.Cookie(p.ns)
	if err != nil {
		return err
	}
	pins, err := os.ReadDir(filepath.Join(n.cfg.BPFFS, "pods"))
	if err != nil {
		return err
	}
	for _, pin := range pins {
		if pin.Name() != fmt.Sprint(cookie) {
			return fmt.Errorf("left: %s", pin.Name())
		}
	}
	if (len(pins) == 1) != captured {
		return errors.New("pins of the pod are not as they should be")
	}
	return nil
}
