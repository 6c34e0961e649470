package hbone

import (
	"io"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/hbone/machine"
	"github.com/fairlead-mesh/fairlead/internal/loop"
	"github.com/fairlead-mesh/fairlead/internal/relay"
	"github.com/fairlead-mesh/fairlead/internal/tlsrecord"
)

// bulkRead is how much one read must have given for the next one to fill several records, in bytes.
const bulkRead = 8 << 10

// bulkReserve is the room in a tunnel's buffer, behind the record in use, that applications which send much leave to those
// that do not and to control frames, in bytes.
const bulkReserve = ctlSize/2 + bulkSpare*recordSize

// loopApp is an application's socket relayed over a stream. It belongs to the loop's goroutine.
type loopApp struct {
	w    *worker
	t    *loopTunnel
	s    *Stream
	fd   int
	done func(relay.Result)

	// application to stream
	readable    bool // there may be bytes: not seen EAGAIN or a short read since the last event
	hup, broken bool // the socket reported an end; an error
	reading     bool // on worker.readApps
	filling     bool // to read when worker.bulk comes to it
	draining    bool // to write from the queue when worker.bulk comes to it
	queued      bool // on worker.bulk
	waitsSpace  bool // on loopTunnel.spaceApps
	waitsWindow bool // on loopTunnel.windowApps
	behind      bool // what was given to Write before the relay is not sent yet
	bulk        bool // the last read gave much
	outEnd      bool // END_STREAM is sent

	// stream to application
	batch [][]byte // DATA inside the read buffer in use
	queue []piece  // DATA that the socket did not take yet
	fed   bool     // on worker.fed
	inEnd bool     // the peer's END_STREAM was seen
	shut  bool     // and passed on

	closed bool
}

// piece is a part of a pinned read buffer, or bytes of its own when r is nil.
type piece struct {
	b []byte
	r *readBuf
}

// attach begins the relay of fd over s.
func (t *loopTunnel) attach(s *Stream, fd int, done func(relay.Result)) {
	a := &loopApp{w: t.w, t: t, s: s, fd: fd, done: done}
	s.mu.Lock()
	for _, b := range s.rq {
		a.queue = append(a.queue, piece{b: b})
	}
	s.rq = nil
	ended := s.rerr
	over := s.over
	s.mu.Unlock()
	s.app = a
	if ended == io.EOF {
		a.inEnd, ended = true, nil
		a.outEnd = over // the peer wants none of this side's bytes
	}
	if over && ended != nil {
		a.finish(ended, true)
		return
	}
	early := s.early
	if early == nil {
		early = &earlyApp{fd: fd}
	}
	s.early = nil
	if err := early.handOver(a); err != nil {
		a.fail(err)
		return
	}
	t.serve(s)
	if a.closed {
		return
	}
	a.readable = true
	t.w.markApp(a)
	if len(a.queue) > 0 {
		a.drain()
	} else {
		a.wrote()
	}
}

// Ready takes the socket's events.
func (a *loopApp) Ready(events uint32) {
	if events&(loop.In|loop.Hangup) != 0 {
		a.readable = true
		a.hup = a.hup || events&loop.Hangup != 0
		if events&unix.EPOLLERR != 0 {
			if a.broken = true; a.outEnd || a.waitsWindow || a.waitsSpace { // no read would tell
				a.failBroken()
				return
			}
		}
		a.w.markApp(a)
	}
	if events&loop.Out != 0 && len(a.queue) > 0 {
		a.draining = true
		a.enqueue()
	}
}

// markApp puts a on the list of those to read in this or a later turn.
func (w *worker) markApp(a *loopApp) {
	if !a.readable || a.reading || a.filling || a.outEnd || a.closed {
		return
	}
	if a.bulk {
		a.filling = true
		a.enqueue()
	} else {
		a.reading = true
		w.readApps = append(w.readApps, a)
	}
}

func (a *loopApp) enqueue() {
	if !a.queued && !a.closed {
		a.queued = true
		a.w.bulk.push(a)
	}
}

// share implements bulkCarrier.
func (a *loopApp) share() (n int) {
	drain, fill := a.draining, a.filling
	a.queued, a.draining, a.filling = false, false, false
	if drain && !a.closed && a.t.err != errFrozen { // a tunnel that has ended leaves streams that were complete
		n += a.drain()
	}
	if fill {
		n += a.read()
	}
	return n
}

// read takes what the application has sent, straight into the tunnel's records, and says how much of it.
func (a *loopApp) read() (total int) {
	t := a.t
	for a.readable && !a.outEnd && !a.closed && !t.dead && !a.behind {
		window, reserve := a.s.window(a.bulk), bulkReserve
		if !a.bulk {
			reserve = ctlSize / 2
		}
		if window == 0 {
			if a.broken {
				a.failBroken()
			} else if !a.waitsWindow {
				a.waitsWindow = true
				t.windowApps = append(t.windowApps, a)
			}
			return total
		}
		if !t.room(reserve) {
			if !t.dead && !a.waitsSpace {
				a.waitsSpace = true
				t.spaceApps = append(t.spaceApps, a)
			}
			return total
		}
		n, want, errno := a.readInto(window)
		switch {
		case errno == syscall.EINTR:
			continue
		case errno == syscall.EAGAIN:
			a.readable = false
			return total
		case errno != 0:
			a.fail(errno)
			return total
		case n == 0:
			a.end()
			return total
		}
		total += n
		a.s.sent.Add(int64(n))
		a.frame(n)
		a.bulk = n >= bulkRead
		if n < want && !a.hup {
			a.readable = false
			return total
		}
		if a.bulk { // one turn for each
			a.w.markApp(a)
			return total
		}
	}
	return total
}

// window is how much may be sent now. One that sends much leaves a part of what all streams have to the others, of which
// each takes a little at once: it may turn out to send much, too.
func (s *Stream) window(bulk bool) int {
	n := s.ms.BulkWindow()
	if !bulk && n < bulkRead {
		n = min(s.ms.Window(), bulkRead)
	}
	return n
}

// readInto reads into the open record and, when the application sends much, into those that will follow it.
func (a *loopApp) readInto(window int) (n, want int, errno syscall.Errno) {
	t := a.t
	first := t.fill + machine.HeaderLen
	want = min(window, t.recordEnd()-first)
	if !a.bulk || first+want < t.recordEnd() {
		n, errno = loop.Read(a.fd, t.buf[first:first+want])
		return n, want, errno
	}
	const most = tlsrecord.MaxPlain - machine.HeaderLen
	iov := a.w.iov[:1]
	iov[0].Base = &t.buf[first]
	iov[0].SetLen(want)
	window = min(window, sendSize) - want
	for at := t.recordEnd() + tlsrecord.TailLen; window > 0 && len(iov) < len(a.w.iov) && len(t.buf)-at >= recordSize+bulkReserve; at += recordSize {
		k := min(window, most)
		iov = iov[:len(iov)+1]
		iov[len(iov)-1].Base = &t.buf[at+tlsrecord.HeaderLen+machine.HeaderLen]
		iov[len(iov)-1].SetLen(k)
		want += k
		window -= k
	}
	n, errno = loop.Readv(a.fd, iov)
	return n, want, errno
}

// frame writes the DATA headers before n bytes that readInto has put in place, and seals the records that are full.
func (a *loopApp) frame(n int) {
	t := a.t
	for {
		k := min(n, t.recordEnd()-t.fill-machine.HeaderLen)
		a.s.ms.DataHeader(t.buf[t.fill:], k, false)
		t.fill += machine.HeaderLen + k
		if n -= k; n == 0 {
			break
		}
		t.seal()
		t.open = true
		t.fill = t.sealed + tlsrecord.HeaderLen
	}
	t.mark()
}

// end passes the application's half close on; the caller has seen to room.
func (a *loopApp) end() {
	t := a.t
	a.outEnd = true
	a.s.halfClosed.Store(true)
	a.s.ms.DataHeader(t.buf[t.fill:], 0, true)
	t.fill += machine.HeaderLen
	t.mark()
	if a.s.ms.Gone() {
		a.s.end(nil)
	}
	a.maybeFinish()
}

// data takes DATA that lies in the read buffer in use.
func (a *loopApp) data(b []byte, end bool) {
	if a.closed {
		return
	}
	if len(b) > 0 {
		a.batch = append(a.batch, b)
	}
	if end {
		a.inEnd = true
		a.s.halfClosed.Store(true)
	}
	a.w.fedApp(a)
}

func (w *worker) fedApp(a *loopApp) {
	if !a.fed {
		a.fed = true
		w.fed = append(w.fed, a)
	}
}

// feedApps writes to each application its share of the read buffer r; what one does not take is queued.
func (w *worker) feedApps(r *readBuf) {
	for i, a := range w.fed {
		w.fed[i] = nil
		a.fed = false
		if a.closed {
			continue
		}
		rest := a.batch
		if len(a.queue) == 0 {
			rest = a.write(rest)
		}
		if a.closed {
			continue
		}
		for _, b := range rest {
			a.keep(b, r)
		}
		clear(a.batch)
		if a.batch = a.batch[:0]; cap(a.batch) > 8 && !a.t.reading { // only bulk receivers keep a long list
			a.batch = nil
		}
		a.wrote()
	}
	w.fed = w.fed[:0]
}

// keep queues b: big parts where they lie, as long as not too many buffers are pinned, small ones copied.
func (a *loopApp) keep(b []byte, r *readBuf) {
	if len(b) >= bulkRead && a.w.pinned < maxPinned {
		r.refs++
		a.queue = append(a.queue, piece{b, r})
		return
	}
	if n := len(a.queue); n > 0 {
		if last := &a.queue[n-1]; last.r == nil && cap(last.b)-len(last.b) >= len(b) {
			last.b = append(last.b, b...)
			return
		}
	}
	a.queue = append(a.queue, piece{b: append(make([]byte, 0, max(256, len(b))), b...)})
}

// write gives bs to the socket and returns what it did not take.
func (a *loopApp) write(bs [][]byte) [][]byte {
	for len(bs) > 0 {
		k := min(len(bs), len(a.w.iov))
		n, want, errno := 0, len(bs[0]), syscall.Errno(0)
		if k == 1 {
			n, errno = loop.Write(a.fd, bs[0])
		} else {
			want = 0
			for i, b := range bs[:k] {
				a.w.iov[i].Base = &b[0]
				a.w.iov[i].SetLen(len(b))
				want += len(b)
			}
			n, errno = loop.Writev(a.fd, a.w.iov[:k])
		}
		if errno == syscall.EINTR {
			continue
		}
		if errno == syscall.EAGAIN {
			return bs
		}
		if errno != 0 {
			a.fail(errno)
			return nil
		}
		a.took(n)
		short := n < want
		for n > 0 && n >= len(bs[0]) {
			n -= len(bs[0])
			bs = bs[1:]
		}
		if n > 0 {
			bs[0] = bs[0][n:]
		}
		if short {
			return bs
		}
	}
	return nil
}

// took counts n bytes that the socket has taken and gives the peer credit for them.
func (a *loopApp) took(n int) {
	a.s.received.Add(int64(n))
	a.s.ms.Consumed(n)
	if len(a.t.m.Output()) > 0 {
		a.t.mark()
	}
}

// drain writes a share of the queue and says how much of it.
func (a *loopApp) drain() (total int) {
	for len(a.queue) > 0 {
		if total >= bulkTurn {
			a.draining = true
			a.enqueue()
			return total
		}
		k := min(len(a.queue), len(a.w.iov))
		want := 0
		for i, p := range a.queue[:k] {
			a.w.iov[i].Base = &p.b[0]
			a.w.iov[i].SetLen(len(p.b))
			want += len(p.b)
		}
		n, errno := loop.Writev(a.fd, a.w.iov[:k])
		if errno == syscall.EINTR {
			continue
		}
		if errno == syscall.EAGAIN {
			return total
		}
		if errno != 0 {
			a.fail(errno)
			return total
		}
		a.took(n)
		total += n
		short := n < want
		gone := 0
		for n > 0 && n >= len(a.queue[gone].b) {
			n -= len(a.queue[gone].b)
			a.w.unpin(a.queue[gone].r)
			gone++
		}
		if n > 0 {
			a.queue[gone].b = a.queue[gone].b[n:]
		}
		rest := copy(a.queue, a.queue[gone:])
		clear(a.queue[rest:])
		a.queue = a.queue[:rest]
		if short {
			return total
		}
	}
	a.queue = nil
	a.wrote()
	return total
}

// wrote passes the peer's half close on when all before it is written.
func (a *loopApp) wrote() {
	if a.inEnd && !a.shut && len(a.queue) == 0 {
		a.shut = true
		if !a.outEnd { // else the close that follows says it
			loop.ShutdownWrite(a.fd)
		}
	}
	a.maybeFinish()
}

func (a *loopApp) maybeFinish() {
	if a.outEnd && a.shut {
		a.finish(nil, false)
	}
}

// fail ends the relay because of the application's socket: the stream is reset.
func (a *loopApp) fail(err error) {
	if a.closed {
		return
	}
	a.s.ms.Reset(machine.CodeCancel) // on a stream that has ended already it only gives the window back
	a.t.mark()
	a.s.end(&ResetError{Code: machine.CodeCancel})
	a.finish(err, true)
}

// failBroken ends the relay with the error that the socket holds.
func (a *loopApp) failBroken() {
	errno := loop.SocketError(a.fd)
	if errno == 0 {
		errno = syscall.ECONNRESET
	}
	a.fail(errno)
}

// finish closes the socket, with a TCP reset if so said, and reports.
func (a *loopApp) finish(err error, reset bool) {
	if a.closed {
		return
	}
	a.closed = true
	for _, p := range a.queue {
		a.w.unpin(p.r)
	}
	a.queue, a.batch = nil, nil
	if reset {
		loop.LingerZero(a.fd)
	}
	a.w.loop.Close(a.fd)
	if cause := a.s.abortCause(); cause != nil && err != nil {
		err = cause
	}
	res := relay.Result{Err: err, Reset: reset}
	res.Sent, res.Received = a.s.Counters()
	a.done(res)
}
