package main

import (
	"os"
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"
)

// spawner starts processes in network namespaces, on a thread of its own. A child that is to end with its parent
// (PR_SET_PDEATHSIG) ends with the thread that started it, and other threads of a Go program may end.
type spawner struct{ work chan func() }

func newSpawner() (*spawner, error) {
	s := &spawner{work: make(chan func())}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // for ever
		home, err := os.Open("/proc/thread-self/ns/net")
		ready <- err
		for f := range s.work {
			f()
			if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) != nil {
				return // nothing more can be started, and what was started ends
			}
		}
	}()
	return s, <-ready
}

// start starts cmd inside ns.
func (s *spawner) start(ns *os.File, cmd *exec.Cmd) error {
	done := make(chan error)
	s.work <- func() {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- os.NewSyscallError("enter network namespace", err)
			return
		}
		done <- cmd.Start()
	}
	return <-done
}
