package zds

import (
	"net"
	"os"
	"path/filepath"
	"testing"
)

func TestListenIsForTheOwnerAndReplaces(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	socket := filepath.Join(dir, "s.sock")
	for range 2 { // the second time over the first one's
		l, err := Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		for path, want := range map[string]os.FileMode{dir: 0o700, socket: 0o600} {
			if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
				t.Errorf("%s: mode %v, %v; want %v", path, info.Mode(), err, want)
			}
		}
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		if _, err := l.Accept(); err != nil {
			t.Errorf("the listener made last does not get the connection: %v", err)
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("left in the directory: %v, %v", entries, err)
	}
}
