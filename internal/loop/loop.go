// Package loop (plumbing) is an event loop over epoll: one goroutine that owns the descriptors given to it and calls
// their handlers. It sleeps in the Go netpoller, on its epoll descriptor, so it costs no thread while it waits and the
// runtime's profiles and preemption see an ordinary goroutine.
package loop

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Events that handlers care about. Every descriptor is registered once, edge triggered, for all of them.
const (
	In     = unix.EPOLLIN
	Out    = unix.EPOLLOUT
	Hangup = unix.EPOLLRDHUP | unix.EPOLLHUP | unix.EPOLLERR

	all = unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | -unix.EPOLLET // EPOLLET is the sign bit
)

// Handler is told of events of its descriptor, on the loop's goroutine.
type Handler interface{ Ready(events uint32) }

// slot is what a descriptor number stands for. Its generation tells an event of a descriptor that was closed in the same
// batch from one of its successor with the same number.
type slot struct {
	h   Handler
	gen int32
}

// Loop is one event loop. Post may be called from any goroutine, all else only from the loop's.
type Loop struct {
	ep, wake int
	file     *os.File // owns ep
	poll     syscall.RawConn
	turn     func() (more bool)

	slots []slot
	gen   int32
	evs   [256]unix.EpollEvent

	mu     sync.Mutex
	posted []func()
	spare  []func()
	asleep bool // in wait, or about to be: a post must wake it
	closed bool
}

// New makes a loop and starts it. turn is called after each batch of events and posts; while it says more, the loop
// looks for new events but does not sleep.
func New(turn func() (more bool)) (*Loop, error) {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create epoll: %w", err)
	}
	if err := unix.SetNonblock(ep, true); err != nil { // so that os.NewFile gives it to the netpoller
		unix.Close(ep)
		return nil, fmt.Errorf("make epoll non-blocking: %w", err)
	}
	l := &Loop{ep: ep, file: os.NewFile(uintptr(ep), "epoll"), turn: turn}
	if l.poll, err = l.file.SyscallConn(); err != nil {
		l.file.Close()
		return nil, fmt.Errorf("wait on epoll: %w", err)
	}
	if l.wake, err = unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC); err != nil {
		l.file.Close()
		return nil, fmt.Errorf("create eventfd: %w", err)
	}
	if err := l.Add(l.wake, woken{}); err != nil {
		unix.Close(l.wake)
		l.file.Close()
		return nil, err
	}
	go l.run()
	return l, nil
}

// woken is the handler of the eventfd: the posts are run in any case. It is never read: edge triggered, each write is an event.
type woken struct{}

func (woken) Ready(uint32) {}

// turns is how often the loop serves posts that its own turns make, until it looks for events again.
const turns = 4

// Post runs f on the loop soon, after what was posted before. It says false when the loop is closed; f runs if it says
// true. A loop that is awake looks for posts before it sleeps, so that only a post to one that sleeps costs a system call.
func (l *Loop) Post(f func()) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return false
	}
	l.posted = append(l.posted, f)
	if l.asleep {
		l.asleep = false
		// Under the lock: a loop that is not closed keeps its eventfd until it has had the lock once more.
		one := uint64(1)
		unix.RawSyscall(unix.SYS_WRITE, uintptr(l.wake), uintptr(unsafe.Pointer(&one)), 8)
	}
	return true
}

// Stop ends the loop after the current batch and what is posted meanwhile. Descriptors that are still registered stay open.
func (l *Loop) Stop() {
	l.Post(func() {
		l.mu.Lock()
		l.closed = true
		l.mu.Unlock()
	})
}

// Add registers fd, which must be non-blocking; h is called with the events that come from now on. A new descriptor's
// current readiness comes as the first event.
func (l *Loop) Add(fd int, h Handler) error {
	for fd >= len(l.slots) {
		l.slots = append(l.slots, make([]slot, max(64, len(l.slots)))...)
	}
	l.gen++
	e := unix.EpollEvent{Events: uint32(all & 0xffffffff), Fd: int32(fd), Pad: l.gen}
	_, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(l.ep), unix.EPOLL_CTL_ADD, uintptr(fd), uintptr(unsafe.Pointer(&e)), 0, 0)
	if errno != 0 {
		return fmt.Errorf("add descriptor to epoll: %w", errno)
	}
	l.slots[fd] = slot{h, l.gen}
	return nil
}

// Replace gives fd, which was added, another handler. A descriptor that was not added, or is closed, stays as it is.
func (l *Loop) Replace(fd int, h Handler) {
	if fd < len(l.slots) && l.slots[fd].h != nil {
		l.slots[fd].h = h
	}
}

// Close closes fd, whether or not it was added; its handler is not called again.
func (l *Loop) Close(fd int) {
	if fd < len(l.slots) {
		l.slots[fd] = slot{}
	}
	unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0)
}

// Remove takes fd out without closing it; its handler is not called again. Closing is not enough for a descriptor that
// another process has as well: epoll would go on to report it.
func (l *Loop) Remove(fd int) {
	l.slots[fd] = slot{}
	unix.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(l.ep), unix.EPOLL_CTL_DEL, uintptr(fd), 0, 0, 0)
}

// Each calls f for the handler of every descriptor.
func (l *Loop) Each(f func(Handler)) {
	for _, s := range l.slots {
		if s.h != nil {
			f(s.h)
		}
	}
}

// pending takes what epoll has, without waiting.
func (l *Loop) pending() int {
	n, _, e := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(l.ep), uintptr(unsafe.Pointer(&l.evs[0])), uintptr(len(l.evs)), 0, 0, 0)
	if e != 0 {
		return 0
	}
	return int(n)
}

// wait sleeps until epoll has something or there are posts.
func (l *Loop) wait() (n int, err error) {
	l.mu.Lock()
	l.asleep = len(l.posted) == 0
	asleep := l.asleep
	l.mu.Unlock()
	if !asleep {
		return l.pending(), nil
	}
	err = l.poll.Read(func(uintptr) bool {
		n = l.pending()
		return n > 0
	})
	return n, err
}

func (l *Loop) run() {
	defer l.release()
	more := false
	for {
		n, err := 0, error(nil)
		if more {
			n = l.pending()
		} else if n, err = l.wait(); err != nil {
			if errors.Is(err, os.ErrClosed) {
				return
			}
			panic("event loop: " + err.Error()) // no descriptor but a closed one gives an error here
		}
		for i := range n {
			e := &l.evs[i]
			if s := &l.slots[e.Fd]; s.h != nil && s.gen == e.Pad {
				s.h.Ready(e.Events)
			}
		}
		for again, rounds := true, 0; again && rounds < turns; rounds++ {
			if l.runPosted() {
				return
			}
			more = l.turn()
			again = l.hasPosts()
		}
	}
}

func (l *Loop) hasPosts() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.posted) > 0
}

// runPosted runs the posts and says whether the loop was stopped. Then none is left, and none will come.
func (l *Loop) runPosted() (closed bool) {
	for {
		l.mu.Lock()
		l.asleep = false
		fs := l.posted
		if len(fs) == 0 {
			closed = l.closed
			l.mu.Unlock()
			return closed
		}
		l.posted, l.spare = l.spare[:0], nil
		l.mu.Unlock()
		for i, f := range fs {
			fs[i] = nil
			f()
		}
		l.mu.Lock()
		if l.spare = fs[:0]; cap(fs) > 4096 {
			l.spare = nil
		}
		closed = l.closed
		l.mu.Unlock()
		if !closed {
			return false
		}
	}
}

func (l *Loop) release() {
	unix.Close(l.wake)
	l.file.Close()
}
