package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/bpf"
	"github.com/fairlead-mesh/fairlead/tests/bench/load"
)

// group is a cgroup2 directory. Everything that runs for the benchmark is below one, and what is measured is in one of
// its own: the kernel counts the CPU time of each to the microsecond.
type group string

const groupPrefix = "fairlead-bench-"

// newGroups makes the benchmark's group, takes away those of runs that were killed, and moves this process into it.
func newGroups() (group, error) {
	root, err := bpf.FindCgroup2("/proc/self/mounts")
	if err != nil {
		return "", fmt.Errorf("CPU time is counted by cgroup2: %w", err)
	}
	old, err := filepath.Glob(filepath.Join(root, groupPrefix+"*"))
	if err != nil {
		return "", err
	}
	for _, dir := range old {
		pid, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(dir), groupPrefix))
		if err == nil && errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
			_ = group(dir).remove() // another run may be doing the same
		}
	}
	g := group(filepath.Join(root, groupPrefix+strconv.Itoa(os.Getpid())))
	own, err := g.child("harness")
	if err != nil {
		return "", err
	}
	return g, os.WriteFile(filepath.Join(string(own), "cgroup.procs"), []byte("0"), 0)
}

func (g group) child(name string) (group, error) {
	c := group(filepath.Join(string(g), name))
	return c, os.MkdirAll(string(c), 0o755)
}

// cpu is the CPU time that the group has used, those below it included, in seconds.
func (g group) cpu() (float64, error) {
	content, err := os.ReadFile(filepath.Join(string(g), "cpu.stat"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(content)) {
		if rest, ok := strings.CutPrefix(line, "usage_usec "); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(rest), 10, 64)
			return float64(n) / 1e6, err
		}
	}
	return 0, fmt.Errorf("no usage in %s/cpu.stat", g)
}

// leave moves this process to where it must be for the group to be removed.
func (g group) leave() error {
	return os.WriteFile(filepath.Join(filepath.Dir(string(g)), "cgroup.procs"), []byte("0"), 0)
}

// remove takes the group and those below it away. Their processes have ended.
func (g group) remove() error {
	var dirs []string
	err := filepath.WalkDir(string(g), func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	for i := len(dirs) - 1; i >= 0; i-- {
		for attempt := 0; ; attempt++ { // a process that has just ended may still be counted
			rmErr := unix.Rmdir(dirs[i])
			if rmErr == nil || attempt == 20 {
				err = errors.Join(err, rmErr)
				break
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
	return err
}

// affinity makes every thread below the group run on the first n CPUs of those in allowed; 0: on all of them.
func (g group) affinity(allowed unix.CPUSet, n int) error {
	set := first(allowed, n)
	return filepath.WalkDir(string(g), func(path string, d os.DirEntry, err error) error {
		if err != nil || d.Name() != "cgroup.procs" {
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, pid := range strings.Fields(string(content)) {
			for range 2 { // threads may be made meanwhile by those not yet moved
				tasks, err := os.ReadDir("/proc/" + pid + "/task")
				if errors.Is(err, os.ErrNotExist) {
					break
				}
				if err != nil {
					return err
				}
				for _, t := range tasks {
					tid, err := strconv.Atoi(t.Name())
					if err != nil {
						return err
					}
					if err := unix.SchedSetaffinity(tid, &set); err != nil && !errors.Is(err, unix.ESRCH) {
						return fmt.Errorf("pin thread %d: %w", tid, err)
					}
				}
			}
		}
		return nil
	})
}

// first is the set of the first n CPUs of another; 0: all.
func first(allowed unix.CPUSet, n int) unix.CPUSet {
	if n == 0 {
		return allowed
	}
	var set unix.CPUSet
	for cpu := 0; set.Count() < n && cpu < 1024; cpu++ {
		if allowed.IsSet(cpu) {
			set.Set(cpu)
		}
	}
	return set
}

// command is a program to start.
type command struct {
	name  string
	ns    *os.File
	group group
	argv  []string
	env   []string // beside this process's
	log   string   // a file for both outputs
	spawn *spawner
}

// process is one that runs. It ends with this process.
type process struct {
	command
	cmd  *exec.Cmd
	done chan struct{}
	err  error // once done is closed
}

func (c command) build(ctx context.Context) (*exec.Cmd, *os.File, error) {
	dir, err := os.Open(string(c.group))
	if err != nil {
		return nil, nil, err
	}
	cmd := exec.CommandContext(ctx, c.argv[0], c.argv[1:]...)
	cmd.Env = append(os.Environ(), c.env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	return cmd, dir, nil
}

// start starts a program that runs until stop.
func (c command) start() (*process, error) {
	cmd, dir, err := c.build(context.Background())
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", c.name, err)
	}
	defer dir.Close()
	log, err := os.Create(c.log)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", c.name, err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := c.spawn.start(c.ns, cmd); err != nil {
		return nil, fmt.Errorf("start %s: %w", c.name, err)
	}
	p := &process{command: c, cmd: cmd, done: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// ended is an error when the process runs no more.
func (p *process) ended() error {
	select {
	case <-p.done:
		return fmt.Errorf("%s has ended (%v); its last words: %s", p.name, p.err, lastLines(p.log, 5))
	default:
		return nil
	}
}

// stop ends the process and waits for it.
func (p *process) stop() {
	_ = p.cmd.Process.Kill() // fails only when it has ended
	<-p.done
}

// resident is the process's resident memory in MiB.
func (p *process) resident() (float64, error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(content)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kib, err := strconv.ParseFloat(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 64)
			return kib / 1024, err
		}
	}
	return 0, fmt.Errorf("no VmRSS of %s", p.name)
}

// lastLines is the end of a file, for error messages.
func lastLines(path string, n int) string {
	content, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(content)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], " | ")
}

// runLoad runs a client of package load in the client pod, to its end.
func (l *lane) runLoad(ctx context.Context, c load.Client) (load.Result, error) {
	pod := l.pods[client]
	ctx, cancel := context.WithTimeout(ctx, c.Warm+c.Duration+30*time.Second)
	defer cancel()
	argument, err := json.Marshal(c)
	if err != nil {
		return load.Result{}, err
	}
	cmd, dir, err := command{group: pod.group, argv: []string{selfPath, "load", string(argument)}}.build(ctx)
	if err != nil {
		return load.Result{}, err
	}
	defer dir.Close()
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := l.spawn.start(pod.ns, cmd); err != nil {
		return load.Result{}, fmt.Errorf("start the client: %w", err)
	}
	if err := cmd.Wait(); err != nil {
		return load.Result{}, fmt.Errorf("%w: %s", err, strings.TrimSpace(complaint.String()))
	}
	var r load.Result
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		return r, fmt.Errorf("read the client's result: %w", err)
	}
	return r, nil
}

// selfPath is this program.
const selfPath = "/proc/self/exe"
