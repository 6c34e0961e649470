package lab

import (
	"errors"
	"os"
	"runtime"

	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// thread is an operating system thread that has entered namespaces and stays in them. Children started on it are born
// in those namespaces, and get SIGKILL when it ends (Pdeathsig), so it lives as long as they should.
type thread struct {
	// net is the thread's network namespace.
	net  *os.File
	jobs chan func()
	done chan struct{}
}

var errThreadEnded = errors.New("the world is closed")

// newThread starts a thread and runs enter on it.
func newThread(enter func() error) (*thread, error) {
	t := &thread{jobs: make(chan func()), done: make(chan struct{})}
	entered := make(chan error, 1)
	go func() {
		// Never unlocked: when this goroutine returns, the thread ends and its namespaces with it.
		runtime.LockOSThread()
		defer close(t.done)
		err := enter()
		if err == nil {
			t.net, err = netns.Open("/proc/thread-self/ns/net")
		}
		entered <- err
		if err != nil {
			return
		}
		for job := range t.jobs {
			job()
		}
	}()
	if err := <-entered; err != nil {
		<-t.done
		return nil, err
	}
	return t, nil
}

// do runs f on the thread and waits for it. f must not call do of the same thread.
func (t *thread) do(f func() error) error {
	result := make(chan error, 1)
	select {
	case <-t.done:
		return errThreadEnded
	case t.jobs <- func() { result <- f() }:
		return <-result
	}
}

// end ends the thread. Nothing may call do afterwards or at the same time.
func (t *thread) end() {
	close(t.jobs)
	<-t.done
	t.net.Close()
}
