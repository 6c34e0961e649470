package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestUninstallLeavesTheNodesAsTheyWere is the last of all: after it there is no mesh.
func TestUninstallLeavesTheNodesAsTheyWere(t *testing.T) {
	w := newWorld(t, "withdraw", "alice")
	w.join(t)
	cmd := exec.Command(filepath.Join(testLab.top, "hack/install.sh"), "--uninstall")
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	eventually(t, 30*time.Second, "no pod of ours is left", func() error {
		if out := kubectl(t, "-n", "istio-system", "get", "pods", "-o", "name", "--ignore-not-found"); out != "" {
			return &leftError{out}
		}
		return nil
	})
	after, err := testLab.nodeState()
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes {
		if after[n] != testLab.before[n] {
			t.Errorf("%s differs from before the install\nbefore:\n%s\nafter:\n%s", n, testLab.before[n], after[n])
		}
	}
	got, readable, hbone := w.observe(t, "alice")
	allOK(t, "after the uninstall", got)
	if readable == 0 || hbone != 0 {
		t.Errorf("after the uninstall the payload was readable %d times, %d HBONE packets", readable, hbone)
	}
}

type leftError struct{ what string }

func (e *leftError) Error() string { return "left: " + strings.ReplaceAll(e.what, "\n", " ") }
