package bpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// mountSource is what a BPF file system that this package mounted gives as its device, by which it is known from its first
// moment on.
const mountSource = "fairlead"

// ensureMount makes sure that dir exists and is on a BPF file system. A missing one is mounted in the mount namespace whose
// file is mounts, from where it has to come to this process.
func ensureMount(dir, mounts string) error {
	if os.MkdirAll(dir, 0o700) == nil && isBPFFS(dir) {
		return nil
	}
	if err := inMounts(mounts, func() error { return mountAt(dir) }); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make directory in BPF file system: %w", err)
	}
	if !isBPFFS(dir) {
		return fmt.Errorf("the BPF file system that the host has on %s is not seen here: it needs mount propagation", dir)
	}
	return nil
}

// inMounts runs f in a mount namespace, given by its file; empty means this process's.
func inMounts(mounts string, f func() error) error {
	if mounts == "" {
		return f()
	}
	ns, err := os.Open(mounts)
	if err != nil {
		return fmt.Errorf("open the host's mount namespace: %w", err)
	}
	defer ns.Close()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for ever: the thread ends with this goroutine
		done <- withFD(ns, func(fd int) error {
			if err := errors.Join(unix.Unshare(unix.CLONE_FS), unix.Setns(fd, unix.CLONE_NEWNS)); err != nil {
				return fmt.Errorf("enter the host's mount namespace: %w", err)
			}
			return f()
		})
	}()
	return <-done
}

// mountAt mounts a BPF file system on dir if it is on none. Where dir cannot even be made, as below the empty /sys/fs/bpf,
// the file system is mounted on its parent.
func mountAt(dir string) error {
	err := os.MkdirAll(dir, 0o700)
	if err == nil && isBPFFS(dir) {
		return nil
	}
	at := dir
	if err != nil {
		at = filepath.Dir(dir)
		if isBPFFS(at) {
			return fmt.Errorf("make directory in BPF file system: %w", err)
		}
	}
	if err := unix.Mount(mountSource, at, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("mount a BPF file system on %s: %w", at, err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make directory in BPF file system: %w", err)
	}
	return nil
}

// unmount undoes mountAt once the pins are gone.
func unmount(dir string) error {
	for _, at := range []string{dir, filepath.Dir(dir)} {
		if ours, err := mounted(at); err != nil {
			return err
		} else if !ours {
			continue
		}
		entries, err := os.ReadDir(at)
		if err != nil {
			return err
		}
		// The kernel puts two files of its own into each BPF file system.
		others := slices.ContainsFunc(entries, func(e fs.DirEntry) bool {
			return !slices.Contains([]string{"maps.debug", "progs.debug"}, e.Name()) && filepath.Join(at, e.Name()) != dir
		})
		if others {
			return nil
		}
		if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount the BPF file system on %s: %w", at, err)
		}
	}
	return removeEmpty(dir)
}

// mounted tells whether this package has mounted the file system on a directory, as the mount namespace of the thread has it.
func mounted(dir string) (bool, error) {
	_, found, err := findMount("/proc/thread-self/mounts", func(source, at, kind string) bool {
		return source == mountSource && at == dir && kind == "bpf"
	})
	return found, err
}

// findMount is where the first file system of a mount table, as /proc/self/mounts, is mounted that is the one.
func findMount(table string, isIt func(source, at, kind string) bool) (at string, found bool, err error) {
	text, err := os.ReadFile(table)
	if err != nil {
		return "", false, err
	}
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) > 2 && isIt(fields[0], fields[1], fields[2]) {
			return fields[1], true, nil
		}
	}
	return "", false, nil
}

// removeEmpty removes a directory, unless somebody has something in it.
func removeEmpty(dir string) error {
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	return nil
}

func isBPFFS(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.BPF_FS_MAGIC
}

// withFD calls f with the file's descriptor, which stays open meanwhile.
func withFD(file *os.File, f func(fd int) error) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var callErr error
	if err := raw.Control(func(fd uintptr) { callErr = f(int(fd)) }); err != nil {
		return err
	}
	return callErr
}
