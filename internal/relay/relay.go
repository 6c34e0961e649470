// Package relay (plumbing) joins two TCP connections inside the kernel until both directions have ended. Half close is
// passed on as half close, a reset as a reset; every live relay can be cut from outside and read for its byte counts.
//
// A connection's road ends here. Next: internal/accesslog/accesslog.go, the line it leaves.
package relay

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

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

// patience is how long a destination may take nothing until the source is asked whether it is still there.
const patience = time.Second

// errCut tells a direction that the other one has ended the relay.
var errCut = errors.New("relay was cut")

// Handle is a live relay between two TCP connections.
type Handle struct {
	a, b     *net.TCPConn
	up, down direction // a to b, b to a
	done     func(Result)

	halfClosed atomic.Bool

	mu       sync.Mutex
	err      error         // of whoever cut the relay first
	frozen   bool          // both directions are to stand still
	finished bool          // it ended before they did
	stopped  chan struct{} // closed when both have ended, or stand still, and nobody asks the sockets any more
}

// direction is one direction of a relay. Its goroutine owns it, or whoever froze the relay.
type direction struct {
	src, dst *net.TCPConn
	count    atomic.Int64
	first    []byte      // to be written before what comes
	pipe     *pipe       // nil until it is needed
	held     int64       // bytes in the pipe
	ended    atomic.Bool // src's end was passed on
}

// Splice relays between a and b with splice(2) and owns both from now on. done is called once, in a goroutine of the
// relay, when both directions have ended; it must not block for long. Sent counts a to b.
func Splice(a, b *net.TCPConn, done func(Result)) *Handle {
	h := newHandle(a, b)
	h.done = done
	h.run()
	return h
}

func newHandle(a, b *net.TCPConn) *Handle {
	h := &Handle{a: a, b: b}
	h.up.src, h.up.dst = a, b
	h.down.src, h.down.dst = b, a
	return h
}

// run carries both directions until they have ended or stand still.
func (h *Handle) run() {
	h.stopped = make(chan struct{})
	var carriers, watchers sync.WaitGroup
	for _, d := range []*direction{&h.down, &h.up} {
		carriers.Add(1)
		watchers.Add(1)
		go func() {
			defer watchers.Done()
			if !d.ended.Load() {
				h.carry(d)
			}
			ended := d.ended.Load()
			carriers.Done()
			if ended {
				h.watch(d.src)
			}
		}()
	}
	go func() {
		defer close(h.stopped)
		carriers.Wait()
		if !h.up.ended.Load() || !h.down.ended.Load() {
			watchers.Wait() // Freeze, or a cut: a reset that one of them has taken from its socket is found nowhere else
		}
		if err, over := h.settle(); over {
			h.finish(err)
		}
	}()
}

// settle says whether the relay, whose directions have stopped, has ended. A cut that comes later finds it finished, or
// frozen.
func (h *Handle) settle() (err error, over bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.finished = h.over(); h.finished && h.err != nil && h.frozen {
		h.reset() // the cut has left it to whoever goes on with the relay, and nobody does
	}
	return h.err, h.finished
}

// over says that the relay has ended. mu is held.
func (h *Handle) over() bool { return h.err != nil || h.up.ended.Load() && h.down.ended.Load() }

func (h *Handle) finish(err error) {
	h.close()
	res := Result{Err: err, Reset: err != nil}
	res.Sent, res.Received = h.Counters()
	h.done(res)
}

func (h *Handle) close() {
	h.a.Close()
	h.b.Close()
	for _, d := range []*direction{&h.up, &h.down} {
		d.pipe.close()
		d.pipe = nil
	}
}

// Abort cuts the relay: both ends see a TCP reset and Result.Err is err. Only the first of several cuts counts.
func (h *Handle) Abort(err error) { h.cut(err) }

// Counters reads the bytes carried so far, a to b and b to a. It may be called at any time.
func (h *Handle) Counters() (sent, received int64) { return h.up.count.Load(), h.down.count.Load() }

// HalfClosed says that one side has ended its direction.
func (h *Handle) HalfClosed() bool { return h.halfClosed.Load() }

// cut closes both connections so that their other ends see a RST.
func (h *Handle) cut(err error) {
	if err == nil {
		err = errCut
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.err != nil {
		return
	}
	if h.err = err; !h.frozen { // a frozen one is cut when it goes on, and not here if that is elsewhere
		h.reset()
	}
}

func (h *Handle) reset() {
	for _, c := range []*net.TCPConn{h.a, h.b} {
		_ = c.SetLinger(0) // fails only on a socket that is closed already
		c.Close()
	}
}

// carry is one direction: it passes src's end on as half close; an error cuts the relay.
func (h *Handle) carry(d *direction) {
	err := h.move(d)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return // Freeze
	}
	if err == nil {
		h.halfClosed.Store(true)
		err = d.dst.CloseWrite()
		if errors.Is(err, syscall.ENOTCONN) { // dst has gone away in both directions already, and that was no error
			err = nil
		}
		d.ended.Store(err == nil)
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

// move splices from d's source to its destination until the source ends.
func (h *Handle) move(d *direction) error {
	if err := h.writeFirst(d); err != nil {
		return err
	}
	in, err := d.src.SyscallConn()
	if err != nil {
		return err
	}
	out, err := d.dst.SyscallConn()
	if err != nil {
		return err
	}
	if d.pipe == nil {
		if d.pipe, err = newPipe(); err != nil {
			return err
		}
	}
	p := d.pipe
	for {
		for d.held > 0 {
			if err := h.writeHeld(d, out); err != nil {
				return err
			}
		}
		n, err := splice(in.Read, func(fd int) (int64, error) {
			n, err := unix.Splice(fd, nil, p.w, nil, pipeSize, unix.SPLICE_F_NONBLOCK)
			if err == unix.EAGAIN || n == 0 && err == nil {
				if mark, _ := unix.IoctlGetInt(fd, unix.SIOCATMARK); mark != 0 {
					return pastUrgent(fd, p.w)
				}
			}
			return n, err
		})
		if err != nil || n == 0 {
			return err
		}
		d.held = n
	}
}

func (h *Handle) writeFirst(d *direction) error {
	for len(d.first) > 0 {
		stall := h.stall(d)
		n, err := d.dst.Write(d.first)
		stall.Stop()
		d.count.Add(int64(n))
		if d.first = d.first[n:]; err != nil {
			return err
		}
	}
	return nil
}

// writeHeld gives the destination what it takes of the pipe, at least a byte.
func (h *Handle) writeHeld(d *direction, out syscall.RawConn) error {
	var stall *time.Timer
	k, err := splice(out.Write, func(fd int) (int64, error) {
		k, err := unix.Splice(d.pipe.r, nil, fd, nil, int(d.held), unix.SPLICE_F_NONBLOCK)
		if err == unix.EAGAIN && stall == nil {
			stall = h.stall(d)
		}
		return k, err
	})
	if stall != nil {
		stall.Stop()
	}
	if err != nil {
		return err
	}
	d.held -= k
	d.count.Add(k)
	return nil
}

// stall is for a destination that takes nothing now. Nobody waits for the source meanwhile, and the other direction,
// which may have nothing to write to it, does not meet its reset either: it is asked from time to time.
func (h *Handle) stall(d *direction) *time.Timer {
	at := d.count.Load()
	return time.AfterFunc(patience, func() {
		if d.count.Load() != at {
			return // it has taken something
		}
		broken, err := failed(d.src)
		switch {
		case err != nil: // the relay has ended here
		case broken:
			h.cut(syscall.ECONNRESET)
		default:
			h.stall(d)
		}
	})
}

// failed says that an error waits in c, and leaves it there: should the cut meet a frozen relay, whoever goes on with it
// finds the error again. A connection that was closed in both directions has none.
func failed(c *net.TCPConn) (bool, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return false, err
	}
	var p [1]unix.PollFd
	err = raw.Control(func(fd uintptr) {
		p[0].Fd = int32(fd)
		_, _ = unix.Poll(p[:], 0) // asks again next time
	})
	return p[0].Revents&unix.POLLERR != 0, err
}

// pipe is what bytes are spliced through.
type pipe struct{ r, w int }

func newPipe() (*pipe, error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		return nil, fmt.Errorf("make pipe: %w", err)
	}
	// A smaller pipe than asked for (a limit of the user's) only costs more calls.
	_, _ = unix.FcntlInt(uintptr(p[1]), unix.F_SETPIPE_SZ, pipeSize)
	return &pipe{p[0], p[1]}, nil
}

func (p *pipe) close() {
	if p != nil {
		unix.Close(p.r)
		unix.Close(p.w)
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
