package hbone

// The way out, in steps:
//  1. Open finds a tunnel of the key with room for one more stream, or waits for the one handshake that is under way,
//     or starts it.
//  2. The tunnel's driver sends the CONNECT.
//  3. Open returns with the peer's answer: a Stream on 2xx, a *StatusError otherwise.
// A stream that the peer surely has not looked at (GOAWAY, refused, tunnel lost before the answer) is tried once more.
// Next: internal/hbone/server.go, on the other node.

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"
)

// PoolConfig is what a Pool needs. The zero value of each field means the default named.
type PoolConfig struct {
	Driver              Driver        // Goroutines()
	Log                 *zap.Logger   // no log
	MaxStreamsPerTunnel int           // 100; the peer's own limit is kept as well
	HandshakeTimeout    time.Duration // 10 s, for dial and TLS handshake together
	IdleTimeout         time.Duration // 5 min; a tunnel without streams is closed after it
	PingInterval        time.Duration // 30 s; a tunnel that was silent for so long is asked for a sign of life; <0 = never
	PingTimeout         time.Duration // 20 s; how long it has to answer
}

// Pool opens streams and shares tunnels among them. One per process.
type Pool struct {
	cfg PoolConfig

	mu     sync.Mutex
	keys   map[Key]*peer
	live   map[*pooled]struct{}
	empty  chan struct{} // closed and replaced whenever live becomes empty
	closed bool
}

// peer is the tunnels of one key.
type peer struct {
	tunnels []*pooled
	dialing *dialing // the handshake under way that more may wait for; nil when there is none
	dials   int      // handshakes under way
}

// dialing is a handshake under way that several Opens wait for, no more than the tunnel will have room for: a burst of
// connections does not wait for one handshake after the other.
type dialing struct {
	done    chan struct{}
	waiting int
	err     error
}

// pooled is one tunnel of a pool. Its fields are guarded by Pool.mu.
type pooled struct {
	p        *Pool
	key      Key
	t        tunnel
	streams  int
	max      int
	used     bool // has carried a stream
	leaving  bool // takes no new streams
	giving   bool // stands still for another process, or is about to
	idle     *time.Timer
	finished bool
}

var (
	errTunnelFull     = errors.New("the peer's stream limit is reached")
	errTunnelDraining = errors.New("the tunnel takes no new streams")
	errRefused        = errors.New("the peer did not look at the stream")
)

// NewPool makes a pool without tunnels.
func NewPool(cfg PoolConfig) *Pool {
	if cfg.Driver == nil {
		cfg.Driver = Goroutines()
	}
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	cfg.MaxStreamsPerTunnel = orDefault(cfg.MaxStreamsPerTunnel, 100)
	cfg.HandshakeTimeout = orDefault(cfg.HandshakeTimeout, 10*time.Second)
	cfg.IdleTimeout = orDefault(cfg.IdleTimeout, 5*time.Minute)
	cfg.PingInterval = orDefault(cfg.PingInterval, 30*time.Second)
	cfg.PingTimeout = orDefault(cfg.PingTimeout, 20*time.Second)
	return &Pool{cfg: cfg, keys: map[Key]*peer{}, live: map[*pooled]struct{}{}, empty: make(chan struct{})}
}

func orDefault[T int | time.Duration](v, d T) T {
	if v == 0 {
		return d
	}
	return v
}

// Open asks the peer proxy of key for a stream and returns after its 2xx answer. Other outcomes are told apart by
// errors.As: *DialError, *TLSError, *StatusError, *TunnelError, *ResetError; ctx ended gives ctx.Err().
func (p *Pool) Open(ctx context.Context, key Key, dial Dialer, req Request) (*Stream, error) {
	for attempt := 0; ; attempt++ {
		t, reused, err := p.reserve(ctx, key, dial)
		if err != nil {
			return nil, err
		}
		s, err := p.openOn(ctx, t, &req)
		if err == nil {
			return s, nil
		}
		if !mayRepeat(err, reused) || attempt == 3 || ctx.Err() != nil {
			return nil, err
		}
	}
}

// mayRepeat says that the peer has surely not looked at a stream that failed. reused: its tunnel had carried others.
func mayRepeat(err error, reused bool) bool {
	if errors.Is(err, errTunnelFull) || errors.Is(err, errTunnelDraining) || errors.Is(err, errRefused) {
		return true
	}
	var lost *TunnelError
	return errors.As(err, &lost) && reused // an old tunnel may have died unseen; a fresh one that breaks is news
}

// Start is Open for a caller that does not wait: opened is called once, with what Open would have returned. Where a tunnel
// of an event loop stands with room for a stream no goroutine has a part in it, and opened is called on the loop; else in a
// goroutine. It must not block. within bounds the whole. app is the socket of the application that the stream is for, as
// RelayFD takes it, or -1: on a tunnel that stands, the first that it sends goes with the request. It stays the caller's,
// but must not be read before opened is called.
func (p *Pool) Start(ctx context.Context, within time.Duration, key Key, dial Dialer, req Request, app int, opened func(*Stream, error)) {
	wait := func() {
		ctx, cancel := context.WithTimeout(ctx, within)
		defer cancel()
		opened(p.Open(ctx, key, dial, req))
	}
	t, reused := p.standing(key)
	if t == nil {
		go wait()
		return
	}
	s := t.t.newStream()
	early := &earlyApp{t: t.t.(*loopTunnel), s: s, fd: app}
	if app >= 0 {
		s.early = early
	}
	late := time.AfterFunc(within, func() { s.Abort(context.DeadlineExceeded) })
	s.onEnd = t.release
	s.onAnswer = func(status int, err error) {
		late.Stop()
		if err == nil && status/100 == 2 {
			opened(s, nil)
			return
		}
		repeat := err != nil && early.mayRepeat(err, reused)
		early.stop()
		switch {
		case repeat:
			go wait()
		case err != nil:
			opened(nil, err)
		default:
			s.Abort(ErrAborted) // as in openOn
			opened(nil, &StatusError{Code: status, Reason: reasonOf(s.header)})
		}
	}
	t.t.connect(s, &req)
}

// standing takes a stream's slot on a tunnel that stands and belongs to an event loop, or returns nil. The goroutine driver
// calls back with its lock held, which Start's callers cannot know.
func (p *Pool) standing(key Key) (t *pooled, reused bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e := p.keys[key]
	if e == nil || p.closed {
		return nil, false
	}
	if t = e.pick(); t == nil {
		return nil, false
	}
	if _, ok := t.t.(*loopTunnel); !ok {
		return nil, false
	}
	return t, t.take()
}

// take takes a stream's slot; reused says that the tunnel has carried streams before. Pool.mu is held.
func (t *pooled) take() (reused bool) {
	reused, t.used = t.used, true
	t.streams++
	if t.idle != nil {
		t.idle.Stop()
		t.idle = nil
	}
	return reused
}

// openOn sends the CONNECT on a tunnel with a reserved slot and waits for the answer.
func (p *Pool) openOn(ctx context.Context, t *pooled, req *Request) (*Stream, error) {
	s := t.t.newStream()
	s.onEnd = t.release
	t.t.connect(s, req)
	stop := context.AfterFunc(ctx, func() { s.Abort(ctx.Err()) })
	defer stop()
	status, err := s.awaitAnswer()
	if err != nil {
		return nil, err
	}
	if status/100 != 2 {
		s.Abort(ErrAborted) // a refusal usually ends the stream itself; a peer that leaves it open must not keep it
		return nil, &StatusError{Code: status, Reason: reasonOf(s.header)}
	}
	if !stop() && ctx.Err() != nil {
		s.Abort(ctx.Err())
		return nil, ctx.Err()
	}
	return s, nil
}

// reserve returns a tunnel with one stream slot taken; reused says that it has carried streams before.
func (p *Pool) reserve(ctx context.Context, key Key, dial Dialer) (t *pooled, reused bool, err error) {
	for {
		p.mu.Lock()
		if p.closed {
			p.mu.Unlock()
			return nil, false, ErrClosed
		}
		e := p.keys[key]
		if e == nil {
			e = &peer{}
			p.keys[key] = e
		}
		if t := e.pick(); t != nil {
			reused = t.take()
			p.mu.Unlock()
			return t, reused, nil
		}
		d := e.dialing
		if d == nil {
			d = &dialing{done: make(chan struct{})}
			e.dialing = d
			e.dials++
			go p.dial(context.WithoutCancel(ctx), key, dial, d)
		}
		if d.waiting++; d.waiting == p.cfg.MaxStreamsPerTunnel {
			e.dialing = nil
		}
		p.mu.Unlock()
		select {
		case <-d.done:
			if d.err != nil {
				return nil, false, d.err
			}
		case <-ctx.Done():
			return nil, false, ctx.Err()
		}
	}
}

// pick prefers the fullest tunnel that has room, so that emptier ones run out and are released.
func (e *peer) pick() *pooled {
	var best *pooled
	for _, t := range e.tunnels {
		if !t.leaving && !t.giving && t.streams < t.max && (best == nil || t.streams > best.streams) {
			best = t
		}
	}
	return best
}

// dial makes one tunnel for all that wait for it.
func (p *Pool) dial(ctx context.Context, key Key, dial Dialer, d *dialing) {
	t, err := p.handshake(ctx, key, dial)
	p.mu.Lock()
	e := p.keys[key]
	e.dials--
	if e.dialing == d {
		e.dialing = nil
	}
	switch {
	case err != nil:
		d.err = err
	case p.closed:
		d.err = ErrClosed
	case t.finished:
		d.err = &TunnelError{Err: errors.New("closed by the peer right after the handshake")}
	default:
		e.tunnels = append(e.tunnels, t)
		p.live[t] = struct{}{}
		t.startIdle()
	}
	p.forgetEmpty(key, e)
	p.mu.Unlock()
	if d.err != nil && t != nil {
		t.t.close(d.err)
	}
	close(d.done)
}

func (p *Pool) handshake(ctx context.Context, key Key, dial Dialer) (*pooled, error) {
	ctx, cancel := context.WithTimeout(ctx, p.cfg.HandshakeTimeout)
	defer cancel()
	nc, cfg, err := dial(ctx)
	if err != nil {
		return nil, &DialError{Err: err}
	}
	boundUnread(nc, p.cfg.PingInterval, p.cfg.PingTimeout)
	t := &pooled{p: p, key: key, max: p.cfg.MaxStreamsPerTunnel}
	tun, err := p.cfg.Driver.start(ctx, nc, cfg, tunnelConfig{
		events: t, buffers: key.Buffers, ping: p.cfg.PingInterval, pingWait: p.cfg.PingTimeout})
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	t.t = tun
	p.mu.Unlock()
	return t, nil
}

// forgetEmpty drops a key that has neither tunnels nor a handshake under way. Pool.mu is held.
func (p *Pool) forgetEmpty(key Key, e *peer) {
	if len(e.tunnels) == 0 && e.dials == 0 && p.keys[key] == e {
		delete(p.keys, key)
	}
}

// release gives a stream's slot back.
func (t *pooled) release() {
	t.p.mu.Lock()
	defer t.p.mu.Unlock()
	if t.streams--; t.streams == 0 && !t.finished {
		t.startIdle()
	}
}

// startIdle starts the clock of a tunnel without streams. Pool.mu is held.
func (t *pooled) startIdle() {
	if t.streams > 0 {
		return
	}
	t.idle = time.AfterFunc(t.p.cfg.IdleTimeout, func() {
		t.p.mu.Lock()
		go_ := t.streams == 0 && !t.finished
		t.leaving = t.leaving || go_
		t.p.mu.Unlock()
		if go_ {
			t.t.drain()
		}
	})
}

func (t *pooled) incoming(in *Incoming) { in.Reject(501, "this side takes no streams") }

func (t *pooled) limit(n int) {
	t.p.mu.Lock()
	t.max = min(n, t.p.cfg.MaxStreamsPerTunnel)
	t.p.mu.Unlock()
}

func (t *pooled) draining() {
	t.p.mu.Lock()
	t.leaving = true
	t.p.mu.Unlock()
}

func (t *pooled) ended(err error) {
	p := t.p
	p.mu.Lock()
	defer p.mu.Unlock()
	t.finished, t.leaving = true, true
	if t.idle != nil {
		t.idle.Stop()
	}
	if e := p.keys[t.key]; e != nil {
		for i, o := range e.tunnels {
			if o == t {
				e.tunnels = append(e.tunnels[:i:i], e.tunnels[i+1:]...)
				break
			}
		}
		p.forgetEmpty(t.key, e)
	}
	if _, ok := p.live[t]; ok {
		delete(p.live, t)
		if len(p.live) == 0 {
			close(p.empty)
			p.empty = make(chan struct{})
		}
	}
	if err != nil {
		p.cfg.Log.Debug("tunnel lost", zap.Stringer("peer", t.key.Addr), zap.Error(err))
	}
}

// Tunnels says how many tunnels stand.
func (p *Pool) Tunnels() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.live)
}

// Drain refuses new streams, sends GOAWAY on all tunnels and waits until their streams have ended or ctx has.
func (p *Pool) Drain(ctx context.Context) error {
	p.mu.Lock()
	p.closed = true
	n, empty := len(p.live), p.empty
	ts := p.tunnels()
	p.mu.Unlock()
	for _, t := range ts {
		t.t.drain()
	}
	if n == 0 {
		return nil
	}
	select {
	case <-empty:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("drain tunnels: %w", ctx.Err())
	}
}

// Close cuts all tunnels and their streams.
func (p *Pool) Close() {
	p.mu.Lock()
	p.closed = true
	ts := p.tunnels()
	p.mu.Unlock()
	for _, t := range ts {
		t.t.close(ErrClosed)
	}
}

// tunnels marks all as leaving and lists them. Pool.mu is held.
func (p *Pool) tunnels() []*pooled {
	ts := make([]*pooled, 0, len(p.live))
	for t := range p.live {
		t.leaving = true
		ts = append(ts, t)
	}
	return ts
}
