// Package resident (plumbing) gives back memory that a process has used and does not need for now.
package resident

import (
	"fmt"
	"os"
	"runtime/debug"
	"strings"

	"golang.org/x/sys/unix"
)

// Release gives back the free heap, for which it collects garbage, and what ReleaseProgram does. It is for the end of a time in
// which the process had much to do.
func Release() error {
	debug.FreeOSMemory()
	return ReleaseProgram()
}

// ReleaseProgram takes the program's code and constants out of the resident memory. They are mapped read-only, so nothing
// is lost: pages that are needed again are mapped again from the page cache.
func ReleaseProgram() error {
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
