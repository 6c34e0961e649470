package lab

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// StateDir holds a directory for each world of this machine. It is the same for everyone, so that each run can tell
// the worlds that live (their directory is locked) from what a killed run left.
const StateDir = "/tmp/fairlead-lab"

// lockFile is locked in a world's directory as long as the world lives.
const lockFile = "lock"

// claim makes and locks a world's directory.
func claim() (string, *os.File, error) {
	guard, err := guardState()
	if err != nil {
		return "", nil, err
	}
	defer guard.Close()
	dir, err := os.MkdirTemp(StateDir, "world-")
	if err != nil {
		return "", nil, err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", nil, err
	}
	f, err := lock(dir)
	return dir, f, err
}

// guardState makes and locks StateDir. Whoever leaves it empty removes it, so that the one that was waited for may be
// gone by then.
func guardState() (*os.File, error) {
	for {
		if err := os.MkdirAll(StateDir, 0o755); err != nil {
			return nil, err
		}
		guard, err := lock(StateDir)
		if err != nil {
			return nil, err
		}
		held, err := guard.Stat()
		if err != nil {
			return nil, errors.Join(err, guard.Close())
		}
		if now, err := os.Stat(guard.Name()); err == nil && os.SameFile(held, now) {
			return guard, nil
		}
		guard.Close()
	}
}

// tidy removes StateDir when it holds no world. The caller holds the guard.
func tidy() error {
	entries, err := os.ReadDir(StateDir)
	if err != nil || len(entries) > 1 {
		return err
	}
	return os.RemoveAll(StateDir)
}

// lock waits for the lock of a directory.
func lock(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return f, nil
}

// Prune removes the directories and cgroups of worlds whose process is gone.
func Prune() error {
	if _, err := os.Stat(StateDir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	guard, err := guardState()
	if err != nil {
		return err
	}
	defer guard.Close()
	worlds, err := filepath.Glob(filepath.Join(StateDir, "world-*"))
	if err != nil {
		return err
	}
	alive := map[string]bool{}
	for _, dir := range worlds {
		if alive[filepath.Base(dir)] = locked(dir); alive[filepath.Base(dir)] {
			continue
		}
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	top, err := cgroupMount()
	if err != nil {
		return err
	}
	groups, err := filepath.Glob(filepath.Join(top, cgroupPrefix+"*"))
	if err != nil {
		return err
	}
	for _, group := range groups {
		if alive[strings.TrimPrefix(filepath.Base(group), cgroupPrefix)] {
			continue
		}
		if err := removeCgroup(group); err != nil {
			return err
		}
	}
	return tidy()
}

// release removes a world's directory, unless it is to be kept, and lets go of its lock.
func release(dir string, lock *os.File, keep bool) error {
	guard, err := guardState()
	if err != nil {
		return err
	}
	defer guard.Close()
	defer lock.Close()
	if keep {
		return nil
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return tidy()
}

// locked tells whether a living process holds the lock of dir.
func locked(dir string) bool {
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil
}

const cgroupPrefix = "fairlead-lab-"

// cgroupMount finds the cgroup2 file system; hybrid machines have it beside the version 1 hierarchies.
func cgroupMount() (string, error) {
	f, err := os.Open("/proc/self/mounts")
	if err != nil {
		return "", err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if fields := strings.Fields(s.Text()); len(fields) > 2 && fields[2] == "cgroup2" {
			return fields[1], nil
		}
	}
	return "", errors.New("no cgroup2 file system is mounted")
}

func makeCgroup(world string) (string, error) {
	top, err := cgroupMount()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(top, cgroupPrefix+world)
	return dir, os.Mkdir(dir, 0o755)
}

// removeCgroup kills what still runs in a cgroup and removes it with everything below.
func removeCgroup(dir string) error {
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	// cgroup.kill appeared in Linux 5.14; before it the children's Pdeathsig has to do.
	if err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	if err != nil {
		return err
	}
	for i := len(dirs) - 1; i >= 0; i-- {
		if err := removeEmptied(dirs[i]); err != nil {
			return err
		}
	}
	return nil
}

// removeEmptied removes a cgroup as soon as the processes in it are gone; the kernel lets go of them a moment after
// they were waited for.
func removeEmptied(dir string) error {
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return fmt.Errorf("remove cgroup %s: %w", dir, err)
		}
	}
}
