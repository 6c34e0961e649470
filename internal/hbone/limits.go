package hbone

import (
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Limit names what a peer or an owner of tunnels has used up.
type Limit string

const (
	LimitTunnels       Limit = "tunnels"        // of one Server, from all peers
	LimitPeerTunnels   Limit = "peer_tunnels"   // of one Server, from one address
	LimitStreams       Limit = "streams"        // handlers of one tunnel: its peer resets streams faster than they end
	LimitBufferedBytes Limit = "buffered_bytes" // Buffers
)

const (
	// leastWindow is the connection window that a tunnel with Buffers begins with, in bytes.
	leastWindow = 256 << 10
	// growAfter is how much a tunnel receives before its window is enlarged, and before that is tried again, in bytes.
	growAfter = 64 << 10
)

// Buffers bounds what several tunnels may be sent before their applications have taken it. Every tunnel may always be
// sent 256 KiB; one that carries much gets a window of 16 MiB while there is room for it here.
type Buffers struct {
	left    atomic.Int64
	limited func(Limit)
}

// NewBuffers makes room for n bytes. limited is told when a tunnel wants more than is left; it must not block and may be
// nil.
func NewBuffers(n int64, limited func(Limit)) *Buffers {
	b := &Buffers{limited: limited}
	b.left.Store(n)
	return b
}

func (b *Buffers) take(n int64) bool {
	if b.left.Add(-n) >= 0 {
		return true
	}
	b.left.Add(n)
	if b.limited != nil {
		b.limited(LimitBufferedBytes)
	}
	return false
}

// window is one tunnel's share of a Buffers. The tunnel's driver owns it.
type window struct {
	from     *Buffers // nil: the tunnel began with all it may have
	received int
	taken    int64
}

func newWindow(tc *tunnelConfig) window { return window{from: tc.buffers} }

// firstWindow is the connection window to begin with.
func (tc *tunnelConfig) firstWindow() int {
	if tc.buffers != nil {
		return leastWindow
	}
	return connWindow
}

// got counts n bytes from the peer and returns by how much its window may grow now.
func (w *window) got(n int) (more int) {
	if w.from == nil || w.taken > 0 {
		return 0
	}
	if w.received += n; w.received < growAfter {
		return 0
	}
	w.received = 0
	if !w.from.take(connWindow - leastWindow) {
		return 0
	}
	w.taken = connWindow - leastWindow
	return connWindow - leastWindow
}

// close gives back what was taken.
func (w *window) close() {
	if w.from != nil {
		w.from.left.Add(w.taken)
		w.from, w.taken = nil, 0
	}
}

// boundUnread makes the kernel give a connection up whose peer has not taken what was sent to it for as long as PING
// would wait (TCP_USER_TIMEOUT of tcp(7)): one that is gone, or that does not read. Of the latter the kernel finds only
// those that are quiet; liveness finds the others.
func boundUnread(nc net.Conn, ping, wait time.Duration) {
	tcp, ok := nc.(*net.TCPConn)
	if !ok || ping < 0 {
		return
	}
	if raw, err := tcp.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { // a socket without the option ends by PING alone
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int((ping+wait)/time.Millisecond))
		})
	}
}

// admission counts a server's tunnels by the peer's address, from before their handshake on. Server.mu guards it.
type admission struct {
	all    int
	byPeer map[netip.Addr]int
}

// admit counts one more connection of a peer, unless that is one too many.
func (s *Server) admit(nc net.Conn) (peer netip.Addr, ok bool) {
	peer = addrPort(nc.RemoteAddr()).Addr()
	s.mu.Lock()
	a := &s.admitted
	limit := Limit("")
	switch {
	case s.cfg.MaxTunnels > 0 && a.all >= s.cfg.MaxTunnels:
		limit = LimitTunnels
	case s.cfg.MaxPeerTunnels > 0 && a.byPeer[peer] >= s.cfg.MaxPeerTunnels:
		limit = LimitPeerTunnels
	default:
		a.all++
		a.byPeer[peer]++
	}
	s.mu.Unlock()
	if limit != "" {
		s.limited(limit)
		return peer, false
	}
	return peer, true
}

// leave takes one connection of a peer out again. Server.mu is held.
func (a *admission) leave(peer netip.Addr) {
	a.all--
	if a.byPeer[peer]--; a.byPeer[peer] <= 0 {
		delete(a.byPeer, peer)
	}
}

func (s *Server) limited(l Limit) {
	if s.cfg.Limited != nil {
		s.cfg.Limited(l)
	}
}
