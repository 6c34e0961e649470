package netns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Beginner begins connections on the calling goroutine without waiting for anything, for callers that may not: neither
// another goroutine nor Go's poller has a part in it. What it gives is a bare descriptor, non-blocking and close-on-exec,
// that the caller owns.
type Beginner struct {
	home *os.File

	mu     sync.Mutex
	strays map[int]struct{} // threads that could not go back, by their ids
	lost   atomic.Int32     // len(strays)
}

// NewBeginner makes a Beginner, to be closed with Close.
func NewBeginner() (*Beginner, error) {
	// Not the process's: its first thread may have ended in another namespace.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := Open("/proc/thread-self/ns/net")
	return &Beginner{home: home, strays: map[int]struct{}{}}, err
}

// Close ends the Beginner. None of its calls may be under way.
func (b *Beginner) Close() error { return b.home.Close() }

// Begin is the beginning of Dial. pending says that the connection is not made yet, which Finish waits for; over lo it
// usually is at once, as the kernel delivers its packets before connect(2) returns.
func (b *Beginner) Begin(ns *os.File, opts DialOptions, dst netip.AddrPort) (fd int, pending bool, err error) {
	dst = netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	if fd, err = b.socket(ns, dst.Addr()); err != nil {
		return -1, false, dialError(dst, err)
	}
	if err := prepare(fd, opts); err != nil {
		return -1, false, dialError(dst, closeAll(err, fd))
	}
	to := sockaddr(dst)
	err = unix.Connect(fd, to)
	if errors.Is(err, unix.EINPROGRESS) {
		err = unix.Connect(fd, to) // tells what has become of the first
	}
	switch {
	case err == nil, errors.Is(err, unix.EISCONN):
		return fd, false, nil
	case errors.Is(err, unix.EALREADY):
		return fd, true, nil
	}
	return -1, false, dialError(dst, closeAll(os.NewSyscallError("connect", err), fd))
}

// Finish waits until a connection that Begin left pending is made, has failed, or ctx has ended. It owns fd and gives it
// back, or another one of the same socket.
func (b *Beginner) Finish(ctx context.Context, fd int, dst netip.AddrPort) (int, error) {
	file := os.NewFile(uintptr(fd), "connection") // non-blocking, so it waits in Go's poller
	defer file.Close()
	if err := wait(ctx, file); err != nil {
		var errno unix.Errno
		if errors.As(err, &errno) {
			err = os.NewSyscallError("connect", errno)
		}
		return -1, dialError(dst, err)
	}
	fd, err := control(file, func(fd int) (int, error) { return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0) })
	if err != nil {
		return -1, dialError(dst, err)
	}
	return fd, nil
}

func dialError(dst netip.AddrPort, err error) error {
	return &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(dst), Err: err}
}

// socket makes a socket inside ns. The thread is in its own namespace again when it returns. Where it cannot go back, which
// takes a kernel without memory for a few bytes, it stays the calling goroutine's alone, so that nothing else runs in the
// wrong namespace, and each later call of that goroutine tries again before all else.
func (b *Beginner) socket(ns *os.File, addr netip.Addr) (fd int, err error) {
	family := unix.AF_INET
	if addr.Is6() {
		family = unix.AF_INET6
	}
	if err := b.goHome(); err != nil {
		return -1, err
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if ns != nil {
		if err := move(ns); err != nil {
			return -1, err
		}
		defer func() {
			if homeErr := move(b.home); homeErr != nil {
				b.astray()
				if fd >= 0 {
					homeErr = closeAll(homeErr, fd)
				}
				fd, err = -1, homeErr
			}
		}()
	}
	fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	return fd, os.NewSyscallError("socket", err)
}

// move puts the thread into ns.
func move(ns *os.File) error {
	if _, err := control(ns, func(fd int) (int, error) { return 0, unix.Setns(fd, unix.CLONE_NEWNET) }); err != nil {
		return fmt.Errorf("enter network namespace %s: %w", ns.Name(), err)
	}
	return nil
}

// astray keeps the thread, which is in another namespace than its own, for the calling goroutine.
func (b *Beginner) astray() {
	runtime.LockOSThread() // until goHome
	b.mu.Lock()
	defer b.mu.Unlock()
	b.strays[unix.Gettid()] = struct{}{}
	b.lost.Store(int32(len(b.strays)))
}

// goHome brings a thread home that could not go back before.
func (b *Beginner) goHome() error {
	if b.lost.Load() == 0 {
		return nil
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	thread := unix.Gettid()
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.strays[thread]; !ok {
		return nil
	}
	if err := move(b.home); err != nil {
		return err
	}
	runtime.UnlockOSThread() // astray's; there is none where the thread has only the number of one that has ended
	delete(b.strays, thread)
	b.lost.Store(int32(len(b.strays)))
	return nil
}
