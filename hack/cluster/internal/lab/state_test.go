package lab

import (
	"io"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// The lock's file comes and goes; still no two may hold the lock at once.
func TestLockIsHeldByOne(t *testing.T) {
	l := Lab{State: t.TempDir(), Out: io.Discard}
	var holders, worst atomic.Int32
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 20 {
				unlock, err := l.lock("c")
				if err != nil {
					t.Error(err)
					return
				}
				if n := holders.Add(1); n > 1 {
					worst.Store(n)
				}
				time.Sleep(time.Millisecond)
				holders.Add(-1)
				unlock()
			}
		})
	}
	wg.Wait()
	if n := worst.Load(); n > 1 {
		t.Errorf("%d held the lock at once", n)
	}
	left, err := os.ReadDir(l.State + "/run")
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v (%v)", left, err)
	}
}

func TestNamesThatLeadElsewhereAreRefused(t *testing.T) {
	l := Lab{State: t.TempDir(), Out: io.Discard}
	for _, name := range []string{"../x", "", "A", "a/b", "."} {
		if err := l.Down(name); err == nil {
			t.Errorf("Down took %q", name)
		}
		if _, err := l.Env(name); err == nil {
			t.Errorf("Env took %q", name)
		}
	}
}
