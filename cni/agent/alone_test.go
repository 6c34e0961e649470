package agent

import (
	"context"
	"errors"
	"net/http"
	"os"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/fairlead-mesh/fairlead/cni/plugin"
)

// While an agent lives, another one on the node touches nothing, and says why; then it takes over.
func TestAgentsTakeTurns(t *testing.T) {
	n := newNode(t)
	n.proxy()
	p := n.pod("web", 1, modeLabel+": "+modeAmbient)
	n.add(p)
	core, logs := observer.New(zap.InfoLevel)
	run := func() (end func() error) {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- Run(ctx, n.cfg, zap.New(core)) }()
		return func() error { cancel(); return <-done }
	}
	waits := func(times int) func() error {
		return func() error {
			if logs.FilterMessageSnippet("another agent").Len() != times {
				return errors.New("it does not say so")
			}
			return nil
		}
	}
	begun := func() int { return logs.FilterMessage("cni-agent runs").Len() }
	end := run()
	n.eventually("the second agent waits", waits(1))
	if err := end(); err != nil {
		t.Errorf("ended while it waits: %v", err)
	}
	end = run()
	n.eventually("the third agent waits", waits(2))
	n.add(p) // the first still answers
	if begun() != 0 {
		t.Error("an agent runs beside another")
	}
	n.stop()
	n.eventually("the third agent runs", func() error {
		if begun() != 1 {
			return errors.New("it does not say so")
		}
		_, err := n.call(http.MethodGet, plugin.StatusPath, "")
		return err
	})
	n.add(p)
	n.expect(p, "proxy")
	n.stop = func() { // for the cleanup
		if err := end(); err != nil {
			t.Error(err)
		}
	}
}

// A run directory that was made for all to read, as the kubelet's are, is the agent's alone.
func TestRunDirectoryIsClosedToOthers(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	lock, err := alone(t.Context(), dir, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	info, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o700 {
		t.Errorf("mode %v", info.Mode())
	}
}
