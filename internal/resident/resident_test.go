package resident

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

func TestReleaseProgram(t *testing.T) {
	before := residentFile(t)
	if err := ReleaseProgram(); err != nil {
		t.Fatal(err)
	}
	if after := residentFile(t); after >= before {
		t.Errorf("%d KiB of files are resident, %d before", after, before)
	}
}

// residentFile is how much of mapped files is in this process's memory, in KiB.
func residentFile(t *testing.T) (kib int) {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "RssFile:"); ok {
			if _, err := fmt.Sscan(rest, &kib); err != nil {
				t.Fatal(err)
			}
		}
	}
	return kib
}
