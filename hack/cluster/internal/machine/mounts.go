package machine

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/cgroup"
)

// isolate cuts the mount namespace off from the machine's own and gives it a
// /proc of its own process namespace.
func isolate() error {
	if err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	return mount("proc", "/proc", "proc", "")
}

// nodeRoot turns the copied mount tree into a node's: what its daemons write ends
// in the node's directory, and /sys, /run, cgroups and BPF objects are its own.
// keep are directories that must stay reachable at their places.
func nodeRoot(m Machine, cgroupMode string, keep ...string) error {
	groups, err := cgroup.Discover() // while the machine's own mounts are still in sight
	if err != nil {
		return err
	}
	kept, err := openAll(keep)
	if err != nil {
		return err
	}
	defer kept.close()
	for _, dir := range []string{"/etc", "/opt"} {
		if err := overlay(m, dir); err != nil {
			return err
		}
	}
	for _, dir := range []string{"/var/lib", "/var/log"} {
		fresh := filepath.Join(m.Dir(), "root", dir)
		if err := os.MkdirAll(fresh, 0o755); err != nil {
			return err
		}
		if err := bind(fresh, dir); err != nil {
			return err
		}
		// The cluster's own directory may be among what was just covered.
		if err := kept.restore(dir); err != nil {
			return err
		}
	}
	// Taken away rather than covered: some look for cgroups in the list of mounts.
	for _, dir := range []string{"/sys", "/run"} {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("detaching %s: %w", dir, err)
		}
	}
	if err := mount("sysfs", "/sys", "sysfs", ""); err != nil {
		return err
	}
	if err := mountCgroups(groups, cgroupMode); err != nil {
		return err
	}
	if err := mount("bpf", "/sys/fs/bpf", "bpf", ""); err != nil {
		return err
	}
	if err := mount("tmpfs", "/run", "tmpfs", "mode=755"); err != nil {
		return err
	}
	for _, d := range []string{"/run/containerd", "/run/netns", "/run/lock", "/var/log/pods", "/var/log/containers", "/opt/cni/bin", "/var/lib/kubelet"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	if err := os.Mkdir("/run/tmp", 0o1777); err != nil {
		return err
	}
	if err := coverSysctls("/run/sysctl"); err != nil {
		return err
	}
	if err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("sharing mounts with containers: %w", err)
	}
	return nil
}

// mountCgroups shows the node its own groups as roots: all hierarchies as the
// machine has them, or cgroup v2 alone, as current distributions do.
func mountCgroups(groups cgroup.Hierarchies, mode string) error {
	const top = "/sys/fs/cgroup"
	if mode == "v2" {
		if err := mount("cgroup2", top, "cgroup2", ""); err != nil {
			return err
		}
		if b, err := os.ReadFile(filepath.Join(top, "cgroup.controllers")); err != nil || len(b) == 0 {
			return err
		}
		return cgroup.LeaveRoot(top)
	}
	if err := mount("tmpfs", top, "tmpfs", "mode=755"); err != nil {
		return err
	}
	for _, h := range groups {
		dir, kind := filepath.Join(top, filepath.Base(h.Mount)), "cgroup"
		if h.V2 {
			kind = "cgroup2"
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := mount(kind, dir, kind, h.Options); err != nil {
			return err
		}
	}
	return nil
}

// coverSysctls lays plain files over the kernel settings that are the whole
// machine's: kubelet reads its wishes there and changes nothing.
func coverSysctls(dir string) error {
	for name, value := range map[string]string{
		"vm/overcommit_memory": "1", "vm/panic_on_oom": "0", "kernel/panic": "10", "kernel/panic_on_oops": "1",
		"kernel/keys/root_maxkeys": "1000000", "kernel/keys/root_maxbytes": "25000000",
	} {
		file := filepath.Join(dir, strings.ReplaceAll(name, "/", "_"))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file, []byte(value+"\n"), 0o644); err != nil {
			return err
		}
		if err := bind(file, filepath.Join("/proc/sys", name)); err != nil {
			return err
		}
	}
	return nil
}

// overlay makes dir writable without changing it: changes go to the machine's directory.
func overlay(m Machine, dir string) error {
	upper, work := filepath.Join(m.Dir(), "root", dir), filepath.Join(m.Dir(), "work", dir)
	for _, d := range []string{upper, work} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	return mount("overlay", dir, "overlay", fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", dir, upper, work))
}

// openDirs are directories held open while something is mounted above them.
type openDirs map[string]*os.File

func openAll(paths []string) (openDirs, error) {
	dirs := openDirs{}
	for _, p := range paths {
		f, err := os.Open(p)
		if err != nil {
			dirs.close()
			return nil, err
		}
		dirs[p] = f
	}
	return dirs, nil
}

// restore makes those below dir visible again.
func (o openDirs) restore(dir string) error {
	for p, f := range o {
		if !strings.HasPrefix(p, dir+"/") {
			continue
		}
		if err := os.MkdirAll(p, 0o755); err != nil {
			return err
		}
		if err := bind(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), p); err != nil {
			return err
		}
	}
	return nil
}

func (o openDirs) close() {
	for _, f := range o {
		f.Close()
	}
}

func mount(source, target, kind, options string) error {
	if err := unix.Mount(source, target, kind, 0, options); err != nil {
		return fmt.Errorf("mounting %s on %s (%s): %w", kind, target, options, err)
	}
	return nil
}

func bind(source, target string) error {
	if _, err := os.Lstat(target); errors.Is(err, fs.ErrNotExist) {
		return nil // a machine without that path needs no cover for it
	}
	if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("binding %s on %s: %w", source, target, err)
	}
	return nil
}
