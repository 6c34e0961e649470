package lab

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/testenv"
)

const hangs = "FAIRLEAD_TEST_HANGS"

// TestHangs is the program of TestFailureShowsWhatAProgramWasDoing.
func TestHangs(t *testing.T) {
	if os.Getenv(hangs) == "" {
		return
	}
	waitForNobody(make(chan int))
}

func waitForNobody(c chan int) { <-c }

// A program that is not ready in time leaves the stacks of its goroutines in the error.
func TestFailureShowsWhatAProgramWasDoing(t *testing.T) {
	testenv.RequireRoot(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	root, err := cgroupMount()
	testenv.Require(t, err == nil, "a cgroup2 mount")
	group, err := os.MkdirTemp(root, "fairlead-process-test-")
	if err != nil {
		t.Fatal(err)
	}
	th, err := newThread(func() error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	p, err := th.start(t.TempDir(), command{name: "hangs", path: self, args: []string{"-test.run=^TestHangs$", "-test.v"}, env: []string{hangs + "=1"}, cgroup: group})
	t.Cleanup(func() {
		if p != nil && p.running() {
			p.kill()
		}
		th.end()
		if err := os.Remove(group); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	begun := func(context.Context) error {
		if text, err := os.ReadFile(p.log); err != nil || !strings.Contains(string(text), "=== RUN") {
			return errors.Join(errors.New("it has not begun"), err)
		}
		return nil
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := p.waitFor(ctx, begun); err != nil {
		t.Fatal(err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	err = p.waitFor(ctx, func(context.Context) error { return errors.New("it never is") })
	if err == nil || !strings.Contains(err.Error(), "waitForNobody") || !strings.Contains(err.Error(), filepath.Base(p.log)) {
		t.Errorf("the error does not say where the program hangs: %v", err)
	}
	if p.running() {
		t.Error("the program goes on")
	}
}
