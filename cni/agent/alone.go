package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// aloneEvery is how often an agent looks whether the one before it has ended.
const aloneEvery = 100 * time.Millisecond

// alone waits until no other agent works on the node, as one does for a moment whose pod was deleted by force, and keeps others
// from it until the file that it returns is closed. Two would give the same numbers and places in the kernel to two pods.
func alone(ctx context.Context, runDir string, log *zap.Logger) (*os.File, error) {
	if err := os.MkdirAll(runDir, 0o700); err != nil {
		return nil, fmt.Errorf("make the run directory: %w", err)
	}
	dir, err := os.Open(runDir)
	if err != nil {
		return nil, fmt.Errorf("open the run directory: %w", err)
	}
	if err := dir.Chmod(0o700); err != nil { // the kubelet makes directories that it mounts for all to read
		return nil, errors.Join(fmt.Errorf("close the run directory to others: %w", err), dir.Close())
	}
	told := false
	for {
		err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return dir, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", runDir, err), dir.Close())
		}
		if !told {
			told = true
			log.Warn("another agent works on this node: this one begins when that has ended", zap.String("runDir", runDir))
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), dir.Close())
		case <-time.After(aloneEvery):
		}
	}
}
