package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// command says how to start one of the world's programs.
type command struct {
	name   string // of the log file
	path   string
	args   []string
	env    []string
	cgroup string     // directory, made if missing
	files  []*os.File // from descriptor 3 on
}

// process is a program of the world. It dies with the thread that started it.
type process struct {
	name string
	log  string
	cmd  *exec.Cmd
	done chan struct{}
}

// start starts a program in the thread's namespaces, with its output in <dir>/<name>.log (appended).
func (t *thread) start(dir string, c command) (*process, error) {
	if err := os.MkdirAll(c.cgroup, 0o755); err != nil {
		return nil, err
	}
	group, err := os.Open(c.cgroup)
	if err != nil {
		return nil, err
	}
	defer group.Close()
	p := &process{name: c.name, log: filepath.Join(dir, c.name+".log"), done: make(chan struct{})}
	out, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	p.cmd = exec.Command(c.path, c.args...)
	p.cmd.Args[0] = filepath.Base(c.path)
	p.cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=/", "GOTRACEBACK=all"}, c.env...)
	p.cmd.Stdout, p.cmd.Stderr, p.cmd.ExtraFiles, p.cmd.Dir = out, out, c.files, "/"
	p.cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig: syscall.SIGKILL, Setpgid: true, UseCgroupFD: true, CgroupFD: int(group.Fd()),
	}
	if err := t.do(p.cmd.Start); err != nil {
		return nil, fmt.Errorf("start %s: %w", c.name, err)
	}
	go func() {
		p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// running tells whether the program has not ended.
func (p *process) running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// kill ends the program at once, as a power cut would, and waits for it.
func (p *process) kill() {
	p.cmd.Process.Kill()
	<-p.done
}

// stop asks the program to end and waits for it; one that does not end in time is made to, which is an error with the
// stacks of its goroutines.
func (p *process) stop(patience time.Duration) error {
	if p == nil || !p.running() {
		return nil
	}
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
		return nil
	case <-time.After(patience):
		return fmt.Errorf("%s did not end within %v of SIGTERM; %s", p.name, patience, p.stacks())
	}
}

// waitFor polls ready until it returns nil; it fails when the program ends before that, with the end of its log, or when ctx
// does, and then ends the program, so that its log has the stacks of all its goroutines.
func (p *process) waitFor(ctx context.Context, ready func(context.Context) error) error {
	for {
		err := ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s ended (%v); %s", p.name, p.cmd.ProcessState, p.tail())
		case <-ctx.Done():
			end := p.tail()
			return fmt.Errorf("%s is not ready: %w; %s\n%s", p.name, errors.Join(ctx.Err(), err), end, p.stacks())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// stacks ends a program that hangs and returns the stacks of its goroutines, which SIGQUIT makes it write to its log. A
// program that is none of Go's writes nothing.
func (p *process) stacks() string {
	before, err := os.Stat(p.log)
	if err != nil {
		return err.Error()
	}
	p.cmd.Process.Signal(syscall.SIGQUIT)
	select {
	case <-p.done:
	case <-time.After(10 * time.Second):
		p.kill()
	}
	text, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("what %s was doing:\n%s", p.name, text[min(before.Size(), int64(len(text))):])
}

func (p *process) tail() string { return tail(p.log) }

// tail is the end of a log, for error messages; it is empty when the log is.
func tail(file string) string {
	text, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	text = bytes.TrimSpace(text)
	if len(text) == 0 {
		return ""
	}
	lines := strings.Split(string(text), "\n")
	return fmt.Sprintf("the end of %s:\n\t%s", file, strings.Join(lines[max(0, len(lines)-15):], "\n\t"))
}
