package machine

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestFindKnowsTheProcessAgain(t *testing.T) {
	m := Machine{Cluster: "c", Name: "node1", Run: t.TempDir()}
	if err := os.MkdirAll(m.Dir(), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, ok := Find(m); ok {
		t.Error("found a machine that was never started")
	}
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := find(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	write := func(p Process) {
		t.Helper()
		if err := os.WriteFile(m.pidFile(), fmt.Appendf(nil, "%d %d\n", p.PID, p.Start), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write(p)
	if got, ok := Find(m); !ok || got != p {
		t.Errorf("got %v %v, want %v", got, ok, p)
	}
	write(Process{PID: p.PID, Start: p.Start + 1})
	if _, ok := Find(m); ok {
		t.Error("took another process with the same number for the machine")
	}
	write(p)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for range 100 {
		if _, ok := Find(m); !ok {
			break
		}
	}
	_ = cmd.Wait()
	if _, ok := Find(m); ok {
		t.Error("found a dead process")
	}
}

func TestPlaceReplacesALink(t *testing.T) {
	dir := t.TempDir()
	target, link := filepath.Join(dir, "target"), filepath.Join(dir, "sub", "resolv.conf")
	if err := os.WriteFile(target, []byte("host's"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Dir(link), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
	if err := place(link, []byte("node's")); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{target: "host's", link: "node's"} {
		if b, err := os.ReadFile(path); err != nil || string(b) != want {
			t.Errorf("%s: %q, %v", path, b, err)
		}
	}
}
