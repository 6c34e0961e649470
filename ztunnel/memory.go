package ztunnel

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// settleTime is how long after the first configuration the process is taken to have done what only its start needs.
const settleTime = 5 * time.Second

// trim gives back, once, the pages of the program's file that only its start has used: the registration of every message
// of the interfaces spoken touches most of the file. Pages that are needed again are mapped again from the page cache.
func (p *Proxy) trim(ctx context.Context) error {
	select {
	case <-p.source.Synced():
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-time.After(settleTime):
	case <-ctx.Done():
		return ctx.Err()
	}
	if err := releaseProgram(); err != nil {
		p.log.Debug("give back pages of the start: " + err.Error())
	}
	<-ctx.Done()
	return ctx.Err()
}

// releaseProgram takes the program's code and constants out of the resident memory. They are mapped read-only, so nothing
// is lost.
func releaseProgram() error {
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return err
	}
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(maps)) {
		fields := strings.Fields(line) // address range, permissions, offset, device, inode, path
		if len(fields) < 6 || fields[5] != self || strings.Contains(fields[1], "w") {
			continue
		}
		var from, to uintptr
		if _, err := fmt.Sscanf(fields[0], "%x-%x", &from, &to); err != nil {
			return fmt.Errorf("read /proc/self/maps: %w", err)
		}
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, from, to-from, unix.MADV_DONTNEED); errno != 0 {
			return errno
		}
	}
	return nil
}
