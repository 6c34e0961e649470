package hbone

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/net/http2/hpack"

	"github.com/fairlead-mesh/fairlead/internal/hbone/machine"
	"github.com/fairlead-mesh/fairlead/internal/loop"
	"github.com/fairlead-mesh/fairlead/internal/relay"
	"github.com/fairlead-mesh/fairlead/internal/tlsrecord"
)

// loopTunnel is one tunnel of the loop driver. All but the fields after pokeMu belong to the loop's goroutine.
type loopTunnel struct {
	w    *worker
	fd   int
	tc   tunnelConfig
	info *connInfo
	rec  *tlsrecord.Conn
	m    *machine.Conn

	tail    []byte // an incomplete record
	reading bool   // on worker.readTunnels or worker.bulk
	bulk    bool   // the last read gave much
	hup     bool   // the socket reported an end: a short read no longer means that it is drained

	// Output: buf[sent:sealed] are records on their way, buf[sealed:] is a record that is being filled up to fill when open.
	buf                []byte
	written            int64 // bytes that the socket has taken
	sent, sealed, fill int
	open               bool
	full               bool // the socket takes no more until it says so
	dirty              bool // on worker.dirty

	spaceApps    []*loopApp // wait for room in buf
	spaceStreams []*Stream
	windowApps   []*loopApp // wait for a window
	blocked      map[*Stream]struct{}

	life   liveness
	idle   idling
	window window
	pace   pace
	timer  *time.Timer
	dead   bool // it does nothing any more: ended, or standing still for another process (errFrozen)
	err    error
	cut    error // the end that was asked for while it stood still

	keeping bool // new CONNECTs are kept, because the tunnel is about to be handed over
	kept    []waiting

	pokeMu   sync.Mutex
	poked    []*Stream
	onPoke   func() // t.servePoked, made once
	timerSet bool
}

func newLoopTunnel(w *worker, fd int, rec *tlsrecord.Conn, info *connInfo, tc tunnelConfig) *loopTunnel {
	t := &loopTunnel{w: w, fd: fd, rec: rec, info: info, tc: tc, m: machine.New(machineConfig(&tc)),
		blocked: map[*Stream]struct{}{}, window: newWindow(&tc)}
	t.onPoke = t.servePoked
	return t
}

// register runs first on the loop.
func (t *loopTunnel) register() {
	if err := t.w.loop.Add(t.fd, t); err != nil {
		t.fail(err)
		return
	}
	t.pace = pace{bound: firstUnderWay, since: t.w.now}
	t.m.BoundUnderWay(t.pace.bound)
	t.idle = idling{after: t.tc.idle}
	t.life = liveness{interval: t.tc.ping, wait: t.tc.pingWait, heard: time.Now()}
	if t.tc.ping > 0 {
		t.timer = time.AfterFunc(t.tc.ping, func() { t.w.loop.Post(t.checkAlive) })
	}
	t.markReading()
	t.mark()
}

func (t *loopTunnel) newStream() *Stream          { return newStream(t, t.info) }
func (t *loopTunnel) state() *tls.ConnectionState { return t.info.tls }

func (t *loopTunnel) connect(s *Stream, req *Request) {
	authority, header := req.Authority, req.Header
	t.w.loop.Post(func() {
		if t.dead {
			if t.err == errFrozen {
				s.end(errTunnelDraining)
				return
			}
			s.end(&TunnelError{Err: t.err})
			return
		}
		if s.givenUp() {
			return
		}
		ms, err := t.m.Connect(authority, header)
		switch {
		case errors.Is(err, machine.ErrFull):
			s.end(errTunnelFull)
		case errors.Is(err, machine.ErrDraining):
			s.end(errTunnelDraining)
		case err != nil:
			s.end(&TunnelError{Err: err})
		default:
			s.ms, ms.User = ms, s
			if s.early != nil {
				s.early.begin()
			}
			t.mark()
		}
	})
}

// answer is Incoming's answer.
func (t *loopTunnel) answer(s *Stream, status int, h []hpack.HeaderField, end bool) error {
	s.mu.Lock()
	over := s.over
	s.mu.Unlock()
	if over {
		return &ResetError{Code: machine.CodeCancel, Remote: true}
	}
	t.w.loop.Post(func() {
		if t.dead || s.ms.Gone() {
			return
		}
		s.ms.Answer(status, h, end)
		s.answered(status, h)
		if end {
			s.end(&ResetError{Code: machine.CodeNo})
		}
		t.serve(s) // what was written meanwhile waited for the answer
	})
	return nil
}

func (t *loopTunnel) drain() {
	t.w.loop.Post(func() {
		t.m.GoAway()
		t.mark()
	})
}

func (t *loopTunnel) close(err error) { t.w.loop.Post(func() { t.fail(err) }) }

// relay hands app to the loop.
func (t *loopTunnel) relay(s *Stream, app *net.TCPConn, done func(relay.Result)) {
	fd, err := loop.Detach(app)
	if err != nil {
		resetApp(app)
		s.Abort(err)
		done(relay.Result{Err: err, Reset: true})
		return
	}
	t.relayFD(s, fd, done)
}

func (t *loopTunnel) relayFD(s *Stream, fd int, done func(relay.Result)) {
	t.w.loop.Post(func() { t.attach(s, fd, done) })
}

// poke asks the loop to look at s.
func (t *loopTunnel) poke(s *Stream) {
	t.pokeMu.Lock()
	if s.queued {
		t.pokeMu.Unlock()
		return
	}
	s.queued = true
	t.poked = append(t.poked, s)
	first := len(t.poked) == 1
	t.pokeMu.Unlock()
	if first {
		t.w.loop.Post(t.onPoke)
	}
}

func (t *loopTunnel) servePoked() {
	t.pokeMu.Lock()
	list := t.poked
	t.poked = nil
	for _, s := range list {
		s.queued = false
	}
	t.pokeMu.Unlock()
	for _, s := range list {
		t.serve(s)
	}
}

// serve does what a stream wants.
func (t *loopTunnel) serve(s *Stream) {
	switch {
	case s.ms == nil: // its CONNECT is still on the way here, and looks itself whether it was given up
	case t.dead:
	default:
		if code, cut := s.takeCut(); cut {
			s.ms.Reset(code)
			t.endStream(s, &ResetError{Code: code})
		} else {
			t.pump(s)
		}
	}
	t.mark()
}

// pump puts what was given to Write into records.
func (t *loopTunnel) pump(s *Stream) {
	behind := false
	for more := true; more && !t.dead; {
		if !t.room(ctlSize / 2) {
			t.spaceStreams = append(t.spaceStreams, s)
			behind = true
			break
		}
		var out []byte
		out, more = s.pump(t.buf[t.fill:t.fill:t.recordEnd()], t.recordEnd()-t.fill)
		t.fill += len(out)
		if more {
			t.seal()
		}
	}
	if s.blocked && !t.dead {
		t.blocked[s] = struct{}{}
		behind = true
	}
	if s.app != nil {
		s.app.behind = behind
		t.w.markApp(s.app)
	}
}

// endStream ends s and its application socket with a reset.
func (t *loopTunnel) endStream(s *Stream, err error) {
	s.end(err)
	if s.app != nil {
		s.app.finish(err, true)
	}
}

// Ready takes the socket's events.
func (t *loopTunnel) Ready(events uint32) {
	if events&(loop.In|loop.Hangup) != 0 {
		t.hup = t.hup || events&loop.Hangup != 0
		t.markReading()
	}
	if events&loop.Out != 0 && t.full {
		t.full, t.life.stuck = false, time.Time{}
		t.mark()
	}
}

func (t *loopTunnel) markReading() {
	if !t.reading && !t.dead {
		t.reading = true
		if t.bulk {
			t.w.bulk.push(t)
		} else {
			t.w.readTunnels = append(t.w.readTunnels, t)
		}
	}
}

// share implements bulkCarrier.
func (t *loopTunnel) share() int {
	t.reading = false
	return t.read()
}

// read takes one buffer full from the socket, opens its records and passes on what is in them; it says how much it took.
func (t *loopTunnel) read() int {
	if t.dead {
		return 0
	}
	r := t.w.buffer()
	kept := copy(r.b, t.tail)
	into := r.b[kept:min(len(r.b), kept+readSize)]
	n, errno := loop.Read(t.fd, into)
	t.bulk = n >= fullRead
	switch {
	case errno == syscall.EAGAIN:
		if !t.wholeRecord() {
			return 0
		}
	case errno == syscall.EINTR:
		t.markReading()
		return 0
	case errno != 0:
		t.fail(errno)
		return 0
	case n == 0:
		t.lost(io.EOF)
		return 0
	case n == len(into) || t.hup:
		t.markReading()
	}
	t.life.heard = t.w.start.Add(t.w.now)
	t.m.Advance(t.w.now)
	rest, err := t.records(r.b[:kept+n])
	if !t.dead {
		t.adapt(n)
		t.info.collect(t.m)
	}
	t.w.feedApps(r)
	t.tail = append(t.tail[:0], rest...)
	if len(rest) == 0 {
		t.tail = nil
	}
	t.w.retire()
	t.mark()
	if err != nil {
		t.lost(err)
	}
	return n
}

// wholeRecord says that tail holds a record already: what was read ahead during the handshake.
func (t *loopTunnel) wholeRecord() bool {
	n, err := t.rec.Length(t.tail)
	return err != nil || n > 0 && len(t.tail) >= n
}

// records opens the whole records in b and returns the rest.
func (t *loopTunnel) records(b []byte) (rest []byte, err error) {
	for !t.dead {
		n, err := t.rec.Length(b)
		if err != nil {
			return nil, err
		}
		if n == 0 || len(b) < n {
			return b, nil
		}
		p, err := t.rec.Open(b[:n])
		if err != nil {
			return nil, err
		}
		if err := t.frames(p); err != nil {
			return nil, err
		}
		b = b[n:]
	}
	return nil, nil
}

// frames runs the machine over p.
func (t *loopTunnel) frames(p []byte) error {
	for !t.dead {
		ev, n, err := t.m.Next(p)
		if err != nil {
			return err
		}
		p = p[n:]
		if ev.Kind == machine.None {
			return nil
		}
		t.act(&ev)
	}
	return nil
}

func (t *loopTunnel) act(ev *machine.Event) {
	var s *Stream
	if ev.Stream != nil {
		s, _ = ev.Stream.User.(*Stream)
	}
	switch ev.Kind {
	case machine.Data:
		if s.app != nil {
			s.app.data(ev.Data, ev.End)
		} else if !s.deliver(ev.Data, ev.End) {
			ev.Stream.Reset(machine.CodeCancel)
			s.end(&ResetError{Code: machine.CodeCancel})
			return
		}
		if ev.Stream.Gone() {
			s.end(nil)
		}
	case machine.Writable:
		t.writable(s)
	case machine.Request:
		s = t.newStream()
		s.ms, ev.Stream.User = ev.Stream, s
		if ev.End {
			s.deliver(nil, true)
		}
		if t.keeping {
			t.kept = append(t.kept, waiting{s, *ev})
			return
		}
		t.tc.events.incoming(newIncoming(s, t, ev))
	case machine.Answer:
		s.answered(ev.Status, ev.Header)
		if ev.End {
			s.deliver(nil, true)
		}
	case machine.Reset:
		t.peerReset(s, ev.Code)
	case machine.Settings:
		t.tc.events.limit(t.m.PeerMaxStreams())
	case machine.GoAway:
		t.tc.events.draining()
	}
}

// peerReset ends s as the peer wants. NO_ERROR after the peer's own end only says that it wants no more of ours.
func (t *loopTunnel) peerReset(s *Stream, code uint32) {
	if a := s.app; a != nil && code == machine.CodeNo && a.inEnd {
		s.end(nil)
		a.outEnd = true
		t.w.fedApp(a)
		return
	}
	if s.app == nil && s.complete(code) {
		s.end(nil)
		return
	}
	t.endStream(s, resetBy(code))
}

// writable goes on with s, or with all that wait for the connection's window.
func (t *loopTunnel) writable(s *Stream) {
	if s != nil {
		if s.blocked {
			delete(t.blocked, s)
			t.pump(s)
		} else if s.app != nil {
			t.w.markApp(s.app)
		}
		return
	}
	apps := t.windowApps
	t.windowApps = nil
	for _, a := range apps {
		a.waitsWindow = false
		t.w.markApp(a)
	}
	for s := range t.blocked {
		delete(t.blocked, s)
		t.pump(s)
		if !t.m.Open() {
			break
		}
	}
}

// checkAlive asks a silent peer for a sign of life, and gives up on one that gave none.
func (t *loopTunnel) checkAlive() {
	if t.dead {
		return
	}
	now := time.Now()
	ask, dead, next := t.life.check(now)
	if dead != nil {
		t.fail(dead)
		return
	}
	if t.idle.over(now, t.m.Streams(), t.m.Newest()) {
		t.m.GoAway() // and with that sent the tunnel ends
		t.mark()
	}
	if ask {
		t.m.Ping()
		t.mark()
	}
	t.timer.Reset(min(next, t.tc.ping))
}
