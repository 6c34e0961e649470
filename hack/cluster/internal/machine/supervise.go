package machine

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/config"
)

// supervisor is what process 1 of a machine does for as long as it lives: it keeps
// daemons running and reaps whatever is left to it.
type supervisor struct {
	machine Machine
	bin     string
	log     io.Writer

	mu      sync.Mutex
	waiting map[int]chan syscall.WaitStatus
}

// restartAfter is how long a daemon that ended stays down.
const restartAfter = time.Second

// environment of every process in a machine; nothing of the caller's leaks in.
func environment(bin string) []string {
	return []string{"PATH=" + bin + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "TMPDIR=/run/tmp"}
}

// start runs a program and promises its end. The lock is held so that reap cannot
// meet the end of a process it does not know yet.
func (s *supervisor) start(log io.Writer, path string, args ...string) (<-chan syscall.WaitStatus, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	out, ok := log.(*os.File)
	if !ok {
		out = os.Stderr
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	pid, err := syscall.ForkExec(path, append([]string{path}, args...), &syscall.ProcAttr{
		Env: environment(s.bin), Dir: "/", Files: []uintptr{null.Fd(), out.Fd(), out.Fd()}, Sys: &syscall.SysProcAttr{Setsid: true}})
	if err != nil {
		return nil, fmt.Errorf("starting %s: %w", path, err)
	}
	end := make(chan syscall.WaitStatus, 1)
	s.waiting[pid] = end
	return end, nil
}

// run runs a program to its end.
func (s *supervisor) run(path string, args ...string) error {
	end, err := s.start(s.log, path, args...)
	if err != nil {
		return err
	}
	if st := <-end; st.ExitStatus() != 0 {
		return fmt.Errorf("%s: %s", filepath.Base(path), describe(st))
	}
	return nil
}

// reap collects children, its own and orphans, for ever.
func (s *supervisor) reap() {
	for {
		var st syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &st, 0, nil)
		switch {
		case err == syscall.EINTR:
		case err != nil:
			time.Sleep(20 * time.Millisecond) // no child just now
		case st.Exited() || st.Signaled():
			s.mu.Lock()
			if end, ok := s.waiting[pid]; ok {
				end <- st
				delete(s.waiting, pid)
			}
			s.mu.Unlock()
		}
	}
}

// keep runs a daemon, again whenever it ends.
func (s *supervisor) keep(d config.Daemon) {
	go func() {
		for {
			s.logf("%s ended: %v; again in %v", d.Name, s.once(d), restartAfter)
			time.Sleep(restartAfter)
		}
	}()
}

func (s *supervisor) once(d config.Daemon) error {
	f, err := os.OpenFile(s.machine.LogFile(d.Name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	end, err := s.start(f, filepath.Join(s.bin, d.Name), d.Args...)
	if err != nil {
		return err
	}
	return fmt.Errorf("%s", describe(<-end))
}

func (s *supervisor) logf(format string, args ...any) {
	fmt.Fprintf(s.log, "%s %s\n", time.Now().UTC().Format(time.RFC3339), fmt.Sprintf(format, args...))
}

func describe(st syscall.WaitStatus) string {
	if st.Signaled() {
		return "killed by " + unix.SignalName(st.Signal())
	}
	return fmt.Sprintf("exit status %d", st.ExitStatus())
}
