// Package relay (plumbing) joins two TCP connections inside the kernel until both directions have ended. Half close is
// passed on as half close, a reset as a reset; every live relay can be cut from outside and read for its byte counts.
//
// A connection's road ends here. Next: internal/accesslog/accesslog.go, the line it leaves.
package relay

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// Result is how a relayed connection ended. It is given once, when both directions are done.
type Result struct {
	Sent     int64 // application bytes from the first side (the application, Splice's a) to the second
	Received int64 // application bytes from the second side to the first
	Err      error // nil when both directions ended with an orderly close
	Reset    bool  // one end or the other reset the connection, or it was cut; the other end saw a reset too
}

// pipeSize is what is asked for each direction's pipe, in bytes. Fewer, larger splices cost less.
const pipeSize = 256 << 10

// errCut tells a direction that the other one has ended the relay.
var errCut = errors.New("relay was cut")

// Handle is a live relay between two TCP connections.
type Handle struct {
	a, b           *net.TCPConn
	sent, received atomic.Int64
	halfClosed     atomic.Bool

	mu  sync.Mutex
	err error // of whoever cut the relay first
}

// Splice relays between a and b with splice(2) and owns both from now on. done is called once, in a goroutine of the
// relay, when both directions have ended; it must not block for long. Sent counts a to b.
func Splice(a, b *net.TCPConn, done func(Result)) *Handle {
	h := &Handle{a: a, b: b}
	var wg sync.WaitGroup
	wg.Add(2)
	direction := func(dst, src *net.TCPConn, count *atomic.Int64) {
		h.carry(dst, src, count)
		wg.Done()
		h.watch(src)
	}
	go direction(b, a, &h.sent)
	go direction(a, b, &h.received)
	go func() {
		wg.Wait()
		a.Close()
		b.Close()
		h.mu.Lock()
		res := Result{Err: h.err, Reset: h.err != nil}
		h.mu.Unlock()
		res.Sent, res.Received = h.Counters()
		done(res)
	}()
	return h
}

// Abort cuts the relay: both ends see a TCP reset and Result.Err is err. Only the first of several cuts counts.
func (h *Handle) Abort(err error) { h.cut(err) }

// Counters reads the bytes carried so far, a to b and b to a. It may be called at any time.
func (h *Handle) Counters() (sent, received int64) { return h.sent.Load(), h.received.Load() }

// HalfClosed says that one side has ended its direction.
func (h *Handle) HalfClosed() bool { return h.halfClosed.Load() }

// cut closes both connections so that their other ends see a RST.
func (h *Handle) cut(err error) {
	if err == nil {
		err = errCut
	}
	h.mu.Lock()
	first := h.err == nil
	if first {
		h.err = err
	}
	h.mu.Unlock()
	if !first {
		return
	}
	for _, c := range []*net.TCPConn{h.a, h.b} {
		_ = c.SetLinger(0) // fails only on a socket that is closed already
		c.Close()
	}
}

// carry is one direction: it passes src's end on as half close; an error cuts the relay.
func (h *Handle) carry(dst, src *net.TCPConn, count *atomic.Int64) {
	err := move(dst, src, count)
	if err == nil {
		h.halfClosed.Store(true)
		err = dst.CloseWrite()
		if errors.Is(err, syscall.ENOTCONN) { // dst has gone away in both directions already, and that was no error
			err = nil
		}
	}
	if err != nil {
		h.cut(err)
	}
}

// watch cuts the relay when src, which has ended its direction, is reset: nobody reads from it any more, and its writer
// would hear of it only at the write after next. It returns when the relay has closed src.
func (h *Handle) watch(src *net.TCPConn) {
	raw, err := src.SyscallConn()
	if err != nil {
		return
	}
	var errno int
	var asked error
	err = raw.Read(func(fd uintptr) bool {
		errno, asked = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		return errno != 0 || asked != nil
	})
	if err == nil && asked == nil { // else src has been closed, which is how it usually ends
		h.cut(syscall.Errno(errno))
	}
}

// move splices from src to dst until src ends.
func move(dst, src *net.TCPConn, count *atomic.Int64) error {
	in, err := src.SyscallConn()
	if err != nil {
		return err
	}
	out, err := dst.SyscallConn()
	if err != nil {
		return err
	}
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		return fmt.Errorf("make pipe: %w", err)
	}
	defer unix.Close(p[0])
	defer unix.Close(p[1])
	// A smaller pipe than asked for (a limit of the user's) only costs more calls.
	_, _ = unix.FcntlInt(uintptr(p[1]), unix.F_SETPIPE_SZ, pipeSize)
	for {
		n, err := splice(in.Read, func(fd int) (int64, error) {
			n, err := unix.Splice(fd, nil, p[1], nil, pipeSize, unix.SPLICE_F_NONBLOCK)
			if err == unix.EAGAIN || n == 0 && err == nil {
				if mark, _ := unix.IoctlGetInt(fd, unix.SIOCATMARK); mark != 0 {
					return pastUrgent(fd, p[1])
				}
			}
			return n, err
		})
		if err != nil || n == 0 {
			return err
		}
		for n > 0 {
			k, err := splice(out.Write, func(fd int) (int64, error) { return unix.Splice(p[0], nil, fd, nil, int(n), unix.SPLICE_F_NONBLOCK) })
			if err != nil {
				return err
			}
			n -= k
			count.Add(k)
		}
	}
}

// pastUrgent moves the urgent byte that fd is at (RFC 6093) into the pipe: splice sees nothing there, or the end, while
// bytes wait behind it.
func pastUrgent(fd, pipe int) (int64, error) {
	var b [1]byte
	n, err := unix.Read(fd, b[:])
	if err != nil || n == 0 {
		return int64(n), err
	}
	n, err = unix.Write(pipe, b[:n])
	return int64(n), err
}

// splice calls f when wait finds the socket ready, until f gives something else than "not now".
func splice(wait func(func(fd uintptr) bool) error, f func(fd int) (int64, error)) (n int64, err error) {
	waitErr := wait(func(fd uintptr) bool {
		for {
			if n, err = f(int(fd)); err != unix.EINTR {
				return err != unix.EAGAIN
			}
		}
	})
	if waitErr != nil {
		return 0, waitErr
	}
	return n, err
}
