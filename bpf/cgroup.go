package bpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// FindCgroup2 returns where the cgroup2 hierarchy is mounted, which on machines that have both hierarchies is not
// /sys/fs/cgroup itself. mounts is the path of a mount table, as /proc/self/mounts.
func FindCgroup2(mounts string) (string, error) {
	at, found, err := findMount(mounts, func(_, _, kind string) bool { return kind == "cgroup2" })
	if err == nil && !found {
		err = fmt.Errorf("no cgroup2 file system in %s", mounts)
	}
	return at, err
}

// CgroupID returns the number by which the kernel knows a cgroup2 directory.
func CgroupID(path string) (uint64, error) {
	var kind unix.Statfs_t
	if err := unix.Statfs(path, &kind); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	if kind.Type != unix.CGROUP2_SUPER_MAGIC {
		return 0, fmt.Errorf("%s is not in a cgroup2 file system", path)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return st.Ino, nil
}

// walkCgroups calls visit for root and every cgroup below it. Cgroups that vanish meanwhile are passed over. visit may
// return fs.SkipDir.
func walkCgroups(root string, visit func(path string, id uint64) error) error {
	return filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) && path != root {
			return nil
		}
		if err != nil || !entry.IsDir() {
			return err
		}
		id, err := CgroupID(path)
		if errors.Is(err, fs.ErrNotExist) && path != root {
			return nil
		}
		if err != nil {
			return err
		}
		return visit(path, id)
	})
}

// hasProcess tells whether a process runs in the cgroup itself, not in one below it.
func hasProcess(cgroup string, pid int) (bool, error) {
	content, err := os.ReadFile(filepath.Join(cgroup, "cgroup.procs"))
	// A threaded cgroup refuses to list its processes (EOPNOTSUPP); one that is being removed has none (ENODEV).
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENODEV) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	want := strconv.Itoa(pid)
	for line := range strings.Lines(string(content)) {
		if strings.TrimSpace(line) == want {
			return true, nil
		}
	}
	return false, nil
}
