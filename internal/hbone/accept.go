package hbone

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/loop"
)

const (
	acceptBatch = 64                    // connections accepted before others have their turn
	acceptPause = 50 * time.Millisecond // after a failure: out of descriptors or memory, others must end first
)

// keepAlive is what accepted sockets inherit from their listener: no small write waits for an acknowledgement, and an end
// that is gone is noticed as Go's own sockets notice it.
var keepAlive = [...][3]int{
	{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
	{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
	{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 15},
	{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 15},
	{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 9},
}

// acceptor is a listener on an event loop.
type acceptor struct {
	w        *worker
	fd       int
	accepted func(int, netip.AddrPort)
	failed   func(error)
	closed   bool
}

// Accept implements Driver.
func (d *LoopDriver) Accept(ln *net.TCPListener, accepted func(int, netip.AddrPort), failed func(error)) (func(), error) {
	fd, err := listenerFD(ln)
	if err != nil {
		return nil, err
	}
	a := &acceptor{w: d.workers[d.next.Add(1)%uint32(len(d.workers))], fd: fd, accepted: accepted, failed: failed}
	added := make(chan error, 1)
	if !a.w.loop.Post(func() { added <- a.w.loop.Add(fd, a) }) {
		added <- ErrClosed
	}
	if err := <-added; err != nil {
		unix.Close(fd)
		return nil, err
	}
	return sync.OnceFunc(func() {
		stopped := make(chan struct{})
		if a.w.loop.Post(func() { a.stop(); close(stopped) }) {
			<-stopped
		}
	}), nil
}

// listenerFD is another descriptor of ln, with what accepted sockets shall inherit.
func listenerFD(ln *net.TCPListener) (fd int, err error) {
	raw, err := ln.SyscallConn()
	if err != nil {
		return -1, err
	}
	controlErr := raw.Control(func(l uintptr) {
		for _, o := range keepAlive {
			if err = unix.SetsockoptInt(int(l), o[0], o[1], o[2]); err != nil {
				return
			}
		}
		fd, err = unix.FcntlInt(l, unix.F_DUPFD_CLOEXEC, 0)
	})
	if controlErr != nil {
		return -1, controlErr
	}
	return fd, err
}

// Ready takes the listener's events.
func (a *acceptor) Ready(uint32) { a.take() }

// take accepts what waits, and goes on in another turn if that is much.
func (a *acceptor) take() {
	for range acceptBatch {
		if a.closed {
			return
		}
		fd, from, errno := loop.Accept(a.fd)
		switch errno {
		case 0:
			a.accepted(fd, from)
		case syscall.EAGAIN:
			return
		case syscall.EINTR, syscall.ECONNABORTED:
		default:
			a.failed(errno)
			time.AfterFunc(acceptPause, func() { a.w.loop.Post(a.take) })
			return
		}
	}
	a.w.loop.Post(a.take)
}

// stop accepts the last and closes this descriptor of the listener.
func (a *acceptor) stop() {
	for !a.closed {
		fd, from, errno := loop.Accept(a.fd)
		if errno == 0 {
			a.accepted(fd, from)
			continue
		}
		a.closed = errno != syscall.EINTR && errno != syscall.ECONNABORTED
	}
	a.w.loop.Close(a.fd)
}

// Accept implements Driver.
func (d *goroutines) Accept(ln *net.TCPListener, accepted func(int, netip.AddrPort), failed func(error)) (func(), error) {
	stopping, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			c, err := ln.AcceptTCP()
			if err != nil {
				select {
				case <-stopping:
					return
				default:
				}
				if errors.Is(err, net.ErrClosed) {
					return
				}
				failed(err)
				time.Sleep(acceptPause)
				continue
			}
			from := addrPort(c.RemoteAddr())
			fd, err := loop.Detach(c)
			if err != nil {
				resetApp(c)
				failed(err)
				continue
			}
			accepted(fd, from)
		}
	}()
	return sync.OnceFunc(func() {
		close(stopping)
		_ = ln.SetDeadline(time.Unix(1, 0)) // fails only on a listener that is closed, which wakes Accept as well
		<-stopped
	}), nil
}
