package hbone

import (
	"errors"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/hbone/machine"
	"github.com/fairlead-mesh/fairlead/internal/loop"
)

// earlyApp is the application's socket of a stream whose CONNECT is not answered. The first that the application sends,
// up to one record, goes behind the CONNECT, so that a connection costs no round trip of its own. It stays in the socket
// until the answer is 2xx: what the peer has not looked at can be sent again on another tunnel, and a refusal finds the
// socket as if nothing had been read. The bytes reach only the authenticated peer proxy, which drops them when it
// refuses. All but the first three fields belong to the loop's goroutine.
type earlyApp struct {
	t  *loopTunnel
	s  *Stream
	fd int

	started bool   // the loop has fd
	events  uint32 // that tell of an end
	sent    int
	at      int64 // loopTunnel.written before what was sent
}

// begin sends what is there, or else waits for it. Sending may find that the tunnel is lost, and then stop undoes the rest.
func (e *earlyApp) begin() {
	if e.started = e.t.w.loop.Add(e.fd, e) == nil; e.started { // else attach will find the same error
		e.send()
	}
}

// Ready takes the socket's events.
func (e *earlyApp) Ready(events uint32) {
	e.events |= events & loop.Hangup
	if events&loop.In != 0 {
		e.send()
	}
}

// send sends the application's first bytes, once.
func (e *earlyApp) send() {
	t, ms := e.t, e.s.ms
	if e.sent > 0 || t.dead || ms.Window() == 0 || !t.room(ctlSize/2) {
		return
	}
	first := t.fill + machine.HeaderLen
	n, errno := loop.Peek(e.fd, t.buf[first:first+min(e.s.window(false), t.recordEnd()-first)])
	if errno != 0 || n == 0 {
		return
	}
	e.sent, e.at = n, t.written+int64(t.sealed-t.sent)
	ms.DataHeader(t.buf[t.fill:], n, false)
	t.fill += machine.HeaderLen + n
	t.mark()
}

// mayRepeat says that the peer has surely not looked at the stream, which failed with err, and never will. What the other
// end's kernel has acknowledged, an application may have; what it has not may still get there until the connection is over.
func (e *earlyApp) mayRepeat(err error, reused bool) bool {
	var lost *TunnelError
	if e.sent > 0 && errors.As(err, &lost) {
		arrived := e.t.written - int64(loop.Unacknowledged(e.t.fd))
		if arrived > e.at || !loop.Over(e.t.fd) {
			return false
		}
	}
	return mayRepeat(err, reused)
}

// stop leaves the socket as it was.
func (e *earlyApp) stop() {
	if e.started {
		e.started = false
		e.t.w.loop.Remove(e.fd)
	}
}

// handOver gives the socket to a, which goes on behind what was sent early.
func (e *earlyApp) handOver(a *loopApp) error {
	a.hup, a.broken = e.events != 0, e.events&unix.EPOLLERR != 0
	if !e.started {
		if err := a.w.loop.Add(e.fd, a); err != nil {
			return err
		}
	} else {
		a.w.loop.Replace(e.fd, a)
	}
	for e.sent > 0 {
		n, errno := loop.Discard(e.fd, e.sent)
		switch {
		case errno == syscall.EINTR:
			continue
		case errno != 0:
			return errno
		case n == 0:
			return syscall.ECONNRESET // it was there
		}
		a.s.sent.Add(int64(n))
		e.sent -= n
	}
	return nil
}
