package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/net/http2/hpack"

	"github.com/fairlead-mesh/fairlead/internal/hbone/machine"
	"github.com/fairlead-mesh/fairlead/internal/loop"
	"github.com/fairlead-mesh/fairlead/internal/relay"
)

// outChunk is how much the writer collects for one write, in bytes.
const outChunk = 256 << 10

// maxHeaderList is the largest header list taken from a peer, in bytes. Baggage is the biggest part of a CONNECT.
const maxHeaderList = 32 << 10

// Goroutines is the driver over any net.Conn: per tunnel a goroutine that reads and one that writes, crypto/tls's own
// records, and two goroutines per relay. The waypoint, FIPS mode and tests use it.
func Goroutines() Driver { return &goroutines{} }

type goroutines struct {
	buffers sync.Pool // *[]byte of appRead bytes
}

func (d *goroutines) start(ctx context.Context, nc net.Conn, cfg *tls.Config, tc tunnelConfig) (tunnel, error) {
	tlsConn := tls.Client(nc, cfg)
	if tc.server {
		tlsConn = tls.Server(nc, cfg)
	}
	if err := tlsConn.HandshakeContext(ctx); err != nil {
		nc.Close()
		return nil, &TLSError{Err: err}
	}
	state := tlsConn.ConnectionState()
	if err := checkState(&state); err != nil {
		nc.Close()
		return nil, &TLSError{Err: err}
	}
	return newGoTunnel(d, tlsConn, &connInfo{local: nc.LocalAddr(), remote: nc.RemoteAddr(), tls: &state}, tc), nil
}

// checkState holds what HBONE demands of TLS whatever the caller's configuration allowed.
func checkState(s *tls.ConnectionState) error {
	if s.Version != tls.VersionTLS13 {
		return errors.New("not TLS 1.3")
	}
	if s.NegotiatedProtocol != "h2" {
		return errors.New("the peer does not speak h2")
	}
	return nil
}

func machineConfig(tc *tunnelConfig) machine.Config {
	return machine.Config{Server: tc.server, StreamWindow: streamWindow, ConnWindow: tc.firstWindow(), MaxFrame: maxFrame,
		MaxHeaderList: maxHeaderList, MaxStreams: tc.maxStreams}
}

// goTunnel is one tunnel of the goroutine driver. Lock order: mu, then the pool's or server's lock, then a stream's.
type goTunnel struct {
	d     *goroutines
	nc    net.Conn
	tc    tunnelConfig
	info  *connInfo
	start time.Time

	mu      sync.Mutex
	work    sync.Cond // the writer waits for it
	m       *machine.Conn
	ready   []*Stream // to be pumped
	blocked map[*Stream]struct{}
	life    liveness
	idle    idling
	window  window
	pinger  *time.Timer
	dead    bool
	err     error
}

func newGoTunnel(d *goroutines, nc net.Conn, info *connInfo, tc tunnelConfig) *goTunnel {
	t := &goTunnel{d: d, nc: nc, tc: tc, info: info, start: time.Now(), m: machine.New(machineConfig(&tc)),
		blocked: map[*Stream]struct{}{}, window: newWindow(&tc), idle: idling{after: tc.idle},
		life: liveness{interval: tc.ping, wait: tc.pingWait, heard: time.Now()}}
	t.work.L = &t.mu
	if tc.ping > 0 {
		t.mu.Lock() // the timer may fire before the assignment
		t.pinger = time.AfterFunc(tc.ping, t.checkAlive)
		t.mu.Unlock()
	}
	go t.write()
	go t.read()
	return t
}

func (t *goTunnel) newStream() *Stream          { return newStream(t, t.info) }
func (t *goTunnel) state() *tls.ConnectionState { return t.info.tls }

func (t *goTunnel) connect(s *Stream, req *Request) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.dead {
		s.end(&TunnelError{Err: t.err})
		return
	}
	if s.givenUp() {
		return
	}
	ms, err := t.m.Connect(req.Authority, req.Header)
	switch {
	case errors.Is(err, machine.ErrFull):
		s.end(errTunnelFull)
	case errors.Is(err, machine.ErrDraining):
		s.end(errTunnelDraining)
	case err != nil:
		s.end(&TunnelError{Err: err})
	default:
		s.ms = ms
		ms.User = s
		t.work.Signal()
	}
}

func (t *goTunnel) poke(s *Stream) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.queue(s)
}

// queue puts s on the writer's list. mu is held.
func (t *goTunnel) queue(s *Stream) {
	if s.ms == nil || t.dead {
		if s.ms == nil {
			s.end(&ResetError{Code: machine.CodeCancel})
		}
		return
	}
	if !s.queued {
		s.queued = true
		t.ready = append(t.ready, s)
		t.work.Signal()
	}
}

func (t *goTunnel) drain() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.m.GoAway()
	t.work.Signal()
}

func (t *goTunnel) close(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.fail(err)
}

// fail ends the tunnel and its streams; err nil is a quiet end. mu is held.
func (t *goTunnel) fail(err error) {
	if t.dead {
		return
	}
	t.dead, t.err = true, err
	if t.pinger != nil {
		t.pinger.Stop()
	}
	lost := err
	if lost == nil {
		lost = io.EOF
	}
	t.m.Each(func(ms *machine.Stream) { ms.User.(*Stream).end(&TunnelError{Err: lost}) })
	t.ready, t.blocked = nil, nil
	t.window.close()
	t.work.Broadcast()
	t.tc.events.draining()
	last := t.takeOutput(nil)
	go func() { // which may wait for a peer that does not read
		sayFarewell(t.nc, last)
		t.tc.events.ended(err)
	}()
}

// checkAlive asks a silent peer for a sign of life, and gives up on one that gave none.
func (t *goTunnel) checkAlive() {
	t.mu.Lock()
	defer t.mu.Unlock()
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
		t.work.Signal()
	}
	if ask {
		t.m.Ping()
		t.work.Signal()
	}
	t.pinger.Reset(min(next, t.tc.ping))
}

// write sends what the machine and the streams have, in one write at a time.
func (t *goTunnel) write() {
	var out []byte
	t.mu.Lock()
	defer t.mu.Unlock()
	for {
		out = t.gather(out[:0])
		if t.dead {
			return
		}
		if len(out) == 0 {
			if t.m.Draining() && t.m.Streams() == 0 {
				t.fail(nil)
				return
			}
			if cap(out) > 16<<10 {
				out = nil // an idle tunnel keeps no big buffer
			}
			t.work.Wait()
			continue
		}
		t.life.stuck = time.Now()
		t.mu.Unlock()
		_, err := t.nc.Write(out)
		t.mu.Lock()
		t.life.stuck = time.Time{}
		if err != nil {
			t.fail(err)
			return
		}
	}
}

// gather collects the next write. mu is held.
func (t *goTunnel) gather(out []byte) []byte {
	out = t.takeOutput(out)
	list := t.ready
	t.ready = nil
	for i, s := range list {
		if len(out) >= outChunk {
			t.ready = append(t.ready, list[i:]...)
			break
		}
		s.queued = false
		if code, cut := s.takeCut(); cut {
			s.ms.Reset(code)
			s.end(&ResetError{Code: code})
			continue
		}
		var more bool
		if out, more = s.pump(out, outChunk-len(out)); more {
			t.queue(s)
		} else if s.blocked {
			t.blocked[s] = struct{}{}
		}
	}
	return t.takeOutput(out)
}

func (t *goTunnel) takeOutput(out []byte) []byte {
	b := t.m.Output()
	out = append(out, b...)
	t.m.Flushed(len(b))
	return out
}

// read feeds the machine until the connection ends.
func (t *goTunnel) read() {
	buf := make([]byte, 32<<10)
	for {
		n, err := t.nc.Read(buf)
		t.mu.Lock()
		if t.dead {
			t.mu.Unlock()
			return
		}
		t.life.heard = time.Now()
		t.m.Advance(t.life.heard.Sub(t.start))
		ferr := t.feed(buf[:n])
		if more := t.window.got(n); more > 0 {
			t.m.Grow(more)
		}
		t.info.collect(t.m)
		if ferr != nil {
			t.fail(ferr)
		} else if err != nil {
			if err == io.EOF && t.m.Streams() == 0 {
				err = nil
			}
			t.fail(err)
		}
		t.work.Signal()
		t.mu.Unlock()
	}
}

// feed runs the machine over b and acts on its events. mu is held.
func (t *goTunnel) feed(b []byte) error {
	for {
		ev, n, err := t.m.Next(b)
		if err != nil {
			return err
		}
		b = b[n:]
		if ev.Kind == machine.None {
			return nil
		}
		t.act(&ev)
	}
}

func (t *goTunnel) act(ev *machine.Event) {
	var s *Stream
	if ev.Stream != nil {
		s, _ = ev.Stream.User.(*Stream)
	}
	switch ev.Kind {
	case machine.Request:
		s = t.newStream()
		s.ms = ev.Stream
		ev.Stream.User = s
		if ev.End {
			s.deliver(nil, true)
		}
		t.tc.events.incoming(newIncoming(s, t, ev))
	case machine.Answer:
		s.answered(ev.Status, ev.Header)
		if ev.End {
			s.deliver(nil, true)
		}
		t.queue(s)
	case machine.Data:
		if !s.deliver(ev.Data, ev.End) {
			ev.Stream.Reset(machine.CodeCancel)
			s.end(&ResetError{Code: machine.CodeCancel})
		} else if ev.Stream.Gone() {
			s.end(nil)
		}
	case machine.Reset:
		if s.complete(ev.Code) {
			s.end(nil)
			return
		}
		s.end(resetBy(ev.Code))
	case machine.Writable:
		t.unblock(s)
	case machine.Settings:
		t.tc.events.limit(t.m.PeerMaxStreams())
	case machine.GoAway:
		t.tc.events.draining()
	}
}

// resetBy is the error of a stream that the peer reset.
func resetBy(code uint32) error {
	if code == machine.CodeRefusedStream {
		return errRefused
	}
	return &ResetError{Code: code, Remote: true}
}

// unblock pumps s again, or all streams when s is nil. mu is held.
func (t *goTunnel) unblock(s *Stream) {
	if s != nil {
		if _, ok := t.blocked[s]; ok {
			delete(t.blocked, s)
			t.queue(s)
		}
		return
	}
	for s := range t.blocked {
		delete(t.blocked, s)
		t.queue(s)
	}
}

// answer is Incoming's answer.
func (t *goTunnel) answer(s *Stream, status int, h []hpack.HeaderField, end bool) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.dead {
		return &TunnelError{Err: t.err}
	}
	if s.ms.Gone() {
		return &ResetError{Code: machine.CodeCancel, Remote: true}
	}
	s.answered(status, h)
	s.ms.Answer(status, h, end)
	if end {
		s.end(&ResetError{Code: machine.CodeNo})
	}
	t.work.Signal()
	return nil
}

// answerer is the driver's part of Incoming.
type answerer interface {
	answer(s *Stream, status int, h []hpack.HeaderField, end bool) error
}

func newIncoming(s *Stream, a answerer, ev *machine.Event) *Incoming {
	in := &Incoming{Request: Request{Authority: ev.Authority, Header: ev.Header}, Peer: s.conn.tls,
		LocalAddr: addrPort(s.conn.local), RemoteAddr: addrPort(s.conn.remote), s: s, answer: a.answer}
	_, in.onLoop = a.(*loopTunnel)
	return in
}

// addrPort is zero for what is not a TCP address.
func addrPort(a net.Addr) netip.AddrPort {
	if t, ok := a.(*net.TCPAddr); ok {
		ap := t.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return netip.AddrPort{}
}

func (t *goTunnel) relay(s *Stream, app *net.TCPConn, done func(relay.Result)) {
	relayStream(s, app, &t.d.buffers, done)
}

func (t *goTunnel) relayFD(s *Stream, fd int, done func(relay.Result)) {
	app, err := loop.Attach(fd)
	if err != nil {
		s.Abort(err)
		done(relay.Result{Err: err, Reset: true})
		return
	}
	t.relay(s, app, done)
}
