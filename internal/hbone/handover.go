package hbone

// A tunnel's way to another process, in steps:
//  1. Handover asks the driver to freeze a tunnel: it stands still, with all that it is in a value and descriptors.
//  2. The owner gives both to the other process, which prepares it there: Adopt.
//  3. When the other process has taken it, this one forgets it; else the tunnel goes on here.
//  4. There it goes on by Adopted.Start.
// Next: internal/hbone/handover_loop.go, the driver's part; ztunnel/handover.go, who uses it.

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"golang.org/x/net/http2/hpack"

	"github.com/fairlead-mesh/fairlead/internal/hbone/machine"
	"github.com/fairlead-mesh/fairlead/internal/relay"
	"github.com/fairlead-mesh/fairlead/internal/tlsrecord"
)

// freezePatience is how long a tunnel may take until all its streams stand between two sockets.
const freezePatience = 300 * time.Millisecond

// TunnelState is a tunnel as a value. Its descriptors go beside it: the tunnel's, then that of each relayed stream's
// application, in the order of Streams. It holds the tunnel's secrets.
type TunnelState struct {
	TLS     tlsrecord.State
	HTTP2   machine.State
	Peer    [][]byte      // the peer's certificates, as they came
	Partial []byte        `json:",omitempty"` // received of a record that is not whole
	Unsent  []byte        `json:",omitempty"` // records that the socket did not take yet
	Streams []StreamState `json:",omitempty"` // as HTTP2.Streams
}

// StreamState is one stream: relayed, with an application's socket, or a CONNECT that nobody has looked at yet.
type StreamState struct {
	Relayed        bool   `json:",omitempty"`
	Sent, Received int64  // application bytes
	Queue          []byte `json:",omitempty"` // received and not yet passed on
	PeerEnd        bool   `json:",omitempty"` // the peer has ended its direction
	PeerEndPassed  bool   `json:",omitempty"` // and the application was told
	AppEnd         bool   `json:",omitempty"` // the application has ended its direction, and the peer was told
	Status         int    `json:",omitempty"`

	Authority string              `json:",omitempty"`
	Header    []hpack.HeaderField `json:",omitempty"`
}

// Frozen is a tunnel that stands still until the owner says that it has Moved, or that it is to Resume.
type Frozen struct {
	State   TunnelState
	Streams []*Stream // as State.Streams; nil for a CONNECT that nobody has looked at
	Files   []int     // descriptors, still the tunnel's

	moved, resume func()
}

// errBusy says that a tunnel has streams that cannot be given away now.
var errBusy = errors.New("streams are being set up")

// errFixed says that a tunnel's driver keeps its state where it cannot be taken from.
var errFixed = errors.New("this driver's tunnels cannot be handed over")

// movable is a tunnel that can be frozen.
type movable interface {
	// freeze waits until the tunnel can stand still, or ctx ends.
	freeze(ctx context.Context) (*Frozen, error)
}

// adopter is a driver that takes tunnels of other processes.
type adopter interface {
	adopt(st *TunnelState, files []int, tc tunnelConfig) (*Adopted, error)
}

// give freezes t and lets the owner give it away.
func give(ctx context.Context, t tunnel, to func(*Frozen) bool) error {
	m, ok := t.(movable)
	if !ok {
		return errFixed
	}
	patience, cancel := context.WithTimeout(ctx, freezePatience)
	defer cancel()
	f, err := m.freeze(patience)
	if err != nil {
		return err
	}
	defer f.State.TLS.Clear()
	if to(f) {
		f.moved()
	} else {
		f.resume()
	}
	return nil
}

// Handover calls to for each tunnel that can be frozen now; to says whether another process has taken it. The others
// go on here. It returns early when ctx ends.
func (p *Pool) Handover(ctx context.Context, to func(Key, *Frozen) bool) {
	p.mu.Lock()
	all := make([]*pooled, 0, len(p.live))
	for t := range p.live {
		all = append(all, t)
	}
	p.mu.Unlock()
	for _, t := range all {
		if ctx.Err() != nil {
			return
		}
		t.give(true)
		_ = give(ctx, t.t, func(f *Frozen) bool { return to(t.key, f) }) // one that cannot go now stays
		t.give(false)
	}
}

// give keeps new streams off a tunnel that may be gone at any moment.
func (t *pooled) give(now bool) {
	t.p.mu.Lock()
	t.giving = now
	t.p.mu.Unlock()
}

// Handover is Pool.Handover of a server's tunnels.
func (s *Server) Handover(ctx context.Context, to func(*Frozen) bool) {
	s.mu.Lock()
	all := make([]tunnel, 0, len(s.tunnels))
	for sv := range s.tunnels {
		all = append(all, sv.t)
	}
	s.mu.Unlock()
	for _, t := range all {
		if ctx.Err() != nil {
			return
		}
		_ = give(ctx, t, to) // one that cannot go now stays
	}
}

// Adopted is a tunnel that another process offers, ready to go on here. One of Start and Discard must be called.
type Adopted struct {
	Streams []*Stream // as TunnelState.Streams; nil for a CONNECT that nobody has looked at

	t       tunnel
	remote  net.Addr
	enlist  func(begin func()) // calls begin, which must not block, and makes the tunnel its pool's or server's
	start   func(done func(i int, r relay.Result))
	discard func()
}

// Start lets the tunnel go on; done is told the end of each relayed stream, as the done of Stream.Relay is. The tunnel is
// begun on its loop before others can find it: what they post there comes after it.
func (a *Adopted) Start(done func(i int, r relay.Result)) {
	a.enlist(func() { a.start(done) })
}

// Discard closes this process's descriptors of the tunnel, which the other process keeps.
func (a *Adopted) Discard() { a.discard() }

// Adopt prepares a client's tunnel. files are the pool's from now on unless there is an error.
func (p *Pool) Adopt(key Key, st *TunnelState, files []int) (*Adopted, error) {
	d, ok := p.cfg.Driver.(adopter)
	if !ok {
		return nil, errFixed
	}
	t := &pooled{p: p, key: key, used: true, max: min(st.HTTP2.PeerStreams, p.cfg.MaxStreamsPerTunnel),
		leaving: st.HTTP2.SentGoAway || st.HTTP2.GotGoAway}
	a, err := d.adopt(st, files, tunnelConfig{events: t, buffers: key.Buffers, ping: p.cfg.PingInterval, pingWait: p.cfg.PingTimeout})
	if err != nil {
		return nil, fmt.Errorf("adopt tunnel to %s: %w", key.Addr, err)
	}
	for i, s := range a.Streams {
		if s != nil && !st.HTTP2.Streams[i].Gone {
			t.streams++
			s.onEnd = t.release
		}
	}
	a.enlist = func(begin func()) {
		p.mu.Lock()
		defer p.mu.Unlock()
		t.t = a.t
		begin() // before anything can be asked of the tunnel
		e := p.keys[key]
		if e == nil {
			e = &peer{}
			p.keys[key] = e
		}
		e.tunnels = append(e.tunnels, t)
		p.live[t] = struct{}{}
		t.startIdle()
	}
	return a, nil
}

// Adopt prepares a server's tunnel, which ctx ending cuts. files are the server's from now on unless there is an error.
func (s *Server) Adopt(ctx context.Context, st *TunnelState, files []int) (*Adopted, error) {
	d, ok := s.cfg.Driver.(adopter)
	if !ok {
		return nil, errFixed
	}
	sv := &served{s: s}
	a, err := d.adopt(st, files, tunnelConfig{server: true, maxStreams: s.cfg.MaxStreams, events: sv,
		buffers: s.cfg.Buffers, ping: s.cfg.PingInterval, pingWait: s.cfg.PingTimeout, idle: s.cfg.IdleTimeout})
	if err != nil {
		return nil, fmt.Errorf("adopt tunnel: %w", err)
	}
	sv.peer = addrPort(a.remote).Addr()
	a.enlist = func(begin func()) {
		s.mu.Lock()
		defer s.mu.Unlock()
		sv.t = a.t
		begin() // before anything is asked of the tunnel
		s.admitted.all++
		s.admitted.byPeer[sv.peer]++
		s.tunnels[sv] = struct{}{}
		sv.stop = context.AfterFunc(ctx, func() { a.t.close(context.Cause(ctx)) })
		if s.draining {
			a.t.drain()
		}
	}
	return a, nil
}

// tlsState is what is known of the handshake that another process made.
func (st *TunnelState) tlsState() (*tls.ConnectionState, error) {
	state := &tls.ConnectionState{Version: tls.VersionTLS13, HandshakeComplete: true, CipherSuite: st.TLS.Suite, NegotiatedProtocol: "h2"}
	for _, der := range st.Peer {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("peer certificate: %w", err)
		}
		state.PeerCertificates = append(state.PeerCertificates, c)
	}
	return state, nil
}

// maxPartial is the most that can have been read of records that are not opened, in bytes.
const maxPartial = 64 << 10

// check refuses what no Frozen can hold.
func (st *TunnelState) check(files int, server bool) error {
	if st.HTTP2.Config.Server != server {
		return errors.New("it is the other end of a tunnel")
	}
	if len(st.Streams) != len(st.HTTP2.Streams) || len(st.Partial) > maxPartial || len(st.Unsent) > maxUnsent {
		return errors.New("out of bounds")
	}
	sockets := 1
	for i, s := range st.Streams {
		if s.Relayed {
			sockets++
		} else if !server || st.HTTP2.Streams[i].Gone || st.HTTP2.Streams[i].Answered {
			return errors.New("a stream without a socket that does not wait for an answer")
		}
	}
	if sockets != files {
		return fmt.Errorf("%d descriptors, want %d", files, sockets)
	}
	return nil
}

// maxUnsent bounds the records that a socket did not take, in bytes.
const maxUnsent = 4 << 20

func rawCertificates(state *tls.ConnectionState) (raw [][]byte) {
	for _, c := range state.PeerCertificates {
		raw = append(raw, slices.Clone(c.Raw))
	}
	return raw
}
