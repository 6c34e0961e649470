// Package machine (plumbing) makes the machines of a cluster: process trees in
// network, mount, process, cgroup, UTS and IPC namespaces of their own. A machine
// lives as long as its first process, and leaves nothing mounted outside.
//
// Starting one takes three processes, because a cgroup namespace shows whatever
// group its creator was in:
//
//  1. Start (the cluster command) starts
//  2. Stage, which enters the machine's cgroups and clones into new namespaces
//  3. Init, the machine's process 1, which waits until its network is there.
package machine

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/cgroup"
)

// Names of the hidden commands that Start and Stage run.
const (
	StageCommand = "machine-stage"
	InitCommand  = "machine-init"
)

// Process is a process that cannot be mistaken for a later one with its number.
type Process struct {
	PID   int
	Start uint64 // clock ticks since boot
}

// Machine names one machine of one cluster.
type Machine struct {
	Cluster string
	Name    string
	Run     string // the cluster's directory
}

// Dir is the machine's own directory.
func (m Machine) Dir() string { return filepath.Join(m.Run, m.Name) }

// LogFile is where a daemon of the machine writes; "" is the machine's init.
func (m Machine) LogFile(daemon string) string {
	if daemon != "" {
		daemon = "-" + daemon
	}
	return filepath.Join(m.Run, "log", m.Name+daemon+".log")
}

func (m Machine) group() string { return m.Cluster + "/" + m.Name }

func (m Machine) pidFile() string { return filepath.Join(m.Dir(), "pid") }

// Start makes the namespaces and the first process of m, which waits for go to be
// called. self is the cluster command's executable. If the caller dies before
// that, so does the machine.
func Start(m Machine, self string) (proc Process, goAhead func() error, err error) {
	for _, d := range []string{m.Dir(), filepath.Dir(m.LogFile(""))} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return Process{}, nil, err
		}
	}
	r, w, err := os.Pipe()
	if err != nil {
		return Process{}, nil, err
	}
	defer r.Close()
	var out, stderr bytes.Buffer
	cmd := exec.Command(self, StageCommand, m.Cluster, m.Name, m.Run)
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = &out, &stderr, []*os.File{r}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Run(); err != nil {
		w.Close()
		return Process{}, nil, fmt.Errorf("starting machine %s: %w: %s", m.Name, err, strings.TrimSpace(stderr.String()))
	}
	pid, err := strconv.Atoi(strings.TrimSpace(out.String()))
	if err == nil {
		proc, err = find(pid)
	}
	if err == nil {
		err = os.WriteFile(m.pidFile(), fmt.Appendf(nil, "%d %d\n", proc.PID, proc.Start), 0o644)
	}
	if err != nil {
		w.Close()
		return Process{}, nil, fmt.Errorf("starting machine %s: %w", m.Name, err)
	}
	return proc, func() error {
		defer w.Close()
		_, err := w.Write([]byte{1})
		return err
	}, nil
}

// Stage is the second step; the first process's number goes to stdout.
func Stage(m Machine, stdout io.Writer) error {
	groups, err := cgroup.Discover()
	if err != nil {
		return err
	}
	if err := groups.Ensure(m.group()); err != nil {
		return fmt.Errorf("making cgroups: %w", err)
	}
	if err := groups.Enter(m.group()); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	logFile, err := os.OpenFile(m.LogFile(""), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer logFile.Close()
	cmd := exec.Command(self, InitCommand, m.Cluster, m.Name, m.Run)
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = logFile, logFile, []*os.File{os.NewFile(3, "go-ahead")}
	cmd.Dir, cmd.Env = "/", []string{}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID |
		unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWCGROUP}
	if err := cmd.Start(); err != nil {
		return err
	}
	_, err = fmt.Fprintln(stdout, cmd.Process.Pid)
	return err
}

// Find returns the machine's first process if it is alive.
func Find(m Machine) (Process, bool) {
	b, err := os.ReadFile(m.pidFile())
	if err != nil {
		return Process{}, false
	}
	var want Process
	if _, err := fmt.Sscan(string(b), &want.PID, &want.Start); err != nil {
		return Process{}, false
	}
	got, err := find(want.PID)
	return got, err == nil && got == want
}

// Stop kills every process of m at once, as a power cut would, and removes its
// cgroups. Its disk (Dir) stays. It is no error if it does not run.
func Stop(m Machine) error {
	if p, ok := Find(m); ok {
		if err := syscall.Kill(p.PID, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("killing %s: %w", m.Name, err)
		}
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			if _, alive := Find(m); !alive {
				break
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("%s: process %d does not die", m.Name, p.PID)
			}
		}
	}
	groups, err := cgroup.Discover()
	if err != nil {
		return err
	}
	if err := groups.Remove(m.group()); err != nil {
		return err
	}
	return removeFile(m.pidFile())
}

// Enter returns the command that runs args inside m, after moving this process
// into m's cgroups. It is to be run in this process's place.
func Enter(m Machine, args []string) (argv []string, err error) {
	p, ok := Find(m)
	if !ok {
		return nil, fmt.Errorf("machine %s of cluster %s does not run", m.Name, m.Cluster)
	}
	groups, err := cgroup.Discover()
	if err != nil {
		return nil, err
	}
	if err := groups.Enter(m.group()); err != nil {
		return nil, err
	}
	argv = []string{"nsenter", "--target=" + strconv.Itoa(p.PID), "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--"}
	return append(argv, args...), nil
}

// find reads a process's start time; zombies do not count.
func find(pid int) (Process, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return Process{}, err
	}
	// The name in parentheses may hold anything; fields are counted after it.
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 20 || f[0] == "Z" || f[0] == "X" {
		return Process{}, fmt.Errorf("process %d is dead", pid)
	}
	start, err := strconv.ParseUint(f[19], 10, 64)
	return Process{PID: pid, Start: start}, err
}

func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
