package hbone

// The way in, in steps:
//  1. Serve accepts a TCP connection, ServeConn does the TLS handshake with the configuration for this hello.
//  2. The tunnel's driver parses a CONNECT and gives it to Handle, in a goroutine of its own.
//  3. Handle decides, connects, and calls Accept (a Stream, usually followed by Relay) or Reject.
// Next: ztunnel/inbound.go or waypoint/serve.go, which are the Handle.

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/net/http2/hpack"
)

// ServerConfig is what a Server needs.
type ServerConfig struct {
	// TLS gives the configuration for one connection: certificate, required client certificate and its check, TLS 1.3,
	// ALPN h2. hello.Conn has the addresses, hello.SupportedProtos what is offered. An error ends the handshake.
	TLS func(ctx context.Context, hello *tls.ClientHelloInfo) (*tls.Config, error)
	// Handle is called for each CONNECT in a goroutine of its own. It may block for policy and dial, and must call
	// Accept or Reject once; when it returns without, the stream is rejected with 500.
	Handle func(*Incoming)
	// Begin is called instead of Handle when set: with the loop driver on the event loop itself, so that it must not
	// block. What takes longer it returns as a function, which then runs in a goroutine as Handle does; nil when it has
	// called Accept or Reject.
	Begin            func(*Incoming) (rest func())
	Driver           Driver        // nil = Goroutines()
	Log              *zap.Logger   // nil = no log
	MaxStreams       int           // streams a peer may have open on one tunnel; 0 = 1000
	MaxTunnels       int           // from all peers, those in their handshake included; 0 = no limit
	MaxPeerTunnels   int           // the same, from one address; 0 = no limit
	Buffers          *Buffers      // what the tunnels may be sent ahead of their applications; nil = 16 MiB each
	Limited          func(Limit)   // told when a limit is hit; must not block. May be nil
	HandshakeTimeout time.Duration // 0 = 10 s
	PingInterval     time.Duration // 0 = 30 s; <0 = never. As in PoolConfig
	PingTimeout      time.Duration // 0 = 20 s
	IdleTimeout      time.Duration // 0 = 15 min; a tunnel without streams is closed after it. <0 = never
}

// Server accepts tunnels. Make it with NewServer.
type Server struct {
	cfg ServerConfig

	mu       sync.Mutex
	tunnels  map[*served]struct{}
	admitted admission
	draining bool
	empty    chan struct{} // closed and replaced whenever the last admitted connection leaves
}

// served is one tunnel of a server.
type served struct {
	s        *Server
	t        tunnel
	peer     netip.Addr
	gone     bool         // guarded by Server.mu
	handlers atomic.Int64 // that run now
	stop     func() bool
}

// NewServer makes a server; Serve or ServeConn starts it.
func NewServer(cfg ServerConfig) *Server {
	if cfg.Driver == nil {
		cfg.Driver = Goroutines()
	}
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	cfg.MaxStreams = orDefault(cfg.MaxStreams, 1000)
	cfg.HandshakeTimeout = orDefault(cfg.HandshakeTimeout, 10*time.Second)
	cfg.PingInterval = orDefault(cfg.PingInterval, 30*time.Second)
	cfg.PingTimeout = orDefault(cfg.PingTimeout, 20*time.Second)
	cfg.IdleTimeout = orDefault(cfg.IdleTimeout, 15*time.Minute)
	return &Server{cfg: cfg, tunnels: map[*served]struct{}{}, empty: make(chan struct{}),
		admitted: admission{byPeer: map[netip.Addr]int{}}}
}

// Serve accepts connections from ln until ctx ends or ln is closed. Tunnels live on after Serve has returned unless ctx
// ended, which cuts them; use Drain first for a gentle end. A closed listener gives a nil error.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	for {
		nc, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			var temporary interface{ Temporary() bool }
			if errors.As(err, &temporary) && temporary.Temporary() { // out of descriptors: others must end first
				s.cfg.Log.Warn("accept tunnel", zap.Error(err))
				time.Sleep(50 * time.Millisecond)
				continue
			}
			return fmt.Errorf("accept tunnel: %w", err)
		}
		go func() {
			if err := s.ServeConn(ctx, nc); err != nil {
				s.cfg.Log.Debug("tunnel refused", zap.Stringer("peer", nc.RemoteAddr()), zap.Error(err))
			}
		}()
	}
}

// ServeConn does the TLS handshake on nc and gives it to the driver; it returns when that is done, while the tunnel lives
// on. nc is owned by the server in any case. A failed handshake is a *TLSError. ctx ending cuts the tunnel.
func (s *Server) ServeConn(ctx context.Context, nc net.Conn) error {
	s.mu.Lock()
	draining := s.draining
	s.mu.Unlock()
	if draining {
		nc.Close()
		return ErrClosed
	}
	peer, ok := s.admit(nc)
	if !ok {
		nc.Close()
		return errTooMany
	}
	boundUnread(nc, s.cfg.PingInterval, s.cfg.PingTimeout)
	hctx, cancel := context.WithTimeout(ctx, s.cfg.HandshakeTimeout)
	defer cancel()
	sv := &served{s: s, peer: peer}
	t, err := s.cfg.Driver.start(hctx, nc, s.tlsConfig(), tunnelConfig{server: true, maxStreams: s.cfg.MaxStreams,
		events: sv, buffers: s.cfg.Buffers, ping: s.cfg.PingInterval, pingWait: s.cfg.PingTimeout, idle: s.cfg.IdleTimeout})
	if err != nil {
		s.mu.Lock()
		s.leave(peer)
		s.mu.Unlock()
		return err
	}
	s.mu.Lock()
	sv.t = t
	draining = s.draining
	if !sv.gone {
		s.tunnels[sv] = struct{}{}
		sv.stop = context.AfterFunc(ctx, func() { t.close(context.Cause(ctx)) })
	}
	s.mu.Unlock()
	if draining {
		t.drain()
	}
	return nil
}

// tlsConfig asks ServerConfig.TLS for each hello.
func (s *Server) tlsConfig() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2"},
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			return s.cfg.TLS(hello.Context(), hello)
		},
	}
}

// incoming runs Handle. A peer that resets streams faster than their handlers notice is refused beyond twice its limit.
func (sv *served) incoming(in *Incoming) {
	if sv.handlers.Add(1) > 2*int64(sv.s.cfg.MaxStreams) {
		sv.handlers.Add(-1)
		sv.s.limited(LimitStreams)
		go in.Reject(503, "too many streams") // not at once: the driver is in the middle of its input
		return
	}
	handle := func() { sv.s.cfg.Handle(in) }
	if begin := sv.s.cfg.Begin; begin != nil {
		if !in.onLoop {
			handle = func() {
				if rest := begin(in); rest != nil {
					rest()
				}
			}
		} else if handle = begin(in); handle == nil {
			in.finish()
			sv.handlers.Add(-1)
			return
		}
	}
	go func() {
		defer sv.handlers.Add(-1)
		defer in.finish()
		handle()
	}()
}

func (sv *served) limit(int) {}
func (sv *served) draining() {}

func (sv *served) ended(err error) {
	s := sv.s
	s.mu.Lock()
	defer s.mu.Unlock()
	sv.gone = true
	delete(s.tunnels, sv)
	s.leave(sv.peer)
	if sv.stop != nil {
		sv.stop()
	}
	if err != nil {
		s.cfg.Log.Debug("tunnel lost", zap.Error(err))
	}
}

// leave takes a connection of a peer out again, and tells Drain of the last. s.mu is held.
func (s *Server) leave(peer netip.Addr) {
	s.admitted.leave(peer)
	if s.admitted.all == 0 {
		close(s.empty)
		s.empty = make(chan struct{})
	}
}

// Drain refuses new tunnels, sends GOAWAY on the others, also those whose handshake is under way, and waits until their
// streams have ended or ctx has.
func (s *Server) Drain(ctx context.Context) error {
	s.mu.Lock()
	s.draining = true
	empty, n := s.empty, s.admitted.all
	ts := make([]tunnel, 0, len(s.tunnels))
	for sv := range s.tunnels {
		ts = append(ts, sv.t)
	}
	s.mu.Unlock()
	for _, t := range ts {
		t.drain()
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

// Close cuts all tunnels. Listeners given to Serve stay the caller's.
func (s *Server) Close() {
	s.mu.Lock()
	s.draining = true
	ts := make([]tunnel, 0, len(s.tunnels))
	for sv := range s.tunnels {
		ts = append(ts, sv.t)
	}
	s.mu.Unlock()
	for _, t := range ts {
		t.close(ErrClosed)
	}
}

// Incoming is a CONNECT that waits for a decision.
type Incoming struct {
	Request
	Peer                  *tls.ConnectionState // of the tunnel: the peer's verified certificates. Must not be changed
	RemoteAddr, LocalAddr netip.AddrPort       // of the tunnel's TCP connection

	s      *Stream
	onLoop bool            // the caller of events.incoming holds no lock
	ctx    context.Context // made when asked for; guarded by s.mu, as cancel
	cancel context.CancelFunc
	answer func(s *Stream, status int, h []hpack.HeaderField, end bool) error // by the driver
	once   sync.Once
}

// Context ends when the peer gives the stream up, the tunnel is lost, or Handle returns: bound the dial with it.
func (in *Incoming) Context() context.Context {
	in.s.mu.Lock()
	defer in.s.mu.Unlock()
	if in.ctx == nil {
		in.ctx, in.cancel = context.WithCancel(context.Background())
		if in.s.cancel = in.cancel; in.s.over {
			in.cancel()
		}
	}
	return in.ctx
}

// Accept answers 200 and returns the stream. It fails when the peer has given up meanwhile.
func (in *Incoming) Accept() (*Stream, error) {
	err := error(ErrClosed)
	in.once.Do(func() { err = in.answer(in.s, 200, nil, false) })
	if err != nil {
		return nil, fmt.Errorf("accept stream: %w", err)
	}
	return in.s, nil
}

// Reject answers with status (401 denied, 503 cannot connect) and ends the stream. reason is for people and is carried
// in the proxy-status header of RFC 9209; it may be empty.
func (in *Incoming) Reject(status int, reason string) {
	in.once.Do(func() {
		var h []hpack.HeaderField
		if reason != "" {
			h = append(h, hpack.HeaderField{Name: "proxy-status", Value: `fairlead; details="` + quoted(reason) + `"`})
		}
		_ = in.answer(in.s, status, h, true) // the peer may be gone; then there is no one to tell
	})
}

// finish runs after Handle.
func (in *Incoming) finish() {
	in.Reject(500, "")
	in.s.mu.Lock()
	cancel := in.cancel
	in.s.mu.Unlock()
	if cancel != nil {
		cancel()
	}
}

// quoted makes s fit for a quoted string of RFC 8941: printable ASCII, with \ and " escaped.
func quoted(s string) string {
	var b strings.Builder
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r < 0x20 || r > 0x7e:
			b.WriteByte('?')
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}

// reasonOf reads what Reject wrote.
func reasonOf(h []hpack.HeaderField) string {
	_, v, ok := strings.Cut(headerValue(h, "proxy-status"), `details="`)
	if !ok {
		return ""
	}
	var b strings.Builder
	for i := 0; i < len(v) && v[i] != '"'; i++ {
		if v[i] == '\\' && i+1 < len(v) {
			i++
		}
		b.WriteByte(v[i])
	}
	return b.String()
}
