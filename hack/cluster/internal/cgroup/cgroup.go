// Package cgroup (plumbing) finds the machine's cgroup hierarchies, v1, v2 or
// both, and keeps one group per cluster machine in each of them.
package cgroup

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Root is the name of the group above all clusters.
const Root = "fairlead"

// initGroup holds a node's own daemons where cgroup v2 has controllers: a group
// that hands controllers to children may hold no process itself.
const initGroup = "init"

// Hierarchy is one mounted cgroup hierarchy.
type Hierarchy struct {
	Mount   string // where it is mounted
	V2      bool
	Options string // v1: what to mount it by again, "cpu,cpuacct" or "none,name=systemd"
}

// Hierarchies is all of a machine's.
type Hierarchies []Hierarchy

// Discover reads the hierarchies of this mount namespace.
func Discover() (Hierarchies, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	h, err := parse(f)
	if err == nil && len(h) == 0 {
		err = errors.New("no cgroup hierarchy is mounted")
	}
	return h, err
}

// parse reads mountinfo (proc_pid_mountinfo(5)). A hierarchy mounted twice is
// taken once.
func parse(r io.Reader) (Hierarchies, error) {
	var all Hierarchies
	seen := map[string]bool{}
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		before, after, ok := strings.Cut(sc.Text(), " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !ok || len(left) < 5 || len(right) < 3 {
			continue
		}
		h := Hierarchy{Mount: left[4], V2: right[0] == "cgroup2"}
		if !h.V2 {
			if right[0] != "cgroup" {
				continue
			}
			h.Options = v1Options(right[2])
		}
		if h.Options == "" && !h.V2 || seen[h.Options] {
			continue
		}
		seen[h.Options] = true
		all = append(all, h)
	}
	return all, sc.Err()
}

// v1Options keeps of a v1 hierarchy's super options what names it.
func v1Options(super string) string {
	var keep []string
	for o := range strings.SplitSeq(super, ",") {
		switch {
		case strings.HasPrefix(o, "name="):
			return "none," + o
		case slices.Contains([]string{"rw", "ro", "xattr", "clone_children", "noprefix", "relatime"}, o), strings.HasPrefix(o, "release_agent="):
		default:
			keep = append(keep, o)
		}
	}
	return strings.Join(keep, ",")
}

// V1 tells whether any controller is on cgroup v1.
func (hs Hierarchies) V1() bool {
	return slices.ContainsFunc(hs, func(h Hierarchy) bool { return !h.V2 })
}

// V2 returns the cgroup v2 hierarchy.
func (hs Hierarchies) V2() (Hierarchy, bool) {
	i := slices.IndexFunc(hs, func(h Hierarchy) bool { return h.V2 })
	if i < 0 {
		return Hierarchy{}, false
	}
	return hs[i], true
}

// Limits tells whether cgroup v2 can enforce limits here; in a hybrid machine the
// controllers belong to v1 and it cannot.
func (hs Hierarchies) Limits() bool {
	h, ok := hs.V2()
	if !ok {
		return false
	}
	b, err := os.ReadFile(filepath.Join(h.Mount, "cgroup.controllers"))
	have := strings.Fields(string(b))
	return err == nil && slices.Contains(have, "cpu") && slices.Contains(have, "memory") && slices.Contains(have, "pids")
}

// Ensure makes the group Root/path in every hierarchy, with all controllers. Where
// cgroup v2 has none that matter, the machine's root group is left as it is.
func (hs Hierarchies) Ensure(path string) error {
	limits := hs.Limits()
	for _, h := range hs {
		dir := h.Mount
		for part := range strings.SplitSeq(Root+"/"+path, "/") {
			if h.V2 && limits {
				Delegate(dir)
			}
			parent := dir
			dir = filepath.Join(dir, part)
			if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return err
			}
			// A new v1 cpuset is empty and no process may enter it.
			for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
				b, err := os.ReadFile(filepath.Join(parent, f))
				if err != nil || h.V2 {
					continue
				}
				if err := os.WriteFile(filepath.Join(dir, f), b, 0); err != nil {
					return fmt.Errorf("copying %s: %w", f, err)
				}
			}
		}
	}
	return nil
}

// Exists tells whether Root/path is there in any hierarchy.
func (hs Hierarchies) Exists(path string) bool {
	return slices.ContainsFunc(hs, func(h Hierarchy) bool { return exists(filepath.Join(h.Mount, Root, path)) })
}

// Delegate hands every controller of the v2 group dir to its children, one by one:
// some (cpu, with realtime processes about) cannot be handed on everywhere.
func Delegate(dir string) {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return
	}
	for _, c := range strings.Fields(string(b)) {
		_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0)
	}
}

// Enter moves the calling process into Root/path of every hierarchy.
func (hs Hierarchies) Enter(path string) error {
	for _, h := range hs {
		dir := filepath.Join(h.Mount, Root, path)
		if h.V2 {
			if sub := filepath.Join(dir, initGroup); exists(sub) {
				dir = sub
			}
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0); err != nil {
			return fmt.Errorf("entering cgroup: %w", err)
		}
	}
	return nil
}

// LeaveRoot moves the calling process from the root of its own cgroup v2 namespace
// into a group below, so that the root can hand its controllers on. mount is where
// the namespace's cgroup2 is mounted.
func LeaveRoot(mount string) error {
	dir := filepath.Join(mount, initGroup)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
		return err
	}
	Delegate(mount)
	return nil
}

// Remove kills every process in Root/path, in any hierarchy, and removes the
// groups. It is no error if there are none.
func (hs Hierarchies) Remove(path string) error {
	var last error
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		last = nil
		for _, h := range hs {
			if err := removeTree(filepath.Join(h.Mount, Root, path)); err != nil {
				last = err
			}
		}
		if last == nil {
			return nil
		}
	}
	return fmt.Errorf("removing cgroups of %s: %w", path, last)
}

// RemoveRoot removes the group above all clusters if no cluster is left.
func (hs Hierarchies) RemoveRoot() {
	for _, h := range hs {
		_ = os.Remove(filepath.Join(h.Mount, Root))
	}
}

func removeTree(dir string) error {
	var groups []string
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && d.IsDir() {
			groups = append(groups, p)
		}
		return err
	})
	if err != nil {
		return err
	}
	for _, g := range slices.Backward(groups) {
		b, _ := os.ReadFile(filepath.Join(g, "cgroup.procs"))
		for p := range strings.FieldsSeq(string(b)) {
			if pid, err := strconv.Atoi(p); err == nil && pid > 1 {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		if err := syscall.Rmdir(g); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return &fs.PathError{Op: "rmdir", Path: g, Err: err}
		}
	}
	return nil
}

func exists(p string) bool {
	_, err := os.Stat(p)
	return err == nil
}
